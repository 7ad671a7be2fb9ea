"""Reading binaries: document boundaries, the micro-batches of each rank a step ahead, and a start that does not grow with the corpus."""

import os
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest

from benchmarks.feeding import first_batch, run_file, sparse_source
from data_prep.indexed import open_binary
from megatron_jobs.data import feeder, phases
from megatron_jobs.data.order import DataOrder
from mujina.user_input import UserError
from tests.conftest import tiny
from tests.data_prep.test_indexed import write
from tokenization.load import load as load_tokenizer

LENGTHS = [4, 1, 101, 2, 7, 1, 1, 60]  # tokens of documents; ids say nothing about where they end


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("documents") / "a"
    write(prefix, [[9] * length for length in LENGTHS])
    return open_binary(prefix)


def test_every_token_knows_its_document(binary):
    """Against a plain count, at every offset and several lengths: samples that begin and end within documents, and at their bounds."""
    owner = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for length in (1, 3, 16, 64):
        offsets = range(len(owner) - length)
        found = np.stack([binary.documents(offset, length) for offset in offsets])
        assert found.dtype == np.int32 and found.shape == (len(offsets), length)
        for offset in offsets:
            inside = owner[offset : offset + length]
            assert found[offset].tolist() == (inside - inside[0]).tolist()


def test_a_search_for_documents_reads_little(tmp_path, monkeypatch):
    write(tmp_path / "many", [[1, 2]] * 100_000)
    binary, read, pread = open_binary(tmp_path / "many"), [], os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: read.append(arguments[1]) or pread(*arguments))
    assert binary.documents(99_999, 8).tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
    assert sum(read) < 400  # bytes; the index has 2 MB


def test_a_file_that_became_shorter_is_an_error(tmp_path):
    write(tmp_path / "a", [[9] * 100])
    binary = open_binary(tmp_path / "a")
    os.truncate(tmp_path / "a.bin", 100)
    with pytest.raises(UserError, match="a.bin: has become shorter"):
        binary.read(40, 20)


@pytest.fixture
def opened(prepared, tmp_path):
    """The tiny run with a batch ramp from 4 to 8 in its first phase, and documents separated in its second."""
    first, last = tiny(prepared, tmp_path).model_dump(mode="json", exclude_none=True)["phases"]
    first |= dict(batch_ramp=dict(start=4, increment=4, tokens=256))
    config = tiny(prepared, tmp_path, phases=[first, last | dict(separate_documents=True)])
    binaries = feeder.open_sources(config)
    sources = feeder.facts(binaries)
    return phases.resolve(config, sources), DataOrder(config, sources), binaries


def test_the_ranks_share_each_step_in_order(opened):
    """The micro-batches of all ranks, laid side by side, are the samples of the order, read from the files as they are."""
    config, order, binaries = opened
    for ranks in (1, 2):
        feeders = [feeder.Feeder(config, order, binaries, rank, ranks) for rank in range(ranks)]
        for step in range(phases.num_steps(config.phases)):
            index, step_in_phase = phases.locate(config.phases, step)
            phase = config.phases[index]
            taken = [feeder.take(step)[0] for feeder in feeders]
            batches = [batch for side_by_side in zip(*taken, strict=True) for batch in side_by_side]
            where = order.samples(step, range(phase.batch_size(step_in_phase)))
            length = phase.sequence_length
            expected = [binaries[name].tokens[at : at + length + 1].tolist() for name, at in where]
            assert np.concatenate([batch.tokens for batch in batches]).tolist() == expected
            assert [order.names[n] for batch in batches for n in batch.sources] == [name for name, _ in where]
            assert all(
                batch.tokens.shape == (config.train.micro_batch_size, length + 1) and batch.tokens.dtype == np.int64 for batch in batches
            )
            for batch in batches:
                assert (batch.documents is None) == (index == 0)
            if index == 1:
                there = np.stack([binaries[name].documents(offset, length) for name, offset in where])
                assert (np.concatenate([batch.documents for batch in batches]) == there).all()
        assert feeders[0].take(3)[0][0].tokens.tolist() == feeders[0].read(3)[0].tokens.tolist()  # back to an earlier step


def test_the_next_step_is_read_meanwhile(opened, monkeypatch):
    """And what its reading raises is raised in the trainer, when it asks for that step."""
    config, order, binaries = opened
    ahead, threads = feeder.Feeder(config, order, binaries, 0, 1), []

    def samples(step, numbers):
        threads.append((step, threading.current_thread().daemon))
        if step == 2:
            raise OSError("the disk is gone")
        return DataOrder.samples(order, step, numbers)

    monkeypatch.setattr(order, "samples", samples)
    ahead.take(0)
    ahead.take(1)
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.take(2)
    assert threads == [(0, True), (1, True), (2, True)]
    ahead.take(5)  # the trainer passes over steps


FEEDING_PROCESS = """
import sys, time
from megatron_jobs.data import feeder
feeder.Feeder.read = lambda self, step: time.sleep(0 if step == 0 else 1000)
from megatron_jobs.config import load
from megatron_jobs.data import phases
phases.num_steps = feeder.num_steps = lambda phases: 9
class Config: phases = ()
feeder.Feeder(Config, None, {}, 0, 1).take(0)
raise SystemExit(7)
"""


def test_a_feeder_does_not_survive_its_trainer():
    assert subprocess.run([sys.executable, "-c", FEEDING_PROCESS], timeout=300).returncode == 7


def test_the_first_batch_of_a_large_corpus_is_there_at_once(prepared, tmp_path):
    """A plan of 1.7 trillion tokens of 2,000 sources, with few descriptors: no index is built, no source is read."""
    names = [f"s{n:04d}" for n in range(2000)]
    (tmp_path / "data").mkdir()
    tokenizer = load_tokenizer(prepared / "tokenizer")
    for name in names:
        sparse_source(tmp_path / "data" / name, 1_300_000_000, tokenizer)
    run = run_file(tmp_path, prepared / "tokenizer", tmp_path / "data", names, 1_700_000_000_000, 4096, separate_documents=True)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        opened, used, peak = first_batch(run)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert opened == 2000 and used > 900
    assert peak < 300 * 2**20
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".bin", ".idx", ".json", ".yaml"}  # no cache
