import subprocess
import sys
from pathlib import Path

import pytest

from evaluation import generate
from tests.chat_folder import save_chain
from tests.chat_server import chat_server


def test_the_command_prints_prompts_and_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_chain(tmp_path, {"<|assistant|>": "one", "one": "two", "two": "one"})
    generate.main(str(folder), ["five", "four"], max_new_tokens=2)
    assert capsys.readouterr().out == "> five\none two … (cut off after 2 tokens)\n\n> four\none two … (cut off after 2 tokens)\n\n"


def test_a_base_model_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_chain(tmp_path, {"five": "one", "one": "two", "two": "</s>"})
    (folder / "chat_template.jinja").unlink()
    generate.main(str(folder), ["four five"])
    assert capsys.readouterr().out.endswith("has no chat template: the prompts are completed as plain text\n\n> four five\none two\n\n")


def test_the_command_asks_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    with chat_server() as server:
        generate.main(f"{server.url}#teacher", ["five", "long"], max_new_tokens=2)
    assert capsys.readouterr().out == "> five\nfive\n\n> long\nlong … (cut off after 2 tokens)\n\n"


@pytest.mark.parametrize("module", ["generate", "evaluate", "report.__main__"])
def test_importing_the_commands_is_light(module: str) -> None:
    """`--help` answers at once: none of the heavy libraries is imported with the module."""
    code = f"import sys, evaluation.{module}; sys.exit(str({{'torch', 'transformers', 'numpy'}} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert not done.stderr.strip()
