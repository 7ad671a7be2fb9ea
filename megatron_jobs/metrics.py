"""What is seen of a run: `config.yaml`, `metrics.jsonl`, TensorBoard, and a line on the console every few seconds."""

import json
import math
import os
import time
from typing import Any

import torch.distributed as dist
import yaml
from torch.utils.tensorboard import SummaryWriter

from megatron_jobs import model, parallel, phases
from megatron_jobs.config import RunConfig
from megatron_jobs.objective import Losses, fp8_warning


class Log:
    """Writes each step once, also after restarts. Only rank 0 has one."""

    def __init__(self, config: RunConfig, first_step: int) -> None:
        self.config = config
        config.run.mkdir(parents=True, exist_ok=True)
        (config.run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
        self.num_steps = phases.num_steps(config.phases)
        self._open(first_step)
        what = "Transformer Engine" if model.has_transformer_engine() else "local"
        print(f"{config.run}: {dist.get_world_size()} processes on {parallel.device_name()}; {what} layers", flush=True)
        if first_step:
            print(f"{config.run}: goes on at step {first_step} of {self.num_steps}", flush=True)

    def _open(self, first_step: int) -> None:
        """Goes on behind `first_step`; lines of later steps, from before a restart or a rollback, are cut off."""
        path = self.config.run / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines() if _is_before(line, first_step)] if path.exists() else []
        rewritten = path.with_suffix(".tmp")
        rewritten.write_text("".join(line + "\n" for line in kept))
        os.replace(rewritten, path)
        self.metrics = path.open("a", buffering=1)
        self.tensorboard = SummaryWriter(str(self.config.run / "tensorboard"), purge_step=first_step + 1)
        self.began, self.first_step, self.shown = time.monotonic(), first_step, -math.inf

    def go_back(self, step: int) -> None:
        """Forgets the steps behind `step`, which a rollback has undone."""
        self.metrics.close()
        self.tensorboard.close()
        self._open(step)

    def step(
        self,
        step: int,
        phase: str,
        losses: Losses,
        learning_rate: float,
        norm: float,
        seconds: float,
        now_and_then: dict[str, dict[str, Any]],
    ) -> None:
        """`now_and_then`: what only some steps measure: "validation", "layer_norms", "fp8_shadow"."""
        tokens = phases.consumed_tokens(self.config.phases, step)
        speed = (tokens - phases.consumed_tokens(self.config.phases, step - 1)) / seconds
        record: dict[str, Any] = {
            "step": step,
            "tokens": tokens,
            "phase": phase,
            "loss": losses.mean,
            "loss_by_source": losses.by_source,
            "tokens_by_source": losses.tokens_by_source,
            "z_loss": losses.z_loss,
            "lr": learning_rate,
            "grad_norm": norm,
            "seconds": seconds,
            "tokens_per_second": speed,
            "memory_gib": parallel.memory_gib(),
        }
        for key in ("loss", "lr", "grad_norm", "tokens_per_second"):
            self.tensorboard.add_scalar(key, record[key], step)
        for source, loss in losses.by_source.items():
            self.tensorboard.add_scalar(f"loss/{source}", loss, step)
        load = losses.expert_load
        if load.numel():
            record["expert_load"] = (load / load.sum(1, keepdim=True)).tolist()
            record["load_balancing_loss"], record["router_z_loss"] = losses.load_balancing_loss, losses.router_z_loss
        record |= now_and_then
        for source, loss in now_and_then.get("validation", {}).items():
            self.tensorboard.add_scalar(f"validation/{source}", loss, step)
        if "fp8_shadow" in now_and_then and (warning := fp8_warning(now_and_then["fp8_shadow"])):
            print(f"warning: step {step}: {warning}", flush=True)
        self.metrics.write(json.dumps(record) + "\n")
        if time.monotonic() - self.shown > 5 or step == self.num_steps:
            self.shown = time.monotonic()
            left = (self.shown - self.began) / (step - self.first_step) * (self.num_steps - step)
            print(
                f"step {step}/{self.num_steps}  {phase}  {tokens:,} tokens  loss {losses.mean:.4f}  lr {learning_rate:.2e}  "
                f"norm {norm:.3f}  {speed:,.0f} tokens/s  {left // 60:.0f}:{left % 60:02.0f} left",
                flush=True,
            )

    def close(self) -> None:
        self.metrics.close()
        self.tensorboard.close()
        print(f"{self.config.run}: all {self.num_steps} steps are done", flush=True)


def _is_before(line: str, first_step: int) -> bool:
    try:
        return json.loads(line)["step"] <= first_step
    except ValueError:  # a line that a killed process left unfinished
        return False
