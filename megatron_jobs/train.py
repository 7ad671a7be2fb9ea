"""The training loop.

    torchrun --nproc-per-node 2 -m megatron_jobs.train CONFIG.yaml [key=value …]      (what `mujina train` calls)
    srun python -m megatron_jobs.train CONFIG.yaml [key=value …]                      (what the Slurm scripts call)

A run that was interrupted goes on from its newest whole checkpoint when it is started again, with the same losses to the
last bit; a run that is finished says so.
"""

import ctypes
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
import yaml
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from torch.utils.tensorboard import SummaryWriter

from megatron_jobs import checkpoint, data, model, parallel, phases
from megatron_jobs import config as configuration
from megatron_jobs.checkpoint import Checkpoint
from megatron_jobs.config import RunConfig
from megatron_jobs.hugging_face import HuggingFaceFolder
from megatron_jobs.layout import TensorSource
from megatron_jobs.order import DataOrder
from megatron_jobs.state import TrainingState
from megatron_jobs.weights import InitialWeights, shapes
from user_input import UserError, run


def train(config: RunConfig) -> None:
    """Trains from where the run folder stands to the end of the last phase. Every process of the run calls this."""
    binaries = data.open_sources(config)
    order = DataOrder(config, data.facts(binaries))
    start = _newest(config)
    state = TrainingState(config, start or _initial(config))
    if start:
        order.check_continues(start.ledger)
        state.restore(start)
    first_step = start.step if start else 0
    log = Log(config, first_step) if dist.get_rank() == 0 else None
    expert_load = ExpertLoad(config, state)
    forward_backward = get_forward_backward_func()
    phase_ends = {sum(phase.num_steps for phase in config.phases[: n + 1]) for n in range(len(config.phases))}

    for step in range(first_step, phases.num_steps(config.phases)):
        began = time.perf_counter()
        index, _ = phases.locate(config.phases, step)
        phase = config.phases[index]
        learning_rate = phases.learning_rate(config.phases, step)
        micro_batches = phase.global_batch_size // (config.train.micro_batch_size * parallel_state.get_data_parallel_world_size())
        state.set_learning_rate(learning_rate)
        state.zero_grad()
        losses = forward_backward(
            forward_step_func=_forward,
            data_iterator=_micro_batches(config, order, binaries, step, micro_batches),
            model=state.chunks,
            num_microbatches=micro_batches,
            seq_length=phase.sequence_length,
            micro_batch_size=config.train.micro_batch_size,
        )
        loss, load = _over_all_ranks(losses, expert_load.take())
        gradient_norm = state.step()
        if not math.isfinite(loss + gradient_norm):
            raise UserError(
                f"step {step + 1}: the loss is {loss} and the gradient norm {gradient_norm}: lower phases.{phase.name}.learning_rate, "
                "or look at the data of the step; the last checkpoint is from before it"
            )
        if log:
            log.step(step + 1, phase.name, loss, learning_rate, gradient_norm, time.perf_counter() - began, load)
        if (step + 1) % config.train.checkpoint_interval == 0 or step + 1 in phase_ends:
            _save(config, order, state, step + 1, phase_ends)
    if log:
        log.close()


def _micro_batches(
    config: RunConfig, order: DataOrder, binaries: dict[str, data.TokenBinary], step: int, micro_batches: int
) -> Iterator[torch.Tensor]:
    """This rank's micro-batches of a step, each [micro_batch_size, sequence_length + 1] token ids."""
    size, length = config.train.micro_batch_size, config.phases[phases.locate(config.phases, step)[0]].sequence_length
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    for number in range(micro_batches):
        first = (number * ranks + rank) * size
        batch = data.read(binaries, order.samples(step, range(first, first + size)), length)
        yield torch.from_numpy(batch).to(torch.cuda.current_device())


def _forward(batches: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    tokens = next(batches)
    positions = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(tokens.shape[0], -1)
    output = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    return output, _mean_loss


def _mean_loss(token_losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = token_losses.float().mean()
    return loss, loss.detach().clone()  # megatron-core divides the first one in place


def _over_all_ranks(losses: list[torch.Tensor], load: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The mean loss of the global batch, and the tokens routed to each expert [layers, experts], on every rank."""
    # Only the last pipeline stage has losses; its tensor-parallel ranks all have the same.
    share = 1 / (parallel_state.get_data_parallel_world_size() * parallel_state.get_tensor_model_parallel_world_size())
    mean = torch.stack(losses).mean() * share if losses else torch.zeros((), device=load.device)
    total = torch.cat([mean.double().view(1), load.double().flatten()])
    dist.all_reduce(total)
    return float(total[0]), total[1:].view_as(load).cpu()


class ExpertLoad:
    """Counts the tokens that each expert gets. `take` returns and clears the counts of this rank's layers."""

    def __init__(self, config: RunConfig, state: TrainingState) -> None:
        size = (config.model.num_layers, config.moe.num_experts) if config.moe else (0, 0)
        self.counts = torch.zeros(size, device=torch.cuda.current_device())
        for chunk in state.chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(self._count)

    def _count(self, router: TopKRouter, inputs: Any, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.counts[router.layer_number - 1] += outputs[1].sum(0)

    def take(self) -> torch.Tensor:
        get_moe_metrics_tracker().clear()  # megatron-core adds to its own records until someone reads them
        counts = self.counts.clone()
        self.counts.zero_()
        return counts


def _initial(config: RunConfig) -> TensorSource:
    if config.train.init_from is None:
        return InitialWeights(config.model, config.moe, config.seed)
    if (config.train.init_from / "config.json").exists():
        folder = HuggingFaceFolder(config.train.init_from)
        folder.check(config)
        return folder
    found = Checkpoint(config.train.init_from)
    if found.shapes != dict(shapes(config.model, config.moe)):
        raise UserError(
            f"train.init_from ({config.train.init_from}): its model is {found.config.model} with moe {found.config.moe}, which is not "
            "the one of this run: name another checkpoint, or upcycle it first"
        )
    return found


def _newest(config: RunConfig) -> Checkpoint | None:
    """The checkpoint to go on from, the same on every rank."""
    found = checkpoint.newest_whole(config.run / "checkpoints") if dist.get_rank() == 0 else None
    folder = parallel.from_rank_0(found and found.folder)
    if folder is None:
        return None
    start = found or Checkpoint(folder)
    phases.check_resumable(start.config, config, start.step)
    return start


def _save(config: RunConfig, order: DataOrder, state: TrainingState, step: int, phase_ends: set[int]) -> None:
    folder = config.run / "checkpoints"
    writer = checkpoint.Writer(folder, step)
    if dist.get_rank() == 0:
        writer.clear()
    dist.barrier()
    files = dict(parallel.gathered(writer.add_rank_file(dist.get_rank(), state.pieces())))
    if dist.get_rank() == 0:
        tokens = phases.consumed_tokens(config.phases, step)
        writer.finish(config, tokens, dict(shapes(config.model, config.moe)), order.ledger(step), files)
        checkpoint.prune(folder, config.train.keep_checkpoints, phase_ends)
    dist.barrier()


class Log:
    """`config.yaml`, `metrics.jsonl` (each step once, also after restarts), TensorBoard, and a line on the console every few seconds."""

    def __init__(self, config: RunConfig, first_step: int) -> None:
        self.config = config
        config.run.mkdir(parents=True, exist_ok=True)
        (config.run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
        path = config.run / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines() if _is_before(line, first_step)] if path.exists() else []
        rewritten = path.with_suffix(".tmp")
        rewritten.write_text("".join(line + "\n" for line in kept))
        os.replace(rewritten, path)
        self.metrics = path.open("a", buffering=1)
        self.tensorboard = SummaryWriter(str(config.run / "tensorboard"), purge_step=first_step + 1)
        self.num_steps = phases.num_steps(config.phases)
        self.began, self.first_step, self.shown = time.monotonic(), first_step, -math.inf
        what = "Transformer Engine" if model.has_transformer_engine() else "local"
        print(f"{config.run}: {dist.get_world_size()} processes on {parallel.device_name()}; {what} layers", flush=True)
        if first_step:
            print(f"{config.run}: goes on at step {first_step} of {self.num_steps}", flush=True)

    def step(self, step: int, phase: str, loss: float, learning_rate: float, norm: float, seconds: float, load: torch.Tensor) -> None:
        tokens = phases.consumed_tokens(self.config.phases, step)
        speed = (tokens - phases.consumed_tokens(self.config.phases, step - 1)) / seconds
        record: dict[str, Any] = {
            "step": step,
            "tokens": tokens,
            "phase": phase,
            "loss": loss,
            "lr": learning_rate,
            "grad_norm": norm,
            "seconds": seconds,
            "tokens_per_second": speed,
            "memory_gib": parallel.memory_gib(),
        }
        for key in ("loss", "lr", "grad_norm", "tokens_per_second"):
            self.tensorboard.add_scalar(key, record[key], step)
        if load.numel():
            record["expert_load"] = (load / load.sum(1, keepdim=True)).tolist()
        self.metrics.write(json.dumps(record) + "\n")
        if time.monotonic() - self.shown > 5 or step == self.num_steps:
            self.shown = time.monotonic()
            left = (self.shown - self.began) / (step - self.first_step) * (self.num_steps - step)
            print(
                f"step {step}/{self.num_steps}  {phase}  {tokens:,} tokens  loss {loss:.4f}  lr {learning_rate:.2e}  "
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


def main(
    config: Annotated[Path, typer.Argument(help="the run's YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example train.micro_batch_size=2")] = None,
) -> None:
    """One process of a training run; `mujina train` starts as many as are needed."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A launcher that is killed outright cannot stop its processes; then the kernel does.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
    settings = configuration.load(config, overrides)
    settings.check(parallel.world_size())
    with parallel.hold(settings.run), parallel.groups(settings.parallel, settings.seed):
        train(settings)


if __name__ == "__main__":
    run(main)
