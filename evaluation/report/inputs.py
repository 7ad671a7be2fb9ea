"""What the page is made from."""

from dataclasses import dataclass
from pathlib import Path

from evaluation.report.runs import Run
from evaluation.result import Result, read_result
from mujina.user_input import UserError


@dataclass(frozen=True)
class Evaluation:
    """A result of `mujina evaluate` under the name that the page gives it."""

    label: str
    result: Result


@dataclass(frozen=True)
class Inputs:
    """Runs (at least one) and evaluations, in the order in which they are shown."""

    runs: list[Run]
    evaluations: list[Evaluation]


def read_evaluation(text: str) -> Evaluation:
    """Reads what `LABEL=result.json` names; raises UserError when it is not of that form, or the file is not a result."""
    label, separator, path = text.partition("=")
    if not (label and separator and path):
        raise UserError(f"--evaluation {text!r} is not of the form LABEL=result.json: write for example before=result.json")
    return Evaluation(label, read_result(Path(path)))
