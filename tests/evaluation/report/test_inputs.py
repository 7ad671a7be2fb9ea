from pathlib import Path

import pytest

from evaluation.report.inputs import read_evaluation
from mujina.user_input import UserError


@pytest.mark.parametrize(
    ("text", "message"),
    [("result.json", "LABEL=result.json"), ("=x", "LABEL=result.json"), ("a=nowhere.json", "nowhere.json: no such file")],
)
def test_evaluations_that_do_not_fit(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_evaluation(text)


def test_an_evaluation_that_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(UserError, match="evaluate again with `mujina evaluate`"):
        read_evaluation(f"a={path}")
