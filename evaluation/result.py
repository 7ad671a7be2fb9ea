"""What an evaluation found, in one form for every suite: the file that `mujina evaluate` writes and `mujina report` draws."""

from collections.abc import Sequence
from pathlib import Path

import pydantic

from mujina.answers import Sampling
from mujina.user_input import Section, UserError, parse, read_object


class Measure(Section):
    """What a number says, in words for people. A share is from 0 to 1 and shown in percent; other numbers are shown as they are."""

    meaning: str
    is_share: bool

    def in_words(self, value: float) -> str:
        return f"{value:.1%}" if self.is_share else f"{value:.4g}"

    def change_in_words(self, before: float, after: float) -> str:
        """Shares in percentage points."""
        return f"{(after - before) * 100:+.1f}" if self.is_share else f"{after - before:+.4g}"


class Suite(Section):
    """What was asked. Numbers compare where name, version and the checksum of the prompt file are the same.

    `version` is raised when the suite asks or scores in another way; `prompts` is the path of the prompt file.
    """

    name: str
    version: int
    prompts: str
    prompts_sha256: str
    measures: dict[str, Measure]


class Scores(Section):
    """Each measure over `num_prompts` samples."""

    num_prompts: int
    measures: dict[str, pydantic.FiniteFloat]


class Sample(Section):
    """One prompt (the last user message) and how it was answered.

    right     None where the suite knows no right and wrong
    verdict   what was made of the answer, in a few words
    scores    each measure of this answer alone
    """

    prompt: str
    expected: str | None
    answer: str
    group: str | None
    right: bool | None
    verdict: str
    scores: dict[str, pydantic.FiniteFloat]


class Result(Scores):
    """The scores over all samples and by group, with every sample. `model` is what answered: a folder, or a server's URL#model."""

    suite: Suite
    model: str
    sampling: Sampling
    groups: dict[str, Scores]
    samples: list[Sample]


def summarize(suite: Suite, model: str, sampling: Sampling, samples: Sequence[Sample]) -> Result:
    """The result whose measures are the means over `samples` (at least one), and over those of each group."""
    groups = sorted({sample.group for sample in samples if sample.group is not None})
    return Result(
        suite=suite,
        model=model,
        sampling=sampling,
        groups={group: _means(suite, [sample for sample in samples if sample.group == group]) for group in groups},
        samples=list(samples),
        **dict(_means(suite, samples)),
    )


def _means(suite: Suite, samples: Sequence[Sample]) -> Scores:
    means = {measure: sum(sample.scores[measure] for sample in samples) / len(samples) for measure in suite.measures}
    return Scores(num_prompts=len(samples), measures=means)


def read_result(path: Path) -> Result:
    """Reads what `mujina evaluate` wrote; raises UserError naming the file when it is anything else, or of an older form."""
    remedy = "`mujina evaluate` writes it"
    values = read_object(path, remedy)
    if not values.keys() >= Result.model_fields.keys():
        raise UserError(f"{path}: is no result, or one of an older form: evaluate again with `mujina evaluate`, which writes today's")
    return parse(values, Result, str(path))
