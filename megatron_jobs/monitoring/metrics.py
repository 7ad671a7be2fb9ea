"""What is seen of a run: `metrics.jsonl`, TensorBoard, Weights & Biases and Prometheus if asked for, and the console.

RUN/metrics.jsonl has one line for each step, also after restarts and rollbacks. Its fields, of which older records may lack some:

    time                        seconds since 1970
    step, phase                 number of the step from 1, name of its phase
    tokens                      consumed by the run when the step is done
    loss                        mean cross-entropy before the update, nats a token, over the weights of the tokens where they have any; in a
                                phase of preferences the mean over the pairs
    loss_by_source, tokens_by_source    the same over the tokens of each source that is in the batch, and their number
    weight_by_source            share of each source in the weight of the batch, where tokens differ in their weight; sums to 1
    trained_by_source           number of tokens of each source that have a weight, likewise
    z_loss, load_balancing_loss, router_z_loss    auxiliary losses before their coefficients; the last two for a mixture
    chosen_reward, rejected_reward, reward_margin, reward_accuracy    of pairs (losses/preference.py): β × what the log-probability has
                                gained over the reference, the difference, and the share of pairs where it is above 0; each also by source
                                (…_by_source), and so chosen_log_probability and rejected_log_probability, sums over an answer's tokens
    expert_load                 share of the routed tokens [layer][expert], sums to 1 over a layer; here and below, a layer is one that is
                                a mixture, and what a capacity drops is counted where the router wanted it
    load_entropy, router_entropy    of that, and of the router's mean scores [layer]: 1 is even, 0 all in one expert
    dropped                     share of the routed tokens that found no room [layer]; with moe.capacity_factor
    expert_similarity           mean cosine between the weights of two experts [layer], at train.validation_interval
    validation                  {source: nats a token} at the steps that end with a validation
    layer_norms, fp8_shadow     at train.layer_norms_interval and train.fp8_shadow_interval
    lr, grad_norm               learning rate of the update; norm of the gradients before clipping
    seconds                     of the step: data, forward, backward, update; no save, no validation
    data_seconds                of these, the wait for data, on the rank that waited longest
    checkpoint_seconds          that training stood still for saves since the line before
    tokens_per_second, tokens_per_second_per_gpu    of this step; a process counts as a GPU
    tflops_per_gpu              10¹² model FLOPs (flops.py) a second of this step
    mfu                         model FLOPs utilisation: that ÷ the GPU's dense peak at train.precision; null where none is known (CPU)
    memory_gib, memory_reserved_gib     of the rank that has most: GPU peak of all tensors, and what PyTorch holds; CPU: resident set
    gpu                         every ten seconds, over all ranks (vitals.py): hottest_c, power_w, slowest_mhz, each with its rank;
                                ecc_errors (uncorrectable, all GPUs); slowed: {rank: reasons in words}

TensorBoard and W&B get every number in it by the same names (`loss_by_source/web`), and `loss_by_phase/PHASE`; matrices and layers are
left out. RUN/events.jsonl tells what happened beside the steps, and is never cut: {time, step, what, …}; with what: experts, that an
expert died or a layer collapsed, or that it is over (moe/statistics.py); preferences, that chosen answers are unlearned.

All this is only a record: what cannot be written is told, and stops no run. Lines that are none are taken out at a start.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from megatron_jobs.config import RunConfig
from megatron_jobs.monitoring import preferences
from megatron_jobs.monitoring.console import Console, Work
from megatron_jobs.monitoring.vitals import Vitals
from megatron_jobs.monitoring.wandb_run import WandbRun
from megatron_jobs.planning import flops
from moe import statistics
from mujina import gaps, strict_yaml
from mujina.files import write_whole
from mujina.records import Record


class Log:
    """Only rank 0 has one."""

    def __init__(self, config: RunConfig, last_step: int, device: str, layers: str, passed_over: Sequence[tuple[int, int]] = ()) -> None:
        """`last_step` is the last one that is done: lines of later steps, from before a restart, are cut off.

        `device` is what a process computes on, `layers` whose layers the model is made of: for the first line, and for the MFU.
        `passed_over` are the (first, last) steps that have no lines because they were never trained.
        """
        self.config = config
        config.run.mkdir(parents=True, exist_ok=True)
        resolved = strict_yaml.dump(config.model_dump(mode="json"), sort_keys=False)
        write_whole(config.run / "config.yaml", resolved.encode())
        self._work = Work(config)
        self._peak = flops.peak(device, config.train.precision) if torch.cuda.is_available() else None
        self._notes: dict[str, Any] = {}
        self._preferences = preferences.Watch()
        self._console = Console(self._work)
        is_restart = (config.run / "metrics.jsonl").exists()
        self._prometheus: Any = None
        self._metrics, self._events = (Record(config.run / f"{name}.jsonl", self._console.say) for name in ("metrics", "events"))
        kept = self._open(last_step)
        self._wandb = WandbRun(config, len(passed_over), self._rows, self._console.say) if config.wandb else None
        if config.prometheus:
            from megatron_jobs.monitoring.prometheus import Endpoint  # its library is imported for those who want it

            self._prometheus = Endpoint(config, self._work, last_step, lambda why: self.event(last_step, "prometheus", reason=why))
        self._console.say(f"{config.run}: {dist.get_world_size()} processes on {device}; {layers} layers")
        if last_step:
            self._console.say(f"{config.run}: goes on at step {last_step} of {self._work.num_steps}")
        if lost := gaps.lost(kept, last_step, passed_over):
            self._console.say(f"{config.run / 'metrics.jsonl'}: the lines of steps {lost} are lost: curves and reports lack them")
        if is_restart:
            self._record_event(last_step, "restart")

    def step(self, step: int, told: dict[str, Any], vitals: Vitals) -> None:
        """A step is done. `told` are its phase, loss, lr, grad_norm, seconds, and all else that the loss, the routers and the trainer have
        to tell of it, by the names of the fields."""
        tokens, work = (of(step) - of(step - 1) for of in (self._work.tokens, self._work.flops))
        num_gpus, seconds = dist.get_world_size(), told["seconds"]
        flops_per_gpu = work / seconds / num_gpus
        record: dict[str, Any] = {
            "time": time.time(),
            "step": step,
            "tokens": self._work.tokens(step),
            **told,
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_gpu": tokens / seconds / num_gpus,
            "tflops_per_gpu": flops_per_gpu / 1e12,
            "mfu": self._peak and flops_per_gpu / self._peak,
            **vitals.fields,
            **self._notes,
        }
        self._notes = {}
        self._metrics.add(json.dumps(record))
        self._send(record, step)
        self._console.step(record)
        for what, warning in vitals.warnings:
            self.event(step, what, reason=warning)
        for news in self._alarms.look(record["expert_load"]) if self._alarms else ():
            self.event(step, "experts", reason=news)
        if unlearned := self._preferences.look(record):
            self.event(step, "preferences", reason=unlearned)

    def saved(self, step: int, seconds: float, whole_seconds: float) -> None:
        """A checkpoint of `step` is whole: training stood still for `seconds` of the `whole_seconds` that it took."""
        self._notes["checkpoint_seconds"] = self._notes.get("checkpoint_seconds", 0.0) + seconds
        self._record_event(step, "checkpoint", seconds=seconds, whole_seconds=whole_seconds)

    def event(self, step: int, what: str, **facts: Any) -> None:
        """A line in events.jsonl, and one on the console: "spike", "skip", "rollback", …; `reason` among the facts is what people read."""
        self._record_event(step, what, **facts)
        told = facts.get("reason") or ", ".join(f"{key} {value}" for key, value in facts.items())
        self._console.say(f"step {step:,}: {what}{told and ': '}{told}")

    def rewind(self, step: int, num_rollbacks: int) -> None:
        """Cuts all back to `step`, the last one that still holds; the steps behind it will come again. `num_rollbacks` with this one."""
        self._on_tensorboard(lambda tensorboard: tensorboard.close())
        self._notes = {}
        self._open(step)
        if self._wandb:
            self._wandb.rewind(num_rollbacks)

    def last_word(self, state: Literal["done", "stopped", "failed"]) -> None:
        """How the run ends, for those who only see it from outside. The other ranks should wait for it."""
        if self._prometheus:
            self._prometheus.close(state)

    def close(self) -> None:
        self._metrics.add()
        self._events.add()
        self._on_tensorboard(lambda tensorboard: tensorboard.close())
        if self._wandb:
            self._wandb.close()
        self._console.say(f"{self.config.run}: all {self._work.num_steps} steps are done")

    def _open(self, last_step: int) -> list[int]:
        """Goes on behind `last_step`; returns the steps that have a line. What is no line, or a killed process left unfinished, goes."""
        self._events.tidy(lambda events: [line for line, _ in events])
        kept = self._metrics.tidy(lambda steps: list({row["step"]: line for line, row in steps if _step_of(row) <= last_step}.values()))
        self._alarms = _alarms(self.config, kept)
        self._tensorboard: SummaryWriter | None = None
        self._on_tensorboard(lambda _: self._open_tensorboard(last_step), is_open=True)
        return [json.loads(line)["step"] for line in kept]

    def _open_tensorboard(self, last_step: int) -> None:
        self._tensorboard = SummaryWriter(str(self.config.run / "tensorboard"), purge_step=last_step + 1)

    def _on_tensorboard(self, action: Callable[[Any], Any], is_open: bool = False) -> None:
        if self._tensorboard or is_open:
            try:
                action(self._tensorboard)
            except Exception as error:  # of its thread, which may be any
                self._tensorboard = None
                self._console.say(f"{self.config.run / 'tensorboard'}: fails ({error}): goes on without it; metrics.jsonl has everything")

    def _rows(self) -> Iterator[dict[str, float]]:
        """What W&B gets of each step in metrics.jsonl."""
        return (_values(json.loads(line)) for line in self._metrics.lines())

    def _send(self, record: dict[str, Any], step: int) -> None:
        values = _values(record)
        self._on_tensorboard(lambda tensorboard: [tensorboard.add_scalar(name, values[name], step) for name in values if name != "step"])
        if self._wandb:
            self._wandb.log(values)
        if self._prometheus:
            self._prometheus.step(record)

    def _record_event(self, step: int, what: str, **facts: Any) -> None:
        facts = {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value for key, value in facts.items()}
        now = time.time()
        self._events.add(json.dumps({"time": now, "step": step, "what": what, **facts}, ensure_ascii=False))
        if self._prometheus:
            self._prometheus.event(what, now)


def _alarms(config: RunConfig, lines: list[str]) -> statistics.Alarms | None:
    """Alarms that have seen the last steps of `lines`, so that a restart tells nothing twice."""
    if not config.moe:
        return None
    alarms = statistics.Alarms(config.moe.layers(config.model), config.moe.top_k, statistics.WINDOW)
    for line in lines[-statistics.WINDOW :]:
        if load := json.loads(line).get("expert_load"):
            alarms.look(load)
    return alarms


def _scalars(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(name, value) of every number in a record, as the module's docstring says."""
    for name, value in record.items():
        if isinstance(value, dict) and name != "layer_norms":
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name not in ("time", "step"):
            yield prefix + name, value


def _values(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a step by their names, and its number as `step`."""
    return dict(_scalars(record)) | {f"loss_by_phase/{record['phase']}": record["loss"], "step": record["step"]}


def _step_of(row: dict[str, Any]) -> float:
    """Infinite where the row is none of ours."""
    step = row.get("step")
    return step if isinstance(step, int) else math.inf
