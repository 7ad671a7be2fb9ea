"""The `mujina` command: one verb for each station on the way of the data.

`mujina VERB …` runs `python -m MODULE …`; the module's own `--help` explains its arguments. Imports nothing heavy.
"""

import runpy
import sys
from pathlib import Path

VERBS = {
    "explain": ("mujina.explain", "tell what may be written into a configuration, field by field"),
    "chain": ("mujina.chain", "run a chain of these verbs, here or as Slurm jobs, and go on where it stopped"),
    "dialogues": ("data_prep.synthetic.rules", "make rule-based dialogues: sums and small puzzles in Japanese and English"),
    "tokenizer": ("tokenization.train", "train a SentencePiece tokenizer with chat roles"),
    "extend-vocabulary": ("tokenization.extend", "add pieces to a Hugging Face model's vocabulary"),
    "compare-tokenizers": ("tokenization.compare", "characters per token of tokenizers, by language and kind of text"),
    "prepare": ("data_prep.prepare", "take raw text through steps to documents, and to indexed token binaries"),
    "inspect": ("data_prep.inspect", "show a token binary: facts, statistics, documents as text"),
    "import": ("megatron_jobs.conversion.import_hf", "make a Hugging Face folder or a GGUF file ready for continued pretraining"),
    "plan": ("megatron_jobs.planning.plan", "show parameters, phases, steps and the data that they need"),
    "train": ("megatron_jobs.launch", "train, or go on training, on this machine"),
    "submit": ("slurm.submit", "check a run and submit it to Slurm"),
    "status": ("slurm.status", "show where a run on the cluster stands"),
    "logs": ("slurm.logs", "show what a run on the cluster says"),
    "upcycle": ("megatron_jobs.conversion.upcycle", "make a mixture of experts out of a dense model"),
    "convert": ("megatron_jobs.conversion.convert", "write a checkpoint as a Hugging Face folder, logits compared"),
    "checkpoint": ("megatron_jobs.checkpoints.tools", "inspect and compare checkpoints, average them, write them in other files"),
    "generate": ("evaluation.generate", "let a chat model answer prompts"),
    "evaluate": ("evaluation.evaluate", "score a chat model's answers to arithmetic prompts"),
    "preferences": ("evaluation.preferences", "pairs of a chat model's own answers, preferred by rules or a judge"),
    "report": ("evaluation.report", "draw runs and evaluations into one HTML file"),
}


def main() -> None:
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("--help", "-h", "help"):
        print("usage: mujina VERB …        (mujina VERB --help explains a verb)\n")
        for name, (module, what) in VERBS.items():
            print(f"  {name:<18} {what}  [python -m {module}]")
        installed = Path(__file__).parents[1]
        print("\nconfigurations to start from, and the scripts of jobs:\n")
        for folder in ("megatron_jobs/configs", "data_prep/configs", "slurm"):
            print(f"  {installed / folder}")
    elif verb in VERBS:
        sys.argv = [f"mujina {verb}", *sys.argv[2:]]
        runpy.run_module(VERBS[verb][0], run_name="__main__")
    else:
        from mujina.exits import MISTAKE
        from mujina.user_input import nearest

        print(f"error: no such verb: {verb}: {nearest(verb, list(VERBS))}", file=sys.stderr)
        sys.exit(MISTAKE)


if __name__ == "__main__":
    main()
