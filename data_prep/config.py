"""The configuration of a preparation: which sources there are, which steps their documents go through, and where that runs."""

import os
import re
import unicodedata
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from data_prep.row import SourceFacts
from data_prep.steps.chat import Dialogue
from data_prep.steps.code import CodeQuality
from data_prep.steps.decontaminate import Decontaminate
from data_prep.steps.duplicates import ExactDuplicates, RepeatedLines
from data_prep.steps.english import EnglishQuality
from data_prep.steps.extract import Extract
from data_prep.steps.japanese import JapaneseQuality
from data_prep.steps.language import Language
from data_prep.steps.near_duplicates import NearDuplicates
from data_prep.steps.normalise import Normalise
from data_prep.steps.pii import Pii
from data_prep.steps.url import Url
from mujina.user_input import Name, Section
from tokenization.tokenizer import BeginDocuments

AnyStep = Annotated[
    Extract
    | Url
    | Language
    | Normalise
    | JapaneseQuality
    | EnglishQuality
    | CodeQuality
    | Dialogue
    | Pii
    | Decontaminate
    | ExactDuplicates
    | RepeatedLines
    | NearDuplicates,
    Field(discriminator="step"),
]


class SourceConfig(SourceFacts):
    """One source: the files it comes from, what phases may know of it, and the steps that its documents go through."""

    documents: list[str] = Field(min_length=1)
    """Paths, patterns or folders of .jsonl[.gz|.zst], .parquet, .warc[.gz], .wet[.gz], .html and .txt files, or `datasets:NAME[:SPLIT]`,
    in order.
    """
    steps: list[AnyStep] = []
    """What the documents go through, in order; none: they are tokenized as they are."""
    damaged: Literal["stop", "skip"] = "stop"
    """What a damaged file or row does: stop the run, or be passed over and reported."""
    tasks: int | None = Field(default=None, gt=0, le=100_000)
    """Tasks that share the files, for steps; more than files make no sense. Null: one for each gigabyte, and at least 16."""
    answer_weights: bool = False
    """Of kind chat: beside the tokens lies the channel `weights`, uint8, 1 for each token that the assistant has to say, its end of turn
    and the end of the document included, and 0 for all others. Phases of `loss.kind: answers` train on them. A dialogue without an answer
    is then damaged, and so is one that the chat template changes, see `template_may_change`.
    """
    template_may_change: bool = False
    """With `answer_weights`, or of kind preferences: the chat template may add to a dialogue what no turn says, such as a default system
    prompt or an empty think block, and leave out what one says.
    """

    @property
    def marks_answers(self) -> bool:
        return self.answer_weights or self.kind == "preferences"

    @pydantic.model_validator(mode="after")
    def _has_answers(self) -> "SourceConfig":
        if self.answer_weights and self.kind not in ("chat", "preferences"):
            raise ValueError(f"answer_weights (true) needs kind chat, not {self.kind}, which has no answers: remove it")
        return self


class SlurmConfig(Section):
    """What a site's Slurm asks for."""

    partition: str
    """Partition of the jobs."""
    qos: str | None = None
    """Quality of service; null: the partition's."""
    time: str = "24:00:00"
    """Limit of each job as Slurm writes it: HH:MM:SS, D-HH:MM:SS, MM:SS, UNLIMITED."""
    memory_gb: int = Field(default=4, gt=0)
    """GB of memory of a task."""
    tokenizer_cpus: int = Field(default=16, gt=0)
    """Cores of one node that tokenize a source; every other task has one core."""
    max_array_size: int = Field(default=1001, gt=0)
    """The site's MaxArraySize."""
    sbatch: dict[str, str] = {}
    """Further options of sbatch, by their long names."""

    @pydantic.field_validator("time")
    @classmethod
    def _is_time(cls, time: str) -> str:
        if not re.fullmatch(r"[0-9]+(:[0-5]?[0-9]){0,2}|[0-9]+-[0-9]+(:[0-5]?[0-9]){0,2}|UNLIMITED|INFINITE", time, re.IGNORECASE):
            raise ValueError("is no limit of time that Slurm knows: write it as HH:MM:SS or D-HH:MM:SS")
        return time


class PrepareConfig(Section):
    """Sources, the folder to write to, the tokenizer, and where to run."""

    sources: dict[Name, SourceConfig] = Field(min_length=1)
    """Sources by name; the names are those of the binaries, and phases use them. They differ in more than capitals."""
    output: str = Field(min_length=1)
    """The folder to write to."""
    tokenizer: str | None = None
    """The tokenizer's folder; null: documents are prepared and not tokenized."""
    end_of_document: str | None = None
    """The piece that ends every document; null: the tokenizer's `eos_token`. Runs on the binaries say the same."""
    begin_documents: BeginDocuments = "auto"
    """Whether the tokenizer's `bos_token` begins every document; auto: as transformers does it, a text where tokenizer.json adds it, a
    dialogue where the chat template writes it. Runs on the binaries say the same.
    """
    processes: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), gt=0, le=4096)
    """Processes on this machine, one for each core unless given; no result depends on it."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """Where the steps run."""
    slurm: SlurmConfig | None = None
    """What `executor: slurm` asks for."""

    @pydantic.model_validator(mode="after")
    def _whole(self) -> "PrepareConfig":
        if self.executor == "slurm" and self.slurm is None:
            raise ValueError("executor slurm needs a section slurm: write at least slurm: {partition: NAME}")
        if self.tokenizer is None and not all(source.steps for source in self.sources.values()):
            raise ValueError("tokenizer is missing, and a source without steps has nothing else to be done: add it")
        names = dict[str, str]()
        for name in self.sources:
            if (other := names.setdefault(_on_disk(name), name)) != name:
                raise ValueError(
                    f"sources {other} and {name} ({ascii(other)}, {ascii(name)}) differ only in capitals or in how Unicode writes a letter "
                    "and have one folder on some disks: give one of them another name"
                )
        for name, source in self.sources.items():
            files = {f"{name}.{end}": f"{name}.{end}" for end in ("bin", "idx", "json")}
            if source.marks_answers:
                files |= dict.fromkeys((f"{name}.weights", f"{name}.weights.bin"), f"{name}.weights.bin")
            for file, written in files.items():
                if twin := names.get(_on_disk(file)):
                    raise ValueError(f"sources {name} and {twin} would both write {written}: give one of them another name")
        return self


def _on_disk(name: str) -> str:
    """What two names have in common that are one to a disk that does not tell capitals or normal forms apart."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
