"""Training is repeatable, is skipped when nothing changed, and leaves nothing half-written."""

import gzip
import json
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mujina.user_input import UserError
from tokenization import train as train_module
from tokenization.load import load
from tokenization.presplit import mecab
from tokenization.train import TrainConfig, train

CORPUS = Path(__file__).parents[2] / "examples/corpus"
WORDS = mecab()


def config(inputs: Path, output: Path, **values: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {"inputs": [str(inputs)], "output": str(output), "vocab_size": 375, "character_coverage": 1.0} | values
    )


def pieces(folder: Path) -> list[str]:
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return [model.id_to_piece(token) for token in range(model.vocab_size())]


def test_the_same_training_gives_the_same_bytes(inputs: Path, folder: Path, tmp_path: Path) -> None:
    again = train(config(inputs, tmp_path / "again"))
    files = {path.name for path in again.iterdir()}
    assert files == {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer_manifest.json"}
    for name in files - {"tokenizer_manifest.json"}:
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    fingerprints = [json.loads((place / "tokenizer_manifest.json").read_text())["fingerprint"] for place in (again, folder)]
    assert fingerprints[0] == fingerprints[1]


def test_it_is_skipped_until_something_changes(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "text.jsonl"
    mine.write_bytes(inputs.read_bytes())
    folder = train(config(mine, tmp_path / "t"))
    before = (folder / "tokenizer.model").stat().st_mtime_ns
    train(config(mine, tmp_path / "t"))
    assert (folder / "tokenizer.model").stat().st_mtime_ns == before
    assert "already trained" in capsys.readouterr().out
    train(config(mine, tmp_path / "t", vocab_size=376))
    assert len(pieces(folder)) == 376
    (folder / "tokenizer.model").unlink()
    train(config(mine, tmp_path / "t", vocab_size=376))
    assert len(pieces(folder)) == 376
    mine.write_text(mine.read_text(encoding="utf-8") + '{"text": "ÆØÅ ÆØÅ ÆØÅ"}\n', encoding="utf-8")
    train(config(mine, tmp_path / "t", vocab_size=376))
    assert "Æ" in "".join(pieces(folder))


def test_a_failure_leaves_the_old_tokenizer(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(config(inputs, tmp_path / "t"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(train_module.SentencePieceTokenizer, "save_hf", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config(inputs, tmp_path / "t", vocab_size=377))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_no_piece_crosses_the_presplit_delimiter(tmp_path: Path) -> None:
    for name, text in (("plain", "東京特許"), ("split", "東京||||特許")):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": text}) + "\n") * 40)
    plain = pieces(train(config(tmp_path / "plain.jsonl", tmp_path / "plain", vocab_size=269)))
    split = pieces(train(config(tmp_path / "split.jsonl", tmp_path / "split", vocab_size=269, presplit_delimiter="||||")))
    assert "東京特許" in plain
    assert set(split[264:]) in ({*"東京特許", "東京"}, {*"東京特許", "特許"})


def test_mecab_keeps_pieces_within_words(tmp_path: Path) -> None:
    with gzip.open(CORPUS / "documents_ja.jsonl.gz", "rt", encoding="utf-8") as stream:
        text = "".join(json.loads(line)["text"][:3_000] for line in list(stream)[:40])
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}))
    split = train(config(tmp_path / "text.jsonl", tmp_path / "split", vocab_size=2_000, presplit="mecab"))
    plain = train(config(tmp_path / "text.jsonl", tmp_path / "plain", vocab_size=2_000))
    words = "\n".join(word.replace(" ", "▁") for line in text.splitlines() for word in WORDS(line))
    crossing = {folder: [piece for piece in pieces(folder)[264:] if piece not in words] for folder in (plain, split)}
    assert len(crossing[plain]) > 100 and crossing[split] == []
    tokenizer = load(split)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_are_sampled_by_lines(tmp_path: Path) -> None:
    """A tenth of the lines is a tenth of the Japanese, not of its words."""
    line = "東京都に住む人が京都に行く"
    (tmp_path / "text.jsonl").write_text((json.dumps({"text": f"{line}\nthe English of it"}) + "\n") * 1_000)
    lines = list(train_module._training_lines(config(tmp_path / "text.jsonl", tmp_path / "t", presplit="mecab", max_lines=200)))
    words = WORDS(line)
    assert set(lines) == {*words, "the English of it"}
    assert 60 < lines.count("the English of it") < 140 and 60 < lines.count("東京") < 140
    again = list(train_module._training_lines(config(tmp_path / "text.jsonl", tmp_path / "t", presplit="mecab", max_lines=200)))
    assert lines == again


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.one_of(st.sampled_from("今日は東京都に 　行く∥\t\n\r\x00aB1。"), st.characters(codec="utf-8"))))
def test_the_words_of_mecab_are_the_text(text: str) -> None:
    assert "".join(WORDS(text)) == text


def test_a_space_stands_before_its_word() -> None:
    assert WORDS("  今日は Apache 2を　見た ") == ["  今日", "は", " Apache", " 2", "を", "　", "見", "た", " "]
    assert WORDS("no Japanese  here") == ["no Japanese  here"]


def test_presplit_without_mecab_or_done_twice_is_explained(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="presplit and presplit_delimiter both cut"):
        config(inputs, tmp_path / "t", presplit="mecab", presplit_delimiter="∥")
    monkeypatch.setitem(sys.modules, "MeCab", None)
    with pytest.raises(UserError, match="pip install mecab-python3"):
        train(config(inputs, tmp_path / "t", presplit="mecab"))


def test_long_documents_are_not_dropped(tmp_path: Path) -> None:
    rows = [{"text": "あいうえお\n" * 20_000 + "かきくけこ"}, {"text": "x" * 20_000}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = "".join(pieces(train(config(tmp_path / "long.jsonl", tmp_path / "t", vocab_size=275))))
    assert set("あかx") <= set(found)


def test_a_vocabulary_larger_than_the_text_is_explained(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocab_size \(100000\).*<= \d+"):
        train(config(inputs, tmp_path / "t", vocab_size=100_000))
    assert not (tmp_path / "t").exists()


def test_a_folder_of_other_things_is_left_alone(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("all I have")
    with pytest.raises(UserError, match="tokenizer_manifest.json"):
        train(config(inputs, tmp_path / "mine"))
    assert (tmp_path / "mine/thesis.txt").read_text() == "all I have"


def test_a_row_without_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"content": "what"}\n')
    with pytest.raises(UserError, match="bad.jsonl line 2.*text"):
        train(config(tmp_path / "bad.jsonl", tmp_path / "t"))
