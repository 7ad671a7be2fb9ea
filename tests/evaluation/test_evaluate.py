import json
from pathlib import Path

import pytest

from evaluation import evaluate
from evaluation.result import read_result
from mujina.answers import Sampling
from mujina.user_input import UserError
from tests.chat_folder import save_chain
from tests.chat_server import chat_server


def held_out(folder: Path, *questions: str) -> Path:
    rows = [{"messages": [{"role": "user", "content": text}], "answer": "12", "language": "en"} for text in questions]
    path = folder / "held_out.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_command_writes_the_result_and_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "result.json"
    with chat_server() as server:
        model = f"{server.url}#teacher"
        evaluate.main(model, held_out(tmp_path, "The_answer_is_12.", "x", "y"), output, limit=2)
    result = read_result(output)
    assert list(output.parent.iterdir()) == [output]
    assert (result.model, result.sampling, result.num_prompts) == (model, Sampling(128), 2)
    assert [sample.answer for sample in result.samples] == ["The_answer_is_12.", "x"]
    printed = capsys.readouterr().out
    assert "well-formed" in printed and "English" in printed and "0.0%" in printed


def test_a_folder_is_scored(tmp_path: Path) -> None:
    folder = save_chain(tmp_path / "model", {"<|assistant|>": "one", "one": "<|end|>"})
    evaluate.main(str(folder), held_out(tmp_path, "five"), tmp_path / "result.json")
    [sample] = read_result(tmp_path / "result.json").samples
    assert (sample.answer, sample.verdict, sample.right) == ("one", "not well-formed", False)


def test_prompts_are_read_before_the_model_is_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="held_out.jsonl: no such file"):
        evaluate.main(str(tmp_path / "no model"), tmp_path / "held_out.jsonl", tmp_path / "result.json")
