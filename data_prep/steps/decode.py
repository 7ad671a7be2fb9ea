"""The bytes of a page become text, as browsers have it: encodings are those of WHATWG's Encoding Standard, and labels are its labels.

What is declared (a byte order mark, else the header, else the page's meta element or XML declaration) is a claim that the bytes must bear
out. In this order:

    byte order mark             UTF-8, UTF-16; UTF-16 without one is known by its markup
    seven bits and escapes      ISO-2022-JP, whatever is declared
    UTF-8 where it is valid     nothing else looks like it, but for a few characters of two bytes
    an East Asian encoding      that is declared and valid, unless another one makes far more common characters of the same bytes
    the same, not declared      the valid one that makes the most common characters, if they are a share that text has
    one byte a character        declared or detected, if the page is not nearly text in one of the above, and has words

Each is decoded strictly, and a page that is in none is damaged: nothing is ever replaced or left out, but for a character that the end of
the page cuts through, and NUL.
"""

import codecs
import re
from functools import cache
from unicodedata import category

from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

from data_prep.row import Fields

BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
META = re.compile(rb"<meta\b[^>]*?\bcharset\s*=\s*[\"']?\s*([\w.:-]+)|<\?xml\b[^>]*?\bencoding\s*=\s*[\"']([\w.:-]+)", re.IGNORECASE)
UTF_16 = re.compile(rb"(?:\s\0)*<\0[!-~]\0|((?:\0\s)*\0<\0[!-~])")
COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)
META_WITHIN = 4096  # bytes; the standard looks at 1024

# Python's codecs for what the standard means by the names that resiliparse gives to labels, and for labels that it does not know.
CODECS = {"shift_jis": "cp932", "gbk": "gb18030", "euc_kr": "cp949", "big5": "big5hkscs", "iso8859-11": "cp874"}
MORE_LABELS = {"x-mac-cyrillic": "mac_cyrillic", "x-mac-ukrainian": "mac_cyrillic"}
# Seven-bit encodings that the standard does not read, with what shows that a page is in one.
UNREAD = {"hz-gb-2312": b"~{", "iso-2022-kr": b"\x0e", "csiso2022kr": b"\x0e", "iso-2022-cn": b"\x0e", "utf-7": b"+"}

# The commonest characters of what is written in an East Asian encoding: a third of any text and more, and little of what the bytes of
# another encoding come out as. Signs are left out, since several encodings have them at the same place.
JAPANESE = (
    *map(chr, (*range(0x3041, 0x3094), *range(0x30A1, 0x30F7), 0x30FC)),
    *"日一国人年大十二本中長出三時行見月後前生五間上東四今金九入学高円子外八六下来気小七山話女北午百書先名川千水半男西電校語",
    *"会社業事者場自分部地手方同合理内的体化度対定代政市経法民全新実用力関発成動機公務最意主要京都県町村店品料物私何文字情報",
    *"無料開当次第作以下約明回表示",
)
SIMPLIFIED = (
    *"的一是不了在人有我他这中大来上个国和也子时道说出而要于就下得可你年生自会那后能对着事其里所去行过家十用发天如然作方成者",
    *"多日都三小军二无同么经法当起与好看学进种将还分此心前面又定见只主没公从网页首为等新们地",
)
TRADITIONAL = (
    *"的一是不了在人有我他這中大來上個國和也子時道說出而要於就下得可你年生自會那後能對著事其裡所去行過家十用發天如然作方成者",
    *"多日都三小軍二無同麼經法當起與好看學進種將還分此心前面又定見只主沒公從網頁首為等新們地",
)
HANGUL = tuple(
    "이다는을가에의고를하은로지도기한사리자시어나인서대아정으해그라일제만수있부전스보장주상여들구원소화비성것조과와요신오공동용"
    "관때유마치미우내국문글안녕습니"
)
COMMON = {
    codec: re.compile(f"[{''.join(characters)}]")
    for codec, characters in [
        ("cp932", JAPANESE),
        ("euc_jp", JAPANESE),
        ("gb18030", SIMPLIFIED),
        ("big5hkscs", TRADITIONAL),
        ("cp949", HANGUL),
    ]
}
NO_LETTERS = re.compile("[\x00-\x7f\u3000-\u303f\uff00-\uffef]+")  # signs, full-width ASCII and half-width kana among them
SCORED = 100_000  # letters of a page
COMMON_SHARE = 0.2  # of the letters, in what is not declared
LEAST_SHARE = 0.05  # of the letters, in what is
RUN = re.compile("[^\x00-\x7f]+")
C1 = re.compile("[\x80-\x9f]")
ESCAPE = re.compile(rb"\x1b(\([BJI]|\$[@B])")
CUT_ESCAPE = re.compile(rb"\x1b[$(]?\Z")
HIGH = bytes(byte + 0x80 if 0x21 <= byte <= 0x7E else 0x80 for byte in range(256))  # what is no part of a character stays none


def html_of(page: bytes, charset: str | None) -> Fields | str:
    """The fields `html` and `text` of a page whose header says `charset`, or why it has none."""
    labels = [label.strip(" '\"").lower() for label in (charset, _meta(page)) if label]
    text = _decoded(page, labels)
    if text is None:
        declared = f"declared: {', '.join(labels)}" if labels else "none is declared"
        return f"its bytes are text in no encoding ({declared}), so they are damaged or of several: fetch the page again"
    return {"html": True, "text": text.replace("\0", "")}


def _meta(page: bytes) -> str | None:
    """The label that the page itself states."""
    found = META.search(COMMENT.sub(b"", page[:META_WITHIN]))
    return (found[1] or found[2]).decode() if found else None


def _decoded(page: bytes, labels: list[str]) -> str | None:
    for mark, of_mark in BOMS.items():
        if page.startswith(mark):
            return strict(page[len(mark) :], of_mark)
    if found := UTF_16.match(page):
        return strict(page, "utf-16-be" if found[1] else "utf-16-le")
    if b"\x1b$" in page or b"\x1b(I" in page:
        return strict(page, "iso2022_jp") or (None if page.isascii() else strict(page, "utf-8"))
    if page.isascii():
        return None if any(UNREAD[label] in page for label in labels if label in UNREAD) else page.decode()
    declared = [codec for codec in map(_codec, labels) if codec]
    text = strict(page, "utf-8")
    if text and (not text.isascii() or "utf-8" in declared):
        return text
    return _east_asian(page, declared) or _of_one_byte(page, declared)


def _codec(label: str | None) -> str | None:
    """Python's codec for a label of the standard; None for those that it does not know, and for UTF-16, which shows itself."""
    name = label and (MORE_LABELS.get(label) or map_encoding_to_html5(label, fallback_utf8=False))
    return CODECS.get(name, name) if name and not name.startswith("utf-16") else None


def _east_asian(page: bytes, declared: list[str]) -> str | None:
    found = {codec: strict(page, codec) for codec in COMMON}
    texts = {codec: text for codec, text in found.items() if text is not None}
    if not texts:
        return None
    letters = {codec: _letters(text) for codec, text in texts.items()}
    num_common = {codec: len(COMMON[codec].findall(letters[codec])) for codec in texts}
    best = max(texts, key=lambda codec: num_common[codec])
    for codec in declared:
        # A few characters prove nothing against a declaration.
        if codec in texts and num_common[best] <= 2 * num_common[codec] + 3:
            is_text = len(letters[codec]) < 20 or num_common[codec] >= LEAST_SHARE * len(letters[codec])
            return texts[codec] if is_text else None
    # One proves nothing against another declaration either.
    return texts[best] if num_common[best] > bool(declared) and num_common[best] >= COMMON_SHARE * len(letters[best]) else None


def _letters(text: str) -> str:
    return NO_LETTERS.sub("", text)[:SCORED]


def _of_one_byte(page: bytes, declared: list[str]) -> str | None:
    """Any bytes are some text in these encodings: those of another one but for some damage are not taken for it."""
    letters = _letters(page.decode("utf-8", "replace"))
    if 2 * letters.count("\ufffd") < len(letters):
        return None
    for codec, common in COMMON.items():
        letters = _letters(page.decode(codec, "replace"))
        if (num_common := len(common.findall(letters))) > 4 and num_common >= COMMON_SHARE * len(letters):
            return None
    for candidate in (*declared, _codec(detect_encoding(page))):
        if candidate and candidate not in COMMON:
            text = strict(page, candidate)
            if text and not C1.search(text) and _has_words(text):
                return text
    return None


def _has_words(text: str) -> bool:
    """Whether it has letters of an alphabet of its own (Cyrillic, Thai), or but a few letters and signs among those of ASCII."""
    runs = RUN.findall(text)
    num_letters = sum(character >= "\u0370" and category(character)[0] in "LM" for run in runs for character in run)
    num_in_a_row = sum(len(run) for run in runs if len(set(run)) > 3)
    return num_in_a_row < 0.2 * sum(map(len, runs)) or num_letters > 0.7 * sum(map(len, runs))


def strict(page: bytes, codec: str) -> str | None:
    """The text of these bytes, without a character that their end cuts through; None where they are none in this encoding."""
    try:
        if codec == "iso2022_jp":
            return _iso_2022_jp(page)
        text = codecs.getincrementaldecoder(codec)("mujina.whatwg").decode(page)
    except UnicodeError:
        return None
    if codec in ("euc_jp", "big5hkscs"):
        return text.translate(_microsoft(codec))
    # Single bytes that Python's Shift_JIS has, and the standard's has not.
    return None if codec == "cp932" and re.search("[\xa0\uf8f1-\uf8f3]", text) else text


def _iso_2022_jp(page: bytes) -> str:
    """Raises UnicodeError."""
    first, *rest = ESCAPE.split(CUT_ESCAPE.sub(b"", page))
    texts = []
    for index, (escape, part) in enumerate(zip([b"(B", *rest[::2]], [first, *rest[1::2]], strict=True)):
        if escape in (b"(B", b"(J"):
            if b"\x1b" in part:
                raise UnicodeError("an escape of another encoding")
            text = part.decode("ascii")
            texts.append(text if escape == b"(B" else text.translate({0x5C: "¥", 0x7E: "‾"}))
        elif escape == b"(I":
            texts.append(part.translate(HIGH).decode("cp932"))
        else:
            if len(part) % 2 and index < len(rest) // 2:
                raise UnicodeError("half a character")
            found = strict(part.translate(HIGH), "euc_jp")
            if found is None:
                raise UnicodeError("no character")
            texts.append(found)
    return "".join(texts)


def _shift_jis(pair: bytes) -> bytes:
    """A character of EUC-JP in Shift_JIS, by its row and cell (from 1) of the one table of both."""
    row, cell = pair[0] - 0xA0, pair[1] - 0xA0
    first = (row - 1) // 2 + (0x81 if row < 63 else 0xC1)
    return bytes([first, cell + (0x9E if row % 2 == 0 else 0x3F + (cell > 63))])


@cache
def _microsoft(codec: str) -> dict[int, str]:
    """Where Python's table has another character than Microsoft's, which is the standard's: U+FF5E for U+301C in EUC-JP, say."""
    if codec == "euc_jp":
        pairs = [bytes([row, cell]) for row in range(0xA1, 0xFF) for cell in range(0xA1, 0xFF)]
        found = [(pair.decode(codec, "ignore"), _shift_jis(pair).decode("cp932", "ignore")) for pair in pairs]
    else:
        pairs = [bytes([row, cell]) for row in (0xA1, 0xA2) for cell in range(0x40, 0xFF)]  # the rows of signs
        found = [(pair.decode(codec, "ignore"), pair.decode("cp950", "ignore")) for pair in pairs]
    same = {python for python, standard in found if python == standard}
    return {ord(python): standard for python, standard in found if len(python) == len(standard) == 1 and python not in same}


def _whatwg(error: UnicodeError) -> tuple[str, int]:
    """An error handler for characters that the standard has beyond Python's tables."""
    assert isinstance(error, UnicodeDecodeError)
    pair = error.object[error.start : error.start + 2]
    if error.encoding == "euc_jp" and len(pair) == 2 and min(pair) > 0xA0 and max(pair) < 0xFF:
        return _shift_jis(pair).decode("cp932"), error.start + 2
    if error.encoding == "big5hkscs":
        return pair.decode("cp950"), error.start + 2
    if error.encoding == "gb18030" and pair.startswith(b"\x80"):
        return "€", error.start + 1
    raise error


codecs.register_error("mujina.whatwg", _whatwg)
