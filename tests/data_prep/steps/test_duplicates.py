"""The first of equal documents stays, and what a site puts on all of its pages goes."""

import random
import re
from collections import Counter, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datatrove.data import Document

from data_prep.steps import records
from data_prep.steps.duplicates import ExactDuplicates, RepeatedLines
from data_prep.steps.step import CorpusStep


def text_document(text: str, **metadata: Any) -> Document:
    return Document(text=text, id="", metadata=metadata)


def judged(step: CorpusStep, documents: list[Document], folder: Path, num_ranks: int) -> list[str | None]:
    """Why each document is dropped, or None; ranks take consecutive documents. Rewrites them."""
    folder.mkdir()
    for number, document in enumerate(documents):
        document.id = f"文書{number}"
    shares = [[documents[n] for n in share] for share in np.array_split(range(len(documents)), num_ranks)]
    for rank, share in enumerate(shares):
        assert list(step.mark(iter(share), folder, rank)) == share
    for num_tasks, work in step.find(folder, num_ranks):
        for task in [*reversed(range(num_tasks)), 0]:
            work(task)
    judges = [step.judge(folder, rank) for rank in range(num_ranks)]
    return [judge(document) for judge, share in zip(judges, shares, strict=True) for document in share]


@pytest.fixture(params=["whole", "small"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything at once, and in more runs and slices than there are ranks."""
    if request.param == "small":
        monkeypatch.setattr(records, "RUN", 7)
        monkeypatch.setattr(records, "SLICE", 5)


@pytest.mark.parametrize("num_ranks", [1, 2, 5, 40])
def test_the_first_of_equal_texts_stays(tmp_path: Path, pieces: None, num_ranks: int) -> None:
    dice = random.Random(num_ranks)
    words = [dice.choice(["猫 と\n犬", "猫　と 犬 ", "猫と犬", "cat", "Cat", ""] + [str(n) for n in range(20)]) for _ in range(39)]
    first: dict[str, int] = {}
    expected = []
    for number, word in enumerate(words):
        original = first.setdefault(" ".join(word.split()), number)
        expected.append(None if original == number else f"exact_duplicate: of 文書{original}")
    assert judged(ExactDuplicates(), [text_document(word) for word in words], tmp_path / "x", num_ranks) == expected


def test_dialogues_are_equal_in_all_turns(tmp_path: Path) -> None:
    def dialogue(*contents: str) -> Document:
        return text_document("\n".join(contents), messages=[{"role": "user", "content": content} for content in contents])

    documents = [dialogue("a", "b"), dialogue("a b"), dialogue("a", "b"), text_document("a b")]
    assert judged(ExactDuplicates(), documents, tmp_path / "x", 2) == [None, None, "exact_duplicate: of 文書0", "exact_duplicate: of 文書1"]


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_repeated_lines_stay_in_their_first_document(tmp_path: Path, pieces: None, num_ranks: int) -> None:
    dice = random.Random(0)
    lines = ["", "短い", *(f"ページの上と下に並ぶ{n}番目の行" for n in range(12))]
    texts = ["\n".join(["この文書だけにある長い行" * 5 + str(n), *dice.choices(lines, k=8)]) for n in range(60)]
    texts = [text.replace("3番目の行", " 3番目の行　") for text in texts]

    counts = Counter(line for text in texts for line in {" ".join(line.split()) for line in text.split("\n")})
    seen: set[str] = set()
    expected = []
    for text in texts:
        plain = [" ".join(line.split()) for line in text.split("\n")]
        is_kept = [True] * len(plain)
        kinds = "".join("b" if not line else "s" if len(line) < 10 else "R" if counts[line] > 25 else "." for line in plain)
        blocks = [group for group in re.finditer("R[Rsb]*", kinds) if group[0].count("R") >= 3]
        for group in (*blocks, *re.finditer(r"R[Rb]*\Z", kinds)):  # and what the document ends with
            for n in range(*group.span()):
                is_kept[n] = len(plain[n]) < 10 or plain[n] not in seen
        kept = [line for line, stays in zip(text.split("\n"), is_kept, strict=True) if stays]
        seen |= set(plain)
        expected.append(text if all(is_kept) else "\n".join(kept).strip("\n"))
    assert 3 < sum(counts[line] > 25 for line in lines[2:]) < 12 and expected != texts
    documents = [text_document(text) for text in texts]
    assert set(judged(RepeatedLines(max_documents=25), documents, tmp_path / "x", num_ranks)) == {None}
    assert [document.text for document in documents] == expected


TOP = "サイトの案内　トップページへ戻る"
MENU = ["会社概要のページはこちら", "製品情報のページはこちら", "採用情報のページはこちら", "お問い合わせはこちら"]
FOOTER = ["本サイトの内容の無断転載を禁じます。", "Copyright (c) 2020 Example Inc. All rights reserved."]


@pytest.mark.parametrize(
    "lines",
    [
        ["{n}番目の式は次のとおり。", "\\begin{equation}", "x = {n}", "\\end{equation}", "となる{n}。", "\\end{document}"],
        ["\\documentclass{article}", "\\usepackage{amsmath}", "\\usepackage{graphicx}", "\\begin{document}", "本文{n}。"],
        ["{n}番目の法律の本文である。", "附　則", "この法律は、公布の日から施行する。"],
        ["{n}番目の法律の本文である。", "この法律は、公布の日から施行する。", "この法律は、公布の日から施行する。", "別表{n}"],
        ["Dear Sir or Madam,", "this is letter {n}.", "Thank you in advance for your answer.", "Yours sincerely,"],
        ["拝啓　時下ますますご清栄のこととお喜び申し上げます。", "{n}番目の用件です。", "以上、よろしくお願いいたします。"],
        ["節{n}の本文", "まとめと今後の課題について", "{n}のまとめ"],
        ["## 参考文献の一覧です", "{n}番目の本。", "| --- | --- | --- |", "----------------", "== 脚注・出典・関連項目 =="],
        ["if __name__ == '__main__':", "    print({n})", "$$\\int_0^1 f(x)dx$$", "def main() -> None:"],
        ["<div class='entry-content'>", "text {n}", "</div><!-- entry-content -->", "</body></html>    "],
        [
            "では{n}回目です。",
            "import numpy as np",
            "import pandas as pd",
            "from typing import Any, Self",
            "$ pip install numpy",
            "以上{n}",
        ],
        ["function f{n}() {", "    return document.body;", "}  // end of function", "last {n}"],
        ["関数{n}", "    try:", "        return open(path, 'rb')", "    except FileNotFoundError:", "\treturn None and more"],
        ["コード{n}", "#endif /* CONFIG_H */", "// end of the namespace", "/* vim: set ts=4 */", "@article{knuth1984,", "package main"],
        ["論文{n}", "%%% Local Variables: %%%", "% mode: latex mode", "% TeX-master: t or nil", "図{n}"],
        ["主文{n}", "理由{n}", "よって、裁判官全員一致の意見で、主文のとおり判決する。", "（裁判長裁判官　山田太郎　裁判官　鈴木次郎）"],
        [
            "{n}君。",
            "本日は、これにて散会いたします。",
            "〔「異議なし」と呼ぶ者あり〕",
            "午後三時二十分散会（その{n}）",
            "〔総員起立、拍手する〕",
        ],
        ["主　文", "本件上告を棄却する。", "上告費用は上告人の負担とする。", "理由は{n}である。"],
        ["甲と乙は{n}を約する。", "本契約に定めのない事項については、甲乙協議の上、これを定める。"],
        ["{n}が来た。", "彼は何も言わずに立ち去った。", "私はそれを黙って見ていた。", "雨はいつまでも降り続いていた。", "{n}は泣いた。"],
        ["{n} said.", '"I don\'t know what you mean."', '"Yes, you certainly do."', '"No, I certainly don\'t."', "{n} left."],
        [
            "「{n}さん」",
            "「はい、なんでしょうか、先生？」",
            "「いえ、なんでもありません。」",
            "「それならよいのですが。」",
            "{n}は黙った。",
        ],
        ["Recipe {n}", "- 1 teaspoon of salt", "- 2 cups of flour", "Mix {n} and bake."],
        ["Dear {n},", "Mit freundlichen Grüßen,"],
        ["---", "layout: default post", "title: {n}", "---", "text {n}"],
    ],
)
def test_structure_and_sentences_of_prose_stay(tmp_path: Path, lines: list[str]) -> None:
    texts = ["\n".join(lines).replace("{n}", str(n)) for n in range(15)]
    documents = [text_document(text) for text in texts]
    assert set(judged(RepeatedLines(), documents, tmp_path / "x", 2)) == {None}
    assert [document.text for document in documents] == texts


def test_what_a_site_puts_around_a_page_goes(tmp_path: Path) -> None:
    law = "この法律は、公布の日から施行する。"
    body = "{n}番目の本文は長く、この文書だけにある。\n" * 5 + "{n}番目の附則"
    texts = [
        "\n".join([TOP, "検索", *MENU, "", body, *MENU[:3], f"次の話題{n}", law, "", *FOOTER[::-1]]).replace("{n}", str(n))
        for n in range(15)
    ]
    documents = [text_document(text) for text in texts]
    assert set(judged(RepeatedLines(), documents, tmp_path / "x", 2)) == {None}
    expected = f"検索\n\n{body}\n次の話題{{n}}\n{law}"
    assert [document.text for document in documents] == [texts[0]] + [expected.replace("{n}", str(n)) for n in range(1, 15)]


@pytest.mark.parametrize(
    ("lines", "gone"),
    [
        (["Home | About us | Contact | Site map", "text {n}"], [0]),
        (["[Home] [News] [Contact]", "text {n}"], [0]),
        (["トップ｜会社概要｜お問い合わせ｜採用情報", "本文{n}"], [0]),
        (["ホーム > 製品情報 > 製品一覧", "本文{n}です。"], [0]),
        (["このページを表示するにはJavaScriptを有効にしてください。", "本文{n}"], [0]),
        (["当サイトではクッキーを使用しています。", "本文{n}"], [0]),
        (["ご利用ありがとうございます。会員登録はこちらからどうぞ。", "本文{n}"], [0]),
        (["・ホームページへ戻るには", "・会社案内のページへ移動", "・製品情報のページへ移動", "本文{n}。"], [0, 1, 2]),
        (["本文{n}。", "▲ページの先頭へ戻る"], [1]),
        (["本文{n}", "TEL 03-1234-5678（平日9時～17時）"], [1]),
        (["本文{n}", "あわせて読みたい関連記事はこちら"], [1]),
        (["text {n}", "Subscribe to our newsletter", "Enter your email address to get updates"], [1, 2]),
        (["文{n}。", "この記事をツイートする", "この記事をシェアする", "はてなブックマークに追加", "続き{n}。"], [1, 2, 3]),
        (["本文{n}です。", "Copyright (C) 2020 Example Corporation", "最終更新{n}"], [1]),
        (["本文{n}です。", "本サイトの内容の無断転載を禁じます。", "訪問者{n}人"], [1]),
        (["本文{n}です。", "© 2020 Example K.K.", "更新日{n}"], [1]),
    ],
)
def test_what_a_site_writes_goes(tmp_path: Path, lines: list[str], gone: list[int]) -> None:
    documents = [text_document("\n".join(lines).replace("{n}", str(n))) for n in range(15)]
    judged(RepeatedLines(min_remaining=0), documents, tmp_path / "x", 2)
    stays = "\n".join(line for number, line in enumerate(lines) if number not in gone)
    assert [document.text for document in documents[1:]] == [stays.replace("{n}", str(n)) for n in range(1, 15)]


def test_code_is_left_alone(tmp_path: Path) -> None:
    texts = [f"import numpy as np\nimport pandas as pd\nfrom typing import Any\nx{n} = np.zeros({n})" for n in range(15)]
    documents = [text_document(text, kind="code") for text in texts]
    assert set(judged(RepeatedLines(), documents, tmp_path / "x", 2)) == {None}
    assert [document.text for document in documents] == texts


def test_a_page_of_repeated_lines_only_is_dropped_and_a_dialogue_is_left_alone(tmp_path: Path) -> None:
    banner = "当サイトではクッキーを使用しています"
    system = [{"role": "system", "content": banner}]
    documents = [text_document(f"{banner}\n{n}") for n in range(4)] + [text_document(banner, messages=system) for _ in range(4)]
    reasons = judged(RepeatedLines(max_documents=3), documents, tmp_path / "x", 2)
    assert reasons == [None, *["only_repeated_lines: 0.05"] * 3, *[None] * 4]
    assert documents[-1].metadata["messages"] == system


def test_paragraphs_repeat_as_a_whole(tmp_path: Path) -> None:
    notice = "免責事項その一は長い\n免責事項その二も長い"
    documents = [text_document(f"{notice}\n \n本文{n}である。\n免責事項その一は長い\n\n\n{n}番目の文書の結び") for n in range(3)]
    reasons = judged(RepeatedLines(unit="paragraph", max_documents=2), documents, tmp_path / "x", 1)
    assert reasons == [None] * 3 and notice in documents[0].text
    assert documents[2].text == "本文2である。\n免責事項その一は長い\n\n2番目の文書の結び"


def test_an_interrupted_rank_leaves_no_marks(tmp_path: Path) -> None:
    def broken():
        yield text_document("a")
        raise OSError("disk")

    for step in ExactDuplicates(), RepeatedLines():
        with pytest.raises(OSError):
            deque(step.mark(broken(), tmp_path, 0), 0)
    assert not list(tmp_path.iterdir())
