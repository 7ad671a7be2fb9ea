"""Run folders that are being written, and those that do not fit."""

import json
from pathlib import Path

import pytest

from evaluation.report.runs import read_run
from mujina.user_input import UserError
from tests.evaluation.report.pages import build, make_run


def test_a_last_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"web": 5})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "tokens": 24')
    assert len(read_run(run, "run", "red").steps) == 5


def test_phases_that_have_not_begun_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"web": 5})
    path = run / "checkpoints" / "latest" / "ledger.json"
    ledger = json.loads(path.read_text())
    ledger["phases"].append({"name": "someday", "tokens": 0, "steps": 0, "sources": {"web_ja": {"tokens": 0, "samples": 0}}})
    path.write_text(json.dumps(ledger))
    assert "someday" not in build(tmp_path, run)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_missing_file_names_itself_and_the_command(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", {"web": 3})
    (run / name).unlink()
    with pytest.raises(UserError) as error:
        build(tmp_path, run)
    assert str(run / name) in str(error.value) and "mujina train" in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", "model: [", "cannot be read as YAML: line 1"),
        ("config.yaml", "", "holds no keys"),
        ("config.yaml", "phases: []", "model is missing"),
        ("metrics.jsonl", "", "holds no finished step"),
        ("metrics.jsonl", '{"step": 1', "holds no finished step"),
        ("metrics.jsonl", '{"step": 1\n{"step": 2}\n', "line 1: is not JSON"),
        ("metrics.jsonl", '{"step": 1}\n', "line 1: tokens is missing"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, text: str, message: str) -> None:
    run = make_run(tmp_path / "run", {"web": 3})
    (run / name).write_text(text)
    with pytest.raises(UserError) as error:
        build(tmp_path, run)
    assert str(run / name) in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("metrics.jsonl", b"\0" * 50 + b"\n", "metrics.jsonl: 1 of 4 lines: line 4: is not JSON"),
        ("metrics.jsonl", b'{"step": \xe9}\n[]\n', "metrics.jsonl: 2 of 5 lines: line 4: is not JSON"),
        ("events.jsonl", b"\0" * 50 + b"\n", "events.jsonl: 1 of 1 lines: line 1: is not JSON"),
        ("events.jsonl", b'{"time": 1e300, "step": 1, "what": "skip"}\n', "events.jsonl: 1 of 1 lines: line 1: time"),
        ("rollbacks.json", b"[{", "rollbacks.json: is not a list of rollbacks"),
        ("checkpoints/latest/ledger.json", b"{", "ledger.json: is not JSON"),
        ("checkpoints/latest/ledger.json", None, "ledger.json: no such file"),
    ],
)
def test_what_cannot_be_read_is_left_out_and_told(tmp_path: Path, name: str, text: bytes | None, told: str) -> None:
    """The page has all the rest, and gives no advice that does not help."""
    run = make_run(tmp_path / "run", {"web": 3})
    if text is None:
        (run / name).unlink()
    else:
        with (run / name).open("ab") as file:
            file.write(text)
    html = build(tmp_path, run)
    assert "<th>Left out</th>" in html and told in html
    assert len(read_run(run, "run", "red").steps) == 3
