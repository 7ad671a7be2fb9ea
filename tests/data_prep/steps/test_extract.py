"""The main text of a page comes out, its menus do not, and a page that an engine cannot do costs that page alone."""

import subprocess
import sys

import psutil
import pytest
from datatrove.data import Document

from data_prep.steps import extract as module
from data_prep.steps.extract import Extract, unwrap

PAGE = """<!DOCTYPE html><html><head><title>茶の湯 - お茶のサイト</title><script>var x = "広告";</script></head><body>
<nav><ul><li><a href="/">ホーム</a></li><li><a href="/shop">買い物かご</a></li></ul></nav>
<main><article><h1>茶の湯の歴史</h1>
<p>茶の湯は、湯を沸かし、茶を点て、
   茶を振る舞う<b>行為</b>
   である。千利休が<a href="#">わび茶</a>を
   完成させた。 The tea ceremony
   is old.</p>
<p>次の段落も、読むに足りる長さの文章でなければ本文とは見なされないので、ここに少し長めに書いておく。</p>
<h2>手順</h2><ul><li>湯を沸かす</li><li>茶を点てる</li></ul>
<pre>for cup in cups:
    pour(cup)  # 茶
    # 碗
</pre>
</article></main>
<section class="comments"><p>いい記事ですね、と名を名乗らない読者が、少し長めの感想を書いた。</p></section>
<footer><p>Copyright 2024 お茶のサイト <a href="/terms">利用規約</a></p></footer></body></html>"""


def extract(page: str, html: bool = True, **options: object) -> tuple[str | None, Document]:
    document = Document(text=page, id="a", metadata={"html": True} if html else {})
    return Extract.model_validate({"step": "extract"} | options).start()(document), document


def test_a_page_becomes_its_main_text() -> None:
    reason, document = extract(PAGE)
    assert reason is None and document.metadata == {}
    assert document.text == (
        "茶の湯の歴史\n\n"
        "茶の湯は、湯を沸かし、茶を点て、茶を振る舞う行為である。千利休がわび茶を完成させた。 The tea ceremony is old.\n\n"
        "次の段落も、読むに足りる長さの文章でなければ本文とは見なされないので、ここに少し長めに書いておく。\n\n"
        "手順\n\n"
        "  • 湯を沸かす\n  • 茶を点てる\n"
        "for cup in cups:\n    pour(cup)  # 茶\n    # 碗"
    )


def test_lists_of_links_are_menus_and_other_lists_are_not() -> None:
    menu = '<UL class="x">\n <li><a href="/a">新着<b>一覧</b></a></li> <li><a href="/b">人気の記事</a>\n</UL>'
    content = "<ul><li>湯を沸かす</li><li>茶を点てる</li></ul>"
    reason, document = extract(f"<body><div>{menu}</div><div><p>{'手順は次の通り、多くはない。' * 9}</p>{content}</div>{menu}</body>")
    assert reason is None and document.text.endswith("多くはない。\n\n  • 湯を沸かす\n  • 茶を点てる")
    assert document.text.startswith("手順")


def test_trafilatura() -> None:
    reason, document = extract(PAGE, engine="trafilatura")
    assert reason is None
    assert "茶を振る舞う行為である。" in document.text and "手順" in document.text
    assert not any(word in document.text for word in ("買い物かご", "利用規約", "広告"))


def test_wraps_between_full_width_characters_are_joined() -> None:
    assert unwrap("これは\n  文。\r\n次") == "これは文。次"
    assert unwrap("<b>強い</b>\n語と\n<i>斜め</i>") == "<b>強い</b>語と<i>斜め</i>"
    for apart in ("日本\nABC", "ABC\n日本", "表</td>\n<td>の", "行<br>\nの", "<pre>一\n<b>二</b>\n三</pre>", "한국\n어"):
        assert unwrap(apart) == apart


def test_what_is_no_html_passes() -> None:
    text = "1 < 2\n<nav>not a menu</nav>"
    reason, document = extract(text, html=False)
    assert reason is None and document.text == text


@pytest.mark.parametrize("engine", ["resiliparse", "trafilatura"])
def test_a_page_without_text_is_dropped(engine: str) -> None:
    for page in ("", "<html><body><img src=x></body></html>"):
        assert extract(page, engine=engine)[0] == "no_text"


def test_a_page_that_is_too_hard_is_given_up_and_the_next_one_is_done() -> None:
    judge = Extract(timeout=5).start()
    assert judge(Document(text="<div>" * 300_000, id="a", metadata={"html": True})) == "timeout"  # minutes without a limit
    page = Document(text=PAGE + "<br>" * module.MANY_TAGS, id="b", metadata={"html": True})
    assert judge(page) is None and page.text.startswith("茶の湯の歴史")


@pytest.mark.parametrize("padding", ["", "<br>" * module.MANY_TAGS])  # here, and in the process beside
def test_an_engine_that_fails_costs_one_page(padding: str) -> None:
    reason, _ = extract("half a character \ud800" + padding)
    assert reason is not None and reason.startswith("not_parsed: ")


def test_an_engine_that_panics_costs_one_page(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As Rust libraries raise it."""

    def panic(html: str) -> str:
        if "trap" in html:
            raise PanicException("index out of bounds")
        return html

    monkeypatch.setattr(module, "_resiliparse", panic)
    assert extract("trap")[0] == "not_parsed: PanicException index out of bounds"


APART = """
import subprocess
import sys
import time
from datatrove.data import Document
from data_prep.steps.extract import Extract
Extract(engine="trafilatura").start()(Document(text="<p>x", id="a", metadata={"html": True}))
print("ready", flush=True)
time.sleep(60)
"""


def test_the_process_apart_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", APART], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    (apart,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs([apart], timeout=120)[1]
