"""The loss on what is held out of each source."""

from evaluation.report.inputs import Inputs
from evaluation.report.parts import by_source


def section(inputs: Inputs) -> str:
    return by_source(inputs.runs, "validation", "Validation", "On what is held out of each source.", smoothed=False)
