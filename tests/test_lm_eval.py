"""lm-eval, offline and with the task files of examples/lm_eval, on a mixture that `mujina convert` has written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.synthetic.rules import generate
from megatron_jobs.conversion import convert
from tests.conftest import MOE, tiny
from tests.megatron_jobs.test_train import train_here
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
LM_EVAL = Path(sys.prefix) / "lm_eval"  # put there by run_tests.sh
NUM_ROWS = 8


def test_lm_eval_runs_on_an_exported_folder(prepared, tmp_path):
    """It counts the same answers as right as a loop over transformers does."""
    assert LM_EVAL.exists(), f"{LM_EVAL} is missing: start the tests with ./run_tests.sh"
    run_ranks(1, train_here, tiny(prepared, tmp_path / "run", moe=MOE))
    run_ranks(1, convert.main, tmp_path / "run/checkpoints/latest", tmp_path / "hf", True)
    rows = generate(20, NUM_ROWS, 1)[1]
    held_out = tmp_path / "runs/quickstart/chat/held_out.jsonl"
    held_out.parent.mkdir(parents=True)
    held_out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    options = f"--model hf --model_args pretrained=hf,dtype=float32,max_length=512 --include_path {ROOT / 'examples/lm_eval'} "
    options += "--tasks mujina_sums mujina_sums_choice --apply_chat_template --device cpu --batch_size 4 --output_path results"
    offline = dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"), PYTHONPATH=str(LM_EVAL))
    command = [sys.executable, "-m", "lm_eval", "run", *options.split()]
    ended = subprocess.run(command, cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    [path] = tmp_path.glob("results/**/results_*.json")
    found = json.loads(path.read_text())
    assert {task: counts["effective"] for task, counts in found["n-samples"].items()} == {
        "mujina_sums": NUM_ROWS,
        "mujina_sums_choice": NUM_ROWS,
    }
    assert found["results"]["mujina_sums_choice"]["acc,none"] == right_choices(tmp_path / "hf", rows) / NUM_ROWS


def right_choices(folder: Path, rows: list[dict]) -> int:
    """How often the right answer is the likeliest of the four."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
        start = len(tokenizer.encode(prompt, add_special_tokens=False))
        likelihoods = []
        for number in (int(row["answer"]) + more for more in (0, 1, -1, 10)):
            answer = f"The answer is {number}." if row["language"] == "en" else f"答えは{number}です。"
            ids = torch.tensor([tokenizer.encode(prompt + answer, add_special_tokens=False)])
            with torch.no_grad():
                logprobs = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            likelihoods.append(float(logprobs.gather(1, ids[0, start:, None]).sum()))
        right += likelihoods[0] == max(likelihoods)
    return right
