"""The loss of each source in the training data."""

from evaluation.report.inputs import Inputs
from evaluation.report.parts import by_source


def section(inputs: Inputs) -> str:
    return by_source(inputs.runs, "loss_by_source", "Loss by source", "Smoothed within a phase.", smoothed=True)
