"""The figures of a comparison are right on a text small enough to count by hand."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mujina.user_input import UserError
from tokenization.compare import COLUMNS, compare, main, to_markdown
from tokenization.tokenizer import Tokenizer


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rows = [
        {"text": "吾輩は猫である。", "language": "ja", "kind": "web"},
        {"text": "🦡", "language": "ja", "kind": "web"},
        {"text": "a▁b", "language": "en", "kind": "web"},
        {"messages": [{"role": "user", "content": "1 + 2"}, {"role": "assistant", "content": "3"}], "kind": "chat"},
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "texts.jsonl"


def test_the_figures(folder: Path, tokenizer: Tokenizer, texts: Path) -> None:
    rows = {row["language"]: row for row in compare([folder], [("mine", texts)])}
    assert set(rows) == {"ja", "en", ""} and all(tuple(row) == COLUMNS for row in rows.values())
    words = len(tokenizer.encode("吾輩は猫である。"))
    assert rows["ja"] == {
        "tokenizer": str(folder),
        "texts": "mine",
        "kind": "web",
        "language": "ja",
        "documents": 2,
        "chars/token": 9 / (words + 4),
        "bytes/token": 28 / (words + 4),
        "tokens": words + 4,
        "byte tokens": 4 / (words + 4),
        "exact": 1.0,
    }
    assert rows[""]["kind"] == "chat" and rows[""]["tokens"] == len(tokenizer.encode("1 + 2\n3"))
    assert rows["en"]["exact"] == 1.0


def test_a_bare_model_is_taken_as_it_is(folder: Path, texts: Path) -> None:
    """The engine by itself takes U+2581 for a space, so that text does not come back."""
    rows = {row["language"]: row for row in compare([folder / "tokenizer.model"], [("mine", texts)])}
    assert rows["en"]["exact"] == 0.0 and rows["ja"]["exact"] == 1.0
    with pytest.raises(UserError, match="not a sentencepiece model"):
        compare([folder / "tokenizer.json"], [("mine", texts)])


def test_parts_of_characters_count_as_byte_tokens(tmp_path: Path, texts: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({piece: token for token, piece in enumerate([*alphabet, "</s>"])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    rows = {row["language"]: row for row in compare([tmp_path], [("mine", texts)])}
    assert rows["ja"]["byte tokens"] == rows["ja"]["bytes/token"] == 1.0 and rows["en"]["byte tokens"] == 3 / 5


def test_the_command_writes_markdown_and_json(folder: Path, texts: Path, tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(main)
    for name in ("report.md", "report.json"):
        result = CliRunner().invoke(app, [str(folder), "--texts", f"mine={texts}", "--output", str(tmp_path / name)])
        assert result.exit_code == 0, result.exception
    rows = compare([folder], [("mine", texts)])
    assert json.loads((tmp_path / "report.json").read_text()) == rows
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert "\n".join(lines) + "\n" == to_markdown(rows) and len(lines) == 2 + 3
    for arguments, message in ((["--texts", "mine"], "NAME=FILE"), (["--texts", f"a={texts}", "--output", "x.txt"], "end in .md or .json")):
        assert message in str(CliRunner().invoke(app, [str(folder), *arguments]).exception)
