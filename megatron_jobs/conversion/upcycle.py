"""Upcycles a dense model into a mixture of experts, matrix by matrix.

    python -m megatron_jobs.conversion.upcycle MIXTURE.yaml DENSE OUTPUT_FOLDER [--hugging-face] [--no-check]   (`mujina upcycle`)

MIXTURE.yaml is the configuration of the mixture's run; its `moe.upcycling` says how experts are made (`moe/upcycle.py` has the formulas).
DENSE is a checkpoint or a Hugging Face folder. Writes a checkpoint, from which that run goes on with `train.init_from:
OUTPUT_FOLDER/latest`, or a Hugging Face folder. `moe.upcycle_from: DENSE` gives a run the same values without this command.
Ends with a comparison of the logits of both models on the first samples of that run.
"""

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_jobs import config as configuration
from megatron_jobs.config import RunConfig
from megatron_jobs.conversion import convert
from megatron_jobs.conversion.families import hindrance, tell_hindrance
from megatron_jobs.data.ledger import Ledger, Origin
from megatron_jobs.planning import flops
from mujina.files import write_whole
from mujina.locks import hold
from mujina.matrices import Box
from mujina.user_input import UserError, command_line

if TYPE_CHECKING:
    import torch

    from megatron_jobs.conversion.agreement import Agreement

BOUND = 1e-5  # where the mixture is to compute what the dense model does


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the mixture's run, with a moe section")],
    dense: Annotated[Path, typer.Argument(help="dense checkpoint, such as RUN/checkpoints/latest, or Hugging Face folder")],
    output: Annotated[Path, typer.Argument(help="folder for the checkpoint of the mixture, or with --hugging-face the folder itself")],
    hugging_face: Annotated[bool, typer.Option("--hugging-face", help="write a Hugging Face folder in place of a checkpoint")] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="leave out the comparison of logits")] = False,
) -> None:
    """Makes a mixture of experts out of a dense model and compares the logits of both.

    The configuration's moe.upcycling says how: operator copy, noise, drop or granular. Where the operator keeps the function (copy, and
    granular with exact scaling), logits that differ fail the command; where it does not, the difference is told, and only NaN fails.
    """
    mixture = Mixture(configuration.load(config), dense, "DENSE")
    if hugging_face and not no_check and (reason := hindrance(mixture.config.model, mixture.config.moe)):
        raise UserError(reason)
    tell_hindrance(mixture.config)
    is_there = _is_folder if hugging_face else _is_checkpoint
    if is_there(output, mixture, no_check):
        print(f"{output}: is there already")
        return
    agreement = None if no_check else _compare(mixture)
    if hugging_face:
        convert.write(convert.Exported(mixture), output, no_check, upcycling=agreement and agreement.as_dict())
        written = output
    else:
        written = _write_checkpoint(mixture, agreement, output)
    model, moe = mixture.config.model, mixture.config.moe
    assert moe is not None  # Mixture has refused a configuration without it
    print(f"{written}: {moe.num_experts} experts in {flops.num_mixtures(model, moe)} of {model.num_layers} layers")


class Mixture:
    """What a run's configuration makes of a dense model: a source of named matrices that `convert` writes as it writes a checkpoint."""

    step = tokens = 0

    def __init__(self, config: RunConfig, dense: Path, field: str) -> None:
        """`field` gave the path `dense`. Raises UserError when another model is there, or a mixture, or when experts of these sizes cannot
        be made of it.
        """
        from megatron_jobs.checkpoints.weights import InitialWeights, drawn, shapes
        from megatron_jobs.conversion.start import open_weights
        from moe.upcycle import Upcycled

        if config.moe is None:
            raise UserError("moe is missing: add the section of the mixture, with num_experts and top_k")
        if reason := config.moe.why_not_upcycled(config.model):
            raise UserError(reason)
        self.config, self.path = config, dense
        self.dense = open_weights(dense, config, field, moe=None)
        self.shapes = dict(shapes(config.model, config.moe))
        normal = functools.partial(drawn, config.seed, std=1.0)
        self._upcycled = Upcycled(self.dense, InitialWeights(config.model, config.moe, config.seed), config.model, config.moe, normal)
        self.keeps_the_function = self._upcycled.keeps_the_function

    def read(self, name: str, box: Box) -> "torch.Tensor":
        """float32 on the CPU, shape [box.rows, box.columns]."""
        return self._upcycled.read(name, box)

    @functools.cached_property
    def ledger(self) -> Ledger:
        """Nothing is consumed yet. Of a Hugging Face folder every file is read, for its checksum."""
        from megatron_jobs.checkpoints.checkpoint import Checkpoint

        if isinstance(self.dense, Checkpoint):
            before: dict[str, Any] = {"ledger": self.dense.ledger}
        else:
            before = {"hugging_face": self.dense.facts()}
        return Ledger(origin=Origin(kind="upcycled", of=(self.dense.identity,), **before))

    @property
    def identity(self) -> dict[str, Any]:
        """All that the values depend on."""
        sections = {"seed": self.config.seed} | {name: getattr(self.config, name).model_dump(mode="json") for name in ("model", "moe")}
        return sections | {"ledger": json.loads(self.ledger.to_json())}


def _is_checkpoint(output: Path, mixture: Mixture, no_check: bool) -> bool:
    """Whether the checkpoint is there, was compared unless `no_check`, and is what was saved. Reads all of it."""
    from megatron_jobs.checkpoints.checkpoint import Checkpoint

    if not (output / "latest").exists():
        return False
    try:
        found = Checkpoint(output / "latest")
        same = all(getattr(found.config, section) == getattr(mixture.config, section) for section in ("model", "moe", "seed"))
        if not same or found.ledger != mixture.ledger or not (no_check or (output / "agreement.json").exists()):
            return False
        found.verify()
    except UserError as error:
        print(f"{error}: it is made again")
        return False
    return True


def _is_folder(output: Path, mixture: Mixture, no_check: bool) -> bool:
    return convert.is_written(output, mixture.identity, no_check)


def _compare(mixture: Mixture) -> "Agreement":
    """Logits and losses of both on the first samples that the mixture's run trains on. Raises UserError when they may not differ and do."""
    from megatron_jobs.conversion import agreement
    from megatron_jobs.engine import groups

    model, moe = mixture.config.model, mixture.config.moe
    tokens = agreement.samples(mixture.config)
    with groups.alone():
        before = agreement.megatron_logits(model, None, mixture.dense, tokens[:, :-1])
        after = agreement.megatron_logits(model, moe, mixture, tokens[:, :-1])
    found = agreement.compare(before, after, tokens[:, 1:], BOUND if mixture.keeps_the_function else None)
    print(found)
    agreement.require(found, "upcycling")
    return found


def _write_checkpoint(mixture: Mixture, agreement: "Agreement | None", output: Path) -> Path:
    from megatron_jobs.checkpoints.checkpoint import write_weights

    with hold(output / ".lock", f"{output}"):
        if agreement:
            write_whole(output / "agreement.json", json.dumps(agreement.as_dict(), indent=1).encode())
        else:
            (output / "agreement.json").unlink(missing_ok=True)  # of what was there before
        return write_weights(output, mixture.config, mixture, mixture.shapes, mixture.ledger, "upcycling")


if __name__ == "__main__":
    command_line(main)
