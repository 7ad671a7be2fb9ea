"""How much of the loss each source is, where its tokens count more or less than others'."""

from evaluation.report.inputs import Inputs
from evaluation.report.parts import by_source


def section(inputs: Inputs) -> str:
    note = "Of the weight of all tokens of a batch; only where sources or tokens are weighed. Smoothed within a phase."
    return by_source(inputs.runs, "weight_by_source", "Share of the loss by source", note, smoothed=True, axis="Share of the weight")
