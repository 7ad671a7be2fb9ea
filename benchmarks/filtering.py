"""Japanese text after extraction: quality rules and near duplicates, ours against datatrove's stock components on one core.

    python -m benchmarks.filtering TEXTS.jsonl[.gz|.zst]... [--datatrove PYTHON]        (about two minutes)

PYTHON has datatrove[processing] and its Japanese tokenizer (spacy[ja], which brings SudachiPy). It is given a sample of 2 MB and
measured once. Both sides pass all documents to all steps, so that neither gains by what it drops: a filter stops at its first broken
rule, as always. CPU time starts after imports and dictionaries are loaded and excludes reading the texts; ours are medians of three.
"""

import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from mujina.files import read_rows
from mujina.user_input import command_line

ROOT = Path(__file__).parents[1]
DATATROVE_MEGABYTES = 2
NUM_RANKS = 4
DATATROVE = """
import copy, json, os, resource, sys, tempfile
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.utils.word_tokenizers import load_word_tokenizer
seconds = lambda: sum(os.times()[:4])
language = "jpn_Jpan"
documents = [Document(text=json.loads(line)["text"], id=str(n)) for n, line in enumerate(open(sys.argv[1], encoding="utf-8"))]
load_word_tokenizer(language).word_tokenize("日本語")
filters = [kind(language=language) for kind in (GopherRepetitionFilter, GopherQualityFilter, C4QualityFilter, FineWebQualityFilter)]
config, times = MinhashConfig(), [seconds()]
for document in documents:
    for step in filters:
        step.filter(copy.copy(document))
times.append(seconds())
with tempfile.TemporaryDirectory() as folder:
    signatures, buckets, removed = (f"{folder}/{name}" for name in ("signatures", "buckets", "removed"))
    MinhashDedupSignature(signatures, config, language).run(documents, 0, 1)
    times.append(seconds())
    for bucket in range(config.num_buckets):
        MinhashDedupBuckets(signatures, buckets, config=config).run(None, bucket, config.num_buckets)
    MinhashDedupCluster(buckets, removed, config).run(None, 0, 1)
    left = sum(1 for _ in MinhashDedupFilter(removed).run(documents, 0, 1))
    times.append(seconds())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"times": times, "peak": peak, "dropped": len(documents) - left}))
"""


def ours(texts: str, copies: int = 1) -> None:
    """Prints CPU seconds after each part, peak memory and what was dropped as near duplicates. With `copies`, that many times the text."""
    from datatrove.data import Document

    from data_prep.steps.japanese import JapaneseQuality
    from data_prep.steps.near_duplicates import NearDuplicates
    from data_prep.steps.ngrams import letters

    def documents(rank: int) -> Iterator[Document]:
        """Read anew for each pass; a copy is other text of the same shape: its letters are moved on in their blocks."""
        for copy in range(rank, copies, NUM_RANKS) if copies > 1 else [0]:
            for number, (_, row) in enumerate(read_rows(texts)):
                if copies > 1:
                    codes = np.frombuffer(row["text"].encode("utf-32-le"), np.uint32)
                    moved = np.where((codes >= 0x4E00) & (codes < 0x9FA0), 0x4E00 + (codes * (2 * copy + 1) + 97 * copy) % 0x51A0, codes)
                    row["text"] = moved.astype(np.uint32).tobytes().decode("utf-32-le")
                if copies > 1 or number % NUM_RANKS == rank:
                    yield Document(text=row["text"], id=str(number))

    if copies == 1:
        loaded = [list(documents(rank)) for rank in range(NUM_RANKS)]
        documents = loaded.__getitem__
    judge, step = JapaneseQuality().start(), NearDuplicates()
    judge(Document(text="これは日本語の文である。" * 50, id=""))
    letters("")
    times = [_seconds()]
    for rank in range(NUM_RANKS):
        deque(map(judge, documents(rank)), 0)
    times.append(_seconds())
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for rank in range(NUM_RANKS):
            deque(step.mark(documents(rank), work, rank), 0)
        times.append(_seconds())
        for num_tasks, find in step.find(work, NUM_RANKS):
            for task in range(num_tasks):
                find(task)
        dropped = sum(reason is not None for rank in range(NUM_RANKS) for reason in map(step.judge(work, rank), documents(rank)))
        times.append(_seconds())
    print(json.dumps({"times": times, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "dropped": dropped}))


def _seconds() -> float:
    return sum(os.times()[:4])


def _measure(python: str, program: str, *arguments: str) -> tuple[list[float], float, int]:
    """(CPU seconds of quality, signatures and the rest of near duplicates, peak MiB, documents dropped as near duplicates)"""
    env = os.environ | {"RAYON_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    line = [python, "-c", program, *arguments]
    result = subprocess.run(line, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found = json.loads(result.stdout.splitlines()[-1])
    return [end - start for start, end in zip(found["times"], found["times"][1:], strict=False)], found["peak"], found["dropped"]


def _ours(texts: Path, copies: int = 1) -> tuple[list[float], float, int]:
    return _measure(sys.executable, f"from benchmarks.filtering import ours; ours({str(texts)!r}, {copies})")


def main(
    texts: Annotated[list[Path], typer.Argument(help="Japanese documents, rows with `text`")],
    datatrove: Annotated[str | None, typer.Option(help="a Python that has datatrove and its Japanese tokenizer")] = None,
) -> None:
    """Megabytes of text (UTF-8) per CPU second, and peak memory."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = [json.dumps({"text": row["text"]}, ensure_ascii=False) + "\n" for path in texts for _, row in read_rows(path)]
        sample = rows[:: max(1, round(_megabytes(rows) / DATATROVE_MEGABYTES))]
        all_texts, some_texts = Path(scratch, "all.jsonl"), Path(scratch, "some.jsonl")
        all_texts.write_text("".join(rows), encoding="utf-8")
        some_texts.write_text("".join(sample), encoding="utf-8")
        megabytes = _megabytes(rows)
        runs = [_ours(all_texts) for _ in range(3)]
        parts = [statistics.median(run[0][part] for run in runs) for part in range(3)]
        total = statistics.median(sum(run[0]) for run in runs)
        packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "rensa"))
        print(f"\n{datetime.date.today()}, {megabytes:.1f} MB of text, {os.cpu_count()} cores; {packages}\n")
        print("| MB per CPU s | quality | signatures | their comparison | all | peak MiB |\n| --- | --- | --- | --- | --- | --- |")
        _print_row("ours", megabytes, parts, total, statistics.median(run[1] for run in runs))
        if datatrove:
            parts, peak, _ = _measure(datatrove, DATATROVE, str(some_texts))
            _print_row(f"datatrove, {_megabytes(sample):.1f} MB", _megabytes(sample), parts, sum(parts), peak)
            print(f"\nours is {sum(parts) / _megabytes(sample) * megabytes / total:.0f}×\n")
        print(f"\nMemory of ours as the text grows, {NUM_RANKS} ranks in one process, one after the other:\n")
        for copies in (16, 64):
            print(f"{megabytes * copies:.0f} MB: peak {_ours(all_texts, copies)[1]:.0f} MiB", flush=True)


def _megabytes(rows: list[str]) -> float:
    return sum(len(json.loads(row)["text"].encode()) for row in rows) / 1e6


def _print_row(name: str, megabytes: float, parts: list[float], total: float, peak: float) -> None:
    speeds = " | ".join(f"{megabytes / seconds:.2f}" for seconds in (*parts, total))
    print(f"| {name} | {speeds} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    command_line(main)
