"""Upcycles a dense checkpoint into a mixture of experts, matrix by matrix.

    python -m megatron_jobs.upcycle MIXTURE.yaml DENSE_CHECKPOINT OUTPUT_FOLDER [--no-check]   (what `mujina upcycle` calls)

MIXTURE.yaml is the configuration of the run that goes on from there with `train.init_from: OUTPUT_FOLDER/latest`.
Ends with a comparison of the logits of both models on the first samples of that run.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from files import write_whole
from megatron_jobs import config as configuration
from megatron_jobs.config import RunConfig
from user_input import UserError, run

if TYPE_CHECKING:
    import torch

    from megatron_jobs.layout import TensorSource

BOUND = 1e-5
FILE_BYTES = 2**30


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the mixture's run, with a moe section")],
    dense: Annotated[Path, typer.Argument(help="checkpoint folder of the dense run, such as RUN/checkpoints/latest")],
    output: Annotated[Path, typer.Argument(help="folder for the checkpoint of the mixture")],
    no_check: Annotated[bool, typer.Option("--no-check", help="leave out the comparison of logits")] = False,
) -> None:
    """Makes a mixture of experts out of a dense checkpoint and shows that both give the same logits."""
    settings = configuration.load(config)
    if settings.moe is None:
        raise UserError(f"{config}: moe is missing: add the section of the mixture, with num_experts and top_k")

    from megatron_jobs.checkpoint import Checkpoint
    from megatron_jobs.weights import InitialWeights
    from moe.upcycle import Upcycled

    source = Checkpoint(dense)
    if source.config.moe is not None:
        raise UserError(f"{dense}: is a mixture of experts already: name a dense checkpoint")
    if source.config.model != settings.model:
        raise UserError(f"{config}: model must be the model of {dense}, {source.config.model}, but is {settings.model}")

    ledger = {"tokens": 0, "phases": [], "upcycled_from": source.identity | {"ledger": source.ledger}}
    if _is_there(output / "latest", settings, ledger):
        print(f"{output}: is there already")
        return
    mixture = Upcycled(source, InitialWeights(settings.model, settings.moe, settings.seed))
    if not no_check:
        _compare(settings, source, mixture, output)
    final = _write(settings, mixture, ledger, output)
    print(f"{final}: {settings.moe.num_experts} experts in each of {settings.model.num_layers} layers")


def _is_there(checkpoint: Path, settings: RunConfig, ledger: dict[str, Any]) -> bool:
    from megatron_jobs.checkpoint import Checkpoint

    if not checkpoint.exists():
        return False
    found = Checkpoint(checkpoint)
    return found.ledger == ledger and (found.config.moe, found.config.seed) == (settings.moe, settings.seed)


def _compare(settings: RunConfig, dense: "TensorSource", mixture: "TensorSource", output: Path) -> None:
    """Logits and losses of both on the first samples that the mixture's run trains on. Raises UserError when they differ."""
    from megatron_jobs import gate, parallel

    tokens = gate.samples(settings)
    with parallel.alone():
        before = gate.megatron_logits(settings.model, None, dense, tokens[:, :-1])
        after = gate.megatron_logits(settings.model, settings.moe, mixture, tokens[:, :-1])
    agreement = gate.compare(before, after, tokens[:, 1:], BOUND)
    print(agreement)
    gate.require(agreement, "upcycling")
    write_whole(output / "agreement.json", json.dumps(agreement.as_dict(), indent=1).encode())


def _write(settings: RunConfig, mixture: "TensorSource", ledger: dict[str, Any], output: Path) -> Path:
    """A checkpoint of weights only, in files of about FILE_BYTES."""
    from rich.progress import track

    from megatron_jobs.checkpoint import Writer, piece_key
    from megatron_jobs.weights import Box, shapes

    writer = Writer(output, step=0)
    writer.clear()
    wanted = dict(shapes(settings.model, settings.moe))
    pieces: dict[str, torch.Tensor] = {}
    last = list(wanted)[-1]
    for name, (rows, columns) in track(wanted.items(), description="upcycling"):
        box = Box(0, rows, 0, columns)
        pieces[piece_key("master", name, box)] = mixture.read(name, box)
        if sum(piece.nbytes for piece in pieces.values()) > FILE_BYTES or name == last:
            writer.add_rank_file(writer.num_rank_files(), pieces)
            pieces = {}
    return writer.finish(settings, 0, 0, wanted, ledger)


if __name__ == "__main__":
    run(main)
