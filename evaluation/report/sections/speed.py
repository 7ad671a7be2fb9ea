"""Learning rate, speed, time and memory over the run, standstills for checkpoints among them."""

from evaluation.report.charts import Line, limits, line_chart
from evaluation.report.inputs import Inputs
from evaluation.report.parts import SMALL, small_chart, small_section, x_range
from evaluation.report.runs import Run


def section(inputs: Inputs) -> str:
    runs = inputs.runs
    is_old = any(run.steps[-1].tokens_per_second_per_gpu is None for run in runs)
    charts = [
        small_chart(runs, "Learning rate", "lr", smoothed=False),  # has no noise, and corners that should be seen
        small_chart(runs, "Tokens per second", "tokens_per_second") if is_old else "",
        small_chart(runs, "Tokens per second and GPU (or process)", "tokens_per_second_per_gpu"),
        small_chart(runs, "Model TFLOP/s per GPU (or process)", "tflops_per_gpu"),
        small_chart(runs, "Model FLOPs utilisation (MFU)", "mfu"),
        small_chart(runs, "Step, seconds", lambda step: step.seconds if step.data_seconds is not None else None),
        small_chart(runs, "Wait for data, seconds a step", "data_seconds"),
        _save_chart(runs),
        small_chart(runs, "Memory, GiB, of the rank with most", "memory_gib", smoothed=False),
        small_chart(runs, "Memory that PyTorch holds, GiB", "memory_reserved_gib", smoothed=False),
    ]
    return small_section("Learning rate, speed, time and memory", runs, charts)


def _save_chart(runs: list[Run]) -> str:
    """How long training stood still for each checkpoint, and how long the checkpoint took."""
    lines = []
    for run in runs:
        saves = [(run.tokens_at(save.step), save.model_extra or {}) for save in run.saves]
        lines.append(Line(run.name, run.colour, [(x, facts["seconds"]) for x, facts in saves if "seconds" in facts]))
    if not any(line.points for line in lines):
        return ""
    return line_chart("Standstill for a checkpoint, seconds", lines, x_range(runs), (0.0, limits(lines)[1]), size=SMALL)
