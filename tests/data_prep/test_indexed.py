"""Our binaries are Megatron's to the byte, and damaged or foreign ones are refused."""

import json
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data_prep import indexed
from data_prep.indexed import BinaryWriter, Labels, Manifest, open_binary, token_dtype
from mujina.user_input import UserError

DOCUMENTS = [[5, 6, 7, 2], [2], [8] * 100 + [2], [9, 2]]


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, vocab_size: int = 300, tokenizer_hash: str = "a" * 64) -> Manifest:
    writer = BinaryWriter(prefix, token_dtype(vocab_size))
    for ids in documents:
        writer.add_document(np.array(ids))
    labels = Labels(
        name=prefix.name, kind="web", origin="human", languages={"en": len(documents)}, licences={"MIT": len(documents)}, teachers={},
        num_characters=10, tokenizer_hash=tokenizer_hash, vocab_size=vocab_size, fingerprint="f",
    )  # fmt: skip
    return writer.finish(labels)


@pytest.mark.parametrize("vocab_size", [65_499, 65_500])
def test_bytes_and_contents_are_megatrons(tmp_path: Path, vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
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
    write(tmp_path / "ours", vocab_size=vocab_size)
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
    assert json.loads((tmp_path / "a.json").read_text()) == manifest.model_dump()
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
    writer.add_document(np.array([1, 2, 3]))
    with pytest.raises(UserError, match="not a whole binary"):
        open_binary(tmp_path / "a")
    write(tmp_path / "a")
    assert open_binary(tmp_path / "a").document(0).tolist() == DOCUMENTS[0]


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
