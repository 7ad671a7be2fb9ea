"""Planted pieces of evaluation sets are found, whatever their width, case and spacing; what merely resembles them stays."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document

from data_prep.steps import decontaminate
from data_prep.steps.decontaminate import Decontaminate
from mujina.user_input import UserError

JAPANESE = "太郎さんは時速４キロで歩き、花子さんは時速６キロで歩きます。二人が同時に出発したとき、花子さんは何分早く着くでしょうか。"
ENGLISH = "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take to make one?"
SHORT = "日本で一番高い山は何ですか。"
ANSWER = "富士山"


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    rows = [{"question": JAPANESE, "choices": [ANSWER, "北岳"], "answer": ANSWER}, {"question": SHORT, "answer": ANSWER}]
    with gzip.open(tmp_path / "ja_reasoning.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "gsm8k.txt").write_text(f"\n{ENGLISH}\n", encoding="utf-8")
    return [str(tmp_path / "ja_*.jsonl.gz"), str(tmp_path / "gsm8k.txt")]


def judged(sets: list[str], text: str, **values: object) -> str | None:
    return Decontaminate.model_validate({"sets": sets} | values).start()(Document(text=text, id=""))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"問題集より。{JAPANESE}答えは次のページ。", "contaminated: ja_reasoning"),
        ("前置き" + "\n".join(JAPANESE).replace("４", "4") + "後書き", "contaminated: ja_reasoning"),
        ("前" + JAPANESE[5:48] + "後", "contaminated: ja_reasoning"),
        (f"Solve: {ENGLISH.upper().replace(' ', '  ')}!", "contaminated: gsm8k"),
        (ENGLISH.translate({code: code + 0xFEE0 for code in range(0x21, 0x7F)}), "contaminated: gsm8k"),
        (f"「{SHORT}」", "contaminated: ja_reasoning"),  # short, and all of the document
        (f"{SHORT}と聞かれて、富士山だと答えた。", None),
        (ANSWER, None),
        ("前" + JAPANESE[:25] + "後", None),
        (ENGLISH[:60], None),  # 49 letters
        (JAPANESE.replace("歩", "走").replace("出発", "開始"), None),
        ("", None),
    ],
)
def test_planted_pieces(sets: list[str], text: str, reason: str | None) -> None:
    assert judged(sets, text) == reason


def test_a_run_of_exactly_the_length_counts(sets: list[str]) -> None:
    letters = "".join(filter(str.isalnum, ENGLISH))
    for start in range(len(letters) - 60):
        assert judged(sets, f"そして{letters[start : start + 60]}である") == "contaminated: gsm8k"
        assert judged(sets, f"そして{letters[start : start + 59]}である") is None


def test_turns_and_fields(sets: list[str]) -> None:
    turns = [{"role": "user", "content": SHORT}, {"role": "assistant", "content": ANSWER}]
    dialogue = Document(text="", id="", metadata={"messages": turns})
    assert Decontaminate(sets=sets).start()(dialogue) == "contaminated: ja_reasoning"
    with pytest.raises(UserError, match="holds no text of 10 letters or more in the fields answer"):
        judged(sets, "", fields=["answer"])


HEADER = "以下は、ある作業を説明する指示です。要求をきちんと満たす答えを書いてください。\n指示："
PREFIX = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
OWN = [
    "太郎さんは時速四キロで歩き、花子さんは時速六キロで歩きます。花子さんは何分早く着きますか。",
    "紫式部が書いた長い物語の主人公の名前と、その父親である帝の名前をすべて答えなさい。",
]


@pytest.fixture(params=[2, 20, 300])
def prompts(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A set of prompts with one header, twice `param` and some; the first two are OWN, three share a passage."""
    draw = random.Random(1)
    words = ["".join(draw.choices("あいうえおかきくけこさしすせそ", k=60)) for _ in range(2 * request.param)]
    texts = [HEADER + text for text in (*OWN, *(JAPANESE + f"第{n}問、答えは何番ですか。" for n in range(3)), *words)]
    rows = [{"prompt": text, "system": "あなたは優秀な日本語の助手です。", "en": PREFIX + f"{text[len(HEADER) :]}"} for text in texts]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "prompts.jsonl")


def test_what_many_rows_share_is_no_leak(prompts: str) -> None:
    judge = Decontaminate(sets=[prompts]).start()
    for text in (
        HEADER,
        PREFIX,
        f"{HEADER}東京の観光名所を五つ、それぞれの行き方とともに教えてください。",
        f"{HEADER}太郎さんの好きな食べ物は？",
    ):
        assert judge(Document(text=text, id="")) is None
    turns = [{"role": "system", "content": "あなたは優秀な日本語の助手です。"}, {"role": "user", "content": HEADER}]
    assert judge(Document(text="", id="", metadata={"messages": turns})) is None
    for text in (f"問：{OWN[0]}", HEADER + OWN[0], f"問：{OWN[1]}", HEADER + OWN[1], f"本文：{JAPANESE}"):  # the last: of three questions
        assert judge(Document(text=text, id="")) == "contaminated: prompts"


JAPANESE_WORDS = (
    "猫 犬 鳥 魚 山 川 海 空 森 町 村 駅 店 家 父 母 兄 姉 妹 弟 先生 学生 医者 画家 作家 商人 旅人 紅茶 時計 鉛筆 手紙".split()
)
ENGLISH_WORDS = "river stone market garden window teacher doctor farmer painter sailor engine bottle ladder castle forest".split()


def invented(draw: random.Random, is_english: bool, clauses: int = 10) -> str:
    """An item that shares no run with another."""
    if is_english:
        pairs = (draw.sample(ENGLISH_WORDS, 3) for _ in range(clauses))
        return " ".join(f"The {a} of the {b} has {draw.randint(2, 999)} {c}s." for a, b, c in pairs)
    return "、".join("{}は{}の{}を見た".format(*draw.sample(JAPANESE_WORDS, 3)) for _ in range(clauses)) + "。"


@pytest.mark.parametrize("is_english", [False, True])
@pytest.mark.parametrize("place", ["before", "within", "behind"])
@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (45, [40]),  # letters of a header that alone are no run, in a set of so many rows
        (80, [1000]),
        (40, [3]),
        (80, [2, 2]),
        (40, [1, 1, 1]),
        (60, [300, (4, 296)]),  # of the second set four rows have it, and 296 do not
    ],
)
def test_headers_are_no_leaks_and_what_follows_them_is(
    tmp_path: Path, is_english: bool, place: str, length: int, sizes: list[int | tuple[int, int]]
) -> None:
    draw = random.Random(length)
    header = ((PREFIX + "Use what you know.") if is_english else HEADER * 3)[: length if is_english else length // 2]
    new = lambda: invented(draw, is_english)  # noqa: E731
    around = {
        "before": lambda text: header + text,
        "behind": lambda text: text + header,
        "within": lambda text: text[: len(text) // 2] + header + text[len(text) // 2 :],
    }[place]
    items, paths = [], []
    for number, size in enumerate(sizes):
        with_header, without = size if isinstance(size, tuple) else (size, 0)
        items.append([new() for _ in range(with_header)])
        path = tmp_path / f"set{number}.txt"
        path.write_text("\n".join([*(around(text).replace("\n", " ") for text in items[-1]), *(new() for _ in range(without))]))
        paths.append(str(path))
    step = Decontaminate(sets=paths, num_characters=60 if is_english else 50)
    judge = step.start()
    leaks = [text for of_set in items for text in (of_set[0], around(of_set[-1]), f"{new()} {around(of_set[0])} {new()}")]
    clean = [header, new(), around(new()), header + items[0][0][:6] + new(), f"{new()} {header} {new()}"]
    assert [judge(Document(text=text, id="")) is not None for text in (*leaks, *clean)] == [True] * len(leaks) + [False] * len(clean)
    assert len(step.notes()) >= len(sizes)


def test_what_is_no_leak_is_told(prompts: str) -> None:
    told = "\n".join(Decontaminate(sets=[prompts]).notes())
    number = sum(1 for _ in open(prompts))
    assert f"no leak: {number} of the {number} rows of prompts have “以下はある作業を説明する指示です要求をきちんと満たす答えを書”" in told
    assert "“belowisaninstructionthatdescribesatask" in told and "“あなたは優秀な日本語の助手です”" in told


def test_a_text_with_little_of_its_own_is_found_by_that(tmp_path: Path) -> None:
    kinds = [
        f"{animal}の{what}の話" for animal in ("シマウマ", "アザラシ", "ムササビ") for what in ("ひとりたび", "けんかした", "ねむれない")
    ]
    texts = [HEADER + kind + "について、その理由を三つ挙げてから最後に結論を一文で述べてください。" for kind in kinds]
    (tmp_path / "set.txt").write_text("\n".join(texts).replace("\n指示", "指示"))
    found = [judged([str(tmp_path / "set.txt")], text) for text in (texts[3], texts[3].replace("アザラシ", "アライグマ"), HEADER)]
    assert found == ["contaminated: set", None, None]


def test_equal_hashes_are_no_proof(sets: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decontaminate, "ngram_hashes", lambda codes, n: np.full(max(len(codes) - n + 1, 0), 7, np.uint64))
    assert judged(sets, "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。") is None


def test_missing_sets(sets: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        judged([*sets, str(tmp_path / "none*.jsonl")], "")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="holds no text"):
        judged([str(tmp_path / "empty.txt")], "")
