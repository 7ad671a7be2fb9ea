"""The warning that chosen answers are unlearned."""

from megatron_jobs.monitoring.preferences import WINDOW, Watch


def told(rewards, phase="dpo"):
    watch = Watch()
    return [news for chosen, margin in rewards if (news := watch.look({"phase": phase, "chosen_reward": chosen, "reward_margin": margin}))]


def test_chosen_answers_that_fall_are_told_once():
    falling = [(-0.01 * n, 0.02 * n) for n in range(3 * WINDOW)]
    (news,) = told(falling)
    assert "chosen answers become less likely" in news and "phases.dpo.loss.beta" in news


def test_nothing_is_told_of_what_is_well():
    assert not told([(0.01 * n, 0.02 * n) for n in range(3 * WINDOW)]), "both grow"
    assert not told([(0.5 - 0.001 * n, 0.02 * n) for n in range(3 * WINDOW)]), "above the reference"
    assert not told([(-0.01 * n, 1 - 0.02 * n) for n in range(3 * WINDOW)]), "the margin falls too"
    assert not told([(-0.01 * n, 0.02 * n) for n in range(WINDOW - 1)]), "too short to say"
    watch = Watch()
    assert watch.look({"phase": "web", "loss": 1.0}) is None
