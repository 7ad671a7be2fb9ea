"""Which layouts of a run's processes can be: the rules between parallel sizes, model and batches.

The rules are data: `violations` yields those that a layout breaks, and a `Violation` becomes words only where it is shown, so that the
planner asks about tens of thousands of layouts cheaply. Needs no torch, and never edits a configuration.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from megatron_jobs.config import ParallelConfig, RunConfig
from megatron_jobs.config.phase import Phase
from mujina.user_input import UserError

DIVIDES = "{part_name} ({part}) must divide {whole_name} ({whole}): the nearest that do are {divisors}"
NEEDS_STAGES = "{part_name} ({part}) needs {whole_name} above 1: raise it, or set 1"
LEAVES_NONE = "{part_name} ({part}) is too much for {whole_name} ({whole}): at {share} on a process some would have none; lower it"
NEEDS_EXPERTS = "{part_name} ({part}) needs a moe section: add one, or set {part_name} to 1"
CANNOT_PAD = "{part_name} ({part}) cannot pad for {whole_name} ({whole}): use alltoall, or train.precision bf16"


class Violation(NamedTuple):
    """A rule that is broken, and the two numbers (or words) that it holds between."""

    rule: str
    part_name: str
    part: int | str
    whole_name: str = ""
    whole: int | str = ""

    def __str__(self) -> str:
        values = self._asdict()
        if isinstance(self.part, int) and isinstance(self.whole, int):
            near = sorted(sorted(divisors(self.whole), key=lambda n: abs(n - int(self.part)))[:4])
            values |= {"divisors": ", ".join(map(str, near)), "share": -(-self.whole // self.part)}
        return self.rule.format(**values)


def check(config: RunConfig, world_size: int) -> None:
    """Raises UserError when the run cannot be laid out over `world_size` processes, and names the nearest layouts that can."""
    if broken := next(violations(config, config.parallel, world_size), None):
        raise UserError(f"{broken}; {_remedy(config, world_size)}")


def is_possible(config: RunConfig, parallel: ParallelConfig, world_size: int) -> bool:
    return next(violations(config, parallel, world_size), None) is None


def nearest(config: RunConfig, world_size: int) -> Iterator[ParallelConfig]:
    """The layouts of `world_size` processes that `check` accepts, those first that differ least from the configured one."""
    model, experts = config.model, config.moe.num_experts if config.moe else 1
    pipelines = [
        (pipeline, virtual)
        for pipeline in divisors(math.gcd(world_size, model.num_layers))
        for virtual in (divisors(model.num_layers // pipeline) if pipeline > 1 else [1])
    ]
    layouts = [
        ParallelConfig(
            tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, context=context, expert=expert, expert_tensor=expert_tensor
        )
        for tensor in divisors(math.gcd(world_size, model.num_query_groups))
        for pipeline, virtual in pipelines
        for context in divisors(world_size // math.gcd(world_size, tensor * pipeline))
        for expert in divisors(math.gcd(world_size // pipeline, experts))
        for expert_tensor in (divisors(world_size // pipeline // expert) if config.moe else [1])
    ]
    for layout in sorted(layouts, key=lambda layout: _distance(layout, config.parallel)):
        if is_possible(config, layout, world_size):
            yield layout


def violations(config: RunConfig, parallel: ParallelConfig, world_size: int) -> Iterator[Violation]:
    """What stands against the run at the layout `parallel`. Only the first is sure: the rules behind it take it that it is kept."""
    model, moe = config.model, config.moe
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield Violation(NEEDS_STAGES, "parallel.virtual_pipeline", parallel.virtual_pipeline, "parallel.pipeline", parallel.pipeline)
    model_parallel = parallel.tensor * parallel.pipeline * parallel.context
    yield from _divides("parallel.tensor × parallel.pipeline × parallel.context", model_parallel, "the number of processes", world_size)
    if -(-model.num_query_groups // parallel.tensor) * (parallel.tensor - 1) >= model.num_query_groups:
        yield Violation(LEAVES_NONE, "parallel.tensor", parallel.tensor, "model.num_query_groups", model.num_query_groups)
    yield from _divides("parallel.tensor", parallel.tensor, "the padded vocabulary", model.padded_vocab_size)
    if parallel.virtual_pipeline == 1:
        yield from _divides("parallel.pipeline", parallel.pipeline, "model.num_layers", model.num_layers)
    else:
        chunks = parallel.pipeline * parallel.virtual_pipeline
        yield from _divides("parallel.pipeline × parallel.virtual_pipeline", chunks, "model.num_layers", model.num_layers)
    if moe is None:
        for name, size in (("parallel.expert", parallel.expert), ("parallel.expert_tensor", parallel.expert_tensor)):
            if size > 1:
                yield Violation(NEEDS_EXPERTS, name, size)
        yield from _divides("parallel.tensor", parallel.tensor, "model.ffn_hidden_size", model.ffn_hidden_size)
    else:
        if config.train.precision == "fp8" and moe.dispatcher == "allgather":
            yield Violation(CANNOT_PAD, "moe.dispatcher", moe.dispatcher, "train.precision", config.train.precision)
        yield from _divides("parallel.expert", parallel.expert, "moe.num_experts", moe.num_experts)
        width_name = "moe.ffn_hidden_size" if moe.ffn_hidden_size else "model.ffn_hidden_size"
        yield from _divides("parallel.expert_tensor", parallel.expert_tensor, width_name, moe.expert_width(model))
        yield from _divides("parallel.tensor", parallel.tensor, "moe.shared_ffn_hidden_size", moe.shared_ffn_hidden_size)
        if moe.every > 1:
            yield from _divides("parallel.tensor", parallel.tensor, "model.ffn_hidden_size", model.ffn_hidden_size)
        expert_ranks, stage = parallel.expert * parallel.expert_tensor, world_size // parallel.pipeline
        yield from _divides("parallel.expert × parallel.expert_tensor", expert_ranks, "the processes of a pipeline stage", stage)
    for phase in config.phases:
        yield from _violations_of_phase(phase, config.train.micro_batch_size, parallel, world_size)


def _violations_of_phase(phase: Phase, micro_batch_size: int, parallel: ParallelConfig, world_size: int) -> Iterator[Violation]:
    where = f"phases.{phase.name}"
    share, unit = "train.micro_batch_size × the data-parallel size", micro_batch_size * parallel.data(world_size)
    if parallel.virtual_pipeline > 1:  # the interleaved schedule takes micro-batches in groups
        share, unit = f"{share} × parallel.pipeline", unit * parallel.pipeline
    yield from _divides(share, unit, f"{where}.global_batch_size", phase.global_batch_size)
    if phase.batch_ramp:
        yield from _divides(share, unit, f"{where}.batch_ramp.start", phase.batch_ramp.start)
        yield from _divides(share, unit, f"{where}.batch_ramp.increment", phase.batch_ramp.increment)
    length = f"{where}.sequence_length"
    if parallel.context > 1:  # each rank holds two chunks of a sequence
        yield from _divides("2 × parallel.context", 2 * parallel.context, length, phase.sequence_length)
    yield from _divides("parallel.tensor × parallel.context", parallel.tensor * parallel.context, length, phase.sequence_length)


def _divides(part_name: str, part: int, whole_name: str, whole: int) -> Iterator[Violation]:
    if whole % part:
        yield Violation(DIVIDES, part_name, part, whole_name, whole)


def _remedy(config: RunConfig, world_size: int) -> str:
    if found := list(itertools.islice(nearest(config, world_size), 3)):
        return f"the nearest layouts of {world_size} processes that can be: " + "; ".join(map(str, found))
    sizes = sorted(range(1, 2 * world_size + 1), key=lambda size: abs(size - world_size))
    for size in sizes:
        if layout := next(nearest(config, size), None):
            return f"no layout of {world_size} processes can be; the nearest number that can is {size} ({layout})"
    return "no layout can be: change the model or the batches"


def _distance(layout: ParallelConfig, other: ParallelConfig) -> float:
    """The factors of two that lie between the sizes of two layouts."""
    return sum(abs(math.log2(getattr(layout, field) / getattr(other, field))) for field in ParallelConfig.model_fields)


def divisors(whole: int) -> list[int]:
    """In ascending order."""
    small = [n for n in range(1, math.isqrt(whole) + 1) if whole % n == 0]
    return sorted({*small, *(whole // n for n in small)})
