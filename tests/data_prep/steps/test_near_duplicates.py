"""What MinHash drops, held against Jaccard similarities that are computed by brute force."""

import gzip
import json
import random
from collections import deque
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document

from data_prep.steps import near_duplicates, records
from data_prep.steps.near_duplicates import NearDuplicates
from data_prep.steps.ngrams import letters
from data_prep.steps.records import number_of, record_file

CORPUS = Path(__file__).parents[3] / "examples/corpus"


@cache
def real_texts() -> list[str]:
    texts = [json.loads(line)["text"] for name in ("web_ja", "documents_ja", "web_en") for line in gzip.open(CORPUS / f"{name}.jsonl.gz")]
    return [text[:2_000] for text in texts[::2]]


def planted(text: str, dice: random.Random, foreign: str) -> str:
    """A copy with one kind of change at one of many levels."""
    kind, level = dice.choice(["characters", "cut", "sentences", "frame", "spelling"]), dice.uniform(0.002, 0.3)
    if kind == "characters":
        at = set(dice.sample(range(len(text)), int(len(text) * level / 5)))
        return "".join(dice.choice(foreign) if n in at else character for n, character in enumerate(text))
    if kind == "cut":
        start = dice.randrange(int(len(text) * (1 - level)))
        return text[:start] + text[start + int(len(text) * level) :]
    if kind == "sentences":
        start, size = dice.randrange(len(text)), int(len(text) * level)
        return text[:start] + foreign[:size] + text[start:]
    if kind == "frame":
        size = int(len(text) * level / 2)
        return foreign[:size] + text[size:-size] + foreign[-size:] if size else text
    return text.upper().replace("、", ", ").replace("。", "．\n")


def similarities(texts: list[str]) -> np.ndarray:
    """The true Jaccard similarity of all pairs, shape [texts, texts]."""
    vocabulary: dict[str, list[int]] = {}
    sizes = []
    for number, text in enumerate(texts):
        plain = letters(text).tobytes().decode("utf-32-le")
        ngrams = {plain[n : n + 5] for n in range(len(plain) - 4)}
        sizes.append(len(ngrams))
        for ngram in ngrams:
            vocabulary.setdefault(ngram, []).append(number)
    common = np.zeros((len(texts), len(texts)), np.int32)
    for numbers in vocabulary.values():
        if len(numbers) > 1:
            common[np.ix_(numbers, numbers)] += 1
    sizes_N = np.array(sizes)
    return common / (sizes_N[:, None] + sizes_N[None] - common)


def dropped(texts: list[str], folder: Path, num_ranks: int, step: NearDuplicates | None = None) -> dict[int, str]:
    """The numbers of the dropped texts and why; ranks take consecutive texts."""
    step = step or NearDuplicates()
    folder.mkdir()
    documents = [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
    shares = [[documents[n] for n in share] for share in np.array_split(range(len(documents)), num_ranks)]
    for rank, share in enumerate(shares):
        deque(step.mark(share, folder, rank), 0)
    for num_tasks, work in step.find(folder, num_ranks):
        for task in reversed(range(num_tasks)):  # tasks of a stage know nothing of each other
            work(task)
    result = {}
    for rank, share in enumerate(shares):
        judge = step.judge(folder, rank)
        result |= {int(document.id): reason for document in share if (reason := judge(document))}
    return result


def test_recall_and_precision_on_planted_near_duplicates(tmp_path: Path) -> None:
    dice = random.Random(7)
    originals = real_texts()
    texts = list(originals)
    for _ in range(450):
        texts.append(planted(dice.choice(originals), dice, dice.choice(originals)))
    dice.shuffle(texts)
    true_NN = np.tril(similarities(texts), -1)
    removed = dropped(texts, tmp_path / "1", 1)

    # A pair is resolved when one of the two is gone; a document is distinct when it is less than 0.7 like any before it.
    later, earlier = np.nonzero(true_NN >= 0.8)
    is_gone = np.isin(np.arange(len(texts)), list(removed))
    resolved = is_gone[later] | is_gone[earlier]
    distinct = true_NN.max(axis=1) < 0.7
    assert len(later) > 250 and distinct.sum() > 500 and np.count_nonzero((true_NN > 0.5) & (true_NN < 0.8)) > 80
    recall, false = resolved.mean(), (is_gone & distinct).sum() / distinct.sum()
    print(f"{len(later)} pairs, recall {recall:.4f}; {distinct.sum()} distinct documents, dropped {false:.4%}")
    assert recall >= 0.95 and false <= 0.005

    # Each names a document that is kept, and how similar the two are.
    for number, reason in removed.items():
        similarity, keeper = reason.removeprefix("near_duplicate: ").split(" of ")
        assert int(keeper) not in removed
        assert abs(float(similarity) - true_NN[number, int(keeper)]) < 0.1

    assert dropped(texts, tmp_path / "2", 2) == removed
    assert dropped(texts, tmp_path / "5", 5) == removed


def test_a_chain_of_changes_joins_no_unlike_documents(tmp_path: Path) -> None:
    text = "".join(random.Random(0).choices([chr(code) for code in range(0x4E00, 0x5E00)], k=1_400))
    window = [text[start : start + 1_000] for start in range(0, 361, 90)]  # neighbours 0.83, over one 0.69, over two 0.57
    assert list(dropped(window, tmp_path / "chain", 2)) == [1, 3]


def test_copies_of_a_dropped_document_are_held_against_the_kept_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "_find_candidates", only_neighbours)
    text = real_texts()[0]
    copies = dropped([text + "!" * n for n in range(30)], tmp_path / "copies", 3)
    assert copies == {number: "near_duplicate: 1.00 of 0" for number in range(1, 30)}


def only_neighbours(folder: Path, num_ranks: int, part: int) -> None:
    """The fewest candidates that a bucket of 30 copies in 3 ranks could give: each with the one before."""
    with record_file(folder / f"candidates-{part:05}", 2) as candidates:
        if part == 0:
            numbers = np.array([number_of(rank, position) for rank in range(3) for position in range(10)], np.uint64)
            candidates.add(np.stack([numbers[1:], numbers[:-1]]))


def test_short_texts_are_duplicates_when_their_letters_are_the_same(tmp_path: Path) -> None:
    texts = ["はい", "「はい。」", "はいい", "はいいえ", "!?", "?!", "", "", "ハイ", "ﾊｲ", "OK", "ｏｋ"]
    assert list(dropped(texts, tmp_path / "short", 13)) == [1, 9, 11]


def test_dialogues_are_compared_by_their_turns(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "何"}, {"role": "assistant", "content": real_texts()[0]}]
    documents = [Document(text="", id=str(n), metadata={"messages": [*turns, {"role": "user", "content": f"{n}"}]}) for n in range(2)]
    step = NearDuplicates()
    deque(step.mark(documents, tmp_path, 0), 0)
    for _, work in step.find(tmp_path, 1):
        work(0)
    judge = step.judge(tmp_path, 0)
    assert [judge(document) is None for document in documents] == [True, False]


def test_small_pieces_and_tasks_run_twice_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text for text in real_texts()[:60] for _ in range(2)]
    at_once = dropped(texts, tmp_path / "once", 3)
    assert len(at_once) >= 60
    step = NearDuplicates()
    files = {path.name: path.read_bytes() for path in (tmp_path / "once").iterdir()}
    for num_tasks, work in step.find(tmp_path / "once", 3):
        for task in range(num_tasks):
            work(task)
    assert {path.name: path.read_bytes() for path in (tmp_path / "once").iterdir()} == files
    for module, name, value in (records, "RUN", 100), (records, "SLICE", 50), (near_duplicates, "BATCH", 7), (near_duplicates, "SPAN", 11):
        monkeypatch.setattr(module, name, value)
    assert dropped(texts, tmp_path / "small", 3) == at_once


@pytest.mark.parametrize(("similarity", "rows"), [(0.5, 2), (0.8, 6), (0.9, 13), (0.95, 25)])
def test_bands_find_what_is_as_similar_as_wanted(similarity: float, rows: int) -> None:
    step = NearDuplicates(similarity=similarity)
    assert step.rows == rows and similarity - 0.05 < step.threshold < similarity
