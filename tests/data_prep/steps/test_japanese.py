"""Swallow's rules counted the slow way agree with ours on real pages; each rule of ours drops its page and says why."""

import gzip
import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from hypothesis import given
from hypothesis import strategies as st

from data_prep.steps.japanese import WORDS, JapaneseQuality, WordLimit
from data_prep.steps.measure import code_points, repeated_ngrams
from mujina.user_input import UserError

CORPUS = Path(__file__).parents[3] / "examples" / "corpus"
SWALLOW = {"min_full_stops": 0, "min_particle_ratio": 0, "adverts": None, "board": None, "ng_words": None}
ARTICLE = """江戸時代の後期になると、各地の藩は財政の立て直しに苦しむようになった。とくに東北の諸藩では、たび重なる冷害が農村を疲れさせた。
ある藩主は、まず城の暮らしを切り詰めることから改革を始めたという。家臣たちは木綿の着物を着て、食事も一汁一菜に改められた。
次に手がけたのは、漆や桑を植えて新しい産業を育てることだった。しかし、苗木が育つまでには長い年月がかかり、すぐには実を結ばない。
そこで藩は越後から職人を招き、縮の織り方を下級武士の家族に教えさせた。これがのちに名高い織物となって、町をうるおすことになる。
学問の面でも、藩校を建て直して身分にかかわらず若者を受け入れた。先生には江戸で名の知られた儒者が三度も招かれている。
もちろん反対する人もいた。古くからの重臣七人が連名で訴え出て、改革をやめるように迫ったのである。藩主は家臣を一人ずつ呼び、静かに意見を聞いた。
飢饉の年にも、この土地では餓えて死ぬ者がほとんど出なかったと伝えられる。蔵に蓄えた米を早めに分け、山野の草の食べ方を書いた本を配ったからだ。
こうした記録を読むと、制度よりもそれを支えた人びとの工夫に目が向く。小さな町の古文書館には、今も当時の帳面が大切に残されている。
"""


def pages() -> list[str]:
    texts = []
    for name in ("web_ja", "documents_ja"):
        with gzip.open(CORPUS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as stream:
            texts += [json.loads(line)["text"][:4000] for line in stream]
    return texts


def judge(text: str, **settings: object) -> str | None:
    return JapaneseQuality(**settings).start()(Document(text=text, id=""))


def swallow_keeps(text: str) -> bool:
    """Swallow's rules, one by one over characters (without blank lines, which its extraction does not leave)."""

    def share(pattern: str) -> float:
        return len(re.findall(pattern, text)) / max(japanese, 1)

    japanese = len(re.findall("[ぁ-ゖァ-ヺ々〇〻㐀-鿿豈-﫿、，。．！？]", text))
    if len(text) < 400 or japanese < 400 or japanese / len(text) < 0.5 or share("[ぁ-ゖ]") < 0.2 or share("[ァ-ヺ]") > 0.5:
        return False
    lines = [re.findall(r"[^。．！？!?]+[。．！？!?]?", line) for line in text.split("\n") if line]
    sentences = list(chain.from_iterable(lines))
    mean = sum(map(len, sentences)) / len(sentences)
    if not 20 <= mean <= 90 or max(map(len, sentences)) > 200:
        return False
    if sum(sentence.strip().endswith(("・", "…")) for sentence in sentences) / len(sentences) > 0.2:
        return False
    for pieces in (["".join(line) for line in lines], sentences):
        again = [(piece, count - 1) for piece, count in Counter(pieces).items()]
        if sum(count for _, count in again) / len(pieces) > 0.3:
            return False
        if sum(len(piece) * count for piece, count in again) / sum(map(len, pieces)) > 0.2:
            return False
    for n, limit in {2: 0.20, 3: 0.18, 4: 0.16, 5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}.items():
        counts = Counter(text[start : start + n] for start in range(len(text) - n + 1))
        found = max(counts.values()) / sum(counts.values()) if n < 5 else sum(count > 1 for count in counts.values()) / len(counts)
        if found > limit:
            return False
    return True


def test_swallow_s_verdicts_on_real_pages() -> None:
    texts = [text for text in pages() if len(text) >= 400]
    verdicts = [judge(text, **SWALLOW) for text in texts]
    assert [verdict is None for verdict in verdicts] == [swallow_keeps(text) for text in texts]
    reasons = Counter(str(verdict).partition(":")[0] for verdict in verdicts)
    assert min(reasons[reason] for reason in ("None", "repeated_ngrams", "japanese_ratio", "sentence_length", "repeated_lines")) > 5


@pytest.mark.parametrize("unit", ["ああ", "のです", "あいうえ", "𠮷野"])
def test_a_frequent_ngram_is_found_and_its_share_is_exact(unit: str) -> None:
    """The first look, at low bytes, must not hide it."""
    text = ARTICLE + unit * (len(ARTICLE) // 6)
    relaxed = {reason: 1 for reason in ("max_repeated_lines", "max_repeated_characters")} | {
        "max_sentence": 10**6,
        "max_mean_sentence": 10**6,
    }
    top = {n: max(Counter(text[i : i + n] for i in range(len(text) - n + 1)).values()) / (len(text) - n + 1) for n in range(2, 5)}
    settings = SWALLOW | relaxed | {"max_repeated_ngrams": {}}
    assert judge(text, **settings, max_top_ngrams={n: 1.02 * share for n, share in top.items()}) is None
    assert judge(text, **settings, max_top_ngrams={n: 0.98 * share for n, share in top.items()}) == f"repeated_ngrams: {round(top[2], 3):g}"


def test_a_passage_that_stands_twice_breaks_the_limit_of_long_ngrams() -> None:
    """Of 5-grams it is little enough, so the longer ones have to be looked at."""
    text = ARTICLE + ARTICLE[len(ARTICLE) // 2 :][: len(ARTICLE) // 8]
    assert judge(text, max_repeated_ngrams={5: 0.15, 6: 1, 7: 1, 8: 1, 9: 1, 10: 1}) is None
    assert str(judge(text)).startswith("repeated_ngrams: 0.1")


@given(st.text("abc", max_size=40), st.integers(1, 4))
def test_repeated_ngrams_are_all_found_with_their_places(text: str, smallest: int) -> None:
    for n, positions, starts in repeated_ngrams(code_points(text), range(smallest, 8)):
        places: dict[str, list[int]] = {}
        for start in range(len(text) - n + 1):
            places.setdefault(text[start : start + n], []).append(start)
        found = [group.tolist() for group in np.split(positions, starts[1:])] if len(starts) else []
        assert sorted(found) == sorted(group for group in places.values() if len(group) > 1)


def test_an_article_is_kept_though_it_mentions_a_shop_a_board_and_a_crime() -> None:
    assert judge(ARTICLE) is None
    assert judge(ARTICLE + "この本は送料無料で買え、掲示板では名無しさんが>>12と書き、犯人は「ぶっ殺す」と叫んだ。\n") is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("短い文です。", "too_short"),
        (ARTICLE + "English text in between. " * 40, "japanese_ratio"),
        (re.sub("[ぁ-ん]", "漢", ARTICLE), "hiragana_ratio"),
        (ARTICLE.replace("。", "、"), "sentence_ends"),
        ("".join(f"{n}月限定特別販売価格お知らせいたします、ぜひご覧ください。" for n in range(30)), "nouns"),
        ("そうだね。とても良い。" * 50, "sentence_length"),
        (ARTICLE + "あの人の話は長くて、" * 30 + "終わらない。", "longest_sentence"),
        (ARTICLE + "".join(f"{n}番目の思い出はもう遠くて…\n" for n in range(30)), "ellipsis"),
        (ARTICLE + ARTICLE.splitlines()[0].join("\n\n") * 6, "repeated_lines"),
        (
            ARTICLE
            + "今すぐ購入すれば送料無料。ポイント還元の期間限定セール、数量限定で最安値、カートに入れるなら公式サイトはこちら。\n" * 1,
            "adverts",
        ),
        (ARTICLE + "名無しさんが>>1に返信する。ID:abcd1234は次スレへどうぞ、と>>2に書いていたのがこのスレだ。\n", "board"),
        (ARTICLE + "アダルト動画と無修正のエロ画像を集めたページで、ぶっ殺すぞと書いてある。\n", "ng_words"),
    ],
)
def test_each_rule_drops_its_page(text: str, reason: str) -> None:
    assert str(judge(text)).partition(":")[0] == reason


@pytest.mark.parametrize("name", ["advert_ja.txt", "board_ja.txt", "ng_ja.txt"])
def test_the_lists_say_their_licence_and_repeat_nothing(name: str) -> None:
    lines = (WORDS / name).read_text(encoding="utf-8").splitlines()
    assert "Apache-2.0" in lines[0]
    words = [line for line in lines if not line.startswith("#")]
    assert len(words) == len(set(words)) >= 30 and all(word == word.strip() and len(word) > 1 for word in words)


def test_a_list_of_one_s_own_and_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("改革\n# mine\n藩主\n𠮷野家\n", encoding="utf-8-sig")
    assert judge(ARTICLE + "𠮷野家。", ng_words=WordLimit(words=tmp_path / "words.txt", max_distinct=2, max_per_thousand=1)).startswith(
        "ng_words: "
    )
    assert judge(ARTICLE, ng_words=WordLimit(words=tmp_path / "words.txt", max_distinct=2, max_per_thousand=1)) is None
    with pytest.raises(UserError, match=r"none\.txt: no such file"):
        judge(ARTICLE, ng_words=WordLimit(words=Path("none.txt"), max_distinct=2, max_per_thousand=1))
