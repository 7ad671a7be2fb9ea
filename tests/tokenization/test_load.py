"""One protocol, two engines: which of them a folder gets, and that neither knows of the other."""

import ast
import shutil
from pathlib import Path

import pytest

import tokenization
from mujina.user_input import UserError
from tokenization.hf import HfTokenizer
from tokenization.load import load
from tokenization.sentence_piece import SentencePieceTokenizer

ROOM = Path(tokenization.__file__).parent


def test_a_folder_gets_the_engine_that_it_is_for(folder: Path, bpe_folder: Path) -> None:
    assert (folder / "tokenizer.json").exists(), "tokenizer.model is taken before the tokenizer.json beside it"
    assert isinstance(load(folder), SentencePieceTokenizer)
    assert isinstance(load(str(bpe_folder)), HfTokenizer)


def test_a_tokenizer_model_of_others_is_passed_over(bpe_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(bpe_folder, tmp_path / "model")
    for content in (b"", b"garbage", b"version https://git-lfs.github.com/spec/v1\n", b"IQ== 0\nIg== 1\n"):  # the last: tiktoken's
        (tmp_path / "model/tokenizer.model").write_bytes(content)
        assert load(tmp_path / "model").hash == load(bpe_folder).hash


def test_what_lacks_a_tokenizer_is_told_where_to_get_one(bpe_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no tokenizer .* AutoTokenizer, .* save it with save_pretrained"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="tokenizer.json: is a pointer of git-lfs"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("../../blobs/0")
    with pytest.raises(UserError, match="tokenizer.json: is a link to ../../blobs/0, which is not there"):
        load(tmp_path)


def test_no_module_imports_one_that_imports_it_back() -> None:
    """Imports within functions and for types included."""
    imports = {path.stem: set[str]() for path in ROOM.glob("*.py")}
    for name, found in imports.items():
        for node in ast.walk(ast.parse((ROOM / f"{name}.py").read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            found |= {module.removeprefix("tokenization.")} & imports.keys() if module.startswith("tokenization.") else set()
    assert imports["load"] == {"hf", "sentence_piece", "tokenizer"}
    while leaves := {name for name, found in imports.items() if not found & imports.keys()}:
        imports = {name: found for name, found in imports.items() if name not in leaves}
    assert not imports, f"a circle among {sorted(imports)}"
