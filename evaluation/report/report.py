"""The page: its sections, in order."""

from datetime import UTC, datetime
from html import escape

from evaluation.report.inputs import Inputs
from evaluation.report.sections import (
    auxiliary_losses,
    data,
    evaluations,
    events,
    experts,
    gpus,
    gradient_norm,
    layers,
    loss,
    loss_by_source,
    overview,
    preferences,
    speed,
    validation,
    weight_by_source,
)
from mujina.page import page

SECTIONS = (
    overview,
    loss,
    loss_by_source,
    weight_by_source,
    validation,
    gradient_norm,
    speed,
    gpus,
    auxiliary_losses,
    preferences,
    experts,
    layers,
    data,
    events,
    evaluations,
)


def build(inputs: Inputs, command: str) -> str:
    """The page as HTML. `command` is what it was made with."""
    title = f"Training report: {', '.join(run.name for run in inputs.runs)}"
    moment = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(part.section(inputs) for part in SECTIONS),
        f"<footer>Made on {moment} with <code>{escape(command)}</code></footer>",
    ]
    return page(title, "\n".join(filter(None, parts)))
