"""Run folders as `mujina train` leaves them, the pages that are made of them, and what stands on a page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from evaluation.report.__main__ import main

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


def build(tmp_path: Path, *runs: Path, evaluation: list[str] | None = None) -> str:
    output = tmp_path / "out" / "report.html"
    main(list(runs), output, evaluation)
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


def charts(html: str) -> dict[str, str]:
    return {re.search('aria-label="([^"]*)"', svg).group(1): svg for svg in re.findall("<svg.*?</svg>", html)}


def section(html: str, title: str) -> str:
    return re.split("<h2>|<footer>", html.partition(f"<h2>{title}</h2>")[2])[0]
