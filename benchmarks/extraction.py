"""HTML to text, our step against trafilatura as datatrove runs it: megabytes of HTML per CPU second on one core.

    python -m benchmarks.extraction FOLDER_OF_HTML [...]        (about a minute; needs the extra `data`)

The pages are a seeded sample of all .html files under the folders, read and decoded before the clock starts. The ways take turns, and
each figure is the median of three.
"""

import datetime
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

from datatrove.data import Document
from datatrove.pipeline.extractors import Trafilatura

from data_prep.steps.extract import Extract
from data_prep.steps.read import PAGES, find_inputs, read
from mujina.user_input import UserError

BYTES = 8_000_000
SEED = 0


def sample(folders: list[str]) -> list[str]:
    """Pages as text, BYTES of them or all that there are."""
    paths = [path for path in find_inputs(folders) if path.endswith(PAGES)]
    random.Random(SEED).shuffle(paths)
    pages, room = [], BYTES
    for path in paths:
        for document in read(path, {}, "skip", print):
            pages.append(document.text)
            room -= len(document.text.encode())
        if room < 0:
            break
    if not pages:
        raise UserError(f"{', '.join(folders)}: no .html files there: name folders that hold some")
    return pages


def ours() -> Callable[[str], str]:
    judge = Extract().start()

    def extract(page: str) -> str:
        document = Document(text=page, id="", metadata={"html": True})
        return document.text if judge(document) is None else ""

    return extract


def main(folders: list[str]) -> None:
    pages = sample(folders)
    megabytes = sum(len(page.encode()) for page in pages) / 1e6
    ways = {"ours (resiliparse)": ours(), "trafilatura, as datatrove": Trafilatura().extract}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    characters = {}
    for extract in ways.values():
        extract(pages[0])  # loads its library
    for _ in range(3):
        for name, extract in ways.items():
            before = time.process_time()
            texts = [extract(page) for page in pages]
            seconds[name].append(time.process_time() - before)
            characters[name] = sum(len(text or "") for text in texts)
    packages = ", ".join(f"{name} {version(name)}" for name in ("resiliparse", "trafilatura", "datatrove", "lxml"))
    print(f"\n{datetime.date.today()}, {len(pages):,} pages, {megabytes:.1f} MB of HTML, {os.cpu_count()} cores; {packages}\n")
    print("| what | CPU s | MB per CPU s | characters out | ours is |\n| --- | --- | --- | --- | --- |")
    median = {name: statistics.median(times) for name, times in seconds.items()}
    for name, cpu in median.items():
        ratio = "" if name.startswith("ours") else f"{cpu / median['ours (resiliparse)']:.1f}×"
        print(f"| {name} | {cpu:.2f} | {megabytes / cpu:.1f} | {characters[name]:,} | {ratio} |")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
