"""The state of a training run: the model, the optimizer, and their way into and out of checkpoints.

What is saved is, for every matrix of the model, the float32 weights and AdamW's two moments, and one number of updates; with an adapter,
for every matrix of that alone, and the model is frozen.
There is no dropout and the data order is a pure function, so there is no random state to keep.
"""

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_jobs import ranks
from megatron_jobs.checkpoints.checkpoint import STATES, Checkpoint, box_key, boxes_of_range
from megatron_jobs.checkpoints.weights import trained_shapes
from megatron_jobs.config import RunConfig
from megatron_jobs.engine import core, lora, placement
from megatron_jobs.engine.gpt import build
from megatron_jobs.engine.placement import LocalParameter
from megatron_jobs.planning import layers
from mujina.matrices import Box, TensorSource

READERS = min(4, os.cpu_count() or 1)  # one alone leaves the disk waiting while it copies


class TrainingState:
    """This rank's part of the model and of the optimizer."""

    def __init__(self, config: RunConfig) -> None:
        """Builds the model and the optimizer, moments included; the values come from `start_from` or `restore`.

        Raises UserError when this machine cannot do what the configuration asks for.
        """
        layers.check(config, layers.of_this_machine(config))
        dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
        gpts = [
            build(
                config.model,
                config.moe,
                config.parallel,
                dtype,
                max(phase.sequence_length for phase in config.phases),
                chunk=chunk,
                recompute=config.train.recompute,
                fp8=config.train.precision == "fp8",
            )
            for chunk in range(config.parallel.virtual_pipeline)
        ]
        self._frozen: list[LocalParameter] = []  # the base of an adapter
        self._of_each_expert: list[torch.nn.Parameter] = []
        if config.adapter:
            for gpt in gpts:
                self._frozen += (base := placement.local_parameters(gpt, config.model, config.moe))
                self._of_each_expert += lora.attach(gpt, config, base)
        self.parameters = [local for gpt in gpts for local in placement.local_parameters(gpt, config.model, config.moe)]
        overlap = dist.get_world_size() > 1
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, overlap_param_gather=overlap
        )
        # Only the first chunk is cut into buckets: its backward pass ends the step, and hides no exchange but its own.
        self.chunks = [DistributedDataParallel(gpt.config, ddp_config, gpt, disable_bucketing=n > 0) for n, gpt in enumerate(gpts)]
        # A router's bias is moved by its load (`Router.move_bias`), and not by gradients: its moments are zero.
        self._biases = [
            (local, {"master": local.parameter} | {state: torch.zeros_like(local.parameter) for state in STATES[1:]})
            for local in self.parameters
            if not (isinstance(local.parameter, torch.nn.Parameter) or config.adapter)
        ]
        self.optimizer = get_megatron_optimizer(_optimizer_config(config, dtype, overlap), self.chunks, use_gloo_process_groups=False)
        core.set_up_adamw(self.optimizer, config.optimizer.weight_decay)
        for owned in core.owned_ranges(self.optimizer):
            owned.state.update({key: torch.zeros_like(owned.main, requires_grad=False) for key in STATES[1:]})
        self._clip_grad = config.optimizer.clip_grad
        self._groups = list(dict.fromkeys(map(_group, trained_shapes(config))))
        self._hook_into(gpts)

    def _hook_into(self, gpts: list[GPTModel]) -> None:
        """What megatron-core's schedules call of ours."""
        no_sync = [chunk.no_sync for chunk in self.chunks]
        for gpt in gpts:
            gpt.config.finalize_model_grads_func = self._finalize
            gpt.config.grad_scale_func = self.optimizer.scale_loss
            gpt.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def freeze(self, base: TensorSource) -> Counter[str]:
        """Takes the weights of an adapter's base, which no update moves. Collective; returns what `start_from` does."""
        placement.fill(self._frozen, base)
        broken: Counter[str] = Counter()
        for local in self._frozen:
            for part in local.parts if local.is_first_copy else ():
                values = part.of(local.parameter.detach().view(-1, local.columns))
                if count := values.numel() - int(values.isfinite().sum()):
                    broken[part.name] += count
        return sum(ranks.gathered(broken), Counter())

    def start_from(self, weights: TensorSource) -> Counter[str]:
        """Takes the weights, and forgets all updates. Collective; returns how many values of which matrices are not finite."""
        broken: Counter[str] = Counter()
        for is_first, state, name, box, values in self._boxes():
            if state == "master":
                values.copy_(weights.read(name, box))
                if is_first and (count := values.numel() - int(values.isfinite().sum())):
                    broken[name] += count
            else:
                values.zero_()
        self._is_filled(updates=0)
        return sum(ranks.gathered(broken), Counter())

    def forget_updates(self) -> None:
        """Goes on with the weights as they are, as if no update had been made."""
        for _, state, _, _, values in self._boxes():
            if state != "master":
                values.zero_()
        self._count_from(0)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes weights, moments and the number of updates. This rank reads what it owns, whoever it was that wrote it."""
        with ThreadPoolExecutor(READERS) as readers:
            for _ in readers.map(lambda wanted: checkpoint.read_into(*wanted[1:]), self._boxes()):
                pass  # raises here what was raised there
        self._is_filled(checkpoint.updates)

    def _is_filled(self, updates: int) -> None:
        """Gathers the weights that other ranks own, in the type of the model."""
        core.write_back(self.optimizer, self.chunks)
        self._count_from(updates)

    def _count_from(self, updates: int) -> None:
        core.set_updates(self.optimizer, updates)
        self.updates = updates

    def boxes(self) -> dict[str, torch.Tensor]:
        """What this rank owns, as boxes for `saver.Saver.save`: views of the state itself, on its device."""
        return {box_key(state, name, box): values for is_first, state, name, box, values in self._boxes() if is_first}

    def zero_grad(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _finalize(self, *args: Any, **options: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the exchange of gradients is in a stream of its own
        self.gradients_at = time.perf_counter()  # this rank's own are there; now it waits for others
        finalize_model_grads(*args, **options)
        if self._of_each_expert and (group := parallel_state.get_expert_tensor_parallel_group()).size() > 1:
            for parameter in self._of_each_expert:  # each rank has the part of its rows or columns
                dist.all_reduce(parameter.main_grad, group=group)  # type: ignore[attr-defined]

    def gradient_norm(self) -> float:
        """Makes the gradients ready for an update; returns their norm over the whole model, before clipping."""
        self.optimizer.prepare_grads()
        self._norm = float(self.optimizer.get_grad_norm())
        return self._norm

    def layer_norms(self) -> dict[str, dict[str, float]]:
        """The norm of the gradient, before clipping, and of the weights of each layer and of what stands outside of the layers.

        For use between `gradient_norm` and `update`; each rank adds up what it owns of the optimizer.
        """
        squares = torch.zeros(len(self._groups), 2, dtype=torch.float64, device=torch.cuda.current_device())
        for local, owned in self._owned():
            if local.is_first_copy:
                assert owned.main.grad is not None
                norms = [torch.linalg.vector_norm(values.detach(), dtype=torch.float64) for values in (owned.main.grad, owned.main)]
                squares[self._groups.index(_group(local.parts[0].name))] += torch.stack(norms).square()
        dist.all_reduce(squares)
        return {
            name: {"gradient": gradient, "weight": weight}
            for name, (gradient, weight) in zip(self._groups, squares.sqrt().tolist(), strict=True)
        }

    def update(self, learning_rate: float) -> None:
        """One update with the gradients whose norm was taken last, clipped."""
        core.update(self.optimizer, learning_rate, self._clip_grad, self._norm)
        self.updates += 1

    def _boxes(self) -> Iterator[tuple[bool, str, str, Box, torch.Tensor]]:
        """What this rank owns: (no other rank saves it, state, name of the matrix, box, its values), in the order of a file."""
        for state in STATES:
            for local, owned in self._owned():
                flat = owned.main.detach() if state == "master" else owned.state[state]
                for name, box, values in _owned_boxes(local, owned.start, flat):
                    yield local.is_first_copy, state, name, box, values
            for local, by_state in self._biases:
                [part] = local.parts
                yield local.is_first_copy, state, part.name, part.box, by_state[state].view(part.box.rows, part.box.columns)

    def _owned(self) -> Iterator[tuple[LocalParameter, core.OwnedRange]]:
        of = {local.parameter: local for local in self.parameters}
        return ((of[owned.parameter], owned) for owned in core.owned_ranges(self.optimizer))


def _group(name: str) -> str:
    """The layer that a matrix belongs to, or its own name outside of the layers."""
    found = re.match(r"layers\.\d+|\w+", name)
    assert found, name
    return found[0]


def _owned_boxes(local: LocalParameter, start: int, flat: torch.Tensor) -> Iterator[tuple[str, Box, torch.Tensor]]:
    """The flat values of a parameter from `start` on, cut into boxes of named matrices: (name, box, a view of them)."""
    for part in local.parts:
        offset = part.local_row * local.columns
        first, last = max(start, offset), min(start + len(flat), offset + part.box.rows * local.columns)
        if first < last:
            for a, b, box in boxes_of_range(first - offset, last - offset, local.columns):
                box = box.meet(Box(0, part.box.rows, 0, part.box.columns))
                if box.columns > 0:
                    values = flat[offset + a - start : offset + b - start].view(box.rows, -1)[:, : box.columns]
                    down, right = part.box.row0, part.box.column0
                    yield part.name, Box(box.row0 + down, box.row1 + down, box.column0 + right, box.column1 + right), values


def _optimizer_config(config: RunConfig, dtype: torch.dtype, overlap: bool) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=config.phases[0].learning_rate.start,
        min_lr=0.0,
        adam_beta1=config.optimizer.beta1,
        adam_beta2=config.optimizer.beta2,
        adam_eps=config.optimizer.epsilon,
        weight_decay=config.optimizer.weight_decay,
        clip_grad=config.optimizer.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=overlap,
    )
