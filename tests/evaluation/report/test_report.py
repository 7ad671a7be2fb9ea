import re
from pathlib import Path

import pytest

from tests.evaluation.report.pages import TOKENS_PER_STEP, Tags, build, charts, make_full_run, make_run, section
from tests.evaluation.report.results import make_result


def test_the_page_loads_nothing_and_is_well_formed(tmp_path: Path) -> None:
    moe = make_run(tmp_path / "moe", {"web": 30, "chat": 10}, num_experts=4)
    html = build(tmp_path, moe, evaluation=[f"before={make_result(tmp_path / 'a.json', 0.1, 0.05, 'no')}"])
    tags = Tags(html).seen
    assert not re.search(r"https?:|url\(|@import|fetch\(", html)
    assert not [attributes for _, attributes in tags if attributes.keys() & {"src", "href", "srcset"}]
    # loss, gradient norm, two small ones, load balancing, sources, heat map, imbalance, load over time
    assert [tag for tag, _ in tags].count("svg") == 9
    assert "prefers-color-scheme: dark" in html and "@media print" in html


def test_phases_are_labelled_where_they_begin(tmp_path: Path) -> None:
    html = build(tmp_path, make_run(tmp_path / "run", {"web": 30, "talk": 10}))
    loss = next(svg for svg in re.findall("<svg.*?</svg>", html) if "Loss" in svg)
    start, end, low, high = map(float, re.search(r'data-x="([^"]*)"', loss).group(1).split())
    assert re.findall(r'class="phase"[^>]*>([^<]*)', loss) == ["web", "talk"]
    boundaries = [float(x) for x in re.findall(r'class="boundary" d="M([\d.]+)', loss)]
    assert (low, high) == (0, 40 * TOKENS_PER_STEP)
    assert boundaries == pytest.approx([start, start + 0.75 * (end - start)], abs=0.1)


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    dense, moe = make_run(tmp_path / "dense", {"web": 20}), make_run(tmp_path / "moe", {"chat": 10}, num_experts=4)
    html = build(tmp_path, dense, moe)
    assert "Training report: dense, moe" in html
    assert "2 layers × 96 hidden" in html and "5,003" in html
    assert "<td>–</td><td>4 in each layer, top 2</td>" in html
    assert "<td>–</td><td>runs/dense, upcycled</td>" in html
    assert "<td>20</td><td>10</td>" in html
    assert "<td>81,920 of 81,920 planned</td><td>40,960 of 40,960 planned</td>" in html
    assert "<td>10 s</td><td>5 s</td>" in html
    assert html.count("Loss, nats per token</text>") == 2
    assert html.count("<details>") == 2


def test_two_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a" / "run", {"web": 2}), make_run(tmp_path / "b" / "run", {"web": 2})
    assert f"Training report: {first}, {second}" in build(tmp_path, first, second)


def test_all_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    run = make_run(tmp_path / "<i>run", {evil: 3})
    html = build(tmp_path, run, evaluation=[f"<b>now={make_result(tmp_path / 'a.json', 0.1, 0.05, evil + '&amp;')}"])
    tags = [tag for tag, _ in Tags(html).seen]
    assert tags.count("script") == 1 and not {"i", "b", "qa", "add"} & set(tags)
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&amp;amp;" in html
    assert " &amp; 1 &lt;add&gt;?" in html


def test_the_footer_says_how_it_was_made(tmp_path: Path) -> None:
    run = make_run(tmp_path / "my run", {"web": 3})
    assert f"mujina report &#x27;{run}&#x27; --output {tmp_path}/out/report.html</code>" in build(tmp_path, run)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_few_steps(tmp_path: Path, steps: int) -> None:
    html = build(tmp_path, make_run(tmp_path / "run", {"web": steps}, num_experts=2))
    assert "nan" not in html and f"{9 - steps / 100:.3f}" in html


def test_all_that_is_recorded_is_drawn(tmp_path: Path) -> None:
    html = build(tmp_path, make_full_run(tmp_path / "run"))
    Tags(html)
    names = charts(html).keys()
    assert {"Tokens per second and GPU (or process)", "Model TFLOP/s per GPU (or process)", "Model FLOPs utilisation (MFU)"} <= names
    assert {"Step, seconds", "Wait for data, seconds a step", "Standstill for a checkpoint, seconds"} <= names
    assert {"Hottest GPU, °C", "Highest power, W", "Slowest SM clock, MHz", "Norm of the gradient", "Norm of the weights"} <= names
    # nothing is drawn of what is not there, or zero throughout
    assert not {"Uncorrectable ECC errors", "Memory that PyTorch holds, GiB", "z-loss of the output: mean (log Z)²"} & names
    assert "<td>412 (median)</td>" in html and "<td>41.7% (median)</td>" in html
    assert "1: training stood still for 0.25 s, whole after 4.50 s (medians)" in html
    assert '3</td><td>thermal slowdown (driver)</td><td class="number">25.0%</td>' in section(html, "GPUs")


def test_an_old_run_stands_beside_one_of_today(tmp_path: Path) -> None:
    html = build(tmp_path, make_run(tmp_path / "old", {"web": 20}), make_full_run(tmp_path / "new"))
    Tags(html)
    assert "<td>–</td><td>41.7% (median)</td>" in html
    for title in ("Loss by source", "Validation", "Events"):
        assert ">new</span>" in section(html, title) and ">old</span>" not in section(html, title)
    both = charts(html)["Model FLOPs utilisation (MFU)"]
    assert re.search(r'data-label="old" d=""', both) and not re.search(r'data-label="new" d=""', both)


def test_lines_that_are_lost_are_told(tmp_path: Path) -> None:
    """Steps that were passed over never had one."""
    run = make_run(tmp_path / "run", {"web": 9})
    assert "Lines lost" not in build(tmp_path, run)
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(rows[:2] + rows[4:6] + rows[8:]))
    (run / "rollbacks.json").write_text('[{"first": 7, "last": 8, "reason": "a spike"}]')
    assert "<th>Lines lost from metrics.jsonl</th><td>steps 3 to 4</td>" in build(tmp_path, run)


def test_losses_that_are_not_finite_are_counted_and_not_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"web": 5}, top={"loss": float("nan"), "grad_norm": float("inf")})
    html = build(tmp_path, run)
    assert "<th>Steps without a finite loss</th><td>5</td>" in html and "<td>not finite</td>" in html
    assert not re.search(r'd="[^"]*(nan|inf)', html)
