"""Answers of a server, against one with planted faults."""

import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from mujina.answers import Answer, Conversation, Message, Sampling, ServerAnswerer, open_answerer, question
from mujina.answers import server as server_answers
from mujina.user_input import UserError
from tests.chat_server import ChatServer, chat_server

GREEDY = Sampling(max_new_tokens=8)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(server_answers, "_FIRST_WAIT", 0.002)  # eight tries in a quarter of a second, but for what the server asks for
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
    assert server.authorizations == [None]


def test_an_answer_that_was_cut_short_and_one_without_usage(server: ChatServer) -> None:
    assert ask(server, "long", "bare") == [Answer("long", "length", 7, 2), Answer("bare", "stop", None, None)]


@pytest.mark.parametrize(("fault", "num_tries"), [("broken", 2), ("cut", 2), ("lost", 2), ("html", 3)])
def test_a_fault_is_tried_again_and_keeps_its_place(server: ChatServer, fault: str, num_tries: int) -> None:
    assert [answer.text for answer in ask(server, "before", fault, "after")] == ["before", fault, "after"]
    assert server.seen == {"before": 1, fault: num_tries, "after": 1}


def test_retry_after_is_waited_for(server: ChatServer) -> None:
    """The server gives 429 for a second; eight tries without heed to its Retry-After would be over in a quarter of one."""
    assert ask(server, "later")[0].text == "later"
    assert server.seen["later"] <= 3


def test_retry_after_may_be_a_date() -> None:
    assert 50 < server_answers._asked_wait(format_datetime(datetime.now(UTC) + timedelta(minutes=1), usegmt=True)) <= 60
    assert [server_answers._asked_wait(text) for text in (" 3", "", "soon", "Wed, 21 Oct 2015 07:28:00 GMT")] == [3, 0, 0, 0]


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
    def seeds(*words: str, seed: int = 0) -> list[int]:
        server.requests.clear()
        drawn = Sampling(5, temperature=1.0, num_answers=3, seed=seed)
        found = list(open_answerer(f"{server.url}#teacher").answer([question(word) for word in words], drawn))
        assert [[answer.text for answer in few] for few in found] == [[word] * 3 for word in words]
        return sorted(request["seed"] for request in server.requests)

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
    assert server.authorizations == ["Bearer abc"]


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=f"127.0.0.1:{port}.*nobody answers.*start the server"):
        next(open_answerer(f"http://127.0.0.1:{port}/v1#teacher").answer([question("x")], GREEDY))


def test_a_server_that_is_started_anew_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_answers, "_FIRST_WAIT", 0.002)
    with chat_server() as server:
        answerer = ServerAnswerer(server.url, "teacher")
        assert list(answerer.answer([question("x")], GREEDY))
    with pytest.raises(UserError, match="no answer in 8 tries .the connection failed"):
        list(answerer.answer([question("x")], GREEDY))
