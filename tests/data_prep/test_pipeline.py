"""Documents through steps: kept, dropped with a reason, the same bytes however often the run is killed and wherever it runs."""

import gzip
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from datatrove.executor import LocalPipelineExecutor

from data_prep import pipeline
from data_prep.config import PrepareConfig
from data_prep.executors import prepare
from data_prep.indexed import open_binary
from mujina.files import read_rows
from mujina.user_input import UserError, read_yaml
from tests.cluster import wait_for
from tests.data_prep.steps.test_extract import PAGE
from tokenization.load import load

ROOT = Path(__file__).parents[2]
STEPS: list[dict[str, Any]] = [{"step": "normalise"}, {"step": "exact_duplicates"}, {"step": "code_quality"}, {"step": "near_duplicates"}]


def write_files(folder: Path, files: int = 5, rows: int = 60) -> str:
    """Files of rows of code; the second row nearly repeats the first, every tenth is a copy of it, every eleventh one endless line."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(1)
    for file in range(files):
        names = iter(lambda: "".join(draw.choices("abcdefghij", k=9)), "")
        texts = ["\n".join(f"{next(names)} = {next(names)}({next(names)})" for _ in range(12)) for _ in range(rows)]
        texts[1] = texts[0].replace("(", "[", 1)
        texts = [texts[0] if n % 10 == 9 else "x = 1; " * 500 if n % 11 == 10 else text for n, text in enumerate(texts)]
        with gzip.open(folder / f"{file}.jsonl.gz", "wt") as stream:
            stream.writelines(json.dumps({"id": f"{file}:{n}", "text": text + " \r\n"}) + "\n" for n, text in enumerate(texts))
    return str(folder / "*.jsonl.gz")


def values(documents: str, output: Path, **more: Any) -> dict[str, Any]:
    source = {"documents": [documents], "kind": "code", "licence": "MIT", "steps": STEPS} | more.pop("source", {})
    return {"output": str(output), "sources": {"code": source}} | more


def config(*arguments: Any, **more: Any) -> PrepareConfig:
    return PrepareConfig.model_validate(values(*arguments, **more))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.jsonl.zst")) for _, row in read_rows(path)]


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Whatever a preparation leaves, but for the times in datatrove's statistics and logs."""
    kept = [path for path in folder.rglob("*") if path.is_file() and "stages" not in path.parts and path.name != "report.html"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Input files, and what a run that nobody disturbed makes of them."""
    folder = tmp_path_factory.mktemp("undisturbed")
    documents = write_files(folder / "in")
    prepare(config(documents, folder / "out", processes=1))
    return documents, folder / "out"


def test_every_document_is_kept_or_dropped_with_a_reason(undisturbed: tuple[str, Path]) -> None:
    folder = undisturbed[1] / "code"
    kept = rows_of(folder / "documents")
    removed = {path.name: rows_of(path) for path in sorted((folder / "removed").iterdir())}
    assert list(removed) == ["02-exact_duplicates", "03-code_quality", "04-near_duplicates"]
    ids = [row["id"] for rows in (kept, *removed.values()) for row in rows]
    assert sorted(ids) == sorted(f"{file}:{n}" for file in range(5) for n in range(60))
    # of the 25 endless lines all are equal: the first is left for the quality rule
    assert len(removed["02-exact_duplicates"]) == 5 * 6 + 5 * 5 - 1 and len(removed["03-code_quality"]) == 1
    assert [row["id"] for row in removed["04-near_duplicates"]] == [f"{file}:1" for file in range(5)]
    assert all(row["reason"].startswith("exact_duplicate") for row in removed["02-exact_duplicates"])
    assert all((row["kind"], row["licence"], row["source"]) == ("code", "MIT", "code") for row in kept)
    assert not any("\r" in row["text"] for row in kept)
    assert "02-exact_duplicates" in (folder / "report.html").read_text()
    assert {path.name for path in folder.iterdir()} == {"documents", "removed", "problems", "stages", "pipeline.json", "report.html"}


def test_the_bytes_do_not_depend_on_the_number_of_processes(undisturbed: tuple[str, Path], tmp_path: Path) -> None:
    documents, expected = undisturbed
    for processes in (2, 3):
        prepare(config(documents, tmp_path / f"{processes}", processes=processes))
        assert bytes_of(tmp_path / f"{processes}") == bytes_of(expected)


def command(tmp_path: Path, described: dict[str, Any]) -> list[str]:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(described))
    return [sys.executable, "-m", "data_prep.prepare", str(tmp_path / "config.yaml")]


@pytest.mark.parametrize("stage", ["02-exact_duplicates-mark", "04-near_duplicates-mark", "documents"])
def test_a_killed_run_goes_on_at_the_ranks_that_did_not_finish(tmp_path: Path, stage: str) -> None:
    documents = write_files(tmp_path / "in", files=12, rows=150)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    markers = killed / "code/stages" / stage / "completions"
    line = command(tmp_path, values(documents, killed, processes=2))
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(markers.glob("*")):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed midway"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in markers.iterdir()}
    assert 0 < len(before) < 12
    assert not (killed / "code/documents").exists()
    prepare(config(documents, killed))
    assert before == {name: (markers / name).stat().st_mtime_ns for name in before}, "a rank that had ended was run again"
    prepare(config(documents, whole))
    assert bytes_of(killed) == bytes_of(whole)


def test_a_full_disk_is_explained_and_mended_by_the_same_command(undisturbed: tuple[str, Path], tmp_path: Path) -> None:
    documents, expected = undisturbed
    line = command(tmp_path, values(documents, tmp_path / "out", processes=2))
    little = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))  # noqa: E731
    full = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, preexec_fn=little)
    assert full.returncode == 2 and "a file of the output: file too large: make space on the disk" in full.stderr, full.stderr
    assert not (tmp_path / "out/code/documents").exists()
    assert subprocess.run(line, cwd=ROOT, capture_output=True).returncode == 0
    assert bytes_of(tmp_path / "out") == bytes_of(expected)


def test_other_steps_or_inputs_are_not_mixed_with_what_is_there(undisturbed: tuple[str, Path]) -> None:
    documents, output = undisturbed
    for source, named in (
        ({"steps": STEPS[:1]}, "files than this"),
        ({"documents": [documents.replace("*", "1")]}, r"files \(.*0.jsonl.gz, .*2.jsonl.gz, .*3.jsonl.gz …\) than this"),
        ({"licence": "Apache-2.0"}, "files than this"),
    ):
        with pytest.raises(UserError, match=f"of other steps or other input {named}.*remove this folder"):
            prepare(config(documents, output, source=source))


@pytest.mark.parametrize("steps", [STEPS[:1], STEPS])
def test_a_document_file_that_is_lost_or_damaged_is_made_again_and_told(tmp_path: Path, steps: list[dict[str, Any]], capsys) -> None:
    documents, source = write_files(tmp_path / "in", files=2, rows=12), {"steps": steps}
    prepare(config(documents, tmp_path / "out", source=source))
    expected = bytes_of(tmp_path / "out")
    folder = tmp_path / "out/code/documents"
    lost = folder / "00001.jsonl.zst"
    records = [path for path in (tmp_path / "out/code/stages").rglob("documents/written/*.json")]
    assert records
    for damage, is_told in (
        (lost.unlink, True),
        (lambda: os.truncate(lost, 20), True),
        (lambda: lost.write_bytes(bytes(lost.stat().st_size)), True),
        (lambda: shutil.rmtree(folder), True),
        (lambda: [os.truncate(record, 20) for record in records], True),
        (lambda: shutil.rmtree(tmp_path / "out/code/stages"), False),  # then nothing has ended
    ):
        damage()
        prepare(config(documents, tmp_path / "out", source=source))
        assert bytes_of(tmp_path / "out") == expected
        assert (re.search(r"00001.json(l.zst)? is gone, or is not what was written", capsys.readouterr().err) is not None) == is_told
        assert not (tmp_path / "out/code/work").exists() and not (tmp_path / "out/code/.documents").exists()


def test_damaged_records_of_a_rank_are_told(tmp_path: Path) -> None:
    documents, source = write_files(tmp_path / "in", files=1, rows=12), {"steps": [{"step": "exact_duplicates"}]}
    prepare(config(documents, tmp_path / "out", source=source))
    for pattern, told in (("read/*.json", r"other input files \(.*json\)"), ("*/stats/*.json", "is not what a rank has counted")):
        for path in (tmp_path / "out/code/stages").glob(pattern):
            before = path.read_bytes()
            path.write_bytes(before[: len(before) // 2])
            with pytest.raises(UserError, match=f"{told}.*remove .* to start afresh"):
                prepare(config(documents, tmp_path / "out", source=source))
            path.write_bytes(before)
    prepare(config(documents, tmp_path / "out", source=source))


def test_what_was_lost_between_stages_is_made_again(undisturbed: tuple[str, Path], tmp_path: Path) -> None:
    documents, expected = undisturbed
    shutil.copytree(expected, tmp_path / "out")
    folder = tmp_path / "out/code"
    for name in ("work", "removed", "documents", "stages"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (stages,) = (pipeline.stages(name, source, folder) for name, source in config(documents, tmp_path / "out").sources.items())
    for stage in stages[:4]:
        for rank in range(stage.tasks):
            executor = LocalPipelineExecutor(stage.pipeline, stage.tasks, logging_dir=str(folder / "stages" / stage.name))
            executor._run_for_rank(rank)
    (folder / "work/02-exact_duplicates/documents/00002.jsonl.zst").unlink()
    prepare(config(documents, tmp_path / "out"))
    assert bytes_of(tmp_path / "out") == bytes_of(expected)


def test_a_touch_is_no_change_and_a_change_of_the_same_size_is_one(tmp_path: Path) -> None:
    documents = write_files(tmp_path / "in", files=2, rows=20)
    source = {"steps": [{"step": "normalise"}, {"step": "decontaminate", "sets": [str(tmp_path / "sets/*.txt")]}]}
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets/one.txt").write_text("a question of an evaluation set, and nothing else")
    again = lambda: prepare(config(documents, tmp_path / "out", source=source))  # noqa: E731
    again()
    marker = tmp_path / "out/code/stages/documents/completions/00000"
    before = marker.stat().st_mtime_ns
    shutil.copytree(tmp_path / "in", tmp_path / "copy")
    for path in [*(tmp_path / "in").iterdir(), *(tmp_path / "sets").iterdir()]:
        path.touch()
        shutil.move(shutil.copy(path, tmp_path / "moved"), path)
    again()
    assert marker.stat().st_mtime_ns == before
    for path in tmp_path / "in/1.jsonl.gz", tmp_path / "sets/one.txt":
        content, stat = path.read_bytes(), path.stat()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises(UserError, match=rf"of other steps or other input files \({path}\).*remove this folder"):
            again()
        path.write_bytes(content)
        again()
    (tmp_path / "sets/two.txt").write_text("another question of an evaluation set")
    with pytest.raises(UserError, match="two.txt"):
        again()


def test_a_word_list_is_a_part_of_its_step(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "猫が座る。"}) + "\n")
    (tmp_path / "words.txt").write_text("広告\n")
    for step in (
        {"step": "japanese_quality", "adverts": {"words": str(tmp_path / "words.txt"), "max_distinct": 1, "max_per_thousand": 1}},
        {"step": "url", "blocked_domains": str(tmp_path / "words.txt")},
    ):
        settings = config(str(tmp_path / "a.jsonl"), tmp_path / step["step"], source={"steps": [step]})
        (source,) = settings.sources.values()
        stages = lambda: pipeline.stages("code", source, tmp_path / step["step"] / "code")  # noqa: B023, E731
        stages()
        (tmp_path / "words.txt").write_text("宣伝\n")
        with pytest.raises(UserError, match="words.txt"):
            stages()
        (tmp_path / "words.txt").write_text("広告\n")
        stages()


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    documents = write_files(tmp_path / "in", files=1, rows=5)
    mine = tmp_path / "out/code" / "work" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(UserError, match="out/code: exists, is not empty and holds no pipeline.json"):
        prepare(config(documents, tmp_path / "out"))
    assert mine.read_text() == "years of work"
    (tmp_path / "out/code/pipeline.json").write_text("{")
    with pytest.raises(UserError, match="pipeline.json: is damaged"):
        prepare(config(documents, tmp_path / "out"))


def test_damaged_input_stops_the_run_or_is_reported(tmp_path: Path) -> None:
    documents = write_files(tmp_path / "in", files=2, rows=20)
    broken = tmp_path / "in/1.jsonl.gz"
    broken.write_bytes(broken.read_bytes()[:-300])
    (tmp_path / "in/2.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a = 1"}\n{"body": "b = 2"}\n'))
    with pytest.raises(UserError, match="1.jsonl.gz"):
        prepare(config(documents, tmp_path / "stopped"))
    assert not (tmp_path / "stopped/code/documents").exists()
    prepare(config(documents, tmp_path / "skipped", source={"damaged": "skip"}))
    problems = "".join(path.read_text() for path in (tmp_path / "skipped/code/problems").iterdir())
    assert "1.jsonl.gz" in problems and "2.jsonl.gz" in problems
    assert "2.jsonl.gz" in (tmp_path / "skipped/code/report.html").read_text()
    assert any(row["id"] == "0:2" for row in rows_of(tmp_path / "skipped/code/documents"))


def test_damaged_rows_are_passed_over_without_steps_too(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "web.jsonl").write_bytes(b'{"text": "the cat"}\n{"text": "\xff"}\n{"text": "sat"}\n')
    source = {"kind": "web", "damaged": "skip", "steps": []}
    (manifest,) = prepare(config(str(tmp_path / "web.jsonl"), tmp_path / "out", source=source, tokenizer=str(tokenizer_folder)))
    assert manifest.num_documents == 2
    assert "line 2: byte 0xff" in (tmp_path / "out/code/problems/00000.txt").read_text()


def test_a_source_with_steps_is_tokenized(tokenizer_folder: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "７ + 5?\x07"}, {"role": "assistant", "content": "12, write to a@example.com"}]
    rows = [{"messages": turns}, {"messages": turns[:1]}, {"messages": turns}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [{"step": name} for name in ("dialogue", "normalise", "pii", "exact_duplicates")]
    chat = {"kind": "chat", "origin": "synthetic", "teacher": "tanuki", "language": "ja", "steps": steps}
    (manifest,) = prepare(config(str(tmp_path / "chat.jsonl"), tmp_path / "out", source=chat, tokenizer=str(tokenizer_folder)))
    assert (manifest.num_documents, manifest.teachers, manifest.languages) == (1, {"tanuki": 1}, {"ja": 1})
    tokenizer = load(tokenizer_folder)
    text = tokenizer.decode(open_binary(tmp_path / "out/code").document(0).tolist())
    assert "a@example.com" not in text and "12, write to" in text
    (kept,) = rows_of(tmp_path / "out/code/documents")
    assert [turn["role"] for turn in kept["messages"]] == ["user", "assistant"]


def test_pages_are_extracted_by_either_engine(tmp_path: Path) -> None:
    """trafilatura works in a process of its own, which must not outlive the run."""
    folder = tmp_path / "pages"
    folder.mkdir()
    for n in range(4):
        (folder / f"{n}.html").write_text(PAGE)
    for engine in ("resiliparse", "trafilatura"):
        source = {"kind": "documents", "steps": [{"step": "extract", "engine": engine}]}
        line = command(tmp_path, values(str(folder), tmp_path / engine, source=source))
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"MARK": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        assert ["茶を振る舞う行為である。" in row["text"] for row in rows_of(tmp_path / engine / "code/documents")] == [True] * 4
    left = f"MARK={tmp_path}"
    wait_for(lambda: not [path for path in Path("/proc").glob("[0-9]*/environ") if _holds(path, left)], 60, f"processes with {left}")


def _holds(path: Path, text: str) -> bool:
    try:
        return text.encode() in path.read_bytes()
    except OSError:
        return False


@pytest.mark.parametrize("name", ["web_ja", "web_en", "code", "documents", "chat"])
def test_the_presets_are_whole(name: str) -> None:
    preset = ROOT / f"data_prep/configs/{name}.yaml"
    (source,) = read_yaml(preset, PrepareConfig, [f"sources.{name}.documents=[mine]"]).sources.values()
    assert source.documents == ["mine"] and source.steps
    with pytest.raises(UserError, match="did you mean step|unknown key"):
        read_yaml(preset, PrepareConfig, [f"sources.{name}.steps=[{{step: normalise, forms: NFC}}]"])


def test_a_configuration_lays_itself_over_several_presets() -> None:
    sources = read_yaml(ROOT / "examples/debian.yaml", PrepareConfig).sources
    assert list(sources) == ["web_ja", "web_en", "documents", "code", "chat"]
    assert all(source.documents[0].startswith("runs/debian/raw/") and source.steps for source in sources.values())
