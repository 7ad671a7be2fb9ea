"""Sources become binaries once, again when something changed, and wholly or not at all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.indexed import open_binary
from data_prep.prepare import PrepareConfig, prepare
from tokenization.tokenizer import Tokenizer
from tokenization.train import TrainConfig, train
from user_input import UserError

ROOT = Path(__file__).parents[2]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(tokenizer: Path, output: Path, **sources: dict[str, Any]) -> PrepareConfig:
    described = [{"name": name, "kind": "web"} | values for name, values in sources.items()]
    return PrepareConfig.model_validate({"tokenizer": str(tokenizer), "output": str(output), "sources": described})


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_documents_and_dialogues_decode_to_what_went_in(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder)
    texts = ["the cat\n\tsat", "猫 <|user|> </s> 🦡", "▁ x"] * 200
    messages = [{"role": "user", "content": "7 + 5?"}, {"role": "assistant", "content": "The answer is 12."}]
    web = write_rows(tmp_path / "web.jsonl", [{"text": text, "language": "ja", "licence": "MIT"} for text in texts])
    chat = write_rows(tmp_path / "chat.jsonl", [{"messages": messages}] * 3)
    chat_source = {"documents": [chat], "kind": "chat", "origin": "synthetic"}
    manifests = prepare(config(tokenizer_folder, tmp_path / "out", web={"documents": [web]}, chat=chat_source))
    assert [(m.name, m.kind, m.origin, m.num_documents) for m in manifests] == [
        ("web", "web", "human", 600),
        ("chat", "chat", "synthetic", 3),
    ]
    assert (manifests[0].languages, manifests[0].licences) == ({"ja": 600}, {"MIT": 600})
    assert manifests[0].num_characters == sum(map(len, texts))
    binary = open_binary(tmp_path / "out/web", tokenizer.hash)
    for number, text in enumerate(texts):
        ids = binary.document(number)
        assert ids[-1] == tokenizer.eod_id and tokenizer.eod_id not in ids[:-1]
        assert tokenizer.decode(ids[:-1]) == text
    dialogue = open_binary(tmp_path / "out/chat", tokenizer.hash).document(2)
    assert dialogue.tolist() == [*tokenizer.encode_chat(messages), tokenizer.eod_id]


def test_only_what_changed_is_built_again(tokenizer_folder: Path, tmp_path: Path) -> None:
    paths = {name: write_rows(tmp_path / f"{name}.jsonl", [{"text": f"the {name}"}]) for name in ("one", "two")}
    sources = {name: {"documents": [path]} for name, path in paths.items()}

    def built(tokenizer: Path = tokenizer_folder, **changes: dict[str, Any]) -> set[str]:
        before = {name: stamp(name) for name in sources}
        prepare(config(tokenizer, tmp_path / "out", **(sources | changes)))
        return {name for name in sources if stamp(name) != before[name]}

    def stamp(name: str) -> int | None:
        path = tmp_path / f"out/{name}.bin"
        return path.stat().st_mtime_ns if path.exists() else None

    assert built() == {"one", "two"}
    assert built() == set()
    write_rows(tmp_path / "one.jsonl", [{"text": "another"}])
    assert built() == {"one"}
    assert built(two={"documents": [paths["two"]], "kind": "code"}) == {"two"}
    assert built() == {"two"}
    os.truncate(tmp_path / "out/two.bin", 2)
    assert built() == {"two"}
    (tmp_path / "out/one.json").unlink()
    assert built() == {"one"}
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": f"the cat sat on mat {n}"} for n in range(30)])
    other = train(TrainConfig(inputs=[corpus], output=str(tmp_path / "other"), vocab_size=284, character_coverage=1.0))
    assert built(tokenizer=other) == {"one", "two"}
    assert open_binary(tmp_path / "out/one").manifest.tokenizer_hash == Tokenizer.load(other).hash


def test_several_files_are_one_source_in_order(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder)
    for name in ("b", "a"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name}])
    prepare(config(tokenizer_folder, tmp_path / "out", web={"documents": [str(tmp_path / "*.jsonl")]}))
    assert tokenizer.decode(open_binary(tmp_path / "out/web").tokens) == "ab"


def test_an_empty_source_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match="source web: holds no documents.*empty.jsonl"):
        prepare(config(tokenizer_folder, tmp_path / "out", web={"documents": [empty]}))
    with pytest.raises(UserError, match="not a whole binary"):
        open_binary(tmp_path / "out/web")


def test_a_bad_row_leaves_no_binary(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match="bad.jsonl line 2"):
        prepare(config(tokenizer_folder, tmp_path / "out", web={"documents": [str(tmp_path / "bad.jsonl")]}))
    with pytest.raises(UserError, match="not a whole binary"):
        open_binary(tmp_path / "out/web")


def command(tokenizer: Path, documents: str, output: Path, folder: Path) -> list[str]:
    values = {"tokenizer": str(tokenizer), "output": str(output), "sources": [{"name": "web", "documents": [documents], "kind": "web"}]}
    (folder / f"{output.name}.yaml").write_text(yaml.safe_dump(values))
    return [sys.executable, "-m", "data_prep.prepare", str(folder / f"{output.name}.yaml")]


def test_a_killed_preparation_counts_for_nothing_and_is_simply_run_again(tokenizer_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"the cat sat on the mat number {n} " * 20} for n in range(8_000)]
    documents = write_rows(tmp_path / "web.jsonl", rows)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(command(tokenizer_folder, documents, killed, tmp_path), cwd=ROOT, stderr=subprocess.DEVNULL)
    partial = killed / ".web.bin.partial"
    deadline = time.monotonic() + 30
    while not (partial.exists() and partial.stat().st_size > 100_000):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed midway"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not any(path.suffix in (".bin", ".idx", ".json") for path in killed.iterdir())
    with pytest.raises(UserError, match="not a whole binary"):
        open_binary(killed / "web")
    for output in (killed, whole):
        run = subprocess.run(command(tokenizer_folder, documents, output, tmp_path), cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "8,000" in run.stdout
    assert bytes_of(killed) == bytes_of(whole)
    open_binary(killed / "web").verify()


def test_the_command_explains_a_mistake(tokenizer_folder: Path, tmp_path: Path) -> None:
    documents = write_rows(tmp_path / "web.jsonl", [{"text": "x"}])
    line = command(tokenizer_folder, documents, tmp_path / "out", tmp_path)
    run = subprocess.run([*line, "tokeniser=elsewhere"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert "did you mean tokenizer?" in run.stderr
    source = {"documents": [documents]}
    described = [{"name": "web", "kind": "web"} | source] * 2
    with pytest.raises(ValueError, match="'web' occurs twice"):
        PrepareConfig.model_validate({"tokenizer": "t", "output": "o", "sources": described})
