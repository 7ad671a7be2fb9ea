"""The main text of a page comes out, its menus do not, and a page that an engine cannot do costs that page alone."""

import re
import subprocess
import sys

import psutil
import pytest
from datatrove.data import Document
from hypothesis import given, settings
from hypothesis import strategies as st

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


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p><a>東京</a>と<a>大阪</a>。</p>", "東京と大阪。"),
        ("価格：<span>5</span><span>円</span>です", "価格：5円です"),
        ("<h2>序</h2><table><tr><td>春<td>&#26149;<td>&#x6625<td> 夏\n</table>", "序\n\n春\t\t春\t\t春\t\t夏"),
        ("<p>彼は<em>私</em>の<strong>夫</strong>です。</p>", "彼は私の夫です。"),
        ("<p>あ<!-- x -->い<wbr>う&euro;<b>가</b><i>ก</i><q>※</q></p>", "あいう€가ก※"),
        ("春", "春"),
        ("春<p>夏", "春\n\n夏"),
        ("<dl><dt>語<dd>意</dl><x-y>者</x-y><details><summary>概</summary>要</details>", "語\n意\n者\n概要"),
        ("<p>会議は<time datetime=2024-05-01>5月</time>に開く。</p>", "会議は5月に開く。"),
        ("<p><a rel=author>山田</a>が書いた<b itemprop='author'>夏目</b>の本。</p>", "山田が書いた夏目の本。"),
        ("<blockquote><p>吾輩は</p><footer>— <cite>夏目</cite></footer></blockquote><p>後</p>", "吾輩は\n\n— 夏目\n\n後"),
        ("<figure><img alt=絵><figcaption>図</figcaption></figure><label>問</label><input value=答>", "図\n問"),
        ("<main><div><div><div><p class=x><a>東京</a>と<a>大阪</a>。</p></div></div></div></main>", "東京と大阪。"),
        ("<div class=a><div class=b><div class=c><a>東京</a>と<a>大阪</a>。</div></div></div>", "東京と大阪。"),
        ("<main><div><article><p><a>東京都千代田区</a>の</p></article></div></main>", "東京都千代田区の"),
        ("<ul><li>湯を沸かす</ul>", "• 湯を沸かす"),
        ("<ul><li>茶碗</li><li><a>茶筅</a></li><li>5</li></ul>", "• 茶碗\n  • 茶筅\n  • 5"),
        ("<ul><li><a>東京</a>は首都<li><a>大阪</a>は都市</ul>", "• 東京は首都\n  • 大阪は都市"),
        ("<menu><li>甲<menu><li>乙</menu></menu><p>後", "• 甲\n    • 乙\n\n後"),
        ("<ul><li>甲<p>後", "• 甲\n\n    後"),
        ("<p>😀<b>𠮷</b><i>Ω</i><u>×</u><s>々</s>50<span>%</span>&#x3000;<b>「</b>本<b>」</b></p>", "😀𠮷Ω×々50%\u3000「本」"),
        ("<p>e<b>\u0301</b>か<b>\u3099</b>한<b>국</b>ก<b>า</b></p>", "e\u0301か\u3099한국กา"),
        ("<math><mi>x</mi><semantics><mo>=</mo><annotation>=</annotation></semantics></math><dialog open>対</dialog>", "x=対"),
        ("<p>A<td>ª</td></p>", "Aª"),  # no cell outside of a table: its text joins what is before it
        ("<p>" + "<b><i>" * 5_000 + "深い", "深い"),
    ],
)
def test_no_text_is_lost_for_its_form(page: str, text: str) -> None:
    assert extract(page)[1].text == text
    reason, document = extract(f"<!DOCTYPE html><html><head><title>題</title></head><body>{page}</body></html>")
    assert reason is None and document.text == text


@pytest.mark.parametrize(
    "page",
    [
        "<ul><li><a>茶碗</a></li><li>(<a>茶<b>筅</b></a>)&nbsp;3</li></ul>",
        "<ul><li><a>茶道具</a><ul><li><a>茶碗</a><li><a>茶筅</a></ul></li></ul>",
        "<div><a>戻る</a> | <a>上へ</a></div>",
        "<p>¶</p><i>\ue001</i><i>&#xe001;</i><a>&para;</a>",
        "<nav>春</nav><p hidden>夏</p><noscript>秋</noscript><select><option>冬</select>",
        "<noscript><p>春</p></noscript><title>夏</title><dialog>秋</dialog><canvas>冬</canvas>",
        "<template>春</template><svg><text>夏</text></svg><datalist><option>秋</datalist><meter>冬</meter>",
    ],
)
def test_menus_icons_and_what_is_hidden_are_left_out(page: str) -> None:
    assert extract(page + "<p>後に続く文。</p>")[1].text == "後に続く文。"


TEXT = st.text(st.characters(categories=["L", "Nl", "Po", "Sc", "Sm"], exclude_characters="¶<>&•"), min_size=1, max_size=3)
TEXTS = TEXT | st.sampled_from(["円", "と", "春", "。", "※", "€", "가", "ก", "é", "𠮷", "終わり"])


def in_tag(tag: str, children: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return children.map(lambda inside: f"<{tag}>{inside}</{tag.split()[0]}>")


def joined(parts: st.SearchStrategy[str], least: int = 1) -> st.SearchStrategy[str]:
    return st.lists(parts, min_size=least, max_size=4).map("".join)


SPACES = st.sampled_from(["", " ", "\n  "])
PLAIN = st.tuples(SPACES, TEXTS, SPACES).map("".join) | TEXTS.map(lambda text: "".join(f"&#{ord(character)};" for character in text))
SPAN = st.recursive(
    PLAIN | st.sampled_from(["<br>", "<wbr>", "<!-- x -->", "<img alt=x>"]),
    lambda inner: st.sampled_from(
        ["a href=x", "b", "bdi", "code", "em", "font size=1", "mark", "q", "small", "span class=x", "sub", "sup", "time", "u", "x-y"]
    ).flatmap(lambda tag: in_tag(tag, joined(inner))),
    max_leaves=6,
)
WORD = st.text(st.characters(categories=["L"]), min_size=1, max_size=2)  # that is no link, without which a list or a box may be a menu
LINE = st.tuples(WORD, joined(SPAN, 0)).map("".join)
BLOCK = st.recursive(
    st.sampled_from(["p", "h1", "h2", "h6", "address", "center", "figcaption", "label", "pre", "summary", "td", "th", "dt", "dd"]).flatmap(
        lambda tag: in_tag(tag, LINE)
    ),
    lambda inner: st.one_of(
        st.sampled_from(["article", "blockquote", "details", "div", "div class=x", "figure", "main", "section", "x-box"]).flatmap(
            lambda tag: in_tag(tag, st.tuples(LINE, joined(inner)).map("".join))
        ),
        st.sampled_from(["ul", "ol", "menu"]).flatmap(lambda tag: in_tag(tag, joined(in_tag("li", st.tuples(LINE, inner).map("".join))))),
        in_tag("table", in_tag("tr", joined(in_tag("td", LINE)))),
        in_tag("dl", joined(in_tag("dt", LINE) | in_tag("dd", LINE | inner))),
    ),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(st.tuples(LINE | st.just(""), joined(BLOCK), LINE | st.just("")).map("".join))
def test_main_text_is_the_text_nodes_in_their_order(page: str) -> None:
    from resiliparse.parse.html import HTMLTree

    body = HTMLTree.parse(page).body
    assert body is not None
    lines = (re.sub(r"^(• |\d+\. )+", "", line.strip()) for line in extract(page)[1].text.split("\n"))
    assert "".join("".join(lines).split()) == "".join((body.text or "").split())


@pytest.mark.parametrize("engine", ["resiliparse", "trafilatura"])
@pytest.mark.parametrize(
    ("page", "dropped", "in_parentheses"),
    [
        ("<ruby>漢字<rt>かんじ</rt></ruby>を読む。", "漢字を読む。", "漢字（かんじ）を読む。"),
        ("わたし<ruby>本<rt>ほん</rt>無<rt>む</rt></ruby>。", "わたし本無。", "わたし本（ほん）無（む）。"),
        ("<RUBY>漢<RP>（</RP><RT>かん</RT><RP>）</RP>字<RP>（</RP><RT>じ</RT><RP>）</RP></RUBY>", "漢字", "漢（かん）字（じ）"),
        ("<ruby><rb>漢<rb>字<rp>(<rt>かん<rt>じ<rp>)</ruby>だ", "漢字だ", "漢字（かんじ）だ"),
        ("<ruby>\n<rb>漢字</rb>\n<rp>（</rp><rt><b>かん</b>じ</rt><rp>）</rp>\n</ruby>を", "漢字を", "漢字（かんじ）を"),
        ("<ruby>漢字<rt>かんじ</rt><rtc>kanji</rtc></ruby>を", "漢字を", "漢字（かんじ）（kanji）を"),
        ("<ruby><ruby>漢<rt>かん</rt></ruby><rt>から</rt></ruby>", "漢", "漢（かん）（から）"),
        ("<ruby>送<rt>おく</rt>り<rt></rt></ruby>仮名", "送り仮名", "送（おく）り仮名"),
        ("<ruBy>漢<rT>かん</rT></ruBy>", "漢", "漢（かん）"),
        ("<h1><a><ruby><rb>東</rb><rb>京</rb><rt>とう</rt><rt>きょう</rt></ruby></a></h1>", "東京", "東京（とうきょう）"),
        ("<ruby>漢<rt>かん字<rt>じ</ruby>", "漢", "漢（かん字じ）"),  # as browsers read what has no end tag
    ],
)
def test_ruby(engine: str, page: str, dropped: str, in_parentheses: str) -> None:
    around = "ここは、読むに足りる長さの文章でなければ本文とは見なされないので、少し長めに書いておく段落である。"
    for ruby, text in (("drop", dropped), ("parentheses", in_parentheses)):
        _, document = extract(f"<article><p>{around}</p><p>{page}</p><p>{around}</p></article>", engine=engine, ruby=ruby)
        assert "".join(document.text.split()) == around + text + around


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
    assert judge(Document(text="<ul>" * 300_000, id="a", metadata={"html": True})) == "timeout"  # minutes without a limit
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
