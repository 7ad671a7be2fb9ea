"""Shows what a configuration asks for, before anything runs.

python -m megatron_jobs.planning.plan CONFIG.yaml [key=value …] [--gpus 128 [--gpu h100]] [--tokens-per-day 60e9]  (`mujina plan`)
"""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from megatron_jobs import config as configuration
from megatron_jobs.config import RunConfig
from megatron_jobs.config.phase import Phase
from megatron_jobs.conversion.families import tell_hindrance
from megatron_jobs.data import feeder, phases
from megatron_jobs.data.phases import Source
from megatron_jobs.planning import flops, layers, layouts, memory, planner
from mujina.user_input import UserError, command_line


def main(
    config: Annotated[Path, typer.Argument(help="the run's YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example parallel.pipeline=4")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, max=1_000_000, help="check the layout for this many processes")] = None,
    gpu: Annotated[str | None, typer.Option(help="predict memory and speed on these, and search layouts: h100, h200, …")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="with --gpu: GPUs that NVLink joins")] = 8,
    stack: Annotated[str, typer.Option(help=f"with --gpu: the program, {' or '.join(planner.STACKS)}")] = "transformer-engine",
    tokens_per_day: Annotated[float | None, typer.Option(help="a speed, for example 60e9: when each phase would end")] = None,
) -> None:
    """Prints parameters, the fastest layouts, tokens, steps and end of each phase, and what the phases take of each source."""
    settings = configuration.load(config, overrides)
    if tokens_per_day is not None and not tokens_per_day > 0:
        raise UserError(f"--tokens-per-day ({tokens_per_day:g}) must be above 0: give the run's speed, for example 60e9")
    console = Console(width=140, highlight=False)
    total, active = num_parameters(settings)
    console.print(f"parameters        {_billions(total)}" + (f", {_billions(active)} active in a token" if settings.moe else ""))
    machine = None if gpu is None else planner.machine(gpus, gpu, gpus_per_node, stack)
    layers.check(settings, layers.Layers(None, machine is None or machine.gpu.fp8 > machine.gpu.bf16))
    sources = feeder.facts(feeder.open_sources(settings)) if settings.data.folder.is_dir() else None
    if sources is not None:
        settings = phases.resolve(settings, sources)
    if machine is not None and gpu is not None:
        planner.show(settings, machine, gpu, console)
    elif gpus is not None:
        layouts.check(settings, gpus)
        sizes = settings.parallel
        console.print(
            f"layout            {gpus} processes: tensor {sizes.tensor}, pipeline {sizes.pipeline}, expert {sizes.expert}, "
            f"data {sizes.data(gpus)}"
        )
    tell_hindrance(settings)
    console.print(f"rollback          {reach_of_rollbacks(settings)}")
    console.print(_phase_table(settings))
    if tokens_per_day is not None:
        console.print(_calendar(settings, tokens_per_day, datetime.now()))
    if sources is not None:
        for table in (_source_table(settings, sources), _dialogue_table(settings, sources)):
            if table.row_count:
                console.print(table)
    else:
        console.print(f"data.folder ({settings.data.folder}) is not there yet: the sources were not checked")


def num_parameters(config: RunConfig) -> tuple[int, int]:
    """(parameters, parameters that take part in one token: the top-k experts only). The padding rows of the vocabulary count."""
    model, moe = config.model, config.moe
    vectors = 2 * model.hidden_size + sum(memory.attention_vectors(model))
    active = flops.matmul_parameters(model, moe) + model.num_layers * vectors + model.hidden_size
    if not model.tie_embeddings:
        active += model.padded_vocab_size * model.hidden_size
    if moe is None:
        return active, active
    unused = (moe.num_experts - moe.top_k) * 3 * model.hidden_size * moe.expert_width(model)
    return active + flops.num_mixtures(model, moe) * unused, active


def reach_of_rollbacks(config: RunConfig) -> str:
    """How far a rollback goes back, and what is kept for it, in one line."""
    stability, interval = config.stability, config.train.checkpoint_interval
    if not stability.may_roll_back:
        return "none: stability.on_spike and on_not_finite do not ask for it"
    return (
        f"passes over {stability.pass_over:,} steps (stability.pass_over) and goes back at most {stability.pass_over + interval - 1:,}, "
        f"not behind the start of a phase: {stability.checkpoints_needed(interval)} checkpoints are kept for it"
    )


def _phase_table(config: RunConfig) -> Table:
    table = Table("phase", "tokens", "sequence", "batch", "tokens/step", "steps", "learning rate", "admits", title="phases")
    for phase in config.phases:
        rate = phase.learning_rate
        table.add_row(
            phase.name,
            f"{_tokens(phase):,}" if phase.tokens else "as its sources have",
            f"{phase.sequence_length:,}",
            _batch(phase),
            f"{phase.tokens_per_step:,}",
            f"{phase.num_steps:,}" if phase.tokens else "",
            f"{rate.start:g} → {rate.end:g} {rate.shape}"
            + (f", {rate.warmup_steps:,} warm-up" if rate.warmup_steps else "")
            + (f", in the last {rate.decay_steps:,}" if rate.decay_steps else ""),
            ", ".join(value for values in phase.admit.model_dump().values() for value in values) or "all",
        )
    known = [phase for phase in config.phases if phase.tokens]
    table.add_section()
    all_tokens, all_steps = sum(map(_tokens, known)), phases.num_steps(known)
    table.add_row("all" if len(known) == len(config.phases) else "all that is known", f"{all_tokens:,}", "", "", "", f"{all_steps:,}")
    return table


def _batch(phase: Phase) -> str:
    """The global batch size; with a ramp, each one and its steps."""
    if phase.batch_ramp is None:
        return f"{phase.global_batch_size:,}"
    ramp = (
        f"{phase.batch_ramp.start:,} + {phase.batch_ramp.increment:,} … {phase.global_batch_size:,} in {phase.batch_ramp.tokens:,} tokens"
    )
    return ramp + (f" ({sum(steps for _, steps in phase.stretches[:-1]):,} steps)" if phase.tokens else "")


def _tokens(phase: Phase) -> int:
    return phases.consumed_tokens([phase], phase.num_steps)


def _calendar(config: RunConfig, tokens_per_day: float, now: datetime) -> Table:
    """When each phase ends, at a speed that does not change from now on."""
    table = Table("phase", "days", "ends", title=f"at {tokens_per_day:,.0f} tokens a day, from {now:%Y-%m-%d %H:%M} on")
    end = now
    for phase in config.phases:
        if not phase.tokens:
            table.add_row(phase.name, "?", "its sources are not there yet")
            break
        lasts = timedelta(days=_tokens(phase) / tokens_per_day)
        end += lasts
        table.add_row(phase.name, f"{lasts / timedelta(days=1):,.2f}", f"{end:%Y-%m-%d %H:%M}")
    return table


def _source_table(config: RunConfig, sources: dict[str, Source]) -> Table:
    held_out = phases.validation_blocks(config.data) * config.data.block_length
    table = Table(
        *("phase", "source", "kind", "origin", "asked as", "tokens asked", "tokens there", "epochs", "epochs so far"),
        title="sources" + (f" ({held_out:,} tokens of each are held out for validation)" if held_out else ""),
    )
    for phase, row in zip(config.phases, phases.shares(config, sources), strict=True):
        for share in row if not phase.is_of_dialogues else ():
            source = sources[share.source]
            there = phases.training_blocks(source, config.data)
            asked = share.num_samples * phase.sequence_length
            table.add_row(
                phase.name,
                source.name,
                source.kind,
                source.origin,
                _asked_as(phase, source.name),
                f"{asked:,}",
                f"{there * config.data.block_length:,}",
                f"{asked / (there * config.data.block_length):.2f}",
                f"{(share.first_block + share.num_blocks) / there:.2f}",
            )
    return table


def _dialogue_table(config: RunConfig, sources: dict[str, Source]) -> Table:
    """What the phases of dialogues take, and how full their packs are."""
    table = Table(
        *("phase", "source", "asked as", "dialogues asked", "cut", "left out", "packs", "filled", "tokens there", "of which answers"),
        title="dialogues (tokens of each source once, and those that are trained on)",
    )
    for phase, row in zip(config.phases, phases.shares(config, sources), strict=True):
        for share in row:
            source, taken = sources[share.source], share.taken
            if taken and source.dialogues:
                places = np.minimum(source.dialogues.lengths[taken.packs.items], phase.sequence_length).sum()
                counts = taken.count, taken.num_cut, taken.num_left_out, len(taken.packs)
                filled = f"{places / (len(taken.packs) * phase.sequence_length):.1%}"
                there = f"{source.num_tokens:,}", f"{source.num_answer_tokens:,}"
                table.add_row(phase.name, source.name, _asked_as(phase, source.name), *(f"{n:,}" for n in counts), filled, *there)
    return table


def _asked_as(phase: Phase, source: str) -> str:
    portion = phase.portion(source)
    if portion.weight is not None:
        asked = f"weight {portion.weight:g}"
    else:
        asked = f"{portion.tokens:,} tokens" if portion.tokens else f"{portion.epochs:g} epochs"
    return asked + (f", loss × {portion.loss_weight:g}" if portion.loss_weight != 1 else "")


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


if __name__ == "__main__":
    command_line(main)
