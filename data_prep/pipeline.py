"""A source's documents through its steps, as datatrove pipelines: ranks that share the input files, a completion marker for each.

    <output>/<source>/documents/     what is left, RANK.jsonl.zst, there only when all ranks have ended
    <output>/<source>/removed/STEP/  what each step dropped, RANK.jsonl.zst, with `reason`
    <output>/<source>/problems/      damaged files and rows that were passed over, RANK.txt
    <output>/<source>/stages/        datatrove's completion markers, statistics and logs; what each rank has read and written
    <output>/<source>/report.html

A step that must see the whole source (`CorpusStep`) cuts the pipeline: one stage ends with its marks, the next begins with its judgement.
A run that was killed goes on with the ranks that have no marker. What a rank writes depends on its files and steps alone. So a rank that
has ended counts as long as there is what it has read (else nothing is mixed: UserError) and what it has written (else it runs again).
"""

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers import JsonlWriter

from data_prep.config import SourceConfig
from data_prep.report import SourceReport, StepCounts
from data_prep.row import LONGEST_OF_OURS, is_nothing, joined
from data_prep.steps.read import files_of, find_inputs, read
from data_prep.steps.step import CorpusStep, Judge, Step
from mujina.disks import discard, rename, sync
from mujina.files import Stamp, changed, read_rows, rename_folder, sha256_of, stamp, write_stamps, write_whole
from mujina.user_input import UserError, reading

GIGABYTE = 1 << 30
FEWEST_TASKS = 16
ROWS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@dataclass(frozen=True)
class Stage:
    """Tasks that may run side by side: `pipeline` is run for each of `tasks` ranks."""

    name: str
    tasks: int
    pipeline: list[PipelineStep | Callable[..., Any]]


def is_needed(source: SourceConfig) -> bool:
    """Whether documents must be read, cleaned and written before they can be tokenized."""
    of_rows = all(path.startswith("datasets:") or path.endswith(ROWS) for path in source.documents)
    return bool(source.steps) or source.damaged == "skip" or not of_rows


def stages(name: str, source: SourceConfig, folder: Path) -> list[Stage]:
    """What is to be run for a source, in order; `folder` is the source's own.

    Raises UserError when the folder holds the documents of other steps or other input files, or something else.
    """
    files = find_inputs(source.documents)
    num_bytes = sum(os.path.getsize(path) for path in files if not path.startswith("datasets:"))
    tasks = source.tasks or min(len(files), max(FEWEST_TASKS, math.ceil(num_bytes / GIGABYTE)))
    _check_continues(source, files, tasks, folder)
    records = folder / "stages"
    pipeline: list[Any] = [Read(files, source.labels(name), source.damaged, folder / "problems", records / "read")]
    result: list[Stage] = []
    for label, step in _labelled(source):
        removed = folder / "removed" / label
        if isinstance(step, CorpusStep):
            work, mark = folder / "work" / label, f"{label}-mark"
            result.append(Stage(mark, tasks, [*pipeline, Mark(step, work), Rows(work / "documents", records / mark / "written")]))
            for number, (parts, find) in enumerate(step.find(work, tasks), start=1):
                result.append(Stage(f"{label}-find-{number}", parts, [Task(find)]))
            pipeline = [ReadBack(work / "documents"), Apply(label, partial(step.judge, work), removed)]
        else:
            pipeline.append(Apply(label, partial(_start, step), removed))
    result.append(Stage("documents", tasks, [*pipeline, Rows(folder / ".documents", records / "documents/written")]))
    return result


def take_back(stages: list[Stage], folder: Path) -> list[str]:
    """Lets the ranks run again whose documents are gone or are not what they wrote; the paths of those documents.

    Where what a source kept between its stages has been removed since, all ranks of the stages before run again, too.
    """
    documents, work, last = folder / "documents", folder / "work", stages[-1]
    is_finished = documents.exists()
    lost = list[str]()
    for stage in stages[-1:] if is_finished else stages:
        rows = stage.pipeline[-1]
        if isinstance(rows, Rows) and rows.record is not None:
            where = documents if is_finished else rows.folder
            for marker in sorted(_completions(folder, stage).glob("*")):
                record = rows.record / f"{marker.name}.json"
                if record.exists() and (names := changed(record, where)):
                    marker.unlink(missing_ok=True)
                    lost += [str(where / name) for name in names]
    if len(list(_completions(folder, last).glob("*"))) < last.tasks and (is_finished or not work.exists()):
        for stage in stages[:-1]:
            shutil.rmtree(_completions(folder, stage), ignore_errors=True)
        if is_finished:
            rename(documents, folder / ".documents")
    return lost


def _completions(folder: Path, stage: Stage) -> Path:
    return folder / "stages" / stage.name / "completions"


def finish(folder: Path) -> list[str]:
    """Gives the documents of a source their name and removes what was kept between its stages, which have all ended; the files' paths."""
    if (folder / ".documents").exists():
        rename_folder(folder / ".documents", folder / "documents")
    discard(folder / "work")
    return _documents(folder)


def _documents(folder: Path) -> list[str]:
    return [str(path) for path in sorted((folder / "documents").glob("*.jsonl.zst"))]


def report(name: str, source: SourceConfig, folder: Path) -> SourceReport:
    """What each step did, from the statistics that the ranks left."""
    counts = {label: Counter[str]() for label, _ in _labelled(source)}
    seconds: dict[str, float] = dict.fromkeys(counts, 0.0)
    passed = Counter[str]()
    for path in sorted((folder / "stages").glob("*/stats/*.json")):
        with reading(path, "what a rank has counted", f"remove {folder} to start afresh"):
            for entry in json.loads(path.read_bytes()):
                label, stats = entry["name"].removeprefix(f"{Apply.type}: "), entry["stats"]
                if entry["name"] == f"{Read.type}: {Read.name}":
                    passed.update({key.removeprefix("passed_"): _total(of) for key, of in stats.items() if key.startswith("passed_")})
                if label in counts:
                    seconds[label] += _total(entry["time_stats"])
                    counts[label].update({key: _total(value) for key, value in stats.items()})
    steps = [
        StepCounts(
            name=label,
            documents_in=count["documents_in"],
            characters_in=count["characters_in"],
            documents_out=count["documents_out"],
            characters_out=count["characters_out"],
            seconds=seconds[label],
            reasons={key.removeprefix("dropped_"): number for key, number in count.items() if key.startswith("dropped_")},
        )
        for label, count in counts.items()
    ]
    facts = [
        ("kind, origin", f"{source.kind}, {source.origin}"),
        ("language", source.language),
        ("licence", source.licence),
        ("teacher", source.teacher or "none"),
        ("documents", ", ".join(source.documents)),
        *((label, note) for label, step in _labelled(source) if isinstance(step, Step) for note in step.notes()),
    ]
    return SourceReport(
        source=name,
        facts=facts,
        steps=steps,
        kept=[Path(path) for path in _documents(folder)],
        removed={label: sorted((folder / "removed" / label).glob("*.jsonl.zst")) for label in counts},
        problems=[
            *(f"{number:,} × {reason}" for reason, number in passed.most_common()),
            *(line for path in sorted((folder / "problems").glob("*.txt")) for line in path.read_text(encoding="utf-8").splitlines()),
        ],
    )


class Read(PipelineStep):
    """Reads a rank's share of the files; when all is read, their stamps are put down in `record`."""

    type, name = "READER", "read"

    def __init__(self, files: list[str], labels: dict[str, str], damaged: Literal["stop", "skip"], problems: Path, record: Path) -> None:
        super().__init__()
        self.files, self.labels, self.damaged, self.problems, self.record = files, labels, damaged, problems, record

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.problems.mkdir(parents=True, exist_ok=True)
        stamps = dict[str, Stamp]()
        with open(self.problems / f"{rank:05}.txt", "w", encoding="utf-8") as problems:
            write = partial(print, file=problems, flush=True)
            for path in self.files[rank::world_size]:
                stamps |= {file: stamp(file) for file in files_of(path)}
                for document in read(path, self.labels, self.damaged, write, lambda reason: self.stat_update(f"passed_{reason}")):
                    self.stat_update("documents")
                    yield document
        write_stamps(self.record / f"{rank:05}.json", stamps)


class ReadBack(PipelineStep):
    """Reads what this rank wrote at the end of the stage before."""

    type, name = "READER", "read back"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        path = self.folder / f"{rank:05}.jsonl.zst"
        for _, row in read_rows(path, LONGEST_OF_OURS) if path.exists() else ():  # no file: no document came so far
            text = row.pop("text", None)
            if text is None:
                text = joined(row["messages"])
            yield Document(text=text, id=row.pop("id"), metadata=row)


class Mark(PipelineStep):
    """Lets a corpus step mark the documents of a rank on their way."""

    type, name = "MARK", "mark"

    def __init__(self, step: CorpusStep, folder: Path) -> None:
        super().__init__()
        self.step, self.folder = step, folder

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.step.mark(data, self.folder, rank)


class Task:
    """Work on the marks of all ranks, not on documents."""

    def __init__(self, work: Callable[[int], None]) -> None:
        self.work = work

    def __call__(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        self.work(rank)


class Rows(JsonlWriter):
    """Writes a rank's documents as <folder>/RANK.jsonl.zst, and puts down in `record` what the file is when it is whole."""

    def __init__(self, folder: Path, record: Path | None = None) -> None:
        super().__init__(str(folder), compression="zstd")
        self.folder, self.record = folder, record

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        assert self.record is not None
        path = self.folder / f"{rank:05}.jsonl.zst"
        path.unlink(missing_ok=True)  # of a rank that was killed; without documents this one writes no other
        yield from super().run(data, rank, world_size)
        if path.exists():
            sync(path)
        write_stamps(self.record / f"{rank:05}.json", {path.name: stamp(path)} if path.exists() else {})

    def _default_adapter(self, document: Document) -> dict[str, Any]:
        text = {} if "messages" in document.metadata else {"text": document.text}
        return {"id": document.id, **text, **document.metadata}


class Apply(PipelineStep):
    """One step over the documents of a rank; what it drops is written to `removed`, with the reason."""

    type = "STEP"

    def __init__(self, label: str, start: Callable[[int], Judge], removed: Path) -> None:
        self.name = label
        super().__init__()
        self.start, self.removed = start, Rows(removed)

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        judge = self.start(rank)
        with self.removed as removed:
            for document in data:
                self.stat_update("documents_in")
                self.stat_update("characters_in", value=len(document.text))
                with self.track_time():
                    reason = judge(document) or ("empty" if is_nothing(document.text) else None)
                if reason is None:
                    self.stat_update("documents_out")
                    self.stat_update("characters_out", value=len(document.text))
                    yield document
                else:
                    self.stat_update(f"dropped_{reason.partition(':')[0]}")
                    document.metadata["reason"] = reason
                    removed.write(document, rank)


def _total(statistic: Any) -> Any:
    """datatrove writes a number, or a distribution with its total."""
    return statistic["total"] if isinstance(statistic, dict) else statistic


def _labelled(source: SourceConfig) -> list[tuple[str, Any]]:
    return [(f"{number:02}-{step.step}", step) for number, step in enumerate(source.steps, start=1)]


def _start(step: Step, _: int) -> Judge:
    return step.start()


def _check_continues(source: SourceConfig, files: list[str], tasks: int, folder: Path) -> None:
    """Completion markers say that a rank has ended, not with which steps: those stand in pipeline.json."""
    inputs = {path: 0 if path.startswith("datasets:") else os.path.getsize(path) for path in files}
    described = source.model_dump(mode="json", exclude={"documents", "damaged", "tasks", "answer_weights"})
    fingerprint = hashlib.sha256(json.dumps([described, list(inputs.items()), tasks]).encode()).hexdigest()
    files_read = inputs | {str(path): sha256_of(path) for step in source.steps if isinstance(step, Step) for path in step.files()}
    state = folder / "pipeline.json"
    if not state.exists():
        if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder}: exists, is not empty and holds no pipeline.json: choose another output, or remove this folder")
        written = {"fingerprint": fingerprint, "source": described, "files": files_read}
        write_whole(state, json.dumps(written, ensure_ascii=False, indent=2).encode())
        return
    try:
        known = json.loads(state.read_bytes())
        same, before = known["fingerprint"] == fingerprint, known.get("files", files_read)
        different = {path for path in files_read.keys() | before.keys() if files_read.get(path) != before.get(path)}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{state}: is damaged, so nobody knows what {folder} holds: remove this folder to start afresh") from None
    for record in sorted((folder / "stages/read").glob("*.json")):
        if any(folder.glob(f"stages/*/completions/{record.stem}")):  # a rank that has not ended reads again whatever is there
            different |= {*changed(record)}
    if not same or different:
        what = f" ({', '.join(sorted(different)[:3])}{' …' if len(different) > 3 else ''})" if different else ""
        raise UserError(
            f"{folder}: holds documents of other steps or other input files{what} than this configuration's: "
            f"choose another output, or remove this folder to start afresh"
        )
