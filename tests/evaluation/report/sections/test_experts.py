import re
from pathlib import Path

from tests.evaluation.report.pages import build, make_run


def test_expert_load_is_the_mean_at_the_end_and_the_imbalance_over_time(tmp_path: Path) -> None:
    html = build(tmp_path, make_run(tmp_path / "moe", {"web": 80}, num_experts=4))
    assert "Share of routed tokens, mean of the last 2 steps" in html
    assert "layer 0, expert 3: 25.00% of tokens, 1.00 × uniform" in html
    assert "layer 1, expert 0: 100.00% of tokens, 4.00 × uniform" in html
    chart = next(svg for svg in re.findall("<svg.*?</svg>", html) if "busiest expert" in svg)
    top, high = [float(number) for number in re.search(r'data-y="([^"]*)"', chart).group(1).split()][1::2]
    assert high > 4 and top > 0  # one expert of four takes all of layer 1


def test_what_is_watched_of_experts_has_its_curves(tmp_path: Path) -> None:
    watched = {"load_entropy": [0.9, 0.4], "router_entropy": [1.0, 0.8], "dropped": [0.1, 0.3], "expert_similarity": [1.0, 0.5]}
    html = build(tmp_path, make_run(tmp_path / "moe", {"web": 3}, num_experts=4, top=watched))
    assert "layer 1, expert 0, to 12.3k tokens: 4.00 × uniform" in html
    for name in ("Entropy of the load, least even", "Entropy of the router", "Similarity of experts", "Dropped, share"):
        assert name in html


def test_a_dense_run_has_no_expert_section(tmp_path: Path) -> None:
    assert "Expert load" not in build(tmp_path, make_run(tmp_path / "run", {"web": 3}))
