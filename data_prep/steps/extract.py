"""HTML pages to their main text, with paragraphs, headings, lists and code blocks; menus, footers and comments are left out.

What the reader did not mark as HTML passes unchanged. Engines: resiliparse (Rust, the default) and trafilatura, which is an
order of magnitude slower (benchmarks/extraction.py) and leaves out more.
"""

import re
from functools import cache
from typing import Literal

from datatrove.data import Document
from datatrove.pipeline.extractors.base import ExtractorSandbox
from pydantic import Field

from data_prep.steps.step import Judge, Step
from mujina.processes import end_with_parent

# Source lines are wrapped in HTML. Japanese and Chinese have no spaces between words: a wrap between two full-width characters is
# nothing, also where an element of the line ends before it or starts after it.
WIDE = r"[\u3000-\u9fff\uff00-\uffef]"
INLINE = r"(?:a|b|code|em|font|i|mark|small|span|strong|u)\b[^<>]*>"
WRAP = re.compile(rf"(?<={WIDE})(?:((?:</{INLINE})*)[ \t]*\r?\n\s*(?={WIDE})|[ \t]*\r?\n\s*(?=(?:<{INLINE})+{WIDE}))")
PREFORMATTED = re.compile(r"(<[pP][rR][eE]\b.*?</[pP][rR][eE])", re.DOTALL)
# resiliparse takes any list that lies close below the body for a menu. Put deeper, only lists of links are menus.
CONTENT = re.compile(r"(<(?:body|main|article)\b[^>]*>)", re.IGNORECASE)
TRAILING_SPACE = re.compile(r"[ \t\xa0]+$", re.MULTILINE)
BLANK_LINES = re.compile(r"\n{3,}")


# Either engine's time grows with the square of the depth of nesting: 8 s for so many elements, one in the other.
MANY_TAGS = 20_000


class Extract(Step):
    """HTML to its main text.

    Dropped: no_text, timeout, and not_parsed with the engine's error.
    """

    step: Literal["extract"] = "extract"
    engine: Literal["resiliparse", "trafilatura"] = "resiliparse"
    """Resiliparse is fast; trafilatura is slower and takes less of what is not the text."""
    timeout: float = Field(default=10, gt=0)
    """Seconds that a page may take which is not extracted at once (trafilatura's, and those of many tags)."""

    def start(self) -> Judge:
        engine = {"resiliparse": _resiliparse, "trafilatura": _trafilatura}[self.engine]
        engine("<p>loads the library before there are processes</p>")
        sandbox = _sandbox(self.engine, self.timeout)

        def guarded(html: str) -> str | BaseException:
            try:
                return engine(html)
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
            html = unwrap(document.text)
            try:
                direct = self.engine == "resiliparse" and html.count("<") < MANY_TAGS
                result = guarded(html) if direct else sandbox.process_document(html, apart)
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
def _sandbox(engine: str, timeout: float) -> ExtractorSandbox:
    """A process of its own, since only so a page can be given up; kept for the next rank of this process."""
    return ExtractorSandbox(timeout=timeout)


def unwrap(html: str) -> str:
    """HTML whose line breaks between full-width characters are gone, preformatted text aside."""
    if html.isascii():
        return html
    parts = PREFORMATTED.split(html)
    parts[::2] = [WRAP.sub(r"\1", part) for part in parts[::2]]
    return "".join(parts)


def _resiliparse(html: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    html = CONTENT.sub(r"\1<div><div><div>", html)
    text = extract_plain_text(html, main_content=True, alt_texts=False, comments=False)
    return BLANK_LINES.sub("\n\n", TRAILING_SPACE.sub("", text)).strip()


def _trafilatura(html: str) -> str:
    from trafilatura import extract

    # Without `deduplicate`, which remembers earlier pages: what comes of a page must not depend on those before it.
    return extract(html, favor_precision=True, include_comments=False) or ""
