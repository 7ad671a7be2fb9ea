"""Addresses on the block lists are dropped with their reason, offline; what has no web address passes."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from datatrove.data import Document

from data_prep.steps.step import Judge
from data_prep.steps.url import Url
from mujina.user_input import UserError


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    """Made, and used, where every connection is a failure."""
    path = tmp_path_factory.mktemp("lists") / "mine.txt"
    path.write_text("Spam-Site.co.jp  # adverts\n\n# ours\nblog.example.com\n", encoding="utf-8-sig")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("connect", "connect_ex"):
            monkeypatch.setattr(socket.socket, name, lambda *_: pytest.fail("asks the network"))
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asks the network"))
        yield Url(blocked_domains=str(path)).start()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://ja.wikipedia.org/wiki/狸", None),
        ("https://www.pornhub.com/", "url_domain"),
        ("http://spam-site.co.jp/index.html", "url_domain"),
        ("http://shop.spam-site.co.jp/", "url_domain"),
        ("https://blog.example.com/2024", "url_domain"),
        ("https://other.example.com/", None),
        ("https://example.com/livesex-chat", "url_word"),
        ("https://example.com/myxvideosarchive", "url_word"),
        ("ftp://example.com/a", "url_scheme"),
        ("mailto:me@example.com", "url_scheme"),
        ("http://[broken/", None),
        ("pages/local.html", None),
        (None, None),
    ],
)
def test_addresses(judge: Judge, url: str | None, reason: str | None) -> None:
    found = judge(Document(text="x", id="a", metadata={} if url is None else {"url": url}))
    assert (found and found.partition(":")[0]) == reason


def test_a_list_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.txt: no such file: check the path"):
        Url(blocked_domains=str(tmp_path / "none.txt")).start()
