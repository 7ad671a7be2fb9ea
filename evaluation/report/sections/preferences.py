"""Phases of preferences: the rewards of chosen and rejected answers, their margin, and how often the chosen one leads."""

from evaluation.report.inputs import Inputs
from evaluation.report.parts import small_chart, small_section


def section(inputs: Inputs) -> str:
    runs = inputs.runs
    charts = [
        small_chart(runs, "Margin of the rewards", "reward_margin"),
        small_chart(runs, "Pairs whose chosen answer has the higher reward", "reward_accuracy"),
        small_chart(runs, "Reward of the chosen answers", "chosen_reward"),
        small_chart(runs, "Reward of the rejected answers", "rejected_reward"),
        small_chart(runs, "Log-probability of the chosen answers", "chosen_log_probability"),
        small_chart(runs, "Log-probability of the rejected answers", "rejected_log_probability"),
    ]
    note = "A reward is β times what an answer's log-probability has gained over the reference; means over the pairs of a step."
    return small_section("Preferences", runs, charts, note)
