"""Upcycles a dense checkpoint into a mixture of experts, matrix by matrix.

    python -m megatron_jobs.upcycle MIXTURE.yaml DENSE_CHECKPOINT OUTPUT_FOLDER        (what `mujina upcycle` calls)

MIXTURE.yaml is the configuration of the run that goes on from there with `train.init_from: OUTPUT_FOLDER/latest`.
Ends with a comparison of the logits of both models on the first samples of that run.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from user_input import UserError, run

BOUND = 1e-5
FILE_BYTES = 2**30


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the mixture's run, with a moe section")],
    dense: Annotated[Path, typer.Argument(help="checkpoint folder of the dense run, such as RUN/checkpoints/latest")],
    output: Annotated[Path, typer.Argument(help="folder for the checkpoint of the mixture")],
) -> None:
    """Makes a mixture of experts out of a dense checkpoint and shows that both give the same logits."""
    from megatron_jobs import config as configuration

    settings = configuration.load(config)
    if settings.moe is None:
        raise UserError(f"{config}: moe is missing: add the section of the mixture, with num_experts and top_k")

    from megatron_jobs import checkpoint, gate, parallel
    from megatron_jobs.weights import Box, InitialWeights, shapes
    from moe.upcycle import Upcycled

    source = checkpoint.Checkpoint(dense)
    if source.config.moe is not None:
        raise UserError(f"{dense}: is a mixture of experts already: name a dense checkpoint")
    if source.config.model != settings.model:
        raise UserError(f"{config}: model must be the model of {dense}, {source.config.model}, but is {settings.model}")

    origin = {"checkpoint": str(source.folder.resolve().name), "tokens": source.tokens, "ledger": source.ledger}
    ledger = {"tokens": 0, "phases": [], "upcycled_from": origin}
    there = output / "latest"
    if there.exists() and checkpoint.Checkpoint(there).ledger == ledger and checkpoint.Checkpoint(there).config == settings:
        print(f"{output}: is there already")
        return

    tokens = gate.samples(settings)
    mixture = Upcycled(source, InitialWeights(settings.model, settings.moe, settings.seed))
    with parallel.alone():
        before, after = (
            gate.megatron_logits(settings.model, moe, weights, tokens[:, :-1]) for moe, weights in ((None, source), (settings.moe, mixture))
        )
    agreement = gate.compare(before, after, tokens[:, 1:], BOUND)
    print(agreement)
    gate.require(agreement, "upcycling")

    writer = checkpoint.Writer(output, step=0)
    writer.clear()
    files, pieces, size = {}, {}, 0
    wanted = dict(shapes(settings.model, settings.moe))
    for number, (name, (rows, columns)) in enumerate(wanted.items()):
        box = Box(0, rows, 0, columns)
        pieces[checkpoint.piece_key("master", name, box)] = mixture.read(name, box)
        size += rows * columns * 4
        if size > FILE_BYTES or number + 1 == len(wanted):
            file, facts = writer.add_rank_file(len(files), pieces)
            files[file] = facts
            pieces, size = {}, 0
    final = writer.finish(settings, 0, wanted, ledger, files)
    (output / "agreement.json").write_text(json.dumps(agreement.as_dict(), indent=1))
    print(f"{final}: {settings.moe.num_experts} experts in each of {settings.model.num_layers} layers")


if __name__ == "__main__":
    run(main)
