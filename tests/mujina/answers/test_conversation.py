import pytest

from mujina.answers import Sampling, open_answerer
from mujina.user_input import UserError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens \(0\)"),
        ({"temperature": -1.0}, r"temperature \(-1.0\)"),
        ({"top_p": 0.0}, r"top_p \(0.0\)"),
        ({"top_p": 1.1}, r"top_p \(1.1\)"),
        ({"num_answers": 0}, r"num_answers \(0\)"),
        ({"num_answers": 2}, "the same answer again: raise temperature"),
    ],
)
def test_sampling_out_of_range(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**{"max_new_tokens": 1} | values)


@pytest.mark.parametrize("where", ["http://host:8000/v1", "http://host:8000/v1#", "ftp://host#model"])
def test_places_that_name_no_model(where: str) -> None:
    with pytest.raises(UserError, match="http://host:port/v1#model"):
        open_answerer(where)
