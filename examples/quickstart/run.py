"""The quickstart: its chain, and then what it has shown, printed and in runs/quickstart/summary.json.

./quickstart.sh        (makes the environment, then calls this from the project's folder)
"""

import json
from pathlib import Path
from typing import Any

from mujina import chain
from mujina.user_input import command_line

RUN = Path("runs/quickstart")


def main() -> None:
    """Goes through the stations of chain.yaml, and sums up what they wrote."""
    chain.main(Path("examples/quickstart/chain.yaml"))  # which ends this process where a station fails
    result = summary()
    (RUN / "summary.json").write_text(json.dumps(result, indent=1, ensure_ascii=False))
    print(f"\nstep-0 loss: dense {result['step_0_loss']['dense']:.6f}, upcycled {result['step_0_loss']['upcycled']:.6f}")
    for model, facts in result["models"].items():
        print(
            f"{model}: loss {facts['first_loss']:.3f} → {facts['last_loss']:.3f} in {facts['steps']} steps; Hugging Face logits within "
            f"{facts['conversion_max_relative_error']:.1e}"
        )
        for phase, answers in facts["answers"].items():
            print(f"  after {phase:4} {answers['well-formed']:4.0%} of its answers are well-formed, {answers['correct']:4.0%} right")
    print(f"see {RUN}/report.html, {RUN}/summary.json, {RUN}/hf/dense and {RUN}/hf/moe")


def summary() -> dict[str, Any]:
    chain, upcycling = _json("chain/summary.json"), _json("moe_start/agreement.json")
    return {
        "models": {"dense": _model("dense", ("web", "chat", "sft", "dpo")), "moe": _model("moe", ("sft",))},
        "seconds": {row["station"]: row["seconds"] for row in chain["stations"]},
        "seconds_in_all": chain["seconds"],
        "step_0_loss": {"dense": upcycling["loss_before"], "upcycled": upcycling["loss_after"]},
        "upcycling_max_relative_error": upcycling["max_relative_error"],
    }


def _model(model: str, phases: tuple[str, ...]) -> dict[str, Any]:
    """What became of a run, and how it answered behind `phases`, the last of which is its own last one."""
    steps = [json.loads(line) for line in (RUN / model / "metrics.jsonl").read_text().splitlines()]
    ledger = _json(f"{model}/checkpoints/latest/ledger.json")
    labels = {phase: model if phase == phases[-1] else f"{model}-{phase}" for phase in phases}
    return {
        "steps": len(steps),
        "tokens": ledger["tokens"],
        "tokens_by_phase_and_source": {
            phase["name"]: {name: source["tokens"] for name, source in phase["sources"].items()} for phase in ledger["phases"]
        },
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "conversion_max_relative_error": _json(f"hf/{model}/conversion.json")["agreement"]["max_relative_error"],
        "answers": {phase: _json(f"evaluation/{label}.json")["measures"] for phase, label in labels.items()},
    }


def _json(path: str) -> Any:
    return json.loads((RUN / path).read_text())


if __name__ == "__main__":
    command_line(main)
