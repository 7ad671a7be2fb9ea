from pathlib import Path

from tests.evaluation.report.pages import build, charts, make_run, section

RECORDED = {
    **{"reward_margin": 0.5, "reward_accuracy": 0.75, "chosen_reward": 0.2, "rejected_reward": -0.3},
    **{"chosen_log_probability": -12.0, "rejected_log_probability": -20.0},
}


def test_a_phase_of_preferences_has_its_charts_and_says_what_its_loss_is(tmp_path: Path) -> None:
    html = build(tmp_path, make_run(tmp_path / "run", {"dpo": 20}, top=RECORDED))
    drawn = {name for name in charts(html) if name in section(html, "Preferences")}
    assert len(drawn) == len(RECORDED) and "Margin of the rewards" in drawn
    assert "In a phase of preferences it is the mean over the pairs." in section(html, "Loss")


def test_other_runs_have_none(tmp_path: Path) -> None:
    html = build(tmp_path, make_run(tmp_path / "run", {"web": 20}))
    assert "Preferences" not in html and "preferences" not in section(html, "Loss")
