"""Pages dropped by their address: block lists of sites and words (adult, gambling and the like), those that FineWeb used.

The lists ship with datatrove: the blacklists of Université Toulouse 1 Capitole, and its authors' own words. Nothing is downloaded.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any, Literal

from datatrove.data import Document

from data_prep.steps.step import Judge, Step
from mujina.files import read_texts

SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.IGNORECASE)
# What datatrove's filter says, and our reason.
REASONS = {
    "domain": "url_domain",
    "subdomain": "url_domain",
    "url": "url_page",
    "hard_blacklisted": "url_word",
    "soft_blacklisted": "url_word",
    "blacklisted_subword": "url_word",
}


class Url(Step):
    """Drops documents by their address: block lists of sites, pages and words.

    Documents without a url pass, and so do those of local files, whose url is a path.
    Dropped: url_domain, url_page, url_word, and url_scheme (neither http nor https). The lists take 0.8 GB in each process.
    """

    step: Literal["url"] = "url"
    blocked_domains: str | None = None
    """A file of further domains or hosts, one a line, # before a comment; null: the built-in lists alone."""

    def files(self) -> list[Path]:
        return [Path(self.blocked_domains)] if self.blocked_domains else []

    def start(self) -> Judge:
        filter = _filter_of(self.blocked_domains)

        def judge(document: Document) -> str | None:
            url = document.metadata.get("url")
            scheme = url and SCHEME.match(url)
            if not scheme:
                return None
            if scheme[1].lower() not in ("http", "https"):
                return f"url_scheme: {scheme[1]}"
            verdict = filter.filter(document)
            return None if verdict is True else f"{REASONS[verdict[1]]}: {url}"

        return judge


@cache
def _filter_of(blocked_domains: str | None) -> Any:
    """Kept for the next rank of this process: reading the lists takes seconds."""
    from datatrove.pipeline.filters.url_filter import URLFilter
    from tldextract import TLDExtract

    filter = URLFilter(extra_domains=_domains_of(blocked_domains))
    filter.tldextractor = TLDExtract(suffix_list_urls=())  # the suffixes that it ships; else it asks the network for newer ones
    filter.download_data()  # reads the lists, which it has
    return filter


def _domains_of(path: str | None) -> list[str]:
    if path is None:
        return []
    lines = (line.partition("#")[0].strip().lower() for line in read_texts(path))
    return [line for line in lines if line]
