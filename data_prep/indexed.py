"""Token binaries in Megatron's indexed format: <prefix>.bin (ids), <prefix>.idx (where documents lie), <prefix>.json (manifest).

Beside them may lie channels, <prefix>.<channel>.bin: one little-endian number for each token or each document, in their order. Megatron
does not see them. The manifest is written last: a binary without one does not exist.

Layout of .idx (megatron.core.datasets.indexed_dataset), little-endian:
    9 bytes  b"MMIDIDX\\0\\0"     8 bytes  version 1     1 byte  dtype code     8 bytes  sequences S     8 bytes  document bounds D + 1
    int32[S]  tokens in each sequence     int64[S]  byte offset of each     int64[D + 1]  sequence at which each document starts
Here every document is one sequence, so S = D.
"""

import hashlib
import json
import os
import resource
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
import pydantic

from data_prep.row import Kind, Origin
from mujina.disks import flush, patiently, rename, sync
from mujina.files import sha256_of, write_whole
from mujina.user_input import Section, UserError
from tokenization.tokenizer import BeginDocuments

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {"int32": 4, "uint16": 8}
CHUNK = 1 << 20  # index entries held in memory at once


class Labels(Section):
    """What the writer of a binary knows about it. `languages`, `licences` and `teachers` count documents.

    begin_documents, end_of_document    as the tokenizer was asked for them (`data_prep.config.PrepareConfig`)
    num_begun                           documents that begin with the tokenizer's bos_token

    Not written where there are none: `num_empty`, the documents without anything in them, which were left out; `template_hash`, of the
    chat template that wrote the dialogues; `num_answer_tokens`, what the assistant says in them; `num_damaged`, the dialogues that were
    passed over for what is wrong with them, and `damaged`, the first of these.
    """

    name: str
    kind: Kind
    origin: Origin
    languages: dict[str, int]
    licences: dict[str, int]
    teachers: dict[str, int]
    num_characters: int
    num_empty: int = 0
    tokenizer_hash: str
    template_hash: str | None = None
    vocab_size: int
    begin_documents: BeginDocuments = "auto"
    end_of_document: str | None = None  # of older binaries: the tokenizer's eos_token
    num_begun: int = 0
    num_answer_tokens: int = 0
    num_damaged: int = 0
    damaged: tuple[str, ...] = ()
    fingerprint: str


class Channel(Section):
    """Numbers beside the tokens, one for each token or one for each document."""

    dtype: Literal["uint8", "float16", "float32"]
    per: Literal["token", "document"]

    def numpy_dtype(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")


class StoredChannel(Channel):
    """A channel of a binary. `sha256` is that of <prefix>.<channel>.bin."""

    sha256: str


class Manifest(Labels):
    """<prefix>.json. `num_tokens` includes the end-of-document token of every document."""

    num_tokens: int
    num_documents: int
    dtype: str
    bin_sha256: str
    idx_sha256: str
    channels: dict[Annotated[str, pydantic.Field(pattern=r"^[a-z_]+$")], StoredChannel] = {}  # not written when there are none

    def num_values(self, channel: Channel) -> int:
        return self.num_tokens if channel.per == "token" else self.num_documents


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's rule: uint16 below 65,500 pieces, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


class BinaryWriter:
    """Writes one binary under temporary names; `finish` gives it its names. Memory does not grow with the number of documents.

    channels   what lies beside the tokens, by name (of a-z and _)
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype, channels: Mapping[str, Channel] | None = None) -> None:
        self._prefix = Path(prefix)
        self._channels = dict(channels or {})
        self._dtype = np.dtype(dtype)
        self.num_documents = 0
        self.num_tokens = 0
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = _HashedFile(self._partial("bin"))
        self._lengths = _HashedFile(self._partial("lengths"))
        self._values = {name: _HashedFile(self._partial(f"{name}.bin")) for name in self._channels}

    def add_documents(self, ids: np.ndarray, lengths: np.ndarray, channels: Mapping[str, np.ndarray] | None = None) -> None:
        """Appends documents: the ids of all, one after the other, their end-of-document tokens included, and how many each has.

        channels   the values of every channel of this writer, of its dtype: one for each of `ids`, or one for each of `lengths`

        All arrays are 1-D.
        """
        channels = channels or {}
        assert ids.ndim == 1 and lengths.size > 0 and lengths.min() > 0 and lengths.sum() == ids.size
        assert channels.keys() == self._channels.keys(), "values for all channels, and for no others"
        for name, channel in self._channels.items():
            values = channels[name]
            assert values.dtype == channel.dtype and values.shape == (ids if channel.per == "token" else lengths).shape, name
            self._values[name].write(values.astype(channel.numpy_dtype(), copy=False).tobytes())
        self._bin.write(ids.astype(self._dtype, copy=False).tobytes())
        self._lengths.write(lengths.astype("<i4", copy=False).tobytes())
        self.num_documents += lengths.size
        self.num_tokens += ids.size

    def add_binary(self, binary: "TokenBinary") -> None:
        """Appends all documents of another binary of the same dtype and channels, in a memory that does not depend on its size."""
        assert binary.tokens.dtype == self._dtype
        assert {name: (channel.dtype, channel.per) for name, channel in binary.manifest.channels.items()} == {
            name: (channel.dtype, channel.per) for name, channel in self._channels.items()
        }
        channels = ((binary.channel(name), file) for name, file in self._values.items())
        for values, file in ((binary.tokens, self._bin), (binary.lengths, self._lengths), *channels):
            for start in range(0, values.size, CHUNK):
                file.write(values[start : start + CHUNK].tobytes())
        self.num_documents += binary.manifest.num_documents
        self.num_tokens += binary.manifest.num_tokens

    def finish(self, labels: Labels) -> Manifest:
        """Writes the index and the manifest, and renames. Until the last step an older binary of this name no longer exists."""
        bin_sha256 = self._bin.close()
        self._lengths.close()
        manifest = Manifest(
            **labels.model_dump(),
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            dtype=self._dtype.name,
            bin_sha256=bin_sha256,
            idx_sha256=self._write_index(),
            channels={
                name: StoredChannel(**channel.model_dump(), sha256=self._values[name].close()) for name, channel in self._channels.items()
            },
        )
        # What each line does is on the disk before the next: a manifest must not come back over files that it does not describe.
        former = _former_channels(self._prefix) - self._channels.keys()
        path_of(self._prefix, "json").unlink(missing_ok=True)
        sync(self._prefix.parent)
        for name in former:
            path_of(self._prefix, f"{name}.bin").unlink(missing_ok=True)
        for kind in ("bin", "idx", *(f"{name}.bin" for name in self._channels)):
            rename(self._partial(kind), path_of(self._prefix, kind))
        self._partial("lengths").unlink(missing_ok=True)
        sync(self._prefix.parent)
        write_whole(path_of(self._prefix, "json"), (manifest.model_dump_json(indent=2, exclude_defaults=True) + "\n").encode())
        return manifest

    def _write_index(self) -> str:
        index = _HashedFile(self._partial("idx"))
        index.write(HEADER.pack(MAGIC, 1, DTYPE_CODES[self._dtype.name], self.num_documents, self.num_documents + 1))
        lengths = np.memmap(self._partial("lengths"), dtype="<i4", mode="r")
        for start in range(0, self.num_documents, CHUNK):
            index.write(lengths[start : start + CHUNK].tobytes())
        offset = 0
        for start in range(0, self.num_documents, CHUNK):
            ends = offset + np.cumsum(lengths[start : start + CHUNK], dtype="<i8") * self._dtype.itemsize
            index.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
            offset = int(ends[-1])
        for start in range(0, self.num_documents + 1, CHUNK):
            index.write(np.arange(start, min(start + CHUNK, self.num_documents + 1), dtype="<i8").tobytes())
        return index.close()

    def _partial(self, kind: str) -> Path:
        return self._prefix.with_name(f".{self._prefix.name}.{kind}.partial")


class _File:
    """A file that is open for reading as long as this object is in use."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.descriptor)


# A run may have thousands of sources, and a process often no more than 1,024 descriptors: the least used ones are closed.
@lru_cache(maxsize=resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
def _opened(binary: "TokenBinary", kind: str) -> _File:
    return _File(path_of(binary.prefix, kind))


class TokenBinary:
    """An opened binary. Its files are touched only when something is read.

    tokens    1-D memory map of all ids in order, each document ending in its end-of-document token
    lengths   1-D memory map, the tokens of each document

    A memory map keeps a descriptor and counts as memory of the process; `read`, `read_channel` and `documents` do neither.
    """

    def __init__(self, prefix: Path, manifest: Manifest) -> None:
        self.prefix = prefix
        self.manifest = manifest
        self._dtype = np.dtype(manifest.dtype)
        self._starts_at = HEADER.size + 4 * manifest.num_documents  # bytes into .idx

    @cached_property
    def tokens(self) -> np.ndarray:
        return np.memmap(path_of(self.prefix, "bin"), dtype=self._dtype, mode="r")

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.memmap(path_of(self.prefix, "idx"), dtype="<i4", mode="r", offset=HEADER.size, shape=(self.manifest.num_documents,))

    def read(self, offset: int, length: int) -> np.ndarray:
        """The ids of `length` tokens from `offset` on, a copy."""
        return self._read("bin", self._dtype, offset, length)

    def channel(self, name: str) -> np.ndarray:
        """A 1-D memory map of all values of a channel. Raises UserError when the binary has no such channel."""
        return np.memmap(path_of(self.prefix, f"{name}.bin"), dtype=self._channel(name).numpy_dtype(), mode="r")

    def read_channel(self, name: str, offset: int, length: int) -> np.ndarray:
        """`length` values of a channel, a copy: those of the tokens (documents, for a channel that has one for each) from `offset` on.

        Raises UserError when the binary has no such channel.
        """
        return self._read(f"{name}.bin", self._channel(name).numpy_dtype(), offset, length)

    def _channel(self, name: str) -> Channel:
        channels = self.manifest.channels
        if name not in channels:
            raise UserError(
                f"{self.prefix}: has no channel {name} (it has: {', '.join(channels) or 'none'}): prepare the source again with it; "
                f"answer_weights: true gives weights"
            )
        return channels[name]

    def _read(self, kind: str, dtype: np.dtype, offset: int, length: int) -> np.ndarray:
        values = np.empty(length, dtype)
        self._fill(memoryview(values.view(np.uint8)), kind, offset * dtype.itemsize)
        return values

    def _fill(self, buffer: memoryview, kind: str, position: int) -> None:
        """Reads until the buffer is full: over a network a read may give less than what is there."""
        path = path_of(self.prefix, kind)
        while buffer:
            try:
                count = os.preadv(_opened(self, kind).descriptor, [buffer], position)
            except OSError as error:
                error.filename = str(path)
                raise
            if count == 0:
                raise UserError(f"{path}: has become shorter since it was opened: copy it again, and go on")
            buffer, position = buffer[count:], position + count

    def documents(self, offset: int, length: int) -> np.ndarray:
        """Which document each of the tokens offset … offset + length - 1 belongs to: int32 [length], 0 for that of the first one.

        Searches the index: a few dozen reads of 8 bytes, however many documents there are.
        """
        numbers = range(self.manifest.num_documents)
        first = bisect_right(numbers, offset, key=self._start)
        last = bisect_left(numbers, offset + length, lo=first, hi=min(first + length, len(numbers)), key=self._start)
        return np.bincount(self._starts(first, last) - offset, minlength=length).cumsum(dtype=np.int32)

    def bounds(self, document: int) -> tuple[int, int]:
        """The offsets, in tokens, of the first token of a document and of the one behind its last."""
        start = self._start(document)
        length = bytearray(4)
        self._fill(memoryview(length), "idx", HEADER.size + 4 * document)
        return start, start + int.from_bytes(length, "little")

    def _start(self, document: int) -> int:
        entry = bytearray(8)
        self._fill(memoryview(entry), "idx", self._starts_at + 8 * document)
        return int.from_bytes(entry, "little") // self._dtype.itemsize

    def _starts(self, first: int, last: int) -> np.ndarray:
        """The offsets, in tokens, of the first tokens of documents `first` … `last` - 1."""
        entries = np.empty(last - first, "<i8")
        self._fill(memoryview(entries.view(np.uint8)), "idx", self._starts_at + 8 * first)
        return entries // self._dtype.itemsize

    def document(self, index: int) -> np.ndarray:
        """The ids of one document, without a copy."""
        start = self._start(index)
        return self.tokens[start : start + int(self.lengths[index])]

    def verify(self) -> None:
        """Reads everything and raises UserError unless all checksums are the manifest's. Seconds per gigabyte."""
        channels = ((f"{name}.bin", channel.sha256) for name, channel in self.manifest.channels.items())
        for kind, expected in (("bin", self.manifest.bin_sha256), ("idx", self.manifest.idx_sha256), *channels):
            path = path_of(self.prefix, kind)
            if sha256_of(path) != expected:
                raise UserError(f"{path}: its checksum is not the manifest's: the file has changed, prepare the source again")


def path_of(prefix: Path, kind: str) -> Path:
    """<prefix>.<kind>; not `with_suffix`, because a name may hold a dot. Raises UserError where the prefix names no file."""
    if not prefix.name:
        raise UserError(f"{prefix}: is a folder and no binary's name: write it as FOLDER/SOURCE")
    return prefix.with_name(f"{prefix.name}.{kind}")


def open_binary(prefix: str | Path, tokenizer_hash: str | None = None) -> TokenBinary:
    """Opens <prefix>.bin/.idx/.json, and the channels beside them, in a time that does not depend on their size.

    Checks manifest, sizes, the index's header and its last entry against each other, and the tokenizer when its hash is given.
    Raises UserError when they do not belong together.
    """
    prefix = Path(prefix)
    manifest = read_manifest(prefix)
    bin_path, idx_path = path_of(prefix, "bin"), path_of(prefix, "idx")
    if tokenizer_hash not in (None, manifest.tokenizer_hash):
        raise UserError(
            f"{prefix}: was prepared with the tokenizer {manifest.tokenizer_hash[:12]}, the one given is {str(tokenizer_hash)[:12]}: "
            f"prepare the source again with this tokenizer, or give the one that it was prepared with, with begin_documents: "
            f"{manifest.begin_documents}"
            + (f" and end_of_document: {json.dumps(manifest.end_of_document, ensure_ascii=False)}" if manifest.end_of_document else "")
        )
    if manifest.num_documents == 0 or manifest.num_tokens == 0:
        raise UserError(f"{prefix}: holds no documents: leave the source out, or prepare it again from files that hold some")
    itemsize = np.dtype(manifest.dtype).itemsize
    _check_size(bin_path, manifest.num_tokens * itemsize)
    for name, channel in manifest.channels.items():
        _check_size(path_of(prefix, f"{name}.bin"), manifest.num_values(channel) * channel.numpy_dtype().itemsize)
    documents = manifest.num_documents
    _check_size(idx_path, HEADER.size + documents * 12 + (documents + 1) * 8)
    with open(idx_path, "rb") as stream:
        header = HEADER.unpack(stream.read(HEADER.size))
        last_length = _entry(stream, "<i", HEADER.size + 4 * (documents - 1))
        last_offset = _entry(stream, "<q", HEADER.size + 4 * documents + 8 * (documents - 1))
    expected = (MAGIC, 1, DTYPE_CODES[manifest.dtype], documents, documents + 1)
    if header != expected or last_offset + last_length * itemsize != manifest.num_tokens * itemsize:
        raise UserError(
            f"{idx_path}: is not the index of {bin_path.name}: it is of another binary, copy it again or prepare the source again"
        )
    return TokenBinary(prefix, manifest)


def read_manifest(prefix: Path) -> Manifest:
    """<prefix>.json; raises UserError when it is no manifest, or not there."""
    path = path_of(prefix, "json")
    try:
        manifest = Manifest.model_validate_json(patiently(path, path.read_bytes))
    except FileNotFoundError:
        bare, inside = prefix.with_suffix(""), sorted(prefix.glob("[!.]*.idx"))
        remedy = "check the name, or prepare the source (again) with `mujina prepare`"
        if bare != prefix and path_of(bare, "json").exists():
            remedy = f"write {bare}, without the ending"
        elif inside:
            remedy = f"name one of the binaries in that folder, such as {inside[0].with_suffix('')}"
        raise UserError(f"{path}: no such manifest, so {prefix} is not a whole binary: {remedy}") from None
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: is not a manifest ({error.errors()[0]['msg']}): prepare the source again") from None
    if manifest.dtype not in DTYPE_CODES:
        raise UserError(f"{path}: dtype ({manifest.dtype}) must be {' or '.join(DTYPE_CODES)}: prepare the source again")
    return manifest


def _former_channels(prefix: Path) -> set[str]:
    """The channels of the binary that is there, if one is."""
    try:
        return set(read_manifest(prefix).channels)
    except UserError:
        return set()


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though the manifest is there: copy it too, or prepare the source again") from None
    if size != expected:
        raise UserError(
            f"{path}: has {size:,} bytes, its manifest asks for {expected:,}: it is truncated or of another binary, "
            f"copy it again or prepare the source again"
        )


def _entry(stream: BinaryIO, layout: str, offset: int) -> int:
    stream.seek(offset)
    return int(struct.unpack(layout, stream.read(struct.calcsize(layout)))[0])


class _HashedFile:
    """A file written from start to end, with the sha256 of what went in."""

    def __init__(self, path: Path) -> None:
        self._stream = open(path, "wb")
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self._sha256.update(data)

    def close(self) -> str:
        """Returns the sha256 in hex, once the bytes are on the disk: a rename must not overtake them."""
        flush(self._stream)
        self._stream.close()
        return self._sha256.hexdigest()
