"""Losses beside the main one."""

from evaluation.report.inputs import Inputs
from evaluation.report.parts import small_chart, small_section


def section(inputs: Inputs) -> str:
    runs = inputs.runs
    charts = [
        small_chart(runs, "z-loss of the output: mean (log Z)²", lambda step: step.z_loss or None),
        small_chart(runs, "Load balancing (1 is perfect)", "load_balancing_loss"),
        small_chart(runs, "z-loss of the router", "router_z_loss"),
        small_chart(runs, "Loss in fp8 against bf16, relative", lambda step: step.fp8_shadow.get("difference"), smoothed=False),
    ]
    return small_section("Auxiliary losses", runs, charts, "Before their coefficients.")
