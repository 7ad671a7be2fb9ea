"""Pages in the encodings of the web come out as written whatever they declare, or not at all."""

import codecs
from collections.abc import Callable

import pytest

from data_prep.steps.decode import html_of

JAPANESE = "これは日本語のページです。吾輩は猫である。名前はまだ無い。ﾃｽﾄ、①㈱№～－纊。"
SIMPLIFIED = "这是一个中文网页。我们的人民在学习中国的历史，今天也是。"
TRADITIONAL = "這是一個中文網頁。我們的人民在學習中國的歷史，今天也是。"
KOREAN = "이것은 한국어 페이지입니다. 나는 고양이다. 이름은 아직 없다."


def euc_jp(text: str) -> bytes:
    """As browsers read it: the characters of CP932 by row and cell, NEC's and IBM's too."""
    parts = []
    for character in text:
        first, *second = character.encode("cp932")
        if first < 0x80:
            parts.append(bytes([first]))
        elif not second:
            parts.append(bytes([0x8E, first]))
        else:
            row = 2 * (first - (0x81 if first < 0xA0 else 0xC1)) + 1 + (second[0] > 0x9E)
            cell = second[0] - (0x9E if second[0] > 0x9E else 0x3F + (second[0] > 0x7E))
            parts.append(bytes([row + 0xA0, cell + 0xA0]))
    return b"".join(parts)


def iso_2022_jp(text: str) -> bytes:
    parts = []
    for character in text:
        data = euc_jp(character)
        escape = b"" if data.isascii() else b"\x1b(I" if data[0] == 0x8E else b"\x1b$B"
        parts.append(escape + bytes(byte & 0x7F for byte in data.removeprefix(b"\x8e")) + (b"\x1b(B" if escape else b""))
    return b"".join(parts)


ENCODINGS: dict[str, tuple[Callable[[str], bytes], str]] = {
    "utf-8": (str.encode, JAPANESE),
    "shift_jis": (lambda text: text.encode("cp932"), JAPANESE),
    "euc-jp": (euc_jp, JAPANESE.replace("纊", "")),
    "iso-2022-jp": (iso_2022_jp, JAPANESE.replace("纊", "")),
    "gb2312": (lambda text: text.encode("gbk"), SIMPLIFIED),
    "gb18030": (lambda text: text.encode("gb18030"), SIMPLIFIED),
    "big5": (lambda text: text.encode("big5"), TRADITIONAL),
    "euc-kr": (lambda text: text.encode("cp949"), KOREAN),
}
DECLARED = [*ENCODINGS, "iso-8859-1", "windows-1252", "windows-1251", "us-ascii", "utf-16", "no-such-thing", None]


def read(page: bytes, charset: str | None = None) -> str:
    fields = html_of(page, charset)
    assert not isinstance(fields, str), fields
    return fields["text"]


def refused(page: bytes, charset: str | None = None) -> str:
    problem = html_of(page, charset)
    assert isinstance(problem, str), problem
    return problem


@pytest.mark.parametrize("true", ENCODINGS)
def test_whatever_is_declared_the_text_is_what_was_written(true: str) -> None:
    encode, text = ENCODINGS[true]
    for written in (text, text[:9]):
        for header in DECLARED:
            for meta in {header, "shift_jis", "utf-8", "euc-kr", None}:
                page = f'<html><head><meta charset="{meta}"></head>' if meta else "<html>"
                assert written in read(page.encode() + b"<p>" + encode(written), header), (header, meta)


@pytest.mark.parametrize("true", ENCODINGS)
@pytest.mark.parametrize("declared", DECLARED)
def test_a_damaged_page_is_read_in_no_encoding(true: str, declared: str | None) -> None:
    encode, text = ENCODINGS[true]
    page = b"<p>" + encode(text * 9) + b"\xff<p>\xa0\x80" + encode(text * 9)
    assert "fetch the page again" in refused(page, declared)


@pytest.mark.parametrize("true", ENCODINGS)
def test_a_character_cut_by_the_end_is_left_out(true: str) -> None:
    encode, text = ENCODINGS[true]
    page = encode(text + text[0])
    page = page.removesuffix(b"\x1b(B") if true == "iso-2022-jp" else page
    assert read(page[:-1], true).startswith(text) and len(read(page[:-1], true)) == len(text)


@pytest.mark.parametrize(
    ("data", "label", "text"),
    [
        (b"\x87\x40\x87\x8a\xfb\xfc\x87\x82\x81\x60\x81\x7c\x81\x61\x5c\x7e", "Shift_JIS", "①㈱髙№～－∥\\~"),
        (b"\x87\x40\x82\xa0", "x-sjis", "①あ"),
        (b"\x87\x40\x82\xa0", "ms_kanji", "①あ"),
        (b"\x87\x40\x82\xa0", "Windows-31J", "①あ"),
        (b"\x87\x40\x82\xa0", "csShiftJIS", "①あ"),
        (b"\xad\xa1\xad\xea\xa1\xc1\xa1\xdd\x8e\xb1\x8f\xb0\xa1\xa1\xf1", "EUC-JP", "①㈱～－ｱ丂￠"),
        (b"\xad\xa1\xa4\xa2", "x-euc-jp", "①あ"),
        (b'\x1b$@$"\x1b(J\\\x1b(I1\x1b$B-!\x1b(B\\', "ISO-2022-JP", "あ¥ｱ①\\"),
        (b"\x80 \xc4\xe3\xba\xc3", "gb_2312-80", "€ 你好"),
        (b"\xa7A\xa6n\xa1E\xa3\xe1", "Big5-HKSCS", "你好‧€"),
        (b"\xb0\xa1\x8cc", "ks_c_5601-1987", "가똠"),
        (b"caf\xe9 \x80 \x93quoted\x94", "ISO-8859-1", "café € “quoted”"),
        (b"caf\xe9", None, "café"),
        (b"\x82\xaa", None, "が"),
        (b"\xcf\xf0\xe8\xe2\xe5\xf2, \xec\xe8\xf0", "windows-1251", "Привет, мир"),
        (b"\xf0\xd2\xc9\xd7\xc5\xd4", "koi8-r", "Привет"),
        ("Привет".encode("mac_cyrillic"), "x-mac-cyrillic", "Привет"),
        ("สวัสดี".encode("cp874"), "tis-620", "สวัสดี"),
        (codecs.BOM_UTF8 + "あ".encode(), "shift_jis", "あ"),
        ("\ufeff<p>春".encode("utf-16-le"), "shift_jis", "<p>春"),
        ("\ufeff<p>春".encode("utf-16-be"), None, "<p>春"),
        ("<p>春".encode("utf-16-le"), "utf-16", "<p>春"),
        ("\n<p>春".encode("utf-16-be"), None, "\n<p>春"),
        (b"<p>nul\0", None, "<p>nul"),
        (b"", None, ""),
        (b'<?xml version="1.0" encoding="EUC-JP"?>\xbd\xd5', None, '<?xml version="1.0" encoding="EUC-JP"?>春'),
        (b'<!-- <meta charset="euc-kr"> --><meta charset=euc-jp>\xbd\xd5', None, '<!-- <meta charset="euc-kr"> --><meta charset=euc-jp>春'),
    ],
)
def test_encodings_are_those_of_browsers(data: bytes, label: str | None, text: str) -> None:
    assert read(data, label) == text


def test_text_far_below_the_head_of_a_page_counts() -> None:
    page = b"<p>" + b"x" * 300_000 + euc_jp(JAPANESE)
    assert JAPANESE.replace("纊", "") in read(page.replace(euc_jp("纊"), b""), "iso-8859-1")
    assert "declared: windows-1251" in refused(page.replace(b"<p>", b"<p>\xff<p>"), "windows-1251")


def test_what_browsers_do_not_read_is_not_read() -> None:
    assert "declared: hz-gb-2312" in refused(b"<p>~{<:Ky2;VS{!#~}", "hz-gb-2312")
    assert "declared: iso-2022-kr" in refused(b'<meta charset="ISO-2022-KR"><p>\x1b$)C\x0e0!\x0f')
    assert "none is declared" in refused("亜哀愛悪握圧扱安案暗".encode("cp932"))
    assert "none is declared" in refused("春".encode() + b"\xff" + "春".encode())
