"""Our binaries are Megatron's to the byte, and damaged or foreign ones are refused."""

import hashlib
import json
import os
import time
import tracemalloc
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from data_prep import indexed
from data_prep.indexed import BinaryWriter, Channel, Labels, Manifest, open_binary, token_dtype
from mujina.user_input import UserError

DOCUMENTS = [[5, 6, 7, 2], [2], [8] * 100 + [2], [9, 2]]


CHANNELS = {
    "weights": Channel(dtype="uint8", per="token"),
    "halves": Channel(dtype="float16", per="token"),
    "logp": Channel(dtype="float32", per="document"),
}


def values_of(documents: list[list[int]]) -> dict[str, np.ndarray]:
    """Of CHANNELS: twice the id, half of it, and the sum of the ids."""
    ids = np.array([*chain(*documents)])
    sums = np.array([sum(document) for document in documents])
    return {"weights": (2 * ids).astype(np.uint8), "halves": (ids / 2).astype(np.float16), "logp": -sums.astype(np.float32)}


def write(
    prefix: Path,
    documents: list[list[int]] = DOCUMENTS,
    vocab_size: int = 300,
    tokenizer_hash: str = "a" * 64,
    channels: dict[str, Channel] | None = None,
) -> Manifest:
    writer = BinaryWriter(prefix, token_dtype(vocab_size), channels)
    for part in (documents[:1], documents[1:]):
        if part:
            values = {name: values for name, values in values_of(part).items() if name in channels} if channels else {}
            writer.add_documents(np.array([*chain(*part)]), np.array([len(ids) for ids in part]), values)
    labels = Labels(
        name=prefix.name, kind="web", origin="human", languages={"en": len(documents)}, licences={"MIT": len(documents)}, teachers={},
        num_characters=10, tokenizer_hash=tokenizer_hash, vocab_size=vocab_size, fingerprint="f",
    )  # fmt: skip
    return writer.finish(labels)


@pytest.mark.parametrize(("vocab_size", "channels"), [(65_499, None), (65_500, CHANNELS)])
def test_bytes_and_contents_are_megatrons(
    tmp_path: Path, vocab_size: int, channels: dict[str, Channel] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    monkeypatch.setattr(indexed, "CHUNK", 3)  # so that the index spans several
    dtype = DType.optimal_dtype(vocab_size)
    assert token_dtype(vocab_size) == dtype
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for ids in DOCUMENTS:
        builder.add_item(torch.tensor(ids))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    write(tmp_path / "ours", vocab_size=vocab_size, channels=channels)
    for kind in ("bin", "idx"):
        assert (tmp_path / f"ours.{kind}").read_bytes() == (tmp_path / f"theirs.{kind}").read_bytes()
    theirs, ours = IndexedDataset(str(tmp_path / "ours")), open_binary(tmp_path / "ours")
    assert len(theirs) == ours.manifest.num_documents == 4
    for number, ids in enumerate(DOCUMENTS):
        assert theirs[number].tolist() == ours.document(number).tolist() == ids
    assert ours.tokens.tolist() == sum(DOCUMENTS, [])
    ours.verify()


def test_the_manifest_counts_what_is_there(tmp_path: Path) -> None:
    manifest = write(tmp_path / "a")
    assert (manifest.num_documents, manifest.num_tokens, manifest.dtype) == (4, 108, "uint16")
    assert json.loads((tmp_path / "a.json").read_text()) == manifest.model_dump(exclude_defaults=True), "as before there were channels"
    assert open_binary(tmp_path / "a").manifest == manifest and manifest.channels == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]


def test_names_with_dots_stay_apart(tmp_path: Path) -> None:
    write(tmp_path / "web.2024")
    write(tmp_path / "web.2025", documents=[[1, 2]])
    assert open_binary(tmp_path / "web.2024").manifest.num_documents == 4
    assert open_binary(tmp_path / "web.2025").manifest.num_documents == 1


def test_a_truncated_bin_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a")
    os.truncate(tmp_path / "a.bin", 200)
    with pytest.raises(UserError, match=r"a.bin: has 200 bytes.*216.*truncated"):
        open_binary(tmp_path / "a")


def test_the_idx_of_another_binary_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a")
    for name, documents, vocab_size in (("counts", [[1, 2]], 300), ("lengths", [[1, 2]] * 4, 300), ("dtype", DOCUMENTS, 70_000)):
        write(tmp_path / name, documents, vocab_size, tokenizer_hash="b" * 64)
        (tmp_path / "a.idx").write_bytes((tmp_path / f"{name}.idx").read_bytes())
        with pytest.raises(UserError, match="a.idx.*another binary"):
            open_binary(tmp_path / "a")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", tokenizer_hash="a" * 64)
    assert open_binary(tmp_path / "a", tokenizer_hash="a" * 64).manifest.tokenizer_hash == "a" * 64
    with pytest.raises(UserError, match="tokenizer aaaaaaaaaaaa.*bbbbbbbbbbbb.*prepare the source again"):
        open_binary(tmp_path / "a", tokenizer_hash="b" * 64)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    for kind in ("json", "idx", "bin"):
        write(tmp_path / "a")
        (tmp_path / f"a.{kind}").unlink()
        with pytest.raises(UserError, match=f"a.{kind}: no such"):
            open_binary(tmp_path / "a")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="not a manifest"):
        open_binary(tmp_path / "a")


def test_an_empty_binary_is_refused(tmp_path: Path) -> None:
    manifest = write(tmp_path / "a")
    (tmp_path / "a.json").write_text(manifest.model_copy(update={"num_documents": 0, "num_tokens": 0}).model_dump_json())
    with pytest.raises(UserError, match="holds no documents"):
        open_binary(tmp_path / "a")


def test_changed_bytes_are_found_by_verify(tmp_path: Path) -> None:
    for kind, offset in (("bin", 4), ("idx", 40)):
        write(tmp_path / "a")
        with open(tmp_path / f"a.{kind}", "r+b") as stream:
            stream.seek(offset)
            stream.write(b"\xff")
        with pytest.raises(UserError, match=f"a.{kind}: its checksum"):
            open_binary(tmp_path / "a").verify()


def test_an_unfinished_writer_leaves_no_binary_and_a_new_one_starts_over(tmp_path: Path) -> None:
    writer = BinaryWriter(tmp_path / "a", token_dtype(300))
    writer.add_documents(np.array([1, 2, 3]), np.array([3]))
    with pytest.raises(UserError, match="not a whole binary"):
        open_binary(tmp_path / "a")
    write(tmp_path / "a")
    assert open_binary(tmp_path / "a").document(0).tolist() == DOCUMENTS[0]


# Channels


def test_channels_lie_beside_the_tokens(tmp_path: Path) -> None:
    manifest = write(tmp_path / "a", channels=CHANNELS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.bin", "a.halves.bin", "a.idx", "a.json", "a.logp.bin", "a.weights.bin",
    ]  # fmt: skip
    said = json.loads((tmp_path / "a.json").read_text())["channels"]["logp"]
    digest = hashlib.sha256((tmp_path / "a.logp.bin").read_bytes()).hexdigest()
    assert said == {"dtype": "float32", "per": "document", "sha256": digest}
    binary = open_binary(tmp_path / "a")
    assert binary.manifest == manifest
    for name, values in values_of(DOCUMENTS).items():
        assert (tmp_path / f"a.{name}.bin").read_bytes() == values.astype(values.dtype.newbyteorder("<")).tobytes()
        found = binary.channel(name)
        assert isinstance(found, np.memmap) and found.dtype == values.dtype and np.array_equal(found, values)
        for offset, length in ((0, values.size), (1, 2), (values.size - 1, 1)):
            part = binary.read_channel(name, offset, length)
            assert part.dtype == values.dtype and np.array_equal(part, values[offset : offset + length])
    # of the tokens 3 … 102 as labels, as a trainer reads them for a sample at offset 2
    assert np.array_equal(binary.read_channel("weights", 3, 100), 2 * binary.read(3, 100))
    binary.verify()


def test_a_channel_that_is_not_there_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a", channels={"logp": CHANNELS["logp"]})
    write(tmp_path / "b")
    for name, there in (("a", "logp"), ("b", "none")):
        for ask in (lambda binary: binary.channel("weights"), lambda binary: binary.read_channel("weights", 0, 1)):
            with pytest.raises(UserError, match=f"/{name}: has no channel weights .it has: {there}.*answer_weights: true"):
                ask(open_binary(tmp_path / name))


def test_joining_carries_channels_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "CHUNK", 3)
    write(tmp_path / "whole", channels=CHANNELS)
    labels = Labels.model_validate(open_binary(tmp_path / "whole").manifest.model_dump(include=set(Labels.model_fields)))
    writer = BinaryWriter(tmp_path / "joined", token_dtype(300), CHANNELS)
    for number, part in enumerate((DOCUMENTS[:3], DOCUMENTS[3:])):
        write(tmp_path / f"part{number}", part, channels=CHANNELS)
        writer.add_binary(open_binary(tmp_path / f"part{number}"))
    assert writer.finish(labels) == open_binary(tmp_path / "whole").manifest
    open_binary(tmp_path / "joined").verify()
    for channels in ({}, {"weights": Channel(dtype="float16", per="token")}):
        with pytest.raises(AssertionError):
            BinaryWriter(tmp_path / "other", token_dtype(300), channels).add_binary(open_binary(tmp_path / "part0"))


@pytest.mark.parametrize(
    "channels",
    [
        {},
        {"weights": np.ones(2, np.uint8)},
        {"weights": np.ones(3, np.float32)},
        {"weights": np.ones(3, np.uint8), "more": np.ones(3, np.uint8)},
    ],
    ids=["none", "too few", "another type", "one too many"],
)
def test_values_that_are_not_those_of_the_channels_are_refused(tmp_path: Path, channels: dict[str, np.ndarray]) -> None:
    writer = BinaryWriter(tmp_path / "a", token_dtype(300), {"weights": CHANNELS["weights"]})
    with pytest.raises(AssertionError):
        writer.add_documents(np.array([1, 2, 3]), np.array([3]), channels)


def test_a_damaged_channel_is_refused(tmp_path: Path) -> None:
    for name, size in (("weights", 108), ("logp", 16)):
        path = tmp_path / f"a.{name}.bin"
        write(tmp_path / "a", channels=CHANNELS)
        with path.open("r+b") as stream:
            stream.seek(5)
            stream.write(b"\x55")
        with pytest.raises(UserError, match=f"a.{name}.bin: its checksum is not the manifest's"):
            open_binary(tmp_path / "a").verify()
        binary = open_binary(tmp_path / "a")
        os.truncate(path, 8)
        with pytest.raises(UserError, match=f"a.{name}.bin: has become shorter"):
            binary.read_channel(name, 2, 1 if name == "logp" else 100)
        with pytest.raises(UserError, match=f"a.{name}.bin: has 8 bytes, its manifest asks for {size}"):
            open_binary(tmp_path / "a")
        path.unlink()
        with pytest.raises(UserError, match=f"a.{name}.bin: no such file, though the manifest is there"):
            open_binary(tmp_path / "a")


def test_a_channel_goes_when_its_binary_is_written_without_it(tmp_path: Path) -> None:
    write(tmp_path / "a.weights")  # a binary whose name looks like that of a channel
    write(tmp_path / "a", channels={"halves": CHANNELS["halves"], "logp": CHANNELS["logp"]})
    write(tmp_path / "a", channels={"logp": CHANNELS["logp"]})
    assert not (tmp_path / "a.halves.bin").exists()
    open_binary(tmp_path / "a").verify()
    open_binary(tmp_path / "a.weights").verify()


def test_joining_takes_the_same_memory_at_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "CHUNK", 1 << 14)
    peaks = []
    for documents in (200_000, 1_600_000):
        shard = BinaryWriter(tmp_path / "shard", token_dtype(300))
        shard.add_documents(np.arange(2 * documents) % 300, np.full(documents, 2))
        labels = Labels.model_validate(write(tmp_path / "any").model_dump(include=set(Labels.model_fields)))
        shard.finish(labels)
        writer = BinaryWriter(tmp_path / "joined", token_dtype(300))
        tracemalloc.start()
        writer.add_binary(open_binary(tmp_path / "shard"))
        writer.add_binary(open_binary(tmp_path / "shard"))
        manifest = writer.finish(labels)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        joined = open_binary(tmp_path / "joined")
        assert manifest.num_documents == 2 * documents and joined.document(2 * documents - 1).tolist() == joined.tokens[-2:].tolist()
        assert np.array_equal(joined.tokens[: 2 * documents], joined.tokens[2 * documents :])
    assert peaks[1] < 1.2 * peaks[0] < 4e6, "bytes"


def test_opening_does_not_read_the_corpus(tmp_path: Path) -> None:
    """Four gigabytes of holes behind a true header and a true last entry: only a reader that looks at more would take long."""
    documents = 200_000_000
    manifest = write(tmp_path / "a", [[1, 2]])
    header = indexed.HEADER.pack(indexed.MAGIC, 1, indexed.DTYPE_CODES["uint16"], documents, documents + 1)
    with open(tmp_path / "a.idx", "wb") as stream:
        stream.write(header)
        stream.seek(len(header) + 4 * (documents - 1))
        stream.write(np.array([10], dtype="<i4").tobytes())
        stream.seek(len(header) + 4 * documents + 8 * (documents - 1))
        stream.write(np.array([20 * (documents - 1)], dtype="<i8").tobytes())
        stream.truncate(len(header) + documents * 12 + (documents + 1) * 8)
    with open(tmp_path / "a.bin", "wb") as stream:
        stream.truncate(20 * documents)
    update = {"num_documents": documents, "num_tokens": 10 * documents}
    (tmp_path / "a.json").write_text(manifest.model_copy(update=update).model_dump_json())
    started = time.process_time()  # other work on the machine does not count
    binary = open_binary(tmp_path / "a")
    assert binary.document(documents - 1).size == 10
    assert time.process_time() - started < 0.5
