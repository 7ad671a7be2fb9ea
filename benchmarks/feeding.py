"""The way of the tokens into the trainer: how soon the first batch is there, in how much memory, and how many tokens a second follow.

    python -m benchmarks.feeding        (some minutes; writes about 1 GB below the folder for temporary files)

Seconds are given on the clock and of the processor: on a machine that others use too, only the second say something.
    start       a plan of 1.7 trillion tokens of 2,000 sources (sparse files), the whole first batch of 1,024 × 4,096, in a fresh
                process, imports included
    feeding     30 sources of real random tokens out of the page cache, by one process, as int64 micro-batches of 8
    peer        megatron-core's BlendedMegatronDatasetBuilder with GPTDataset on the same 30 sources; its samples stacked to micro-batches
                of 8 without PyTorch's DataLoader; the start without its imports. First with an empty cache folder, then with the index
                that it has left there
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml

from data_prep.indexed import DTYPE_CODES, HEADER, MAGIC, BinaryWriter, Labels, Manifest, path_of
from tokenization.load import load as load_tokenizer
from tokenization.tokenizer import Tokenizer
from tokenization.train import TrainConfig, train

NUM_SOURCES, NUM_TOKENS, PLANNED = 2000, 1_300_000_000, 1_700_000_000_000  # sources, tokens of each, tokens of the plan
FED_SOURCES, FED_TOKENS = 30, 8_000_000
MEAN_DOCUMENT = 850  # tokens
MICRO_BATCH = 8


def labels(name: str, tokenizer: Tokenizer) -> Labels:
    return Labels(
        name=name, kind="web", origin="human", languages={"ja": 1}, licences={"MIT": 1}, teachers={}, num_characters=1,
        tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size, fingerprint="",
    )  # fmt: skip


def sparse_source(prefix: Path, num_tokens: int, tokenizer: Tokenizer) -> None:
    """A binary of zeros that takes no room on the disk: only the parts of its index that are looked at when it is opened are written."""
    documents = num_tokens // MEAN_DOCUMENT
    manifest = Manifest(
        **labels(prefix.name, tokenizer).model_dump(),
        num_tokens=num_tokens, num_documents=documents, dtype="uint16", bin_sha256="0" * 64, idx_sha256="0" * 64,
    )  # fmt: skip
    with open(path_of(prefix, "bin"), "wb") as stream:
        stream.truncate(num_tokens * 2)
    with open(path_of(prefix, "idx"), "wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, DTYPE_CODES["uint16"], documents, documents + 1))
        stream.seek(HEADER.size + 4 * (documents - 1))
        stream.write(np.int32(MEAN_DOCUMENT).tobytes())
        stream.seek(HEADER.size + 12 * documents - 8)
        stream.write(np.int64((num_tokens - MEAN_DOCUMENT) * 2).tobytes())
        stream.truncate(HEADER.size + 12 * documents + 8 * (documents + 1))
    path_of(prefix, "json").write_text(manifest.model_dump_json())


def run_file(folder: Path, tokenizer: Path, data: Path, names: list[str], tokens: int, length: int, **phase: object) -> Path:
    """The YAML of a run over `names`, weights from 1 to 3."""
    values = {
        "run": str(folder / "run"),
        "tokenizer": str(tokenizer),
        "model": dict(
            num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, num_query_groups=1,
            vocab_size=load_tokenizer(tokenizer).vocab_size,
        ),
        "data": dict(folder=str(data), block_length=8192),
        "train": dict(micro_batch_size=MICRO_BATCH),
        "phases": [
            dict(
                name="p", tokens=tokens, sequence_length=length, global_batch_size=1024, learning_rate=dict(start=1e-3, end=1e-4),
                sources={name: 1.0 + 2 * n / len(names) for n, name in enumerate(names)}, **phase,
            )
        ],
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


START = """
import sys
from megatron_jobs import config
from megatron_jobs.data import feeder, phases
from megatron_jobs.data.order import DataOrder
settings = config.load(sys.argv[1])
binaries = feeder.open_sources(settings)
sources = feeder.facts(binaries)
settings = phases.resolve(settings, sources)
ours = feeder.Feeder(settings, DataOrder(settings, sources), binaries, rank=0, ranks=1)
first = ours.read(0)
assert len(first) == settings.phases[0].global_batch_size // settings.train.micro_batch_size
assert "torch" not in sys.modules
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(len(binaries), len({n for batch in first for n in batch.sources.tolist()}), int(peak) * 1024)
"""


def first_batch(run: Path) -> tuple[int, int, int]:
    """In a fresh process: sources opened, sources in the first batch, and the peak of resident memory, in bytes."""
    shown = subprocess.run([sys.executable, "-c", START, str(run)], check=True, capture_output=True, text=True).stdout
    opened, used, peak = map(int, shown.split())
    return opened, used, peak


def feed(run: Path, steps: int) -> None:
    began = Clock()
    from megatron_jobs import config
    from megatron_jobs.data import feeder, phases
    from megatron_jobs.data.order import DataOrder

    settings = config.load(run)
    binaries = feeder.open_sources(settings)
    sources = feeder.facts(binaries)
    settings = phases.resolve(settings, sources)
    ours = feeder.Feeder(settings, DataOrder(settings, sources), binaries, rank=0, ranks=1)
    ours.read(0)
    started = Clock()
    tokens = sum(batch.tokens[:, 1:].size for step in range(1, steps) for batch in ours.read(step))
    report(began, started, tokens)


def feed_peer(data: Path, cache: Path, names: list[str], length: int, steps: int) -> None:
    from types import SimpleNamespace

    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    began = Clock()
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=length, split="1,0,0", path_to_cache=str(cache), reset_position_ids=False,
        blend=([str(data / name) for name in names], [1.0 + 2 * n / len(names) for n in range(len(names))]),
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False, mid_level_dataset_surplus=0.05,
        tokenizer=SimpleNamespace(eod=0, pad=-1, vocab_size=65_000, unique_identifiers={"name": "none"}),
    )  # fmt: skip
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [steps * 1024, 0, 0], lambda: True, config).build()[0]

    def batch(number: int) -> torch.Tensor:
        rows = [dataset[n] for n in range(number * MICRO_BATCH, (number + 1) * MICRO_BATCH)]
        return torch.stack([torch.stack([row[name] for row in rows]) for name in ("tokens", "labels")])

    per_step = 1024 // MICRO_BATCH
    for number in range(per_step):
        batch(number)
    started = Clock()
    tokens = sum(batch(number)[0].numel() for number in range(per_step, steps * per_step))
    report(began, started, tokens)


class Clock:
    """Now, in seconds on the clock and of the processor."""

    def __init__(self) -> None:
        self.seconds, self.processor = time.perf_counter(), time.process_time()


def report(began: Clock, started: Clock, tokens: int) -> None:
    now = Clock()
    values = {
        "start": started.seconds - began.seconds,
        "start_processor": started.processor - began.processor,
        "speed": tokens / (now.seconds - started.seconds),
        "speed_processor": tokens / (now.processor - started.processor),
        "peak": next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")),
    }
    print(json.dumps(values))


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def in_a_process(*arguments: object) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.feeding", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    print(f"megatron-core {version('megatron-core')}, numpy {np.__version__}, {os.cpu_count()} cores\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "text.jsonl").write_text(json.dumps({"text": __doc__}))
        train(TrainConfig(inputs=[str(folder / "text.jsonl")], output=str(folder / "tokenizer"), vocab_size=350, character_coverage=1.0))
        tokenizer = load_tokenizer(folder / "tokenizer")

        names = [f"s{n:04d}" for n in range(NUM_SOURCES)]
        (folder / "sparse").mkdir()
        for name in names:
            sparse_source(folder / "sparse" / name, NUM_TOKENS, tokenizer)
        run = run_file(folder, folder / "tokenizer", folder / "sparse", names, PLANNED, 4096)
        for _ in range(3):
            began, processor = time.perf_counter(), children_seconds()
            opened, used, peak = first_batch(run)
            seconds, processor = time.perf_counter() - began, children_seconds() - processor
            print(
                f"start: {PLANNED:,} tokens in {opened:,} sources, first batch of {used} of them: {seconds:.2f} s "
                f"({processor:.2f} s of the processor), {peak / 2**20:.0f} MiB"
            )

        draw = np.random.default_rng(1)
        names = [f"r{n:02d}" for n in range(FED_SOURCES)]
        for name in names:
            writer = BinaryWriter(folder / "real" / name, np.dtype(np.uint16))
            lengths = draw.integers(50, 2 * MEAN_DOCUMENT - 50, FED_TOKENS // MEAN_DOCUMENT)
            writer.add_documents(draw.integers(1, tokenizer.vocab_size, lengths.sum()), lengths)
            writer.finish(labels(name, tokenizer))
        print(f"\nfeeding: {FED_SOURCES} sources of {FED_TOKENS:,} tokens\n")
        print("| sequence | what | first batch, s | of the processor, s | tokens/s | a processor second | peak MiB |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for length, steps in ((2048, 40), (4096, 20)):
            tokens = steps * 1024 * length
            rows = {}
            run = run_file(folder, folder / "tokenizer", folder / "real", names, tokens, length)
            rows["ours"] = in_a_process("ours", run, steps)
            run = run_file(folder, folder / "tokenizer", folder / "real", names, tokens, length, separate_documents=True)
            rows["ours, documents too"] = in_a_process("ours", run, steps)
            for cache in ("peer, empty cache", "peer, index cached"):
                rows[cache] = in_a_process("peer", folder / "real", folder / f"cache-{length}", ",".join(names), length, steps)
            for what, row in rows.items():
                print(
                    f"| {length} | {what} | {row['start']:.2f} | {row['start_processor']:.2f} | {row['speed'] / 1e6:,.0f} M "
                    f"| {row['speed_processor'] / 1e6:,.0f} M | {row['peak'] / 2**20:,.0f} |"
                )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["ours", run, steps]:
            feed(Path(run), int(steps))
        case ["peer", data, cache, names, length, steps]:
            feed_peer(Path(data), Path(cache), names.split(","), int(length), int(steps))
        case _:
            main()
