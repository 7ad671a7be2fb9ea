"""What `mujina inspect` says of a binary is what is in it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.indexed import BinaryWriter, Channel, Labels, open_binary
from data_prep.inspect import facts, frequent_pieces, show_document
from data_prep.prepare import PrepareConfig, prepare
from mujina.user_input import UserError
from tokenization.load import load

ROOT = Path(__file__).parents[2]
TEXTS = ["the cat", "[bold]猫[/bold] \x1b[31mred\x07\ttab\nnext", "x" * 1_500]


@pytest.fixture(scope="module")
def prefix(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    rows = [{"text": text, "language": "ja" if "猫" in text else "en"} for text in TEXTS]
    (folder / "web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "web", "documents": [str(folder / "web.jsonl")]}
    prepare(PrepareConfig.model_validate({"tokenizer": str(tokenizer_folder), "output": str(folder / "out"), "sources": {"web": source}}))
    return folder / "out/web"


def test_channels_are_shown(tmp_path: Path) -> None:
    channels = {"weights": Channel(dtype="uint8", per="token"), "logp": Channel(dtype="float16", per="document")}
    writer = BinaryWriter(tmp_path / "a", np.dtype(np.uint16), channels)
    values = {"weights": np.array([0, 1, 1, 0], np.uint8), "logp": np.array([-1e4, -6e4], np.float16)}
    for _ in range(3):  # the sum of the halves is above what one can hold
        writer.add_documents(np.array([5, 6, 7, 2]), np.array([3, 1]), values)
    labels = Labels(
        name="a", kind="chat", origin="human", languages={}, licences={}, teachers={}, num_characters=9, tokenizer_hash="a" * 64,
        vocab_size=300, fingerprint="f",
    )  # fmt: skip
    writer.finish(labels)
    shown = dict(facts(open_binary(tmp_path / "a")))
    assert shown["channel weights"] == "12 uint8, one per token: min 0, mean 0.5, max 1"
    assert shown["channel logp"] == "6 float16, one per document: min -6e+04, mean -3.5e+04, max -1e+04"


def inspect(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "data_prep.inspect", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_statistics_are_those_of_the_documents(prefix: Path, tokenizer_folder: Path) -> None:
    tokenizer, binary = load(tokenizer_folder), open_binary(prefix)
    lengths = sorted(len(tokenizer.encode(text)) + 1 for text in TEXTS)
    shown = dict(facts(binary))
    assert shown["documents"] == "3" and shown["languages"] == "en 2, ja 1"
    assert shown["tokens per document"] == f"mean {sum(lengths) / 3:,.1f}, median {lengths[1]:,.1f}, max {lengths[2]:,}"
    assert shown["tokens"].startswith(f"{sum(lengths):,},")
    ids = [token for text in TEXTS for token in [*tokenizer.encode(text), tokenizer.eod_id]]
    pieces = frequent_pieces(binary, tokenizer)
    assert pieces[0] == ("<0x78>", ids.count(tokenizer.encode("x")[-1]) / len(ids)), "x is no piece of this tokenizer"
    assert dict(pieces)["</s>"] == 3 / len(ids)
    assert [share for _, share in pieces] == sorted((share for _, share in pieces), reverse=True)


def test_documents_are_shown_and_cannot_reach_the_terminal(prefix: Path, tokenizer_folder: Path) -> None:
    tokenizer, binary = load(tokenizer_folder), open_binary(prefix)
    assert show_document(binary, 0, tokenizer) == "the cat"
    assert show_document(binary, 1, tokenizer) == "[bold]猫[/bold] \\x1b[31mred\\x07\ttab\nnext"
    assert show_document(binary, 2, tokenizer) == "x" * 1_000 + " … and 500 characters"
    assert show_document(binary, 0, None) == " ".join(map(str, tokenizer.encode("the cat")))


def test_the_command(prefix: Path, tokenizer_folder: Path) -> None:
    run = inspect(prefix, "--from", "1", "--documents", "1", "--tokenizer", tokenizer_folder, "--verify")
    assert run.returncode == 0, run.stderr
    assert "[bold]猫[/bold]" in run.stdout and "the cat" not in run.stdout and "verified" in run.stdout
    assert "\x1b" not in run.stdout and "'</s>'" in run.stdout
    assert "the cat" not in inspect(prefix).stdout


def test_mistakes_are_explained(prefix: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    past = inspect(prefix, "--from", "3")
    assert past.returncode == 2 and "--from 3: " in past.stderr and "documents 0 to 2" in past.stderr
    for name, remedy in (
        (tmp_path / "none", "check the name, or prepare the source"),
        (f"{prefix}.bin", f"write {prefix}, without the ending"),
        (prefix.parent, f"such as {prefix}"),
        ("", "is a folder and no binary's name: write it as FOLDER/SOURCE"),
    ):
        with pytest.raises(UserError, match=re.escape(remedy)):
            open_binary(name)
    other = tmp_path / "other"
    for kind in ("bin", "idx", "json"):
        other.with_name(f"other.{kind}").write_bytes(prefix.with_name(f"web.{kind}").read_bytes())
    manifest = json.loads(prefix.with_name("web.json").read_text())
    other.with_name("other.json").write_text(json.dumps(manifest | {"tokenizer_hash": "a" * 64}))
    assert "was prepared with the tokenizer aaaaaaaaaaaa" in inspect(other, "--tokenizer", tokenizer_folder).stderr
    other.with_name("other.json").write_text(json.dumps(manifest))
    data = bytearray(other.with_name("other.bin").read_bytes())
    data[2] ^= 1
    other.with_name("other.bin").write_bytes(data)
    damaged = inspect(other, "--verify")
    assert damaged.returncode == 2 and "other.bin: its checksum is not the manifest's" in damaged.stderr
