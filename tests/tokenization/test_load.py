"""One protocol, two engines: which of them a folder gets, and that neither knows of the other."""

import ast
from pathlib import Path

import tokenization
from tokenization.hf import HfTokenizer
from tokenization.load import load
from tokenization.sentence_piece import SentencePieceTokenizer

ROOM = Path(tokenization.__file__).parent


def test_a_folder_gets_the_engine_that_it_is_for(folder: Path, bpe_folder: Path) -> None:
    assert (folder / "tokenizer.json").exists(), "tokenizer.model is taken before the tokenizer.json beside it"
    assert isinstance(load(folder), SentencePieceTokenizer)
    assert isinstance(load(str(bpe_folder)), HfTokenizer)


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
