"""`mujina preferences`: from prompts to pairs."""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.pairs import turns_of
from evaluation.preferences import __main__ as preferences
from mujina.user_input import UserError
from tests.chat_folder import save_chain
from tests.chat_server import ChatServer, chat_server


def write(folder: Path, model: str, rows: list[dict[str, Any]], **values: Any) -> Path:
    """A configuration of eight answers to each of these prompts, right when the last number is."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    answers = {"model": model, "number": 8, "temperature": 0.7, "max_new_tokens": 16, "seed": 3}
    config = {"prompts": [str(folder / "prompts.jsonl")], "output": str(folder / "out"), "answers": answers, "judge": {"kind": "number"}}
    (folder / "preferences.yaml").write_text(yaml.safe_dump(config | values))
    return folder / "preferences.yaml"


def row(text: str, answer: str | None = "12", **labels: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "answer": answer, **labels}


def pairs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "pairs.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((folder / "out" / "summary.json").read_text())
    return found


def model_of(server: ChatServer) -> str:
    return f"{server.url}#teacher"


def test_right_answers_are_preferred_to_wrong_ones(tmp_path: Path) -> None:
    rows = [
        row("5 + 7? draw:it_is_12|it_is_13", language="en", licence="CC0-1.0", id="a"),
        row("always right draw:12"),
        row("without an answer null"),
        row("cut off long"),
        row("empty empty"),
        row("日本 draw:１２|−12||−12|１２"),
    ]
    with chat_server() as server:
        preferences.main(write(tmp_path, model_of(server), rows))
        assert len(server.requests) == 8 * 6
        before = (tmp_path / "out" / "pairs.jsonl").read_bytes()
        preferences.main(tmp_path / "preferences.yaml")
        failed_again = 8
        assert len(server.requests) == 8 * 6 + failed_again
    assert (tmp_path / "out" / "pairs.jsonl").read_bytes() == before
    first, last = pairs(tmp_path)
    assert (first["chosen"], first["rejected"], first["language"], first["licence"]) == ("it is 12", "it is 13", "en", "CC0-1.0")
    assert turns_of(first) == [*rows[0]["messages"], *({"role": "assistant", "content": f"it is {n}"} for n in (12, 13))]
    provenance = first["provenance"]
    assert provenance["scores"] == [1, 0] and provenance["judge"] == {"kind": "number", "field": "answer"}
    assert (provenance["model"], provenance["temperature"], provenance["seed"]) == ("teacher", 0.7, 3)
    chosen, rejected = provenance["numbers"]
    assert first["id"] == f"a#{chosen}-{rejected}"
    assert (last["chosen"], last["rejected"], last["id"][:16]) == ("１２", "−12", "prompts.jsonl:6#")
    told = summary(tmp_path)
    assert (told["prompts"], told["answers"], told["pairs"], told["prompts without a pair"]) == (6, 48, 2, 4)
    assert (told["failed answers"], told["answers cut off"]) == (8, 8) and 8 < told["empty answers"] < 16


def test_a_folder_answers_and_a_pattern_judges(tmp_path: Path) -> None:
    folder = save_chain(tmp_path / "model", {"<|assistant|>": {"one": 0.5, "two": 0.5}, "one": "<|end|>", "two": "<|end|>"})
    judge = {"kind": "pattern", "pattern": "(one|two)", "field": "answer"}
    preferences.main(write(tmp_path, str(folder), [row("five", "one"), row("four", "two")], judge=judge))
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs(tmp_path)] == [("one", "two"), ("two", "one")]
    assert pairs(tmp_path)[0]["provenance"]["model"].startswith("model ")


def test_every_pair_and_a_limit(tmp_path: Path) -> None:
    with chat_server() as server:
        rows = [row("draw:12|13|14"), row("draw:12|1")]
        preferences.main(write(tmp_path, model_of(server), rows, choose="every_pair"), ["limit=1"])
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs(tmp_path)} == {("12", "13"), ("12", "14")}


def test_where_no_pair_comes_out_nothing_is_written(tmp_path: Path) -> None:
    with chat_server() as server:
        config = write(tmp_path, model_of(server), [row("draw:12"), row("draw:13|14")])
        with pytest.raises(UserError, match="out: no pairs: of no prompt is one answer better than another: raise answers.temperature"):
            preferences.main(config)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"journal.jsonl", ".journal.jsonl.lock"}


def test_a_server_that_is_away_and_comes_back(tmp_path: Path) -> None:
    rows = [row(f"{number} draw:12|13") for number in range(20)]
    config = write(tmp_path, "http://127.0.0.1:9/v1#teacher", rows)
    with pytest.raises(UserError, match="nobody answers"):
        preferences.main(config)
    assert not (tmp_path / "out" / "pairs.jsonl").exists()
    with chat_server() as server:
        preferences.main(config, [f"answers.model={model_of(server)}"])
    assert len(pairs(tmp_path)) > 15  # of eight answers all may be alike


@pytest.mark.parametrize(
    ("rows", "values", "message"),
    [
        ([], {}, "prompts.jsonl: no prompts"),
        ([{"text": "a"}], {}, "prompts.jsonl line 1: messages is missing"),
        ([row("x"), row("y", None)], {}, r"line 2: answer \(None\) must be a text or a number"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], {}, "line 1: messages.*the last message must be the user's"),
        ([row("x")], {"judge": {"kind": "nummer"}}, "judge.*nummer"),
        ([row("x")], {"judge": {"kind": "pattern", "pattern": "("}}, "no regular expression"),
        ([row("x")], {"answers": {"model": "m", "number": 1}}, "answers.number"),
        ([row("x")], {"chose": "every_pair"}, "unknown key chose: did you mean choose"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_opened(
    tmp_path: Path, rows: list[dict[str, Any]], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        preferences.main(write(tmp_path, "nowhere", rows, **values))
    assert not (tmp_path / "out").exists()


@pytest.mark.repeats
def test_killed_at_any_moment_it_pays_for_nothing_twice(tmp_path: Path) -> None:
    """Of answers and judgements, by what the server counts."""
    rows = [row(f"{number} draw:short|longer_one|the_longest_of_all") for number in range(60)]
    prompt = {"version": 1, "user": "{conversation} <a>{answer_a}</a> <b>{answer_b}</b> judge:longer", "verdict": r"\[\[([A-Z])\]\]"}
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump(prompt))
    journal = tmp_path / "out" / "journal.jsonl"
    with chat_server("--most", "4") as server:
        judge = {"kind": "pairwise", "model": model_of(server), "prompt": str(tmp_path / "judge.yaml")}
        config = write(tmp_path, model_of(server), rows, judge=judge)
        for num_lines in (200, 490):  # of 480 answers and 300 judgements or more
            process = subprocess.Popen([sys.executable, "-m", "mujina", "preferences", str(config)])
            deadline = time.monotonic() + 60
            while not journal.exists() or journal.read_bytes().count(b"\n") < num_lines:
                assert process.poll() is None and time.monotonic() < deadline
            process.kill()
            assert process.wait() == -9
        preferences.main(config)
        before = (tmp_path / "out" / "pairs.jsonl").read_bytes()
        preferences.main(config, [f"output={tmp_path / 'again'}"])
    assert (tmp_path / "again" / "pairs.jsonl").read_bytes() == before
    kept = Counter(json.loads(line)["key"] for line in journal.read_bytes().splitlines())
    assert set(kept.values()) == {1} and len(kept) > 480 + 300
