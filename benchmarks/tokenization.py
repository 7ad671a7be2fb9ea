"""JSONL to .bin/.idx, ours against its peers: megabytes of text per CPU second on one core.

    python -m benchmarks.tokenization [PYTHON_WITH_DATATROVE]        (about four minutes; the table of a run is in RESULTS.md)

The text is examples/corpus and Python files of the installed packages, each document once: caches that live from repeated text gain
nothing. Every measurement is a process of its own; CPU time counts its children and starts after the imports. Medians of three.
"""

import datetime
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
BYTES_OF_CODE = 40_000_000
DATATROVE = """
import json, sys, os
from datatrove.data import Document
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer
documents, tokenizer, output = sys.argv[1:]
before = sum(os.times()[:4])
rows = (Document(text=json.loads(line)["text"], id=str(n)) for n, line in enumerate(open(documents, encoding="utf-8")))
step = MegatronDocumentTokenizer(output, tokenizer_name_or_path=tokenizer + "/tokenizer.json", eos_token="</s>")
step.run(rows, 0, 1)
print(sum(os.times()[:4]) - before)
"""


def ours(documents: str, tokenizer: str, output: str, processes: int = 1) -> tuple[float, float]:
    from data_prep.prepare import PrepareConfig, prepare
    from tokenization import hf  # noqa: F401  (loaded before the clock starts)

    source = {"kind": "web", "documents": [documents]}
    config = PrepareConfig.model_validate({"tokenizer": tokenizer, "output": output, "sources": {"all": source}, "processes": processes})
    return _timed(lambda: prepare(config))


def megatron(documents: str, tokenizer: str, output: str) -> tuple[float, float]:
    """Megatron-LM's tools/preprocess_data.py in short: each document encoded by itself and added to the builder as a list."""
    import tokenizers
    import torch  # noqa: F401
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    def convert() -> None:
        engine = tokenizers.Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
        eod = engine.token_to_id("</s>")
        builder = IndexedDatasetBuilder(f"{output}.bin", dtype=DType.optimal_dtype(engine.get_vocab_size()))
        with open(documents, encoding="utf-8") as stream:
            for line in stream:
                ids = [*engine.encode(json.loads(line)["text"], add_special_tokens=False).ids, eod]
                builder.add_document(ids, [len(ids)])
        builder.finalize(f"{output}.idx")

    return _timed(convert)


def bare_sentencepiece(documents: str, tokenizer: str, _: str) -> tuple[float, float]:
    """The engine on texts that are in memory already; nothing is written."""
    import sentencepiece

    texts = [json.loads(line)["text"] for line in open(documents, encoding="utf-8")]
    engine = sentencepiece.SentencePieceProcessor(model_file=f"{tokenizer}/tokenizer.model")
    return _timed(lambda: [engine.encode(text) for text in texts])


def ours_on_two(documents: str, tokenizer: str, output: str) -> tuple[float, float]:
    return ours(documents, tokenizer, output, processes=2)


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """(CPU seconds of this process and its children, wall seconds)"""
    cpu, wall = sum(os.times()[:4]), time.monotonic()
    work()
    return sum(os.times()[:4]) - cpu, time.monotonic() - wall


def _measure(way: str, documents: Path, tokenizer: Path) -> tuple[float, float]:
    results = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as output:
            arguments = [str(documents), str(tokenizer), f"{output}/out"]
            if way.startswith("/"):
                line = [way, "-c", DATATROVE, *arguments]
            else:
                line = [sys.executable, "-m", "benchmarks.tokenization", way, *arguments]
            env = os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            run = subprocess.run(line, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            values = [float(value) for value in run.stdout.splitlines()[-1].split()]
            results.append((values[0], values[-1]))
    return statistics.median(cpu for cpu, _ in results), statistics.median(wall for _, wall in results)


def _corpus(path: Path) -> int:
    """Writes the documents; returns the bytes of text."""
    texts = [json.loads(line)["text"] for file in sorted((ROOT / "examples/corpus").glob("*.jsonl.gz")) for line in gzip.open(file)]
    code, packages = 0, Path(json.__file__).parents[1]
    for file in [*sorted(packages.rglob("*.py")), *sorted(Path(sys.prefix).glob("lib/*/site-packages/torch/**/*.py"))]:
        text = file.read_text(encoding="utf-8", errors="ignore")
        if code < BYTES_OF_CODE and text:
            texts.append(text)
            code += len(text.encode())
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return sum(len(text.encode()) for text in texts)


def _train_bpe(documents: Path, folder: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<unk>", "<s>", "</s>", "<pad>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8_000, show_progress=False, special_tokens=special, initial_alphabet=alphabet)
    lines = documents.read_text(encoding="utf-8").splitlines()
    backend.train_from_iterator([json.loads(line)["text"][:3_000] for line in lines[::4]], trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')


def main(datatrove: str | None) -> None:
    from tokenization.train import TrainConfig, train

    with tempfile.TemporaryDirectory() as scratch:
        documents, bpe, unigram = Path(scratch, "all.jsonl"), Path(scratch, "bpe"), Path(scratch, "unigram")
        megabytes = _corpus(documents) / 1e6
        _train_bpe(documents, bpe)
        inputs = [str(path) for path in sorted((ROOT / "examples/corpus").glob("*.jsonl.gz"))]
        train(TrainConfig(inputs=inputs, output=str(unigram), vocab_size=8_000, max_lines=30_000))
        packages = ", ".join(f"{name} {version(name)}" for name in ("gigatoken", "tokenizers", "sentencepiece", "megatron-core", "numpy"))
        print(f"\n{datetime.date.today()}, {megabytes:.1f} MB of text, 8,000 pieces, {os.cpu_count()} cores; {packages}\n")
        print("| what | CPU s | MB per CPU s | ours is |\n| --- | --- | --- | --- |")
        for title, folder, ways in (
            ("BPE", bpe, {"ours": "ours", "Megatron's way": "megatron"} | ({"datatrove": datatrove} if datatrove else {})),
            ("unigram", unigram, {"ours": "ours", "bare sentencepiece, nothing written": "bare_sentencepiece"}),
        ):
            measured = {name: _measure(way, documents, folder) for name, way in ways.items()}
            for name, (cpu, _) in measured.items():
                ratio = "" if name == "ours" else f"{cpu / measured['ours'][0]:.2f}×"
                print(f"| {title}: {name} | {cpu:.2f} | {megabytes / cpu:.1f} | {ratio} |", flush=True)
        two = _measure("ours_on_two", documents, unigram)[1]
        print(f"\nunigram, wall: 1 process {measured['ours'][1]:.2f} s, 2 processes {two:.2f} s: {measured['ours'][1] / two:.2f}×")


if __name__ == "__main__":
    if len(sys.argv) == 5:
        way = {function.__name__: function for function in (ours, megatron, bare_sentencepiece, ours_on_two)}[sys.argv[1]]
        print(*way(*sys.argv[2:]))
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else None)
