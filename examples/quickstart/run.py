"""The whole way of the data at a size that fits a laptop: raw text to a Hugging Face mixture of experts and a report.

    ./quickstart.sh        (makes the environment, then calls this from the project's folder)

Every station is one `mujina` command, printed before it runs; each takes up what an earlier call has finished or begun.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_jobs import config as configuration
from mujina.files import write_whole

HERE = Path("examples/quickstart")
RUN = Path("runs/quickstart")
CLOCK = RUN / "seconds.json"
MODELS = ("dense", "moe")


def stations() -> list[tuple[str, str, list[str]]]:
    """(station, module, arguments), in order."""
    rows = [
        ("chat data", "data_prep.synthetic.rules", [f"{RUN}/chat", "--dialogues", "10000", "--held-out", "200"]),
        ("tokenizer", "tokenization.train", [f"{HERE}/tokenizer.yaml"]),
        ("binaries", "data_prep.prepare", [f"{HERE}/data.yaml"]),
        ("plan", "megatron_jobs.planning.plan", [f"{HERE}/dense.yaml", "--gpus", "2"]),
        ("dense training", "megatron_jobs.launch", [f"{HERE}/dense.yaml", "--processes", "2"]),
        ("upcycling", "megatron_jobs.conversion.upcycle", [f"{HERE}/moe.yaml", f"{RUN}/dense/checkpoints/latest", f"{RUN}/moe_start"]),
        ("mixture training", "megatron_jobs.launch", [f"{HERE}/moe.yaml", "--processes", "2"]),
    ]
    for model in MODELS:
        rows += [
            ("conversion", "megatron_jobs.conversion.convert", [f"{RUN}/{model}/checkpoints/{checkpoint}", f"{RUN}/hf/{folder}"])
            for folder, checkpoint in ((f"{model}-before-chat", _before_last_phase(model)), (model, "latest"))
        ]
    for label in _labels():
        arguments = [f"{RUN}/hf/{label}", "--prompts", f"{RUN}/chat/held_out.jsonl", "--output", f"{RUN}/evaluation/{label}.json"]
        rows.append(("evaluation", "evaluation.evaluate", [*arguments, "--limit", "100"]))
    evaluations = [argument for label in _labels() for argument in ("--evaluation", f"{label}={RUN}/evaluation/{label}.json")]
    rows.append(("report", "evaluation.report", [f"{RUN}/dense", f"{RUN}/moe", "--output", f"{RUN}/report.html", *evaluations]))
    return rows


def main() -> None:
    for station, module, arguments in stations():
        if station == "evaluation" and _is_newer(Path(arguments[4]), Path(arguments[0]) / "conversion.json"):
            continue
        command = " ".join(["python -m", module, *arguments])
        print(f"\n--- {station}: {command}", flush=True)
        began = time.monotonic()
        status = subprocess.run([sys.executable, "-m", module, *arguments]).returncode
        _spend(station, command, time.monotonic() - began, done=status == 0)
        if status:
            sys.exit(f"quickstart: station {station} ended with status {status}; call ./quickstart.sh again to go on from there")
    seconds: dict[str, float] = {}
    for spent in _json(CLOCK).values():
        seconds[spent["station"]] = round(seconds.get(spent["station"], 0.0) + spent["seconds"], 1)
    result = summary(seconds)
    (RUN / "summary.json").write_text(json.dumps(result, indent=1, ensure_ascii=False))
    show(result)


def _spend(station: str, command: str, seconds: float, done: bool) -> None:
    """Adds up what a command has cost until it was done; later calls only look and are not counted."""
    clock = _json(CLOCK) if CLOCK.exists() else {}
    before = clock.get(command, {"seconds": 0.0, "done": False})
    if not before["done"]:
        clock[command] = {"station": station, "seconds": before["seconds"] + seconds, "done": done}
        write_whole(CLOCK, json.dumps(clock, indent=1).encode())


def summary(seconds: dict[str, float]) -> dict[str, Any]:
    """What the quickstart has shown, from the files that the stations wrote."""
    result: dict[str, Any] = {"models": {}, "seconds": seconds, "seconds_in_all": round(sum(seconds.values()), 1)}
    upcycling = _json(RUN / "moe_start/agreement.json")
    result["step_0_loss"] = {"dense": upcycling["loss_before"], "upcycled": upcycling["loss_after"]}
    result["upcycling_max_relative_error"] = upcycling["max_relative_error"]
    for model in MODELS:
        steps = [json.loads(line) for line in (RUN / model / "metrics.jsonl").read_text().splitlines()]
        ledger = _json(RUN / model / "checkpoints/latest/ledger.json")
        before, after = (_json(RUN / f"evaluation/{label}.json") for label in (f"{model}-before-chat", model))
        result["models"][model] = {
            "steps": len(steps),
            "tokens": ledger["tokens"],
            "tokens_by_phase_and_source": {
                phase["name"]: {name: source["tokens"] for name, source in phase["sources"].items()} for phase in ledger["phases"]
            },
            "first_loss": steps[0]["loss"],
            "last_loss": steps[-1]["loss"],
            "conversion_max_relative_error": _json(RUN / f"hf/{model}/conversion.json")["agreement"]["max_relative_error"],
            "well_formed_before_chat_phase": before["measures"]["well-formed"],
            "well_formed_after_chat_phase": after["measures"]["well-formed"],
            "correct_after_chat_phase": after["measures"]["correct"],
        }
    return result


def show(result: dict[str, Any]) -> None:
    print(f"\nstep-0 loss: dense {result['step_0_loss']['dense']:.6f}, upcycled {result['step_0_loss']['upcycled']:.6f}")
    for model, facts in result["models"].items():
        print(
            f"{model}: loss {facts['first_loss']:.3f} → {facts['last_loss']:.3f} in {facts['steps']} steps; Hugging Face logits within "
            f"{facts['conversion_max_relative_error']:.1e}; well-formed answers {facts['well_formed_before_chat_phase']:.0%} before the "
            f"chat-only phase, {facts['well_formed_after_chat_phase']:.0%} after ({facts['correct_after_chat_phase']:.0%} correct)"
        )
    print(f"{result['seconds_in_all']:.0f} seconds in all; see {RUN}/report.html, {RUN}/summary.json, {RUN}/hf/dense and {RUN}/hf/moe")


def _labels() -> list[str]:
    return [label for model in MODELS for label in (f"{model}-before-chat", model)]


def _before_last_phase(model: str) -> str:
    phases = configuration.load(HERE / f"{model}.yaml").phases
    return f"step-{sum(phase.num_steps for phase in phases[:-1]):08d}"


def _is_newer(output: Path, source: Path) -> bool:
    return output.exists() and source.exists() and output.stat().st_mtime > source.stat().st_mtime


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
