"""Sources become binaries once, again when something changed, and wholly or not at all."""

import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tokenizers
import yaml
from tokenizers import decoders, models, pre_tokenizers

from data_prep import blocks
from data_prep import tokenize as tokenize_module
from data_prep.blocks import Block, read_blocks, rows_of
from data_prep.config import SlurmConfig
from data_prep.executors import notes
from data_prep.indexed import open_binary
from data_prep.prepare import PrepareConfig, prepare, shared_out
from data_prep.row import Row
from mujina import locks
from mujina.user_input import UserError, parse
from tokenization.load import load
from tokenization.tokenizer import CHAT_TEMPLATES
from tokenization.train import TrainConfig, train

ROOT = Path(__file__).parents[2]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(tokenizer: Path, output: Path, **sources: dict[str, Any]) -> PrepareConfig:
    described = {name: {"kind": "web"} | values for name, values in sources.items()}
    return PrepareConfig.model_validate({"tokenizer": str(tokenizer), "output": str(output), "sources": described})


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def test_documents_and_dialogues_decode_to_what_went_in(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = load(tokenizer_folder)
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
    assert dialogue.tolist() == [*tokenizer.render(messages).ids, tokenizer.eod_id]


def test_answers_have_weights_beside_the_tokens(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = load(tokenizer_folder)
    first = [{"role": "user", "content": "7 + 5?"}, {"role": "assistant", "content": "The answer is 12."}]
    second = [{"role": "system", "content": "the cat"}, *first, {"role": "user", "content": "猫"}, {"role": "assistant", "content": "犬"}]
    documents = write_rows(tmp_path / "chat.jsonl", [{"messages": messages} for messages in (first, second)])
    source = {"documents": [documents], "kind": "chat", "origin": "synthetic", "answer_weights": True}
    (manifest,) = prepare(config(tokenizer_folder, tmp_path / "out", chat=source))
    binary = open_binary(tmp_path / "out/chat")
    binary.verify()
    assert {name: (channel.dtype, channel.per) for name, channel in manifest.channels.items()} == {"weights": ("uint8", "token")}
    # The plain way: the assistant says its answer, the end of its turn and that of the document, and not what names the speaker.
    expected: list[list[int]] = []
    for messages in (first, second):
        expected.append([])
        for turn in messages:
            said = int(turn["role"] == "assistant")
            expected[-1] += [0, *[said] * len(tokenizer.encode(turn["content"])), said]
        expected[-1] += [1]
    assert manifest.num_answer_tokens == sum(map(sum, expected))
    assert binary.lengths.tolist() == list(map(len, expected))
    assert binary.channel("weights").tolist() == sum(expected, []) and 1 in sum(expected, [])
    answer = binary.document(0)[np.array(expected[0], bool)]
    assert tokenizer.decode(answer[:-2]) == "The answer is 12." and answer[-2:].tolist() == [tokenizer.end_of_turn_id, tokenizer.eod_id]


def test_a_dialogue_whose_last_turn_ends_as_documents_do_has_one_end(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(tokenizer_folder / "tokenizer.model", folder)
    shutil.copy(CHAT_TEMPLATES["alpaca_ja"], folder / "chat_template.jinja")
    tokenizer = load(folder)
    turns = [{"role": "user", "content": "7 + 5?"}, {"role": "assistant", "content": "12"}]
    documents = write_rows(tmp_path / "chat.jsonl", [{"messages": [*turns, *turns]}, {"messages": [*turns, turns[0]]}])
    source: dict[str, Any] = {"documents": [documents], "kind": "chat", "answer_weights": True}
    with pytest.raises(UserError, match="the chat template adds .*以下は、タスクを説明する"):
        prepare(config(folder, tmp_path / "out", chat=source))
    (manifest,) = prepare(config(folder, tmp_path / "out", chat=source | {"template_may_change": True}))
    binary = open_binary(tmp_path / "out/chat")
    both, one = binary.document(0), binary.document(1)
    assert (both == tokenizer.eod_id).sum() == 2 and (one == tokenizer.eod_id).sum() == 2 and one[-1] == tokenizer.eod_id
    weights = binary.channel("weights")
    answer = len(tokenizer.encode("12")) + 1
    assert manifest.num_answer_tokens == weights.sum() == 2 * answer + answer + 1, "of the second, where the user speaks last, the end too"


DAMAGED = {
    "has no turn of the assistant": [("user", "7 + 5?")],
    "turn 2 .assistant. says nothing": [("user", "7 + 5?"), ("assistant", " \n")],
    "turn 2 .user. follows another of the same role": [("user", "7"), ("user", "5"), ("assistant", "12")],
    "turn 3 .assistant. follows another of the same role": [("user", "7"), ("assistant", "5"), ("assistant", "12")],
}


@pytest.mark.parametrize("problem", DAMAGED)
def test_a_dialogue_with_nothing_to_train_on_is_told(tokenizer_folder: Path, tmp_path: Path, problem: str) -> None:
    good, bad = (
        [{"role": role, "content": text} for role, text in turns] for turns in ([("user", "1"), ("assistant", "2")], DAMAGED[problem])
    )
    documents = write_rows(tmp_path / "chat.jsonl", [{"messages": good}, {"messages": bad}, {"messages": good, "id": "last"}])
    source: dict[str, Any] = {"documents": [documents], "kind": "chat", "origin": "synthetic", "answer_weights": True}
    with pytest.raises(UserError, match=rf"source chat: dialogue chat.jsonl:2: {problem}.*damaged: skip"):
        prepare(config(tokenizer_folder, tmp_path / "out", chat=source))
    (manifest,) = prepare(config(tokenizer_folder, tmp_path / "out", chat=source | {"damaged": "skip"}))
    assert (manifest.num_documents, manifest.num_damaged) == (2, 1) and problem[:6] in manifest.damaged[0]
    write_rows(tmp_path / "chat.jsonl", [{"messages": bad}])
    with pytest.raises(UserError, match=rf"source chat: holds no documents \(dialogue chat.jsonl:1: {problem}"):
        prepare(config(tokenizer_folder, tmp_path / "other", chat=source | {"damaged": "skip"}))


def test_weights_of_answers_are_built_and_removed_with_their_field_only(tokenizer_folder: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "7 + 5?"}, {"role": "assistant", "content": "12"}]
    documents = write_rows(tmp_path / "chat.jsonl", [{"messages": messages}] * 3)
    source: dict[str, Any] = {"documents": [documents], "kind": "chat", "steps": [{"step": "dialogue"}]}
    built: list[dict[str, bytes]] = []
    for answer_weights in (False, True, True, False):
        (manifest,) = prepare(config(tokenizer_folder, tmp_path / "out", chat=source | {"answer_weights": answer_weights}))
        built.append({path.name: path.read_bytes() for path in (tmp_path / "out").glob("chat.*")})
        assert ("chat.weights.bin" in built[-1]) == answer_weights == ("weights" in manifest.channels)
    assert built[0] == built[3] and built[1] == built[2] and built[0]["chat.json"] != built[1]["chat.json"]
    assert all(built[0][name] == built[1][name] for name in ("chat.bin", "chat.idx"))
    prepare(config(tokenizer_folder, tmp_path / "out", chat=source | {"answer_weights": True}))
    os.truncate(tmp_path / "out/chat.weights.bin", 1)
    prepare(config(tokenizer_folder, tmp_path / "out", chat=source | {"answer_weights": True}))
    open_binary(tmp_path / "out/chat").verify()


def test_weights_are_for_chat_and_names_are_their_own_on_every_disk(tokenizer_folder: Path, tmp_path: Path) -> None:
    chat = {"documents": ["a.jsonl"], "kind": "chat", "answer_weights": True}
    for sources, problem in (
        ({"web": chat | {"kind": "web"}}, r"answer_weights \(true\) needs kind chat, not web"),
        ({"chat": chat, "chat.weights": chat}, "sources chat and chat.weights would both write chat.weights.bin"),
        ({"chat": chat, "CHAT.Idx": chat}, "sources chat and CHAT.Idx would both write chat.idx"),
        ({"Web": chat, "web": chat}, "sources Web and web .'Web', 'web'. differ only in capitals .* give one of them another name"),
        (
            {"가": chat, "\u1100\u1161": chat},
            r"sources 가 and \u1100\u1161 .'\\uac00', '\\u1100\\u1161'. differ only .* how Unicode writes",
        ),
        ({"\u212bngström": chat, "ångström": chat}, "differ only in capitals or in how Unicode writes a letter"),
    ):
        with pytest.raises(UserError, match=problem):
            parse({"tokenizer": str(tokenizer_folder), "output": str(tmp_path), "sources": sources}, PrepareConfig, "config.yaml")


@pytest.mark.parametrize("time", ["24:00:00", "1-00:00:00", "1-12", "90:00", "90", "UNLIMITED", "infinite"])
def test_times_as_slurm_writes_them(time: str) -> None:
    assert SlurmConfig(partition="p", time=time).time == time


@pytest.mark.parametrize("time", ["24h", "1 day", "24:60:00", "-1:00:00", "24：00：00", "24:00:00.5", ""])
def test_other_times_are_refused_before_sbatch_does(time: str) -> None:
    with pytest.raises(UserError, match="time .* is no limit of time that Slurm knows: write it as HH:MM:SS"):
        parse({"partition": "p", "time": time}, SlurmConfig, "config.yaml")


def test_an_output_has_a_name(tmp_path: Path) -> None:
    sources = {"web": {"documents": ["a.jsonl"], "kind": "web"}}
    with pytest.raises(UserError, match="output .*: must not be empty: write something there"):
        parse({"tokenizer": "t", "output": "", "sources": sources}, PrepareConfig, "config.yaml")


def test_a_fingerprint_is_what_it_was_before_there_were_channels(tokenizer_folder: Path, tmp_path: Path) -> None:
    """So that what users have prepared is kept."""
    documents = write_rows(tmp_path / "web.jsonl", [{"text": "the cat"}])
    (manifest,) = prepare(config(tokenizer_folder, tmp_path / "out", web={"documents": [documents]}))
    facts = {"kind": "web", "origin": "human", "language": "unknown", "licence": "unknown", "teacher": None}
    contents = [hashlib.sha256(Path(documents).read_bytes()).hexdigest()]
    described = json.dumps([load(tokenizer_folder).hash, "web", facts, contents])
    assert manifest.fingerprint == hashlib.sha256(described.encode()).hexdigest()


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
    (tmp_path / "out/two.bin").write_bytes(bytes((tmp_path / "out/two.bin").stat().st_size))  # of the right size
    assert built() == {"two"}
    (tmp_path / "out/one.json").unlink()
    assert built() == {"one"}
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": f"the cat sat on mat {n}"} for n in range(30)])
    other = train(TrainConfig(inputs=[corpus], output=str(tmp_path / "other"), vocab_size=284, character_coverage=1.0))
    assert built(tokenizer=other) == {"one", "two"}
    assert open_binary(tmp_path / "out/one").manifest.tokenizer_hash == load(other).hash


def test_a_chat_template_is_a_part_of_what_it_wrote(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    (tokenizer / "chat_template.jinja").write_text("{% for turn in messages %}{{ turn.content }}</s>{% endfor %}")
    turns = [{"role": "user", "content": "7 + 5?", "weight": 1}, {"role": "assistant", "content": "12", "tool_calls": None}]
    chat = {"documents": [write_rows(tmp_path / "chat.jsonl", [{"messages": turns}])], "kind": "chat"}
    web = {"documents": [write_rows(tmp_path / "web.jsonl", [{"text": "the cat"}])]}
    before, same = (prepare(config(tokenizer, tmp_path / "out", chat=chat, web=web)) for _ in range(2))
    stamps = {name: (tmp_path / f"out/{name}.bin").stat().st_mtime_ns for name in ("chat", "web")}
    (tokenizer / "chat_template.jinja").write_text("You are a cat.{% for turn in messages %}{{ turn.content }}</s>{% endfor %}")
    settings = config(tokenizer, tmp_path / "out", chat=chat, web=web)
    after = prepare(settings)
    assert notes(settings, after) == [f"{tokenizer}: its chat template adds 'You are a cat.', which no turn says"]
    assert before == same and before[1] == after[1] and before[0].num_tokens < after[0].num_tokens
    assert [(tmp_path / f"out/{name}.bin").stat().st_mtime_ns == stamp for name, stamp in stamps.items()] == [False, True]


@pytest.mark.parametrize("nothing", ["", " \n\t", "\u3000", "\ufeff", "\u200b\u200e "])
def test_documents_of_nothing_are_told_and_are_no_tokens(tokenizer_folder: Path, tmp_path: Path, nothing: str) -> None:
    turns = [{"role": role, "content": nothing} for role in ("user", "assistant")]
    web = write_rows(tmp_path / "web.jsonl", [{"text": nothing}, {"text": "the cat"}, {"messages": turns}, {"text": nothing}])
    settings = config(tokenizer_folder, tmp_path / "out", web={"documents": [web]})
    (manifest,) = prepare(settings)
    assert (manifest.num_documents, manifest.num_empty, manifest.num_characters) == (1, 3, 7)
    assert "source web: 3 documents of nothing were left out" in notes(settings, [manifest])
    none = write_rows(tmp_path / "none.jsonl", [{"text": nothing}])
    with pytest.raises(UserError, match="source none: holds no documents"):
        prepare(config(tokenizer_folder, tmp_path / "out", none={"documents": [none]}))


def test_who_prepares_a_source_keeps_others_away_until_it_ends_or_is_killed(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"the cat sat on the mat number {n} " * 20} for n in range(8_000)]
    documents, other = write_rows(tmp_path / "web.jsonl", rows), write_rows(tmp_path / "other.jsonl", rows[:1])
    out = tmp_path / "out"
    first = subprocess.Popen(command(tokenizer_folder, documents, out, tmp_path), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(out.glob(".web.shards/*")):
        assert first.poll() is None and time.monotonic() < deadline, "it ended before the second began"
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)
    with monkeypatch.context() as impatient, pytest.raises(UserError, match=f"source web of {out}: process {first.pid} on .* is at work"):
        impatient.setattr(locks, "PATIENCE", 0)
        prepare(config(tokenizer_folder, out, web={"documents": [documents]}))
    prepare(config(tokenizer_folder, out, other={"documents": [other]}))
    first.kill()
    first.wait()
    prepare(config(tokenizer_folder, out, web={"documents": [documents]}))
    open_binary(out / "web").verify()


SOURCES = {name: {"documents": ["a.jsonl"]} for name in "abcdefgh"}


@pytest.mark.parametrize(
    ("array", "share", "names"),
    [
        (None, "0/1", "abcdefgh"),
        (None, "1/3", "beh"),
        ((0, 0, 1), "array", "abcdefgh"),
        ((0, 7, 8), "array", "d"),
        ((3, 3, 1), "array/8", "d"),
        ((0, 5, 3), "array/4", "dh"),
        ((0, 14, 8), "array/15", "d"),
    ],
)
def test_a_share_is_the_same_whichever_tasks_run(array: Any, share: str, names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if array:
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0" if array == (0, 0, 1) else "3")
        for name, value in zip(("MIN", "MAX", "COUNT"), array, strict=True):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert "".join(shared_out(config(Path("t"), Path("out"), **SOURCES), share).sources) == names


@pytest.mark.parametrize(
    ("array", "share", "problem"),
    [
        (None, "array", "is for the tasks of a Slurm array, and this is none"),
        (None, "3/3", "must be I/N"),
        (None, "x", "must be I/N"),
        ((3, 3, 1), "array", r"\(1 from 3 to 3\) are not all of 0 … N - 1.*add --share array/N"),  # --array=3
        ((0, 5, 3), "array", r"\(3 from 0 to 5\) are not all"),  # 0,2,5
        ((0, 14, 8), "array", r"\(8 from 0 to 14\) are not all"),  # 0-14:2
        ((1, 8, 8), "array", r"\(8 from 1 to 8\) are not all"),
        ((3, 3, 1), "array/3", "task 3 of the array is none of 0 … 3 - 1"),
        ((3, 3, 1), "array/x", "is none of 0"),
    ],
)
def test_a_share_that_nobody_can_tell_is_refused(array: Any, share: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if array:
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
        for name, value in zip(("MIN", "MAX", "COUNT"), array, strict=True):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    with pytest.raises(UserError, match=problem):
        shared_out(config(Path("t"), Path("out"), **SOURCES), share)


@pytest.mark.parametrize("name", ["..", ".", "", ".hidden", "a/b", "/tmp", "-rf", "a\n", "a b", "x" * 300])
def test_a_name_of_a_source_is_a_name(name: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    described = {"tokenizer": "t", "output": str(tmp_path / "out"), "sources": {name: {"kind": "web", "documents": ["a"]}}}
    with pytest.raises(UserError, match="becomes the name of a file: write letters"):
        parse(described, PrepareConfig, "config.yaml")


def test_several_files_are_one_source_in_order(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = load(tokenizer_folder)
    for name in ("b", "a"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name}])
    documents = [str(tmp_path / "*.jsonl"), str(tmp_path / "b.jsonl")]  # a file that two patterns find is read once
    prepare(config(tokenizer_folder, tmp_path / "out", web={"documents": documents}))
    assert tokenizer.decode(open_binary(tmp_path / "out/web").tokens) == "ab"


def test_an_empty_source_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    empty, one = write_rows(tmp_path / "empty.jsonl", []), write_rows(tmp_path / "one.jsonl", [{"text": " "}])
    with pytest.raises(UserError, match="empty.jsonl: holds nothing"):
        prepare(config(tokenizer_folder, tmp_path / "out", web={"documents": [one, empty]}))
    with pytest.raises(UserError, match="source web: holds no documents.*all that it held was dropped"):
        prepare(config(tokenizer_folder, tmp_path / "out", web={"documents": [one], "steps": [{"step": "normalise"}]}))
    with pytest.raises(UserError, match="not a whole binary"):
        open_binary(tmp_path / "out/web")


def test_a_bad_row_leaves_no_binary(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match="bad.jsonl line 2"):
        prepare(config(tokenizer_folder, tmp_path / "out", web={"documents": [str(tmp_path / "bad.jsonl")]}))
    with pytest.raises(UserError, match="not a whole binary"):
        open_binary(tmp_path / "out/web")


def command(tokenizer: Path, documents: str, output: Path, folder: Path) -> list[str]:
    values = {"tokenizer": str(tokenizer), "output": str(output), "sources": {"web": {"documents": [documents], "kind": "web"}}}
    (folder / f"{output.name}.yaml").write_text(yaml.safe_dump(values))
    return [sys.executable, "-m", "data_prep.prepare", str(folder / f"{output.name}.yaml")]


def test_a_killed_preparation_goes_on_where_it_stopped(tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"the cat sat on the mat number {n} " * 20} for n in range(8_000)]
    documents = write_rows(tmp_path / "web.jsonl", rows)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(command(tokenizer_folder, documents, killed, tmp_path), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(killed.glob(".web.shards/??????.json")):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed midway"
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert workers and not psutil.wait_procs(workers, timeout=120)[1], "a worker outlives its parent"
    assert not any(path.suffix in (".bin", ".idx", ".json") for path in killed.iterdir())
    with pytest.raises(UserError, match="not a whole binary"):
        open_binary(killed / "web")
    num_whole = len(list(killed.glob(".web.shards/??????.json")))
    num_blocks = len(list(read_blocks(documents)))
    assert 0 < num_whole < num_blocks
    built = tmp_path / "built"

    def recorded(block: Block, labels: dict[str, str]) -> Iterator[Row]:
        with open(built, "a") as stream:
            stream.write("x")
        return rows_of(block, labels)

    monkeypatch.setattr(tokenize_module, "rows_of", recorded)
    prepare(config(tokenizer_folder, killed, web={"documents": [documents]}))
    assert built.stat().st_size == num_blocks - num_whole
    prepare(config(tokenizer_folder, whole, web={"documents": [documents]}))
    assert built.stat().st_size == 2 * num_blocks - num_whole
    assert bytes_of(killed) == bytes_of(whole) and set(bytes_of(killed)) == {"web.bin", "web.idx", "web.json"}
    open_binary(killed / "web").verify()


def test_the_bytes_do_not_depend_on_the_number_of_processes(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "FIRST_BLOCK", 2_000)
    draw = random.Random(1)
    rows = [{"text": "".join(draw.choices("cat 猫", k=draw.randint(9, 300))), "language": draw.choice("ab")} for _ in range(500)]
    documents = [write_rows(tmp_path / "a.jsonl", rows), str(tmp_path / "b.jsonl.gz")]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(Path(documents[0]).read_bytes()))
    assert len(list(read_blocks(documents[0]))) > 20
    outputs = []
    for processes in (1, 2, 5):
        prepare(
            config(tokenizer_folder, tmp_path / f"out{processes}", web={"documents": documents}).model_copy(update={"processes": processes})
        )
        outputs.append(bytes_of(tmp_path / f"out{processes}"))
    assert outputs[0] == outputs[1] == outputs[2]
    tokenizer, binary = load(tokenizer_folder), open_binary(tmp_path / "out5/web")
    # The plain way: every document by itself, in the order of the files.
    expected = [[*tokenizer.encode(row["text"]), tokenizer.eod_id] for row in rows * 2]
    assert [binary.document(number).tolist() for number in range(1_000)] == expected
    assert binary.manifest.num_characters == 2 * sum(len(row["text"]) for row in rows)
    assert sum(binary.manifest.languages.values()) == 1_000


TOKENS = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer(folder: Path) -> Path:
    """A Hugging Face tokenizer with a token for each byte, and 0 for the end of a document."""
    folder.mkdir(exist_ok=True)
    backend = tokenizers.Tokenizer(models.BPE({piece: token for token, piece in enumerate(["</s>", *TOKENS])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


def test_a_hugging_face_tokenizer_prepares_as_well(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    texts = ["the cat", "spells </s> itself", "猫"] * 100
    documents = write_rows(tmp_path / "web.jsonl", [{"text": text} for text in texts])
    prepare(config(tmp_path, tmp_path / "out", web={"documents": [documents]}))
    binary = open_binary(tmp_path / "out/web", load(tmp_path).hash)
    for number, text in enumerate(texts):
        assert binary.document(number).tolist() == [1 + TOKENS.index(piece) for piece in _byte_level(text)] + [0]


def _byte_level(text: str) -> str:
    return "".join(piece for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text))


def test_of_several_bad_rows_the_first_is_named(tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "FIRST_BLOCK", 1_000)
    rows: list[dict[str, Any]] = [{"text": f"the cat {n}"} for n in range(400)]
    rows[199] = rows[210] = {"body": "x"}
    documents = write_rows(tmp_path / "web.jsonl", rows)
    with pytest.raises(UserError, match="web.jsonl line 200: has neither"):
        prepare(config(tokenizer_folder, tmp_path / "out", web={"documents": [documents]}))


def test_a_worker_that_is_killed_is_reported(tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = write_rows(tmp_path / "web.jsonl", [{"text": "x"}])
    monkeypatch.setattr(tokenize_module, "rows_of", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="a worker process was killed .SIGKILL.*`processes`"):
        prepare(config(tokenizer_folder, tmp_path / "out", web={"documents": [documents]}))


def test_the_command_explains_a_mistake(tokenizer_folder: Path, tmp_path: Path) -> None:
    documents = write_rows(tmp_path / "web.jsonl", [{"text": "x"}])
    line = command(tokenizer_folder, documents, tmp_path / "out", tmp_path)
    run = subprocess.run([*line, "tokeniser=elsewhere"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert "did you mean tokenizer?" in run.stderr


def test_a_disk_that_is_full_when_shards_are_joined_is_explained(tokenizer_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"the cat sat on the mat number {n} " * 20} for n in range(3_000)]
    line = command(tokenizer_folder, write_rows(tmp_path / "web.jsonl", rows), tmp_path / "out", tmp_path)
    little = 1_300_000  # bytes: more than any shard, less than all
    full = subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (little, little))
    )
    assert full.returncode == 2 and "make space on the disk" in full.stderr and "Traceback" not in full.stderr, full.stderr
    with pytest.raises(UserError, match="not a whole binary"):
        open_binary(tmp_path / "out/web")
    assert subprocess.run(line, cwd=ROOT, capture_output=True).returncode == 0
    open_binary(tmp_path / "out/web").verify()
