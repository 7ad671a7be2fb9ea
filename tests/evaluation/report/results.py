"""Results of suites that nobody knows."""

from pathlib import Path

from evaluation.result import Measure, Sample, Scores, Suite, summarize
from mujina.answers import Sampling

SHARES = {name: Measure(meaning=f"what is {name}", is_share=True) for name in ("well-formed", "correct")}


def make_suite(measures: dict[str, Measure] = SHARES, name: str = "sums & more", version: int = 1) -> Suite:
    return Suite(name=name, version=version, prompts="held_out.jsonl", prompts_sha256="", measures=measures)


def make_result(path: Path, well_formed: float, correct: float, answer: str, group: str = "Japanese", suite: Suite | None = None) -> Path:
    """Forty samples, all answered with `answer`; the measures are not what they would be."""
    suite = suite or make_suite()
    scores = dict.fromkeys(suite.measures, 0.0)
    about = dict(answer=answer, group=group, right=False, verdict="not well-formed", scores=scores)
    samples = [Sample(prompt=f"{n} & 1 <add>?", expected=str(n + 1), **about) for n in range(40)]
    planted = Scores(num_prompts=40, measures=dict(zip(suite.measures, (well_formed, correct), strict=True)))
    result = summarize(suite, "hf", Sampling(5), samples).model_copy(update={"measures": planted.measures, "groups": {group: planted}})
    path.write_text(result.model_dump_json())
    return path
