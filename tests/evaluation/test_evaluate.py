import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluation import evaluate
from evaluation.result import read_result
from mujina.answers import Sampling
from mujina.exits import STOPPED
from mujina.user_input import UserError
from tests.chat_folder import save_chain
from tests.chat_server import chat_server


def held_out(folder: Path, *questions: str) -> Path:
    rows = [{"messages": [{"role": "user", "content": text}], "answer": "12", "language": "en"} for text in questions]
    path = folder / "held_out.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_command_writes_the_result_and_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "result.json"
    with chat_server() as server:
        model = f"{server.url}#teacher"
        evaluate.main(model, held_out(tmp_path, "The_answer_is_12.", "x", "y"), output, limit=2)
    result = read_result(output)
    assert {path.name for path in output.parent.iterdir()} == {"result.json", "result.journal.jsonl", ".result.journal.jsonl.lock"}
    assert (result.model, result.sampling, result.num_prompts) == (model, Sampling(128), 2)
    assert [sample.answer for sample in result.samples] == ["The_answer_is_12.", "x"]
    printed = capsys.readouterr().out
    assert "well-formed" in printed and "English" in printed and "0.0%" in printed


def test_a_folder_is_scored(tmp_path: Path) -> None:
    folder = save_chain(tmp_path / "model", {"<|assistant|>": "one", "one": "<|end|>"})
    evaluate.main(str(folder), held_out(tmp_path, "five"), tmp_path / "result.json")
    [sample] = read_result(tmp_path / "result.json").samples
    assert (sample.answer, sample.verdict, sample.right) == ("one", "not well-formed", False)


def test_prompts_are_read_before_the_model_is_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="held_out.jsonl: no such file"):
        evaluate.main(str(tmp_path / "no model"), tmp_path / "held_out.jsonl", tmp_path / "result.json")


WAITS = [f"wait:0.{number % 3 + 1}:{number}" for number in range(1500)]  # more than three starts get done on a loaded machine


def start(url: str, prompts: Path, output: Path) -> subprocess.Popen[str]:
    """A real `mujina evaluate`; returns once some answers are there."""
    command = [sys.executable, "-m", "mujina", "evaluate", f"{url}#teacher", "--prompts", str(prompts), "--output", str(output)]
    before, process = num_answers(output), subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while num_answers(output) < before + 50:
        assert process.poll() is None and time.monotonic() < deadline
    return process


def num_answers(output: Path) -> int:
    journal = output.with_suffix(".journal.jsonl")
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def test_killed_and_stopped_it_asks_nothing_twice_and_the_result_has_the_same_bytes(tmp_path: Path) -> None:
    prompts, one, other = held_out(tmp_path, *WAITS), tmp_path / "one.json", tmp_path / "other.json"
    with chat_server() as server:
        killed = start(server.url, prompts, one)
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
        lost = set(server.seen) - set(words_kept(one))
        assert len(lost) <= 256

        for number in (signal.SIGTERM, signal.SIGINT):
            stopped = start(server.url, prompts, one)
            stopped.send_signal(number)
            told = stopped.communicate(timeout=60)[1]
            assert stopped.returncode == STOPPED and "told to stop: waiting for what is under way" in told
            assert f"stopped: {one.with_suffix('.journal.jsonl')} holds {num_answers(one)} answers, and the same command goes on" in told
            assert not one.exists() and "Traceback" not in told

        evaluate.main(f"{server.url}#teacher", prompts, one)
        assert sorted(words_kept(one)) == sorted(WAITS)
        assert {word for word, count in server.seen.items() if count > 1} == lost
        evaluate.main(f"{server.url}#teacher", prompts, other)
    assert one.read_bytes() == other.read_bytes()


def words_kept(output: Path) -> list[str]:
    lines = output.with_suffix(".journal.jsonl").read_bytes().split(b"\n")[:-1]
    return [json.loads(line)["asked"]["messages"][-1]["content"] for line in lines]
