"""Answers of a server, against one with planted faults."""

import base64
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import count, islice
from pathlib import Path

import pytest

from mujina.answers import (
    Answer,
    Conversation,
    Failure,
    Message,
    Request,
    Sampling,
    completions,
    open_answerer,
    question,
    replica,
)
from mujina.answers import server as server_answers
from mujina.answers.server import ServerAnswerer
from mujina.exits import STOPPED
from mujina.user_input import UserError
from tests.chat_server import ChatServer, chat_server

GREEDY = Sampling(max_new_tokens=8)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(replica, "FIRST_WAIT", 0.002)  # eight tries in a quarter of a second, but for what the server asks for
    with chat_server() as server:
        yield server


def ask(server: ChatServer, *words: str) -> list[Answer]:
    return [found for [found] in open_answerer(f"{server.url}#teacher").answer([question(word) for word in words], GREEDY)]


def test_what_a_server_is_asked_and_says(server: ChatServer) -> None:
    conversation = Conversation((Message(role="system", content="Be brief."), Message(role="user", content="Say 日本")))
    [[answer]] = ServerAnswerer(server.url + "/", "teacher").answer([conversation], Sampling(5, temperature=0.7, top_p=0.9))
    assert answer == Answer("日本", "stop", num_prompt_tokens=7, num_answer_tokens=2)
    [request] = server.requests
    assert request["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say 日本"}]
    assert (request["model"], request["max_tokens"], request["temperature"], request["top_p"]) == ("teacher", 5, 0.7, 0.9)
    assert "authorization" not in server.headers[0]


def test_an_answer_that_was_cut_short_and_one_without_usage(server: ChatServer) -> None:
    assert ask(server, "long", "bare") == [Answer("long", "length", 7, 2), Answer("bare", "stop", None, None)]


@pytest.mark.parametrize("fault", ["broken", "cut", "lost", "html", "nonsense", "list", "no-http"])
def test_a_fault_is_tried_again_and_keeps_its_place(server: ChatServer, fault: str) -> None:
    assert [answer.text for answer in ask(server, "before", fault, "after")] == ["before", fault, "after"]
    assert server.seen == {"before": 1, fault: 2, "after": 1}


def test_retry_after_is_waited_for(server: ChatServer) -> None:
    """The server gives 429 for a second; eight tries without heed to its Retry-After would be over in a quarter of one."""
    assert ask(server, "later")[0].text == "later"
    assert server.seen["later"] <= 3


def test_retry_after_may_be_a_date() -> None:
    assert 50 < completions.asked_wait(format_datetime(datetime.now(UTC) + timedelta(minutes=1), usegmt=True)) <= 60
    assert [completions.asked_wait(text) for text in (" 3", "", "soon", "Wed, 21 Oct 2015 07:28:00 GMT")] == [3, 0, 0, 0]


def test_a_slow_answer_holds_up_no_other_and_order_is_kept(server: ChatServer) -> None:
    words = ["slow", *(f"w{number}" for number in range(40))]
    found = ServerAnswerer(server.url, "teacher", num_in_flight=2).answer([question(word) for word in words], GREEDY)
    assert next(found)[0].text == "slow"  # which the server holds back until others have been asked
    assert len(server.requests) >= 5
    assert [answer.text for [answer] in found] == words[1:]


def test_requests_are_in_flight_together(server: ChatServer) -> None:
    """The server holds back each of eight requests until all eight are there."""
    assert len(ask(server, *["together"] * 8)) == 8


def test_each_answer_is_a_request_with_a_seed_of_its_own(server: ChatServer) -> None:
    num_before = 0

    def seeds(*words: str, seed: int = 0) -> list[int]:
        nonlocal num_before
        drawn = Sampling(5, temperature=1.0, num_answers=3, seed=seed)
        found = list(open_answerer(f"{server.url}#teacher").answer([question(word) for word in words], drawn))
        assert [[answer.text for answer in few] for few in found] == [[word] * 3 for word in words]
        requests = server.requests[num_before:]
        num_before += len(requests)
        return sorted(request["seed"] for request in requests)

    both = seeds("a", "b")
    assert len(set(both)) == 6 and seeds("b", "a") == both
    assert set(seeds("a")) < set(both) and not set(seeds("a", seed=1)) & set(both)


def test_only_so_many_requests_are_made_ahead(server: ChatServer) -> None:
    class Counted(list[Conversation]):
        num_taken = 0

        def __iter__(self) -> Iterator[Conversation]:
            for conversation in super().__iter__():
                self.num_taken += 1
                yield conversation

    conversations = Counted([question("x")] * 100)
    found = ServerAnswerer(server.url, "teacher", num_in_flight=2).answer(conversations, GREEDY)
    next(found)
    assert conversations.num_taken <= 10
    assert len(list(found)) == 99


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("locked", "401 .who are you.*OPENAI_API_KEY"),
        ("too-long", "400 .the context holds 4096 tokens"),
        ("dead", "no answer in 8 tries .the server says 500 .out of memory"),
        ("tomorrow", "429 .*asks to wait 86400 s"),
        ("tomorrow-as-a-date", "503 .*asks to wait 86[34].. s"),
        ("moved", "308 .*write the URL that it names"),
        ("null", "an answer without a text .finish_reason content_filter"),
    ],
)
def test_what_a_server_refuses(server: ChatServer, word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ask(server, "fine", word, "fine")
    assert server.seen[word] == (8 if word == "dead" else 1)


def test_a_model_that_the_server_does_not_know(server: ChatServer) -> None:
    with pytest.raises(UserError, match="404 .*no such model.*/v1, and that pupil is the name"):
        list(open_answerer(f"{server.url}#pupil").answer([question("x")], GREEDY))


def test_the_key_is_sent(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    ask(server, "x")
    assert server.headers[0]["authorization"] == "Bearer abc"
    monkeypatch.setenv("OPENAI_API_KEY", "abc\r\nX-More: yes")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds a line break"):
        ask(server, "x")


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=f"127.0.0.1:{port}.*nobody answers.*start the server"):
        next(open_answerer(f"http://127.0.0.1:{port}/v1#teacher").answer([question("x")], GREEDY))


def test_a_server_that_is_started_anew_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "FIRST_WAIT", 0.002)
    with chat_server() as server:
        answerer = ServerAnswerer(server.url, "teacher")
        assert list(answerer.answer([question("x")], GREEDY))
    with pytest.raises(UserError, match="no answer in 8 tries .the connection failed"):
        list(answerer.answer([question("x")], GREEDY))


def found_by(answerer: ServerAnswerer, *words: str) -> dict[str, Answer | Failure]:
    return dict(answerer.ask((word, Request(question(word), GREEDY)) for word in words))


def test_a_failed_request_is_told_and_stops_no_other(server: ChatServer) -> None:
    """Nor is it an empty answer, while one that is empty is an answer."""
    answerer = ServerAnswerer(server.url, "teacher")
    found = found_by(answerer, "fine", "dead", "too-long", "null", "half \ud83d", "empty", "well")
    failed = {word: one.reason for word, one in found.items() if isinstance(one, Failure)}
    assert list(failed) != [] and failed.keys() == {"dead", "too-long", "null", "half \ud83d"}
    assert "no answer in 8 tries" in failed["dead"] and "400 (the context holds" in failed["too-long"]
    assert "without a text (finish_reason content_filter)" in failed["null"] and "surrogate" in failed["half \ud83d"]
    assert [found[word] for word in ("fine", "empty", "well")] == [Answer(text, "stop", 7, 2) for text in ("fine", "", "well")]


def test_any_form_of_http_is_read(server: ChatServer) -> None:
    words = ["chunked", "until-close", "continued", "x"] * 3
    assert [answer.text for answer in ask(server, *words)] == words


def test_a_response_that_comes_twice_answers_one_request(server: ChatServer) -> None:
    answerer = ServerAnswerer(server.url, "teacher", num_in_flight=1)  # each request would go over the same connection
    words = ["a", "twice", "b", "c"]
    assert [answer.text for [answer] in answerer.answer(map(question, words), GREEDY)] == ["a", "another", "b", "c"]


def test_what_the_server_calls_the_model_is_kept(server: ChatServer) -> None:
    [mine, other] = ask(server, "x", "other")
    assert (mine.model, other.model) == ("teacher", "somebody else")
    assert mine.seconds is not None and 0 <= mine.seconds < 60


def test_half_a_surrogate_pair_in_an_answer_is_replaced(server: ChatServer) -> None:
    assert ask(server, "surrogate")[0].text == "half \ufffd and whole \U0001f600"


def test_a_server_that_says_nothing_is_given_up(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_answers, "TIMEOUT", 0.2)
    assert [answer.text for answer in ask(server, "before", "late", "after")] == ["before", "late", "after"]
    assert server.seen["late"] == 2


def test_the_next_request_may_follow_from_an_answer(server: ChatServer) -> None:
    with ServerAnswerer(server.url, "teacher", num_in_flight=4).open() as session:
        for start in range(3):
            session.put((start, 0), Request(question(f"{start}:0"), GREEDY))
        said: dict[int, list[str]] = {start: [] for start in range(3)}
        while session.num_open:
            (start, turn), found = session.take()
            assert isinstance(found, Answer)
            said[start].append(found.text)
            if turn < 4:
                session.put((start, turn + 1), Request(question(f"{start}:{turn + 1}"), GREEDY))
    assert said == {start: [f"{start}:{turn}" for turn in range(5)] for start in range(3)}


def test_without_end_only_so_many_are_open(server: ChatServer) -> None:
    found = ServerAnswerer(server.url, "teacher", num_in_flight=3).ask((n, Request(question(f"w{n}"), GREEDY)) for n in count())
    assert len({number for number, _ in islice(found, 20)}) == 20
    found.close()
    assert server.asked()["most_in_flight"] <= 3 and len(server.requests) <= 23


@pytest.mark.parametrize("num_in_flight", [1, 50])
def test_order_is_kept_whatever_is_in_flight(server: ChatServer, num_in_flight: int) -> None:
    words = [f"{number} wait:{(number * 7 % 5) / 500}" for number in range(40)]
    answers = ServerAnswerer(server.url, "teacher", num_in_flight).answer(map(question, words), GREEDY)
    assert [answer.text for [answer] in answers] == [word.split()[1] for word in words]


@pytest.mark.parametrize("fault", ["500", "429", "503", "tomorrow"])
def test_a_replica_that_fails_is_left_out(server: ChatServer, fault: str) -> None:
    """It is not given what the others would answer, though nobody is as quick as who fails."""
    words = [f"{number} wait:0.02" for number in range(100)]
    with chat_server(fault) as bad:
        found = found_by(ServerAnswerer([bad.url, server.url], "teacher", num_in_flight=20), *words)
        assert {type(one) for one in found.values()} == {Answer} and len(found) == 100
        assert len(server.requests) == 100 and len(bad.requests) < 60


def test_a_replica_that_goes_is_missed_by_none_and_tried_again(server: ChatServer) -> None:
    with chat_server() as other:
        answerer = ServerAnswerer([other.url, server.url], "teacher", num_in_flight=8)
        words = (f"{number} wait:0.005" for number in range(2000))
        found = answerer.answer(map(question, words), GREEDY)
        first = [next(found) for _ in range(50)]
        assert other.requests and server.requests
        other.end()
        middle = [next(found) for _ in range(100)]
        with chat_server("--port", str(other.port)) as again:
            rest = 0
            while not again.requests:
                next(found)
                rest += 1
    found.close()
    assert {answer.text for few in first + middle for answer in few} == {"wait:0.005"} and rest


def test_all_replicas_are_away(server: ChatServer) -> None:
    with chat_server("500") as bad, chat_server("tomorrow") as tomorrow:
        with pytest.raises(UserError, match="asks to wait 86400 s"):
            found_by(ServerAnswerer([tomorrow.url, tomorrow.url], "teacher"), "x")
        found = found_by(ServerAnswerer([bad.url, bad.url], "teacher"), "x", "y")
        assert all(isinstance(one, Failure) and "500 (always)" in one.reason for one in found.values())


def test_a_server_with_few_places_is_given_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "FIRST_WAIT", 0.002)
    words = [f"{number} wait:0.005" for number in range(200)]
    with chat_server("--most", "4") as server:
        found = found_by(ServerAnswerer(server.url, "teacher", num_in_flight=100), *words)
        assert len(found) == 200 and {type(one) for one in found.values()} == {Answer}
        assert len(server.requests) < 400  # half of them told 429


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_by_way_of_a_proxy(server: ChatServer, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    monkeypatch.setenv(f"{scheme}_proxy", f"http://user:se%20cret@127.0.0.1:{server.port}")
    to_the_proxy = "Basic " + base64.b64encode(b"user:se cret").decode()
    if scheme == "http":
        [answer] = ServerAnswerer("http://nowhere.invalid/v1", "teacher").answer([question("x")], GREEDY)
        assert answer == [Answer("x", "stop", 7, 2)]
        [headers] = server.headers
        assert (headers["host"], headers["proxy-authorization"]) == ("nowhere.invalid", to_the_proxy)
        return
    with chat_server("--tls", str(certificate(tmp_path))) as behind:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "localhost.pem"))
        answers = ServerAnswerer(f"https://localhost:{behind.port}/v1", "teacher").answer(map(question, "abc"), GREEDY)
        assert [answer.text for [answer] in answers] == ["a", "b", "c"]
        assert {headers["authorization"] for headers in behind.headers} == {"Bearer abc"}
    assert server.headers and {headers["proxy-authorization"] for headers in server.headers} == {to_the_proxy}
    assert "authorization" not in server.headers[0]  # the key is not the proxy's to see


def test_a_certificate_that_nobody_vouches_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "FIRST_WAIT", 0.002)
    with chat_server("--tls", str(certificate(tmp_path))) as server:
        with pytest.raises(UserError, match="certificate verify failed"):
            found_by(ServerAnswerer(f"https://localhost:{server.port}/v1", "teacher"), "x")


def certificate(folder: Path) -> Path:
    made = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "key.pem", "-out", folder / "certificate.pem"]
    subprocess.run(["openssl", *made, *names], check=True, capture_output=True)
    path = folder / "localhost.pem"
    path.write_bytes((folder / "key.pem").read_bytes() + (folder / "certificate.pem").read_bytes())
    return path


def test_more_in_flight_than_files_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    with pytest.raises(UserError, match=r"num_in_flight \(5000\) needs 5256 open files, and the limit is 4096: lower it, or raise"):
        ServerAnswerer("http://host/v1", "teacher", num_in_flight=5000)


@pytest.mark.parametrize("url", ["http://:80/v1", "http://host:port/v1", "http:///v1"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(UserError, match="write the server's URL as http://host:port/v1"):
        ServerAnswerer(url, "teacher")


def signal_once_asked(server: ChatServer, number: int, sent: signal.Signals) -> None:
    """Before the first request nobody listens to the signal, and it would end the tests."""

    def run() -> None:
        while server.seen.total() < number:
            time.sleep(0.01)
        os.kill(os.getpid(), sent)

    threading.Thread(target=run, daemon=True).start()


def test_told_to_stop_it_takes_what_is_under_way_and_sends_no_more(server: ChatServer) -> None:
    words = [f"wait:2:{number}" for number in range(40)]
    taken = []
    signal_once_asked(server, 8, signal.SIGTERM)
    with pytest.raises(SystemExit, match=str(STOPPED)):
        for name, found in ServerAnswerer(server.url, "teacher", 8).ask((word, Request(question(word), GREEDY)) for word in words):
            taken.append((name, found))
    assert [isinstance(found, Answer) for _, found in taken] == [True] * 8 and len(server.requests) == 8


def test_told_to_stop_it_does_not_wait_for_ever(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_answers, "LONGEST_END", 0.3)
    signal_once_asked(server, 1, signal.SIGINT)
    began = time.monotonic()
    with pytest.raises(SystemExit, match=str(STOPPED)):
        ask(server, "late")
    assert time.monotonic() - began < 60
