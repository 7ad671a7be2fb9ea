"""The verdicts are those of datatrove's own filters when these are given the same words and sentences."""

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

import datatrove.utils.word_tokenizers
import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.gopher_repetition_filter import find_all_duplicate, find_top_duplicate, get_n_grams
from datatrove.utils.text import split_into_parts
from datatrove.utils.word_tokenizers import WordTokenizer
from hypothesis import given
from hypothesis import strategies as st

from data_prep.steps.english import SENTENCE, WORD, EnglishQuality

FAULTS = (
    "Lorem ipsum dolor sit amet.", "Please enable JavaScript now.", "Read our privacy policy today.", "- one\n- two", "to be continued...",
    "#tag " * 40, "[edit] It is cited.[12]", "it is what it is " * 20, "word" * 300 + " and two more", "f() { return; }",
)  # fmt: skip
CORPUS = Path(__file__).parents[3] / "examples" / "corpus" / "web_en.jsonl.gz"


class SameWords(WordTokenizer):
    def word_tokenize(self, text: str) -> list[str]:
        return WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return SENTENCE.findall(text)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [sentence.span() for sentence in SENTENCE.finditer(text)]


@pytest.fixture
def same_words(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datatrove.utils.word_tokenizers, "load_word_tokenizer", lambda _: SameWords())
    split_into_parts.cache_clear()
    yield
    split_into_parts.cache_clear()


def stock(text: str) -> tuple[str | None, str]:
    """The reason of FineWeb's filters in their order, and the text that they leave."""
    document = Document(text=text, id="")
    for step in (GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter(filter_no_terminal_punct=False), FineWebQualityFilter()):
        verdict = step.filter(document)
        if verdict is not True:
            return verdict[1], document.text
    return None, document.text


def ours(text: str, step: EnglishQuality | None = None) -> tuple[str | None, str]:
    document = Document(text=text, id="")
    reason = (step or EnglishQuality()).start()(document)
    return reason and reason.partition(":")[0], document.text


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Pages of the corpus, shuffled and shortened ones, and such with every kind of fault."""
    with gzip.open(CORPUS, "rt", encoding="utf-8") as stream:
        pages = [json.loads(line)["text"][:8_000] for line in stream]
    rng = random.Random(1)
    paragraphs = [paragraph for page in pages for paragraph in page.split("\n\n")]
    prose = [paragraph for paragraph in paragraphs if len(paragraph) > 200 and paragraph.endswith(".") and "{" not in paragraph]
    mixed = []
    for _ in range(300):
        parts = rng.sample(prose, rng.randint(1, 8))
        parts += rng.sample(paragraphs, rng.randint(0, 4)) + rng.choices(parts, k=rng.choice((0, 0, 0, 1, 1, 2)))
        parts += [rng.choice(FAULTS)] * rng.choice((0, 0, 1, 3))
        rng.shuffle(parts)
        mixed.append(rng.choice(("\n", "\n\n")).join(parts))
    return pages + [page[:1500] for page in pages] + mixed


def test_the_verdicts_are_datatrove_s(same_words: None, texts: list[str]) -> None:
    verdicts = [(ours(text), stock(text)) for text in texts]
    assert [pair for pair in verdicts if pair[0] != pair[1]] == []
    reasons = {reason for _, (reason, _) in verdicts}
    assert {None, "char_dup_ratio", "dup_line_frac", "gopher_short_doc", "lorem_ipsum"} <= reasons
    assert any(str(reason).startswith("duplicated_") for reason in reasons) and any(str(reason).startswith("top_") for reason in reasons)


@given(st.lists(st.sampled_from(("is", "cat", "house", "remember")), min_size=12, max_size=60))
def test_shares_of_repeated_words_are_exact(words: list[str]) -> None:
    """Also where several n-grams are equally frequent: datatrove takes the first."""
    text = " ".join(words)
    values = {reason: value for reason, value, _, _ in EnglishQuality()._repetition(text, words) if "gram" in reason}
    expected = {f"top_{n}_gram": find_top_duplicate(get_n_grams(words, n)) / len(text) for n in range(2, 5)}
    expected |= {f"duplicated_{n}_n_grams": find_all_duplicate(words, n) / len(text) for n in range(5, 11)}
    assert values == expected


LINES = (
    "The house stands at the end of a long road and nobody has painted it for years.",
    "In winter you can see smoke from the village behind those hills.",
    "My grandmother used to say that every river remembers where it began.",
    "We bought bread, some cheese and two bottles of water before leaving.",
    "Nothing about this journey was easy, but all of us would go again.",
    "Have you ever seen so many stars?",
)


def test_the_rules_that_fineweb_left_out_and_the_lines_can_be_chosen() -> None:
    text = "\n".join([*LINES, "A heading without an end"])
    assert ours(text) == (None, text)
    assert ours(text, EnglishQuality(terminal_punctuation=True)) == (None, "\n".join(LINES))
    braced = "\n".join([*LINES, "This one { has a brace.", "Enable javascript to go on."])
    assert ours(braced)[0] == "curly_bracket"
    assert ours(braced, EnglishQuality(curly_bracket=False)) == (None, braced.rpartition("\n")[0])
    assert ours(braced, EnglishQuality(drop_lines=False)) == (None, braced)


def test_a_dialogue_keeps_its_turns() -> None:
    messages = [{"role": "user", "content": "javascript of the cat?"}, {"role": "assistant", "content": "\n".join(LINES)}]
    document = Document(text="\n".join(turn["content"] for turn in messages), id="", metadata={"messages": messages})
    before = document.text
    assert EnglishQuality().start()(document) is None and document.text == before
