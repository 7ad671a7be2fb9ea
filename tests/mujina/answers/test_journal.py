"""The journal of answers: nothing is asked twice, whatever is killed, torn or damaged."""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest

from mujina import locks
from mujina.answers import Answer, Answerer, Conversation, Failure, Message, Request, Sampling, Session, question
from mujina.answers.conversation import seed_of
from mujina.answers.journal import Journalled, asked_of, key_of, open_journal
from mujina.answers.server import ServerAnswerer
from mujina.user_input import UserError
from tests.chat_server import ChatServer, chat_server

SAMPLING = Sampling(max_new_tokens=8, temperature=1.0, num_answers=2)


class Echo(Answerer, Session):
    """Answers with the last message, last asked first; remembers what it was asked. `nothing` has no answer."""

    model, most, has_room = "echo", 4, True

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._wanted: list[tuple[Any, Request]] = []

    @property
    def num_open(self) -> int:
        return len(self._wanted)

    @contextmanager
    def open(self) -> Iterator[Session]:
        yield self

    def put(self, name: Any, request: Request) -> None:
        self._wanted.append((name, request))

    def take(self) -> tuple[Any, Answer | Failure]:
        name, request = self._wanted.pop()
        text = request.conversation.messages[-1].content
        self.asked.append(f"{text} {request.number}")
        return name, Failure("too long") if text == "nothing" else Answer(f"{text}!", "stop", 7, 2, "echo-1", 0.5)


def texts(path: Path, answerer: Answerer, *questions: str) -> list[list[str]]:
    with open_journal(path) as journal:
        found = Journalled(answerer, journal).answer([question(text) for text in questions], SAMPLING)
        return [[answer.text for answer in answers] for answers in found]


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    path, echo = tmp_path / "new" / "journal.jsonl", Echo()
    assert texts(path, echo, "a", "b") == [["a!"] * 2, ["b!"] * 2]
    assert texts(path, echo, "b", "c", "a", "c") == [["b!"] * 2, ["c!"] * 2, ["a!"] * 2, ["c!"] * 2]
    assert Counter(echo.asked) == Counter(f"{word} {number}" for word in "abc" for number in (0, 1))


def test_a_line_says_what_was_asked_and_all_of_the_answer(tmp_path: Path) -> None:
    texts(tmp_path / "journal.jsonl", Echo(), "日本")
    line, _ = sorted((tmp_path / "journal.jsonl").read_bytes().splitlines(), key=lambda line: json.loads(line)["asked"]["number"])
    row = json.loads(line)
    asked = asked_of(Request(question("日本"), SAMPLING), "echo")
    assert line.startswith(b'{"key":"' + key_of(asked).hex().encode()) and asked in line
    assert row["asked"]["messages"] == [{"role": "user", "content": "日本"}]
    with open_journal(tmp_path / "journal.jsonl") as journal:
        found = journal.find(key_of(asked))
    assert found and (found, found.model, found.seconds) == (Answer("日本!", "stop", 7, 2), "echo-1", 0.5)


def test_the_key_is_of_all_that_was_asked_and_of_nothing_else() -> None:
    first = Request(question("a"), SAMPLING)
    system = Conversation((Message(role="system", content="a"),))
    others = [replace(first, number=1), replace(first, conversation=question("b")), replace(first, conversation=system)]
    changes: Sequence[dict[str, Any]] = ({"max_new_tokens": 9}, {"temperature": 0.5}, {"top_p": 0.5}, {"seed": 1})
    others += [replace(first, sampling=replace(SAMPLING, **change)) for change in changes]
    keys = {key_of(asked_of(request, "echo")) for request in (first, *others)} | {key_of(asked_of(first, "other"))}
    assert len(keys) == 9
    alike = replace(first, sampling=replace(SAMPLING, num_answers=1, temperature=1))
    assert key_of(asked_of(alike, "echo")) == key_of(asked_of(first, "echo"))


def test_a_failure_is_kept_with_its_reason_and_asked_again(tmp_path: Path) -> None:
    path, echo = tmp_path / "journal.jsonl", Echo()
    for _ in range(2):
        with open_journal(path) as journal:
            found = dict(Journalled(echo, journal).ask([("x", Request(question("nothing"), SAMPLING))]))
        assert found == {"x": Failure("too long")}
    assert echo.asked == ["nothing 0"] * 2
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["failure"] for row in rows] == ["too long"] * 2 and not any("answer" in row for row in rows)


def test_half_a_surrogate_pair_is_a_failure(tmp_path: Path) -> None:
    with open_journal(tmp_path / "journal.jsonl") as journal:
        [(_, found)] = Journalled(Echo(), journal).ask([(0, Request(question("\ud83d"), SAMPLING))])
    assert isinstance(found, Failure) and "surrogate" in found.reason


@pytest.mark.parametrize("num_bytes", [1, 5, 60, 200])
def test_a_torn_line_is_cut_told_and_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], num_bytes: int) -> None:
    path, echo = tmp_path / "journal.jsonl", Echo()
    texts(path, echo, "a", "b")
    whole = path.read_bytes()
    *_, last = whole.splitlines(keepends=True)
    path.write_bytes(whole[: -min(num_bytes, len(last) - 1)])
    echo.asked.clear()
    assert texts(path, echo, "a", "b") == [["a!"] * 2, ["b!"] * 2]
    assert len(echo.asked) == 1 and len(path.read_bytes()) == len(whole)
    assert f"{path}: the last line is torn off" in capsys.readouterr().err


def test_a_damaged_line_is_told_and_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, echo = tmp_path / "journal.jsonl", Echo()
    texts(path, echo, "a", "b", "c")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:-40] + b"\n"
    lines[3] = b"\0" * 50 + b"\n"
    path.write_bytes(b"".join(lines))
    echo.asked.clear()
    assert texts(path, echo, "a", "b", "c") == [["a!"] * 2, ["b!"] * 2, ["c!"] * 2]
    assert len(echo.asked) == 2
    assert f"{path}: 2 lines are damaged, the first is line 2" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"my thesis\n", b"my thesis", b'{"id": 1}\n{"id": 2}\n'])
def test_a_file_of_another_kind_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "thesis.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="thesis.txt: is no journal of answers"):
        texts(path, Echo(), "a")
    assert path.read_bytes() == content


def test_two_processes_at_one_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    with open_journal(tmp_path / "journal.jsonl"):
        with pytest.raises(UserError, match="journal.jsonl: process .* is at work here"):
            texts(tmp_path / "journal.jsonl", Echo(), "a")


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    program = f"""
import resource, signal
from pathlib import Path
from tests.mujina.answers.test_journal import Echo, texts
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    texts(Path({str(path)!r}), Echo(), *"abcdef")
except OSError as error:
    assert error.filename == {str(path)!r}, error
else:
    raise SystemExit("it went on")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert 0 < path.stat().st_size <= 1000 and path.read_bytes().endswith(b"\n")
    num_lines, echo = len(path.read_bytes().splitlines()), Echo()
    texts(path, echo, *"abcdef")
    assert len(echo.asked) == 12 - num_lines


# kill −9, at any moment.

DRAWN = Sampling(8, temperature=1.0, num_answers=2)


def ask(url: str, journal: Path, num_questions: int, num_in_flight: int, output: Path) -> None:
    words = [f"wait:0.00{number % 7}:{number}" for number in range(num_questions)]
    with open_journal(journal) as kept:
        answerer = Journalled(ServerAnswerer(url, "teacher", num_in_flight), kept)
        found = answerer.answer([question(word) for word in words], DRAWN)
        output.write_text("".join(f"{answer.text}\n" for answers in found for answer in answers))


@pytest.mark.parametrize("num_kills", [3, pytest.param(30, marks=pytest.mark.repeats)])
def test_kill_9_pays_at_most_what_was_in_flight_again(tmp_path: Path, num_kills: int) -> None:
    journal, draw, most, num_questions = tmp_path / "journal.jsonl", random.Random(num_kills), 8, 40 * (num_kills + 1)
    with chat_server() as server:

        def start(journal: Path, num_in_flight: int, output: str) -> ForkProcess:
            process = get_context("fork").Process(target=ask, args=(server.url, journal, num_questions, num_in_flight, tmp_path / output))
            process.start()
            return process

        for number in range(1, num_kills + 1):
            process, wanted = start(journal, most, "killed"), len(lines_of(journal)) + draw.randrange(1, 60)
            deadline = time.monotonic() + 60
            while len(lines_of(journal)) < wanted:
                assert process.is_alive() and time.monotonic() < deadline
            time.sleep(draw.random() * 0.01)
            process.kill()
            process.join()
            kept = Counter((row["asked"]["messages"][-1]["content"], row["asked"]["number"]) for row in map(json.loads, lines_of(journal)))
            assert set(kept.values()) == {1}
            paid_again = asked_of_server(server) - kept
            assert sum(paid_again.values()) <= most * number
        process = start(journal, most, "killed")
        process.join(120)
        num_asked = len(server.requests)
        assert process.exitcode == 0 and num_asked - 2 * num_questions <= most * num_kills
        process = start(tmp_path / "other.jsonl", 64, "at once")
        process.join(120)
        assert process.exitcode == 0 and len(server.requests) == num_asked + 2 * num_questions
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "at once").read_bytes()
    assert len((tmp_path / "killed").read_text().splitlines()) == 2 * num_questions


def lines_of(journal: Path) -> list[bytes]:
    return journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []


def asked_of_server(server: ChatServer) -> Counter[tuple[str, int]]:
    """Which word's which answer: a request tells its number by its seed alone."""
    found = Counter[tuple[str, int]]()
    for body in server.requests:
        word = body["messages"][-1]["content"]
        seeds = [seed_of(Request(question(word), DRAWN, number)) for number in range(DRAWN.num_answers)]
        found[word, seeds.index(body["seed"])] += 1
    return found


@pytest.mark.repeats
def test_ten_million_keys_fit_into_200_mb() -> None:
    program = """
import resource
from hashlib import sha256
from mujina.answers.journal import _Index
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
index = _Index()
for number in range(10_000_000):
    index.add(sha256(number.to_bytes(8)).digest()[:16], number)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
assert all(number in index.places(sha256(number.to_bytes(8)).digest()[:16]) for number in range(0, 10_000_000, 9999))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=True)
    assert int(done.stdout) < 200, done.stdout


def test_a_journal_into_which_nothing_came_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with pytest.raises(UserError, match="no such model"), open_journal(path):
        raise UserError("no such model")
    assert not path.exists()
    with open_journal(path) as journal:
        journal.add(b"{}", Failure("late"))
    assert path.read_bytes().count(b"\n") == 1
