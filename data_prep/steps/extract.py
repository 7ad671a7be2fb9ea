"""HTML pages to their main text, with paragraphs, headings, lists and code blocks; menus, footers and comments are left out.

What the reader did not mark as HTML passes unchanged. Engines: resiliparse (Rust, the default) and trafilatura, which is an
order of magnitude slower (benchmarks/extraction.py) and leaves out more.
"""

import re
from functools import cache
from html import unescape
from typing import Literal

from datatrove.data import Document
from datatrove.pipeline.extractors.base import ExtractorSandbox
from pydantic import Field

from data_prep.steps.step import Judge, Step
from mujina.processes import end_with_parent

# Source lines are wrapped in HTML. Japanese and Chinese have no spaces between words: a wrap between two full-width characters is
# nothing, also where elements of the line end or start between them.
WIDE = r"[\u3000-\u9fff\uff00-\uffef]"
INLINE = "a|b|code|em|font|i|mark|small|span|strong|u"
INLINE = rf"</?(?:{INLINE}|{INLINE.upper()})\b[^<>]*+>"  # at twice the speed of IGNORECASE
WRAP = re.compile(rf"\n\s*+(?=(?:{INLINE})*+{WIDE})")  # from the line end on: they are few
WRAPPED = re.compile(rf"{WIDE}(?:{INLINE})*+\Z")
PREFORMATTED = re.compile(r"(<(?:pre|PRE)\b[^<]*+(?:<(?!/?(?:pre|PRE)\b)[^<]*+)*+</(?:pre|PRE))")
BLANK_LINES = re.compile(r"\n{3,}")

HAS_RUBY = re.compile("<[rR][uU][bB][yY]")
RUBY = re.compile(r"</?(?:rb|ruby)(?=[\s/>])[^>]*+>", re.IGNORECASE)
PAD, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"  # of those that Unicode keeps for such use: they are in no text

# A text node of three bytes of UTF-8, of which the last is no ASCII, is an icon to resiliparse 2.0.1: 春, aé. Those of icon fonts (U+E000
# to U+F8FF) are, and are not among these.
THREE, TWO, ASCII = "\u0800-\ud7ff\uf900-\ufdcf\ufdf0-\uffff", "\x80-\u07ff", "!-%'-;=?-~"
BLANK = r"(?:\s|&#?\w++;?)*+"
# Two bytes may become three: a tag that is ignored, such as a td outside of a table, joins A and ª.
SHORT = re.compile(rf">(?=\s*+(?:[&{THREE}{TWO}]|[{ASCII}][&{TWO}]))({BLANK}(?:[{THREE}{TWO}]|[{ASCII}][{TWO}]?+)?+{BLANK})(?=<|\Z)")
# Of an author or a date, which may stand in a sentence; and the source below a quotation, which is no page's footer.
METADATA = re.compile(
    r"(<(?:a|b|cite|em|i|span|strong)\b[^<>]*\s)(?:itemprop|rel)(?=\s*=\s*[\"']?(?:author|datePublished|tag|url)\b)", re.IGNORECASE
)
SOURCE = re.compile(r"<footer(\b[^>]*>(?:[^<]++|<(?!/?(?:blockquote|footer)\b))*+</)footer(?=\s*>\s*</blockquote)", re.IGNORECASE)
LIST = re.compile(r"<(/?)(?:ul|UL|menu|MENU)(?=[\s/>])[^>]*+>")
LINK_TAG, MENU_TAG = re.compile(r"<(/?)[aA](?=[\s/>])"), re.compile(r"<(/?)(?:menu|MENU)(?=[\s/>])")
# A menu is a list of which each item is links, or a `div` of nothing but links; figures and signs may be between them.
LINK = r"<a\b[^>]*+>(?:[^<]++|<(?!/?(?:a|li|ul|menu)\b)[^>]*+>)*+</a\s*>"
SIGNS = r"(?:[^<&\w。]++|\d++|&(?:nbsp|amp|lt|gt|laquo|raquo|middot|bull);|<(?!/?(?:{})\b)[^>]*+>)*+"
IN_ITEM, IN_BOX = SIGNS.format("a|li|ul|menu"), SIGNS.format("a|li|ul|menu|div|p|h[1-6]|d[dlt]|t[dhr]|table|ol")
MENU = re.compile(rf"<(ul|menu)\b[^>]*+>\s*+(?:<li\b[^>]*+>{IN_ITEM}(?:{LINK}{IN_ITEM})++(?:</li\s*>\s*+)?+)++</\1\s*>", re.IGNORECASE)
BOX = re.compile(rf"<[dD][iI][vV]\b[^>]*+>{IN_BOX}(?:{LINK}{IN_BOX}){{2,}}+</div\s*>", re.IGNORECASE)
# Without the pictures' own texts, and without what is entered into forms; their captions and labels are text. Nor what browsers do not
# show: the title, dialogs that are closed, the source of formulas, what stands for an element that the browser does not know.
SKIPPED = [
    *("img", "area", "object", "video", "audio", "embed", "svg", "textarea", "input", "button", "select", "option"),
    *("title", "datalist", "dialog:not([open])", "annotation", "annotation-xml", "canvas", "meter", "progress", "noembed", "noframes"),
]
# Text, as browsers with scripts have it: in the head its elements would begin the body.
NO_SCRIPT = re.compile(r"<noscript\b[^>]*+>(?:[^<]++|<(?!/?(?:noscript|script)\b))*+</noscript\s*+>", re.IGNORECASE)


# Either engine's time grows with the square of the depth of nesting: 8 s for so many elements, one in the other.
MANY_TAGS = 20_000


class Extract(Step):
    """HTML to its main text.

    Dropped: no_text, timeout, and not_parsed with the engine's error.
    """

    step: Literal["extract"] = "extract"
    engine: Literal["resiliparse", "trafilatura"] = "resiliparse"
    """Resiliparse is fast; trafilatura is slower and takes less of what is not the text."""
    ruby: Literal["drop", "parentheses"] = "drop"
    """Readings above words: left out, or in parentheses after them."""
    timeout: float = Field(default=10, gt=0)
    """Seconds that a page may take which is not extracted at once (trafilatura's, and those of many tags)."""

    def start(self) -> Judge:
        engine = {"resiliparse": _resiliparse, "trafilatura": _trafilatura}[self.engine]
        engine("<p>loads the library before there are processes</p>")
        sandbox = _sandbox(self.engine, self.ruby, self.timeout)

        def guarded(html: str) -> str | BaseException:
            try:
                return engine(unwrap(without_ruby(html, self.ruby)))
            except BaseException as error:
                if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # Rust's, which is no Exception
                    return RuntimeError(f"{type(error).__name__} {error}")
                raise

        def apart(html: str) -> str | BaseException:
            end_with_parent()
            return guarded(html)

        def judge(document: Document) -> str | None:
            if not document.metadata.pop("html", False):
                return None
            try:
                direct = self.engine == "resiliparse" and document.text.count("<") < MANY_TAGS
                result = guarded(document.text) if direct else sandbox.process_document(document.text, apart)
            except TimeoutError:
                return "timeout"
            except Exception as error:  # the engine's, which the sandbox raises, or its process died
                result = error
            if isinstance(result, Exception):
                return f"not_parsed: {result}"
            if not result:
                return "no_text"
            document.text = result
            return None

        return judge


@cache
def _sandbox(engine: str, ruby: str, timeout: float) -> ExtractorSandbox:
    """A process of its own, since only so a page can be given up; kept for the next rank of this process. It keeps its first function."""
    return ExtractorSandbox(timeout=timeout)


def without_ruby(html: str, ruby: Literal["drop", "parentheses"]) -> str:
    """HTML in which the readings of ruby are gone, or stand in parentheses after what they are of; the rest of it is plain text."""
    if not HAS_RUBY.search(html):
        return html
    from resiliparse.parse.html import HTMLTree

    document = HTMLTree.parse(html).document
    assert document is not None
    for node in document.query_selector_all("rp, rt, rtc")[:]:  # as a tuple: one by one takes the square of their number
        text = (node.text or "").strip()
        if ruby == "parentheses" and node.local_name != "rp" and text:
            node.before(document.create_text_node(f"{OPEN}{text}{CLOSE}" if node.local_name == "rt" else f"（{text}）"))
        node.remove()
    # The readings of single characters are one reading of the word.
    html = RUBY.sub("", re.sub(f"{CLOSE}\\s*{OPEN}", "", document.html))
    return html.replace(OPEN, "（").replace(CLOSE, "）")


def unwrap(html: str) -> str:
    """HTML whose line breaks between full-width characters are gone, preformatted text aside."""
    if html.isascii():
        return html
    parts = PREFORMATTED.split(html)
    parts[::2] = map(_unwrapped, parts[::2])
    return "".join(parts)


def _unwrapped(html: str) -> str:
    parts, start = [], 0
    for match in WRAP.finditer(html):
        end = match.start()
        while end > start and html[end - 1] in " \t\r":
            end -= 1
        if WRAPPED.search(html, max(start, end - (200 if html[end - 1 : end] == ">" else 1)), end):
            parts.append(html[start:end])
            start = match.end()
    return "".join([*parts, html[start:]])


def _resiliparse(html: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    text = extract_plain_text(
        _led_around(html), main_content=True, alt_texts=True, form_fields=True, comments=False, skip_elements=SKIPPED
    ).replace(PAD, "")
    return BLANK_LINES.sub("\n\n", "\n".join([line.rstrip(" \t\xa0") for line in text.split("\n")])).strip()


def _led_around(html: str) -> str:
    """A page of which resiliparse keeps all main text: it takes nothing in it for something else because of its form."""
    if "noscript" in html:
        html = NO_SCRIPT.sub("", html)
    if "<time" in html:  # dates in sentences
        html = html.replace("<time", "<span").replace("</time", "</span")
    if "itemprop=" in html or "rel=author" in html or 'rel="author' in html:
        html = METADATA.sub(r"\1data-was", html)
    if "<blockquote" in html and "<footer" in html:
        html = SOURCE.sub(r"<section\1section", html)
    # Elements in which links are most of the bytes: only those of links alone are menus.
    html = BOX.sub("", html)
    for name in ("div", "DIV", "article"):
        if f"<{name}" in html:
            html = html.replace(f"<{name}", "<section").replace(f"</{name}", "</section")
    html = _lists(html)
    # Short nodes. After a comment, so that there is a tag before the first one.
    return SHORT.sub(_padded, f"<!---->{html.replace(PAD, '')}")


def _lists(html: str) -> str:
    """A page without menus. resiliparse takes all lists for them that are close below the body, or a fifth of links."""
    parts: list[str] = []
    depth = start = done = 0
    for tag in LIST.finditer(html):
        if not tag[1]:
            start = start if depth else tag.start()
            depth += 1
        elif depth:
            depth -= 1
            if not depth:
                parts += html[done:start], _list(html[start : tag.end()])
                done = tag.end()
    if depth:  # never ended
        return "".join([*parts, html[done:start], _list(html[start:])])
    return "".join([*parts, html[done:]])


def _list(html: str) -> str:
    found = 1
    while found:
        html, found = MENU.subn("", html)
    if not html:
        return ""
    html = MENU_TAG.sub(r"<\1ul", LINK_TAG.sub(r"<\1span", html))
    return f"{'<section>' * 3}{html}{'</section>' * 3}"


def _padded(node: re.Match[str]) -> str:
    text = unescape(node[1]).strip(" \t\n\r\f")
    data = text.encode()
    is_sign = text == "¶" or "\ue000" <= text <= "\uf8ff"  # of a link to the place itself, of an icon font
    return node[0] + PAD if len(data) in (2, 3) and data[-1] >= 0x80 and not is_sign else node[0]


def _trafilatura(html: str) -> str:
    from trafilatura import extract

    # Without `deduplicate`, which remembers earlier pages: what comes of a page must not depend on those before it.
    return extract(html, favor_precision=True, include_comments=False) or ""
