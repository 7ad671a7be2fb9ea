"""What points at a person is masked, in the forms that Japanese and English pages have; what looks alike stays."""

import subprocess
import sys

import pytest
from datatrove.data import Document
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.steps.pii import Pii

MASKED = {
    "mail": "foo.bar+x@example.co.jp foo＠example．jp ｆｏｏ＠ｅｘａｍｐｌｅ．ｊｐ "
    "foo[at]example.jp foo(at)example(dot)com foo【アット】example.jp",
    "ip": "203.104.209.6 2001:4860:4860::8888",
    "card": "4111111111111111 4111-1111-1111-1111 378282246310005",
    "phone": "03-1234-5678 (03)1234-5678 03(1234)5678 0465-12-3456 090-1234-5678 09012345678 0120-123-456 0800-123-4567 "
    "０９０－１２３４－５６７８ ０３ー１２３４ー５６７８ "
    "+81-90-1234-5678 +819012345678 (212)555-0123 212-555-0123 1-800-555-0199 +442079460958",
}
LEFT = """2024-11-21 03-12-2024 1990-2024 10-20-30 2024年11月21日 08:00-17:00 12:34:56 1,234,567円 +10,000,000 +0900 3.14159265358979
978-4-12-345678-9 4-06-123456-7 20241121123456 1234567890 A03-1234-5678 ABC-090-1234-5678 1234567812345670 4111111111111112
1.2.3.4 v11.22.33.44 libfoo-11.22.33.44 256.300.1.1 1.3.6.1.4.1.311 120.0.6099.109 192.168.1.10 10.20.30.40 127.0.0.1 224.0.0.251
fe80::1 ::1 Chrome/120.40.61.99 std::vector 00:1b:44:11:3a:b7 dead::beef @property A@B.T ＠cosme a@b 100-0001 0123-4567 0000-0000-0000"""


def mask(text: str) -> tuple[str, dict[str, int]]:
    document = Document(text=text, id="")
    assert Pii().start()(document) is None
    return document.text, document.metadata.get("pii", {})


@pytest.mark.parametrize(("kind", "form"), [(kind, form) for kind, forms in MASKED.items() for form in forms.split(" ")])
@pytest.mark.parametrize(("before", "behind"), [("", ""), ("連絡先は", "です。"), ("(see ", ".)"), ("\n", "\n"), ("A、", "、B")])
def test_each_form_is_masked_wherever_it_stands(kind: str, form: str, before: str, behind: str) -> None:
    assert mask(before + form + behind) == (f"{before}<{kind}>{behind}", {kind: 1})


@pytest.mark.parametrize("form", LEFT.split())
@pytest.mark.parametrize(("before", "behind"), [("", ""), ("これは", "です。"), ("It is ", ", yes.")])
def test_what_looks_alike_stays(form: str, before: str, behind: str) -> None:
    assert mask(before + form + behind) == (before + form + behind, {})


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("TEL 03-1234-5678", "TEL <phone>"),
        ("TEL0312345678まで", "TEL<phone>まで"),
        ("Tel:(03)1234-5678", "Tel:<phone>"),
        ("電話（03-1234-5678）", "電話（<phone>）"),
        ("電話番号：03 1234 5678", "電話番号：<phone>"),
        ("〒100-0001 東京都", "〒<postcode> 東京都"),
        ("〒１００－０００１", "〒<postcode>"),
        ("マイナンバー：1234 5678 9012", "マイナンバー：<number>"),
        ("Version 203.104.209.6", "Version 203.104.209.6"),
        ("http://203.104.209.6/a サーバー203.104.209.6:80", "http://<ip>/a サーバー<ip>:80"),
        ("03-1234-5678／090-1234-5678", "<phone>／<phone>"),
    ],
)
def test_the_word_in_front_tells_and_stays(text: str, masked: str) -> None:
    assert mask(text)[0] == masked


@pytest.mark.parametrize(
    "line",
    [
        "attention = q@k.transpose(-2, -1) / d ** 0.5",
        "Y = X@W.mean(axis=0) + A@B.to",
        "scores = q@k.mm",
        "# scores = q@k.transpose(-2, -1)",
        'icon = "img/logo@2x.png"',
        "background: url(logo@2x.png) url('icon@3x.gif')",
        "git clone git@github.com:owner/repo.git",
        'remote = "git@gitlab.example.com"',
        "url = ssh://git@host.example.org/repo.git",
        "object@meta.data$nCount <- object@active.name",
        "return this@MainActivity.name",
        "npm install react@next.js lodash@latest",
        'agent = "Mozilla/5.0 Chrome/120.0.61.99 Safari/537.36"',
        'version = "120.40.61.99"',
        "OID = 1.3.6.1.4.1.311 + 120.40.61.99",
        "offset = +1700000000",
        "[+100 2000 3000]",
        "+12 345 678 901",
        "x = 212-555-0123 + 800-555-0199",
        "SEED = 4111111111111111",
        "const KEY = 5555555555554444L;",
        'id = "4111111111111111"',
        "00000010: 4111 1111 1111 1111 0000",
        "int phone = 9012345678, motel0312345678 = 1;",
        "Intel 0312345678",
    ],
)
def test_on_code_only_what_is_certain_is_masked(line: str) -> None:
    for text in (line, f"import os\n{line}\nprint(1)\n", f"    {line}  # why"):
        document = Document(text=text, id="", metadata={"kind": "code"})
        Pii().start()(document)
        assert document.text == text


@pytest.mark.parametrize(
    ("line", "masked"),
    [
        ("# Author: Hanako Yamada <hanako.yamada@example.co.jp>", "# Author: Hanako Yamada <<mail>>"),
        ('__email__ = "foo@example.com"', '__email__ = "<mail>"'),
        ("// foo.bar@example.org, please ask", "// <mail>, please ask"),
        (" * @author foo@example.com", " * @author <mail>"),
        ("Copyright (c) 2020 foo@example.com", "Copyright (c) 2020 <mail>"),
        ('<a href="mailto:foo@example.com">', '<a href="mailto:<mail>">'),
        ("Signed-off-by: Foo <foo@example.com>", "Signed-off-by: Foo <<mail>>"),
        ('host = "203.104.209.6"', 'host = "<ip>"'),
        ("ping 203.104.209.6", "ping <ip>"),
        ("http://203.104.209.6/a", "http://<ip>/a"),
        ("connect(203.104.209.6:8080)", "connect(<ip>:8080)"),
        ("nameserver_ip: 203.104.209.6", "nameserver_ip: <ip>"),
        ("2001:4860:4860::8888", "<ip>"),
        ("<li>foo@example.com</li>", "<li><mail></li>"),
        ('card = "4111-1111-1111-1111"', 'card = "<card>"'),
        ('card = "4111 1111 1111 1111"', 'card = "<card>"'),
        ("# TEL: 03-1234-5678", "# TEL: <phone>"),
        ("// (212) 555-0123", "// <phone>"),
        ('call("1-800-555-0199")', 'call("<phone>")'),
        ("# +81-90-1234-5678", "# <phone>"),
        ("# 〒100-0001", "# 〒<postcode>"),
    ],
)
def test_on_code_what_is_certain_is_masked(line: str, masked: str) -> None:
    document = Document(text=line, id="", metadata={"kind": "code"})
    Pii().start()(document)
    assert document.text == masked


def test_all_turns_of_a_dialogue_and_only_the_kinds_asked_for() -> None:
    turns = [{"role": "user", "content": "a@b.jp c@d.jp"}, {"role": "assistant", "content": "TEL 03-1234-5678"}]
    document = Document(text="", id="", metadata={"messages": turns})
    Pii(kinds=("mail",)).start()(document)
    assert [turn["content"] for turn in document.metadata["messages"]] == ["<mail> <mail>", "TEL 03-1234-5678"]
    assert document.metadata["pii"] == {"mail": 2}
    assert document.text == "<mail> <mail>\nTEL 03-1234-5678"


FRAGMENTS = [*" ".join(MASKED.values()).split(" "), *LEFT.split(), *"〒 TEL ( ) - － . @ + 0 1 a は <mail> : \n".split(" ")]


@settings(derandomize=True)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=8), st.sampled_from((" ", "、", "は", "\n", "/")))
def test_a_masked_text_is_masked_already(fragments: list[str], between: str) -> None:
    text = between.join(fragments)
    once, _ = mask(text)
    assert mask(once) == (once, {})


def test_hostile_texts_end() -> None:
    """A megabyte of almost-matches each. Quadratic time would be hours."""
    script = """
from datatrove.data import Document
from data_prep.steps.pii import Pii
for piece in "a a. a@ a@a. a@b.com, @ [at] 1 1- 03- (03) +1_ +1-1 1. a: 1:1: TEL 0_ マイナンバー 〒1 1_1_".split():
    piece = piece.replace("_", " ")
    for kind in ("web", "code") if piece in ("a@b.com,", "1.", "1-", "1") else ("web",):
        Pii().start()(Document(text=piece * (1_000_000 // len(piece)), id="", metadata={"kind": kind}))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
