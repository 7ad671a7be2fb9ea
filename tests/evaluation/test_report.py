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
from user_input import UserError

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
        "moe": {"num_experts": num_experts, "top_k": 2} if num_experts else None,
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
    assert [tag for tag, _ in tags].count("svg") == 8  # loss, gradient norm, two small ones, load balancing, sources, heat map, imbalance
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
