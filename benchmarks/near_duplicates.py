"""Near-duplicates planted in real pages: how many are found, and how many distinct pages are dropped for nothing.

    python -m benchmarks.near_duplicates CORPUS        (the OUTPUT of examples/debian_corpus.py --plant-duplicates 0.1; some minutes)

The pages of web_ja and web_en go through `mujina prepare` with the steps extract, normalise and near_duplicates. The truth is counted,
not estimated: the Jaccard similarity of the sets of character 5-grams of each text that the step saw.
    recall           of the planted pairs that are 0.8 or more alike: one of the two was dropped, or both for a third
    distinct         documents that resemble no other of the corpus by 0.8, or by 0.75; those dropped are false removals
"""

import datetime
import json
import sys
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from data_prep.config import PrepareConfig
from data_prep.executors import prepare
from data_prep.steps.ngrams import letters, ngram_hashes
from mujina.files import read_rows

STEPS = [{"step": "extract"}, {"step": "normalise"}, {"step": "near_duplicates"}]
PARTS = ("web_ja", "web_en")


def documents_of(output: Path, name: str) -> tuple[dict[str, str], set[str]]:
    """The texts that the step saw by id, and the ids of those that it dropped."""
    rows = {state: [] for state in ("documents", "removed/03-near_duplicates")}
    for state, found in rows.items():
        for path in sorted((output / name / state).glob("*.jsonl.zst")):
            found += [row for _, row in read_rows(path)]
    kept, removed = rows.values()
    return {row["id"]: row["text"] for row in [*kept, *removed]}, {row["id"] for row in removed}


def best_similarities(texts: list[str]) -> np.ndarray:
    """For each text its largest Jaccard similarity with any other: shape [texts]."""
    sets = [np.unique(ngram_hashes(letters(text), 5)) for text in texts]
    sizes = np.array([len(one) for one in sets])
    hashes, owners = np.concatenate(sets), np.repeat(np.arange(len(sets)), sizes)
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    best = np.zeros(len(sets))
    for number, one in enumerate(sets):
        low, high = np.searchsorted(hashes, one), np.searchsorted(hashes, one, side="right")
        places = np.repeat(low - np.cumsum([0, *(high - low)[:-1]]), high - low) + np.arange((high - low).sum())
        shared = np.bincount(owners[places], minlength=len(sets)).astype(float)
        shared[number] = 0
        best[number] = (shared / np.maximum(sizes + sizes[number] - shared, 1)).max(initial=0)
    return best


def jaccard(one: str, other: str) -> float:
    a, b = (set(ngram_hashes(letters(text), 5).tolist()) for text in (one, other))
    return len(a & b) / max(len(a | b), 1)


def main(corpus: Path) -> None:
    planted = [json.loads(line) for line in (corpus / "planted.jsonl").read_text().splitlines()]
    print(f"{datetime.date.today()}; rensa {version('rensa')}, resiliparse {version('resiliparse')}\n")
    print("| pages | documents | dropped | planted pairs ≥ 0.8 | recall | distinct at 0.8 | dropped | distinct at 0.75 | dropped |")
    print("| --- " * 9 + "|")
    with tempfile.TemporaryDirectory() as folder:
        sources = {name: {"documents": [str(corpus / name)], "kind": "web", "damaged": "skip", "steps": STEPS} for name in PARTS}
        prepare(PrepareConfig.model_validate({"output": folder, "sources": sources}))
        recalls = defaultdict(list)
        for name in PARTS:
            texts, removed = documents_of(Path(folder), name)
            pairs = [row for row in planted if row["id"] in texts and row["copy_id"] in texts]
            found = []
            for row in pairs:
                similarity = jaccard(texts[row["id"]], texts[row["copy_id"]])
                recalls[min(int(similarity * 20) / 20, 0.95)].append(bool({row["id"], row["copy_id"]} & removed))
                if similarity >= 0.8:
                    found.append(recalls[min(int(similarity * 20) / 20, 0.95)][-1])
            ids = list(texts)
            best = best_similarities([texts[id] for id in ids])
            columns = [name, f"{len(ids):,}", f"{len(removed):,}", f"{len(found):,}", f"{np.mean(found):.1%}"]
            for limit in (0.8, 0.75):
                distinct = {id for id, similarity in zip(ids, best, strict=True) if similarity < limit}
                columns += [f"{len(distinct):,}", f"{len(distinct & removed):,} ({len(distinct & removed) / len(distinct):.2%})"]
            print("| " + " | ".join(columns) + " |")
    print("\nplanted pairs found, by similarity: ", end="")
    print("; ".join(f"{low:.2f}–{low + 0.05:.2f}: {sum(hits)} of {len(hits)}" for low, hits in sorted(recalls.items()) if low >= 0.5))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
