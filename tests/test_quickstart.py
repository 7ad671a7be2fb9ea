"""The quickstart's driver over all its stations, with a twentieth of the training; and a second call, which finds all done."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_station_and_a_second_call(tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for file in (tmp_path / "examples/quickstart").glob("*_phases.yaml"):
        file.write_text(re.sub(r"(tokens|warmup_steps|epochs): ([\d_.]+)", a_twentieth, file.read_text()))
    first = call(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr

    result = tmp_path / "runs/quickstart"
    for written in ("hf/dense/model.safetensors", "hf/moe/model.safetensors", "report.html"):
        assert (result / written).stat().st_size > 10_000
    summary = json.loads((result / "summary.json").read_text())
    assert summary["step_0_loss"]["upcycled"] == summary["step_0_loss"]["dense"] or summary["upcycling_max_relative_error"] <= 1e-5
    for model, phases, answered in (
        ("dense", {"web", "chat", "sft", "dpo"}, ["web", "chat", "sft", "dpo"]),
        ("moe", {"chat", "sft"}, ["sft"]),
    ):
        facts = summary["models"][model]
        assert facts["steps"] == len((result / model / "metrics.jsonl").read_text().splitlines())
        assert set(facts["tokens_by_phase_and_source"]) == phases and set(facts["tokens_by_phase_and_source"]["sft"]) == {"answers"}
        of_sources = sum(sum(sources.values()) for sources in facts["tokens_by_phase_and_source"].values())
        assert 0 <= facts["tokens"] - of_sources < 2 * 2048, "what fills up the last batches of dialogues is of no source"
        assert facts["last_loss"] < facts["first_loss"] and facts["conversion_max_relative_error"] <= 1e-4
        assert list(facts["answers"]) == answered
        assert all(0 <= share <= 1 for answers in facts["answers"].values() for share in answers.values())

    weights = (result / "hf/moe/model.safetensors").stat().st_mtime
    second = call(tmp_path)
    assert second.returncode == 0 and second.stdout.count(": is done") == len(summary["seconds"]) == 18
    assert "of its answers are well-formed" in second.stdout and json.loads((result / "summary.json").read_text()) == summary
    assert (result / "hf/moe/model.safetensors").stat().st_mtime == weights


def a_twentieth(found: re.Match[str]) -> str:
    number = float(found[2].replace("_", "")) / 20
    return f"{found[1]}: {number if found[1] == 'epochs' else int(number)}"


def call(folder: Path) -> subprocess.CompletedProcess:
    driver = [sys.executable, "examples/quickstart/run.py"]
    return subprocess.run(driver, cwd=folder, capture_output=True, text=True, timeout=600)
