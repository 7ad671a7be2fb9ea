"""Shows what a configuration asks for, before anything runs.

python -m megatron_jobs.plan CONFIG.yaml [key=value …] [--gpus 128 [--gpu h100]]     (what `mujina plan` calls)
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_jobs import config as configuration
from megatron_jobs import data, phases, planner
from megatron_jobs.config import RunConfig
from user_input import run


def main(
    config: Annotated[Path, typer.Argument(help="the run's YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example parallel.pipeline=4")] = None,
    gpus: Annotated[int | None, typer.Option(help="check the layout for this many processes")] = None,
    gpu: Annotated[str | None, typer.Option(help="predict memory and speed on these, and search layouts: h100, h200, …")] = None,
    gpus_per_node: Annotated[int, typer.Option(help="with --gpu: GPUs that NVLink joins")] = 8,
    stack: Annotated[str, typer.Option(help=f"with --gpu: the program, {' or '.join(planner.STACKS)}")] = "transformer-engine",
) -> None:
    """Prints parameters, tokens a step and steps of each phase, what the phases take of each source, and the fastest layouts."""
    settings = configuration.load(config, overrides)
    console = Console(width=120, highlight=False)
    total, active = num_parameters(settings)
    console.print(f"parameters        {_billions(total)}" + (f", {_billions(active)} active in a token" if settings.moe else ""))
    if gpu is not None:
        planner.show(settings, planner.machine(gpus, gpu, gpus_per_node, stack), gpu, console)
    elif gpus is not None:
        settings.check(gpus)
        sizes = settings.parallel
        console.print(
            f"layout            {gpus} processes: tensor {sizes.tensor}, pipeline {sizes.pipeline}, expert {sizes.expert}, "
            f"data {sizes.data(gpus)}"
        )
    console.print(_phase_table(settings))
    if settings.data.folder.is_dir():
        console.print(_source_table(settings))
    else:
        console.print(f"data.folder ({settings.data.folder}) is not there yet: the sources were not checked")


def num_parameters(config: RunConfig) -> tuple[int, int]:
    """(parameters, parameters that take part in one token: the top-k experts only). The padding rows of the vocabulary count."""
    model, moe = config.model, config.moe
    hidden, head = model.hidden_size, model.head_size
    attention = 2 * hidden * model.num_attention_heads * head + 2 * hidden * model.num_query_groups * head
    ffn = 3 * hidden * model.ffn_hidden_size
    rest = model.num_layers * (attention + 2 * hidden) + hidden
    rest += model.padded_vocab_size * hidden * (1 if model.tie_embeddings else 2)
    if moe is None:
        return rest + model.num_layers * ffn, rest + model.num_layers * ffn
    rest += model.num_layers * moe.num_experts * hidden
    return rest + model.num_layers * moe.num_experts * ffn, rest + model.num_layers * moe.top_k * ffn


def _phase_table(config: RunConfig) -> Table:
    table = Table("phase", "tokens", "sequence", "batch", "tokens/step", "steps", "learning rate", "admits", title="phases")
    for phase in config.phases:
        rate = phase.learning_rate
        table.add_row(
            phase.name,
            f"{phase.num_steps * phase.tokens_per_step:,}",
            f"{phase.sequence_length:,}",
            f"{phase.global_batch_size:,}",
            f"{phase.tokens_per_step:,}",
            f"{phase.num_steps:,}",
            f"{rate.start:g} → {rate.end:g} {rate.shape}" + (f", {rate.warmup_steps:,} warm-up" if rate.warmup_steps else ""),
            ", ".join(value for values in phase.admit.model_dump().values() for value in values) or "all",
        )
    table.add_section()
    steps = phases.num_steps(config.phases)
    table.add_row("all", f"{phases.consumed_tokens(config.phases, steps):,}", "", "", "", f"{steps:,}", "", "")
    return table


def _source_table(config: RunConfig) -> Table:
    sources = data.facts(data.open_sources(config))
    table = Table("phase", "source", "kind", "origin", "tokens asked", "tokens there", "epochs so far", title="sources")
    for phase, row in zip(config.phases, phases.shares(config, sources), strict=True):
        for share in row:
            source = sources[share.source]
            so_far = (share.first_block + share.num_blocks) / phases.blocks_in(source.num_tokens, config.data.block_length)
            asked = share.num_samples * phase.sequence_length
            table.add_row(phase.name, source.name, source.kind, source.origin, f"{asked:,}", f"{source.num_tokens:,}", f"{so_far:.2f}")
    return table


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


if __name__ == "__main__":
    run(main)
