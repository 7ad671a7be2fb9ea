"""The model that a run starts from, or that a mixture is made of: a checkpoint or a Hugging Face folder, opened and compared."""

from collections.abc import Mapping
from pathlib import Path

from megatron_jobs.checkpoints.checkpoint import Checkpoint
from megatron_jobs.config import RunConfig
from megatron_jobs.config.model import MoEConfig, differences
from megatron_jobs.conversion.families import MOE_FIELDS, family_of
from megatron_jobs.conversion.hugging_face import HuggingFaceFolder
from megatron_jobs.conversion.peft import PeftFolder
from megatron_jobs.data.ledger import Origin, told
from mujina.user_input import UserError

Opened = Checkpoint | HuggingFaceFolder


def open_weights(path: Path, config: RunConfig, field: str, moe: MoEConfig | None) -> Opened:
    """A checkpoint or Hugging Face folder with the model of `config`, and with `moe` in the place of its mixture.

    Raises UserError, in the name of the `field` that gave the path, on a model that computes something else: every such field is named,
    with what to write. How the model was initialised and trained may differ.
    """
    found = HuggingFaceFolder(path) if (path / "config.json").exists() else Checkpoint(path)
    if isinstance(found, Checkpoint) and found.config.adapter:
        raise UserError(
            f"{field} ({path}): holds an adapter alone, and a whole model is needed: name its base ({found.config.train.init_from}), or "
            "the Hugging Face folder that `mujina convert` makes of both"
        )
    has = found if isinstance(found, HuggingFaceFolder) else found.config
    if (moe is None) != (has.moe is None):
        is_one, wanted_one = ("a mixture" if of else "a dense model" for of in (has.moe, moe))
        if moe:
            remedy = "name a mixture, or upcycle it first (`mujina upcycle`, or moe.upcycle_from)"
        elif config.moe:
            remedy = "name a dense model"
        else:
            assert has.moe is not None  # one of the two is a mixture
            remedy = f"write moe: {_as_yaml(has.moe)}"
        raise UserError(f"{field} ({path}): is {is_one}, and {wanted_one} is needed: {remedy}")
    problems = [
        f"{name} ({mine}) must be that of {field} ({path}): write {name.partition('.')[2]}: {its}"
        for name, mine, its in differences(config.model, moe, has.model, has.moe)
    ]
    window = found.sliding_window if isinstance(found, HuggingFaceFolder) else None
    for phase in config.phases:
        if window and phase.sequence_length > window:
            problems.append(
                f"phases.{phase.name}.sequence_length ({phase.sequence_length}) must not exceed the sliding_window of {field} ({path}): "
                f"write at most {window}"
            )
    if problems:
        raise UserError("\n".join(problems))
    return found


def origin_of(opened: Opened) -> Origin:
    """For the ledgers of the run that starts from it. Of a Hugging Face folder every file is read, for its checksum."""
    if isinstance(opened, Checkpoint):
        return opened.ledger.origin_for(opened.identity)
    return Origin(kind="imported", of=(opened.identity,), hugging_face=opened.facts())


def with_adapter(origin: Origin, adapter: PeftFolder) -> Origin:
    """Where a run comes from whose base was opened with an adapter."""
    return origin.model_copy(update={"of": (*origin.of, adapter.identity)})


def open_base(config: RunConfig) -> Opened:
    """The frozen base of the configuration's adapter. Raises as `open_weights`."""
    assert config.train.init_from is not None  # RunConfig sees to it
    return open_weights(config.train.init_from, config, "train.init_from", config.moe)


def open_adapter(config: RunConfig, base: Opened) -> PeftFolder:
    """The A and B that a run with `adapter.init_from` begins with. Raises UserError when they are not what the configuration describes."""
    assert config.adapter is not None and config.adapter.init_from is not None
    before = base.ledger.hugging_face if isinstance(base, Checkpoint) else None
    known = before["config"]["model_type"] if before else None
    model_type = base.model_type if isinstance(base, HuggingFaceFolder) else family_of(config.model, config.moe, known)
    return PeftFolder(config.adapter.init_from, config, model_type)


def check_base(checkpoint: Checkpoint, base: Opened) -> None:
    """Raises UserError when the base is not the one that the adapter in a checkpoint was trained beside. Reads all of a folder's files."""
    recorded = checkpoint.ledger.base
    assert recorded is not None  # every run with an adapter writes it down
    if base.identity["files"] != recorded["files"]:
        raise UserError(
            f"train.init_from ({base.folder}): is not the base of the adapter in {checkpoint.folder}, which was trained beside "
            f"{told(recorded)} with other files: name that one, or start another run"
        )


def check_finite(config: RunConfig, broken: Mapping[str, int]) -> None:
    """Raises UserError when values of the weights that a run starts from are NaN or Inf: how many, of which matrices."""
    if not broken:
        return
    if config.moe and config.moe.upcycle_from:
        field = f"moe.upcycle_from ({config.moe.upcycle_from})"
    else:
        path = config.train.init_from
        field = f"train.init_from ({path})" if path else f"model.init_std ({config.model.init_std:g})"
    named = ", ".join(f"{name} ({count:,})" for name, count in sorted(broken.items())[:5])
    raise UserError(
        f"{field}: {sum(broken.values()):,} values of the weights to start from are NaN or Inf, in {named}"
        f"{f' and {len(broken) - 5} more' if len(broken) > 5 else ''}: take weights that are whole; `mujina checkpoint inspect` counts them"
    )


def _as_yaml(moe: MoEConfig) -> str:
    return "{" + ", ".join(f"{name}: {getattr(moe, name)}" for name in MOE_FIELDS) + "}"
