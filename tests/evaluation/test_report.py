import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from evaluation import report
from evaluation.arithmetic import Result, Sample, Shares
from evaluation.report import read_evaluation, read_run
from mujina.user_input import UserError

TOKENS_PER_STEP = 4096


def make_run(folder: Path, phases: dict[str, int], num_experts: int = 0, top: dict[str, Any] | None = None) -> Path:
    """A run folder with `phases` (name: steps); every source's tokens in the ledger are numbers that stand nowhere else."""
    config = {
        "model": {
            "num_layers": 2,
            "hidden_size": 96,
            "ffn_hidden_size": 256,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "vocab_size": 5_003,
            "rope_theta": 10_000,
        },
        "moe": {"num_experts": num_experts, "top_k": 2, "upcycle_from": "runs/dense"} if num_experts else None,
        "parallel": {"tensor": 2, "pipeline": 1},
        "phases": [{"name": name, "tokens": steps * TOKENS_PER_STEP, "sources": {"web_ja": 1}} for name, steps in phases.items()],
    }
    lines, step = [], 0
    for name, steps in phases.items():
        for _ in range(steps):
            step += 1
            row = {"step": step, "tokens": step * TOKENS_PER_STEP, "phase": name, "loss": 9 - step / 100, "lr": 1e-3, "grad_norm": 1.5}
            row |= {"seconds": 0.5, "tokens_per_second": 8192.0}
            if num_experts:
                row |= {"load_balancing_loss": 1.0, "expert_load": [[1 / num_experts] * num_experts, [1.0] + [0.0] * (num_experts - 1)]}
            lines.append(json.dumps(row | (top or {})))
    ledger = {
        "tokens": 7_654_321,
        "block_length": 8192,
        "phases": [
            {
                "name": name,
                "tokens": 1_111_111 + number,
                "steps": steps,
                "sources": {
                    "web_ja": {"tokens": 777_000 + number, "samples": 31, "first_block": 0},
                    "<qa>": {"tokens": 333_000, "samples": 5},
                },
            }
            for number, (name, steps) in enumerate(phases.items())
        ],
    }
    latest = folder / "checkpoints" / "latest"
    latest.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (latest / "ledger.json").write_text(json.dumps(ledger))
    return folder


def make_result(path: Path, well_formed: float, correct: float, answer: str, language: str = "ja") -> Path:
    shares = {"num_prompts": 40, "well_formed": well_formed, "correct": correct}
    samples = [Sample(prompt=f"{n} & 1 <add>?", expected=str(n + 1), answer=answer, well_formed=False, correct=False) for n in range(40)]
    result = Result(folder="hf", prompts="held_out.jsonl", by_language={language: Shares(**shares)}, samples=samples, **shares)
    path.write_text(result.model_dump_json())
    return path


def build(tmp_path: Path, *runs: Path, evaluation: list[str] | None = None) -> str:
    output = tmp_path / "out" / "report.html"
    report.main(list(runs), output, evaluation)
    assert list(output.parent.iterdir()) == [output]  # nothing half-written stays behind
    return output.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """The elements of a page, and a check that they are closed in the order in which they were opened."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


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


def test_the_numbers_of_the_sources_come_from_the_ledger(tmp_path: Path) -> None:
    html = build(tmp_path, make_run(tmp_path / "run", {"web": 30, "chat": 10}))
    for number in ("777,000", "777,001", "1,554,001", "1,111,112", "7,654,321", "333,000", "69.9%"):
        assert number in html, number
    assert "web_ja: 777,000 tokens" in html


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


def test_evaluations_stand_in_the_order_given_with_the_change(tmp_path: Path) -> None:
    before, after = make_result(tmp_path / "b.json", 0.125, 0.05, "hm"), make_result(tmp_path / "a.json", 0.975, 0.8, "well", "en")
    html = build(tmp_path, make_run(tmp_path / "run", {"web": 3}), evaluation=[f"zero={before}", f"after={after}"])
    assert (
        html.index("<td>zero</td>") < html.index("12.5%") < html.index("<td>after</td>") < html.index("97.5%") < html.index("zero → after")
    )
    assert "+85.0" in html and "+75.0" in html
    assert html.index(">Japanese<") < html.index(">English<")
    assert html.count('<span class="verdict">') == 24  # twelve prompts, two labels
    assert "12 of 40 prompts" in html


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


def make_full_run(folder: Path) -> Path:
    """A run of today's records: 40 steps, with a source that comes in the second phase only, events, saves and a GPU that was slowed."""
    run = make_run(folder, {"web": 30, "chat": 10}, num_experts=4)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        loss, in_chat = row["loss"], row["phase"] == "chat"
        row |= {"loss_by_source": {"<qa>": loss - 1} if in_chat else {"web_ja": loss, "code": loss - 2}, "z_loss": 0.0}
        row |= {"tokens_by_source": {source: 4096 for source in row["loss_by_source"]}, "router_z_loss": 0.25, "memory_gib": 61.5}
        row |= {"data_seconds": 0.01, "tokens_per_second_per_gpu": 4096.0, "tflops_per_gpu": 412.5, "mfu": 0.417}
        if row["step"] % 10 == 0:
            row |= {"validation": {"web_ja": loss + 0.5, "code": loss}}
            row |= {"layer_norms": {name: {"gradient": 0.1, "weight": 20.0} for name in ("embedding", "layers.0", "layers.1")}}
            slowed = {"slowed": {"3": ["thermal slowdown (driver)"]}} if row["step"] == 20 else {}
            row |= {"gpu": {"hottest_c": 71.0, "hottest_rank": 3, "power_w": 690.0, "slowest_mhz": 1755.0, "ecc_errors": 0, **slowed}}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    events = [
        {"time": 1.8e9, "step": 12, "what": "skip", "reason": "the loss is 99 & rising", "loss": 99.0, "samples": [["web_ja", 5]]},
        {"time": 1.8e9, "step": 20, "what": "checkpoint", "seconds": 0.25, "whole_seconds": 4.5},
        {"time": 1.8e9, "step": 20, "what": "restart"},
        {"time": 1.8e9, "step": 25, "what": "update", "reason": "the loss is 9"},
        {"time": 1.8e9, "step": 31, "what": "rollback", "reason": "the gradient norm is nan", "loss": "nan"},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"time": 1.8')
    return run


def charts(html: str) -> dict[str, str]:
    return {re.search('aria-label="([^"]*)"', svg).group(1): svg for svg in re.findall("<svg.*?</svg>", html)}


def section(html: str, title: str) -> str:
    return re.split("<h2>|<footer>", html.partition(f"<h2>{title}</h2>")[2])[0]


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


def test_each_source_has_its_line_and_the_same_colour_everywhere(tmp_path: Path) -> None:
    html = build(tmp_path, make_full_run(tmp_path / "run"))
    colours = []
    for title, sources in (("Loss by source", {"web_ja", "code", "&lt;qa&gt;"}), ("Validation", {"web_ja", "code"})):
        (chart,) = charts(section(html, title)).values()
        lines = dict(re.findall(r'stroke="([^"]*)" data-label="([^"]*)"', chart))
        assert set(lines.values()) == sources
        colours.append({label: colour for colour, label in lines.items()})
        assert all(f"background:{colour}" in section(html, title) for colour in lines)
    assert colours[0] | colours[1] == colours[0] and len(set(colours[0].values())) == 3
    (chart,) = charts(section(html, "Loss by source")).values()
    assert float(re.search(r'qa&gt;" d="M([\d.]+)', chart).group(1)) > 700  # its first sample comes after three quarters


def test_events_are_marked_where_they_happened_and_told_below(tmp_path: Path) -> None:
    html = build(tmp_path, make_full_run(tmp_path / "run"))
    chart = charts(html)["Gradient norm, before clipping"]
    start, end, low, high = map(float, re.search(r'data-x="([^"]*)"', chart).group(1).split())
    marks = re.findall(r'<g class="mark" stroke="var\(--event-(\d)\)".*?<title>(.*?)</title><path d="M(\d+)', chart)
    assert sorted(marks, key=lambda mark: int(mark[2])) == [
        ("1", "step 12, skip: the loss is 99 &amp; rising", str(round(start + (end - start) * 12 / 40))),
        ("3", "step 20, restart", str(round(start + (end - start) * 20 / 40))),
        ("0", "step 25, spike: the loss is 9", str(round(start + (end - start) * 25 / 40))),
        ("2", "step 31, rollback: the gradient norm is nan", str(round(start + (end - start) * 31 / 40))),
    ]
    assert "skip (1)" in section(html, "Gradient norm")
    table = section(html, "Events")
    assert table.index("skip</span>") < table.index("restart</span>") < table.index("rollback</span>")
    assert "2027-01-15 08:00:00" in table and "checkpoint" not in table


def test_an_old_run_stands_beside_one_of_today(tmp_path: Path) -> None:
    html = build(tmp_path, make_run(tmp_path / "old", {"web": 20}), make_full_run(tmp_path / "new"))
    Tags(html)
    assert "<td>–</td><td>41.7% (median)</td>" in html
    for title in ("Loss by source", "Validation", "Events"):
        assert ">new</span>" in section(html, title) and ">old</span>" not in section(html, title)
    both = charts(html)["Model FLOPs utilisation (MFU)"]
    assert re.search(r'data-label="old" d=""', both) and not re.search(r'data-label="new" d=""', both)


def test_a_last_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"web": 5})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "tokens": 24')
    assert len(read_run(run, "run", "red").steps) == 5


def test_losses_that_are_not_finite_are_counted_and_not_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"web": 5}, top={"loss": float("nan"), "grad_norm": float("inf")})
    html = build(tmp_path, run)
    assert "<th>Steps without a finite loss</th><td>5</td>" in html and "<td>not finite</td>" in html
    assert not re.search(r'd="[^"]*(nan|inf)', html)


def test_phases_that_have_not_begun_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"web": 5})
    path = run / "checkpoints" / "latest" / "ledger.json"
    ledger = json.loads(path.read_text())
    ledger["phases"].append({"name": "someday", "tokens": 0, "steps": 0, "sources": {"web_ja": {"tokens": 0, "samples": 0}}})
    path.write_text(json.dumps(ledger))
    assert "someday" not in build(tmp_path, run)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints/latest/ledger.json"])
def test_a_missing_file_names_itself_and_the_command(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", {"web": 3})
    (run / name).unlink()
    with pytest.raises(UserError) as error:
        build(tmp_path, run)
    assert str(run / name) in str(error.value) and "mujina train" in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", "model: [", "is not YAML"),
        ("config.yaml", "", "holds no keys"),
        ("config.yaml", "phases: []", "model is missing"),
        ("metrics.jsonl", "", "holds no finished step"),
        ("metrics.jsonl", '{"step": 1', "holds no finished step"),
        ("metrics.jsonl", '{"step": 1\n{"step": 2}\n', "line 1: is not JSON"),
        ("metrics.jsonl", '{"step": 1}\n', "line 1: tokens is missing"),
        ("checkpoints/latest/ledger.json", "{", "is not JSON"),
        ("checkpoints/latest/ledger.json", '{"tokens": 3}', "phases is missing"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, text: str, message: str) -> None:
    run = make_run(tmp_path / "run", {"web": 3})
    (run / name).write_text(text)
    with pytest.raises(UserError) as error:
        build(tmp_path, run)
    assert str(run / name) in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("result.json", "LABEL=result.json"), ("=x", "LABEL=result.json"), ("a=nowhere.json", "nowhere.json: no such file")],
)
def test_evaluations_that_do_not_fit(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_evaluation(text)


def test_an_evaluation_that_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(UserError, match="samples is missing"):
        read_evaluation(f"a={path}")
