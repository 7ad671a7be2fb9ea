"""Masks what points at a person: mail and IP addresses, telephone numbers, postal codes, numbers of cards and of My Number.

Rather a number too many left than a price, a date or a version masked: the rules ask for a form that little else has. In source code
much else has such a form (`q@k.mean(0)`, `logo@2x.png`, 16 digits): there a match has to stand as only an address or a number of a person
does.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Literal, get_args

from datatrove.data import Document

from data_prep.steps.step import Judge, Step, rewrite

Kind = Literal["mail", "ip", "card", "my_number", "postcode", "phone"]
Mask = Callable[[re.Match[str]], str | None]  # the replacement of what was found, or None to leave it

# A match begins at the end of what it cannot contain (lookbehind) and every repetition has a bound: the time grows with the text only.
# A placeholder stands for the digits that it hides: what they kept from matching stays as it is, so that a second pass finds nothing new.
NEW = "".join(f"(?<!<{kind}>)" for kind in ("mail", "ip", "card", "number", "postcode", "phone"))
HYPHEN = "[-‐‑‒–—―−－ーｰ]"
# A digit is that of ASCII or the full-width one; int() and \d know both.
NOT_INSIDE = rf"{NEW}(?<![A-Za-z\d_./=#])(?<![A-Za-z\d>]{HYPHEN})"
NO_MORE = rf"(?![A-Za-z\d_]|(?:{HYPHEN}|[.．])[\d<])"

ALPHANUMERIC = "A-Za-z0-9Ａ-Ｚａ-ｚ０-９"
AT = r"(?:[@＠]|\s?[\[(（［【<{]\s?(?:at|ＡＴ|アット(?:マーク)?|あっと(?:まーく)?)\s?[\])）］】>}]\s?)"
DOT = r"(?:[.．]|\s?[\[(（［【<{]\s?(?:dot|ドット|どっと)\s?[\])）］】>}]\s?)"
MAIL = re.compile(
    rf"(?<![{ALPHANUMERIC}._．%+@＠-]){NEW}[{ALPHANUMERIC}._．%+-]{{1,64}}+{AT}"
    rf"(?:[{ALPHANUMERIC}-]{{1,63}}{DOT}){{1,6}}[A-Za-zＡ-Ｚａ-ｚ]{{2,24}}(?![A-Za-zＡ-Ｚａ-ｚ@＠])",
    re.IGNORECASE,
)
NOT_INSIDE_IP = rf"{NEW}(?<![A-Za-z\d_.:-])(?<![A-Za-z\d>]{HYPHEN})(?<![A-Za-z]/)"  # Chrome/120.0.61.99
IPV4 = re.compile(NOT_INSIDE_IP + r"(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9A-Za-z_]|\.[0-9])")
VERSION = re.compile(r"(?:version|ver\.?|release|rev\.?|build|バージョン|ﾊﾞｰｼﾞｮﾝ|リビジョン)[\s:：]{0,3}\Z", re.IGNORECASE)
IPV6 = re.compile(NOT_INSIDE_IP + r"(?:[0-9A-Fa-f]{1,4}:){1,7}(?::?[0-9A-Fa-f]{1,4}){0,7}(?![A-Za-z0-9_:])")
IPV6_GLOBAL = ipaddress.ip_network("2000::/3")

CARD = re.compile(rf"{NOT_INSIDE}(?:(?:\d{{4}}[ -]?){{3}}\d{{4}}|\d{{4}}[ -]?\d{{6}}[ -]?\d{{5}}){NO_MORE}")
CARD_PREFIX = re.compile("4|5[1-5]|2[2-7]|3[47]|35|36|6011|65")
MY_NUMBER = re.compile(rf"((?:マイナンバー|個人番号)[^\d\n]{{0,6}})\d{{4}}(?:{HYPHEN}|\s)?\d{{4}}(?:{HYPHEN}|\s)?\d{{4}}(?!\d)")
POSTCODE = re.compile(rf"(〒\s?)\d{{3}}{HYPHEN}?\d{{4}}(?!\d)")

# 03-1234-5678, (03)1234-5678, 03(1234)5678, 090-1234-5678, 0120-123-456; without hyphens mobile telephones only.
JAPANESE = re.compile(
    rf"{NOT_INSIDE}(?:[(（][0０]\d{{1,4}}[)）] ?{HYPHEN}?|[0０]\d{{1,4}}(?:{HYPHEN}|[(（]))\d{{1,4}}(?:{HYPHEN}|[)）])\d{{3,4}}{NO_MORE}"
)
MOBILE = re.compile(rf"{NOT_INSIDE}[0０][5-9５-９][0０][ 　]?\d{{4}}[ 　]?\d{{4}}{NO_MORE}")
# +819012345678, +81-90-1234-5678, +81 (0)3 1234 5678
INTERNATIONAL = re.compile(
    rf"{NEW}(?<![\dA-Za-z_+.)\]])[+＋][1-9１-９]\d{{0,2}}(?:[-. －]?[(（]\d{{1,4}}[)）])?[-. －]?"
    rf"(?:\d{{6,14}}|\d{{1,5}}([-. －])\d{{2,4}}(?:\1\d{{2,4}}){{0,2}}){NO_MORE}"
)
AMERICAN = re.compile(rf"{NOT_INSIDE}(?:1[-. ])?(?:\([2-9]\d\d\)[-. ]?|[2-9]\d\d[-.])[2-9]\d\d[-.]\d{{4}}{NO_MORE}")
# Behind a word that says so, also without signs or with blanks.
SAID = re.compile(
    rf"((?<![A-Za-z])(?:tel|ＴＥＬ|fax|ＦＡＸ|℡|☎|📞|電話(?:番号)?|携帯(?:番号|電話)?|ファッ?クス|フリーダイヤル)[\s:：.．/／(（)）は]{{0,4}}?)"
    rf"(?:[0０]\d|[(（](?=\d{{1,5}}[)）])[0０]\d)(?:[ 　()（）]|{HYPHEN})?(?:\d(?:[ 　()（）]|{HYPHEN})?){{7,8}}\d(?!\d)",
    re.IGNORECASE,
)


def _ip(found: re.Match[str]) -> str | None:
    try:
        address = ipaddress.ip_address(found[0])
    except ValueError:
        return None
    if address.version == 6:
        return "<ip>" if address in IPV6_GLOBAL and address.is_global else None
    # Sections and versions have small numbers throughout; of the addresses that are given out, hardly one has.
    is_number = max(address.packed) <= 20 or VERSION.search(found.string, max(found.start() - 12, 0), found.start())
    return "<ip>" if address.is_global and not address.is_multicast and not is_number else None


def _card(found: re.Match[str]) -> str | None:
    """ISO/IEC 7812: a known issuer and the Luhn sum."""
    digits = _digits(found[0])
    luhn = sum(digit if place % 2 == 0 else digit * 2 - 9 * (digit > 4) for place, digit in enumerate(map(int, reversed(digits))))
    return "<card>" if luhn % 10 == 0 and CARD_PREFIX.match(digits) else None


def _japanese(found: re.Match[str]) -> str | None:
    """Ten digits for a place or a free call, eleven for a mobile or IP telephone."""
    digits = _digits(found[0])
    mobile = digits[1] in "56789" and digits[2] == "0" or digits.startswith("0800")
    return "<phone>" if len(digits) == (11 if mobile else 10) and digits[1] != "0" else None


def _international(found: re.Match[str]) -> str | None:
    return "<phone>" if 9 <= len(_digits(found[0])) <= 15 else None


# On code. A line that is a comment, or says whose address follows; what goes on behind an address when it was none.
COMMENT = re.compile(r"\s*(?:#|//|/?\*|;|--|%|<!--|\"\"\"|\'\'\'|\.\. )")
OWNER = re.compile(
    r"author|maintainer|contact|copyright|e-?mail|mailto:|(?:reported|reviewed|signed-off|tested)-by|committer|\([cC]\)|©|作者|著者|連絡|メール",
    re.IGNORECASE,
)
NO_ADDRESS = re.compile(r"\s*[(\[=]|[:/]\S|\.\w|-")
HOST = re.compile(
    r"(?:://|@|\b(?:\w+_)?(?:ip|ipv[46]|ip_?addr|addr|address|host|hostname|server|gateway|peer|dns|ssh|ping)s?\b[\"'\]]?\s*(?:=>|[=:(,])?\s*[\"'(]?)\Z",
    re.IGNORECASE,
)
PORT_OR_NET = re.compile(r"[:/]\d{1,5}\b")
LONGEST_LINE = 500  # characters that are looked at in front of an address
QUOTES = ("'", '"', "`")
NOBODY = ("git", "hg", "svn", "ssh", "noreply", "no-reply")


@cache
def _top_level_domains() -> frozenset[str]:
    from tldextract import TLDExtract

    return frozenset(TLDExtract(suffix_list_urls=()).tlds)  # those that it ships; else it asks the network for newer ones


def _is_quoted(found: re.Match[str]) -> bool:
    before, behind = found.string[found.start() - 1 : found.start()], found.string[found.end() : found.end() + 1]
    return before == behind and before in QUOTES


def _mail_in_code(found: re.Match[str]) -> str | None:
    """An address of a domain that may be, in <> or quotes, in a comment, or behind a word that says whose it is."""
    text, (name, _, domain) = found.string, found[0].partition("@")
    if not domain or domain != domain.lower() or name.lower() in NOBODY or NO_ADDRESS.match(text, found.end()):
        return None
    if domain.rpartition(".")[2] not in _top_level_domains() or not re.fullmatch(r"[\w.%+-]+", name, re.ASCII):
        return None
    first = max(found.start() - LONGEST_LINE, 0)
    line = text[max(text.rfind("\n", first, found.start()) + 1, first) : found.start()]
    in_brackets = line.endswith(("<", ">")) and text.startswith(("<", ">"), found.end())
    return "<mail>" if in_brackets or _is_quoted(found) or COMMENT.match(line) or OWNER.search(line) else None


def _ip_in_code(found: re.Match[str]) -> str | None:
    """One that a word, a scheme, a port or the size of a net makes one: four numbers may be a version."""
    is_host = HOST.search(found.string, max(found.start() - 40, 0), found.start()) or PORT_OR_NET.match(found.string, found.end())
    return _ip(found) if is_host or ":" in found[0] else None


def _card_in_code(found: re.Match[str]) -> str | None:
    """In groups with hyphens, or in quotes: one in ten constants, and rows of a dump, have the Luhn sum."""
    return _card(found) if "-" in found[0] or " " in found[0] and _is_quoted(found) else None


def _international_in_code(found: re.Match[str]) -> str | None:
    """With its hyphens: a constant may have a plus, and numbers may stand side by side."""
    return _international(found) if found[0].count("-") >= 2 else None


def _american_in_code(found: re.Match[str]) -> str | None:
    """In quotes, or with the area in brackets: else it is a difference of numbers."""
    return "<phone>" if "(" in found[0] or _is_quoted(found) else None


def _digits(text: str) -> str:
    return "".join(str(int(character)) for character in text if character.isdecimal())


def _always(placeholder: str) -> Mask:
    """Puts it in the place of all but the first group, which is the word in front."""
    return lambda found: (found[1] if found.re.groups else "") + placeholder


# What the rules of a kind have in common that can be found fast; they look at its neighbourhood of so many characters only.
NUMBER = re.compile(r"\d[\d\s.()（）．‐‑‒–—―−－ーｰ-]{6,}"), 24
AT_SIGN = re.compile(r"[@＠\[(（［【<{](?:(?<=[@＠])|\s?(?:at|AT|At|ＡＴ|アット|あっと))"), 256
Rules = dict[Kind, list[tuple[tuple[re.Pattern[str], int], re.Pattern[str], Mask]]]
RULES: Rules = {
    "mail": [(AT_SIGN, MAIL, _always("<mail>"))],
    "ip": [((re.compile(r"\.\d{1,3}\.\d"), 16), IPV4, _ip), ((re.compile(":[0-9A-Fa-f]{0,4}:"), 40), IPV6, _ip)],
    "card": [(NUMBER, CARD, _card)],
    "my_number": [((re.compile("マイナンバー|個人番号"), 32), MY_NUMBER, _always("<number>"))],
    "postcode": [((re.compile("〒"), 12), POSTCODE, _always("<postcode>"))],
    "phone": [
        (NUMBER, SAID, _always("<phone>")),
        (NUMBER, JAPANESE, _japanese),
        (NUMBER, MOBILE, _always("<phone>")),
        (NUMBER, INTERNATIONAL, _international),
        (NUMBER, AMERICAN, _always("<phone>")),
    ],
}
RULES_ON_CODE = RULES | {
    "mail": [(AT_SIGN, MAIL, _mail_in_code)],
    "ip": [(hint, pattern, _ip_in_code) for hint, pattern, _ in RULES["ip"]],
    "card": [(NUMBER, CARD, _card_in_code)],
    "phone": [
        (NUMBER, SAID, _always("<phone>")),
        (NUMBER, JAPANESE, _japanese),
        (NUMBER, INTERNATIONAL, _international_in_code),
        (NUMBER, AMERICAN, _american_in_code),
    ],
}


class Pii(Step):
    """Rewrites each text with <mail>, <ip>, <card>, <number>, <postcode> and <phone>; metadata["pii"] counts them by kind. Drops none.

    Private, local and reserved IP addresses stay. On code (`kind: code`) only what is certain is masked. The placeholders are no
    tokenizer's control tokens and no rule finds them again.
    """

    step: Literal["pii"] = "pii"
    kinds: tuple[Kind, ...] = get_args(Kind)
    """What is masked."""

    def start(self) -> Judge:
        return self._judge

    def _judge(self, document: Document) -> None:
        counts: Counter[str] = Counter()
        rules = RULES_ON_CODE if document.metadata.get("kind") == "code" else RULES
        rewrite(document, lambda text: self._mask(text, rules, counts))
        if counts:
            document.metadata["pii"] = dict(counts)

    def _mask(self, text: str, rules: Rules, counts: Counter[str]) -> str:
        found = sorted(self._find(text, rules))
        if not found:
            return text
        pieces: list[str] = []
        end = 0
        for start, minus_length, kind, replacement in found:
            if start >= end:  # of two that overlap the first one, of two that begin together the longer one
                pieces += text[end:start], replacement
                end = start - minus_length
                counts[kind] += 1
        return "".join(pieces) + text[end:]

    def _find(self, text: str, rules: Rules) -> Iterator[tuple[int, int, Kind, str]]:
        """Yields (start, minus the length, kind, replacement)."""
        places: dict[tuple[re.Pattern[str], int], list[tuple[int, int]]] = {}
        for kind in self.kinds:
            for hint, pattern, replacement in rules[kind]:
                if hint not in places:
                    places[hint] = list(_places(*hint, text))
                for start, end in places[hint]:
                    for found in pattern.finditer(text, start, end):
                        masked = replacement(found)
                        if masked is not None:
                            yield found.start(), found.start() - found.end(), kind, masked


def _places(hint: re.Pattern[str], margin: int, text: str) -> Iterator[tuple[int, int]]:
    """Where the hint is found with the margin around it; overlapping ones as one."""
    start = end = 0
    for found in hint.finditer(text):
        if found.start() - margin > end:
            if end:
                yield start, end
            start = max(found.start() - margin, 0)
        end = found.end() + margin
    if end:
        yield start, end
