import json
from pathlib import Path

import pytest

from evaluation.result import Measure, Result, Sample, Suite, read_result, summarize
from mujina.answers import Sampling
from mujina.user_input import UserError

MEASURES = {"right": Measure(meaning="the number is right", is_share=True), "mark": Measure(meaning="1 to 10", is_share=False)}
SUITE = Suite(name="marks", version=3, prompts="p.jsonl", prompts_sha256="0" * 64, measures=MEASURES)
SAMPLING = Sampling(5, temperature=0.5, seed=3)


def sample(group: str | None, right: float, mark: float) -> Sample:
    scores = {"right": right, "mark": mark}
    return Sample(prompt="?", expected=None, answer="!", group=group, right=None, verdict=f"{mark} of 10", scores=scores)


def some() -> Result:
    return summarize(SUITE, "a model", SAMPLING, [sample("b", 1, 7), sample("a", 0, 3), sample("b", 0, 8), sample(None, 1, 10)])


def test_measures_are_means_over_all_and_by_group() -> None:
    result = some()
    assert (result.num_prompts, result.measures) == (4, {"right": 0.5, "mark": 7.0})
    assert list(result.groups) == ["a", "b"]
    assert (result.groups["b"].num_prompts, result.groups["b"].measures) == (2, {"right": 0.5, "mark": 7.5})


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(some().model_dump_json(indent=2))
    assert read_result(path) == some()


OLD = {
    "num_prompts": 1,
    "well_formed": 1.0,
    "correct": 1.0,
    "folder": "hf",
    "prompts": "p",
    "by_language": {},
    "samples": [{"prompt": "?"}],
}


@pytest.mark.parametrize("values", [{}, OLD, {"model_type": "llama"}])
def test_older_and_foreign_files(tmp_path: Path, values: dict[str, object]) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"result.json: is no result, or one of an older form: evaluate again with `mujina evaluate`"):
        read_result(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": [{"prompt": "?"}]}, "samples.0.answer is missing"),
        ({"elo": 3}, "unknown key elo"),
        ({"measures": {"right": None}}, "measures.right"),
        ({"sampling": {"max_new_tokens": 0}}, "max_new_tokens"),
        ({"sampling": {"max_new_tokens": 1, "min_p": 1}}, "sampling.min_p .1.: Unexpected"),
    ],
)
def test_a_result_that_was_tampered_with(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(some().model_dump(mode="json") | changes))
    with pytest.raises(UserError, match=message):
        read_result(path)


@pytest.mark.parametrize(("text", "message"), [(None, "no such file"), ("{", "is not JSON"), ("[]", "is not a JSON object")])
def test_files_that_hold_no_object(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_result(path)
