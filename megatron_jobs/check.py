"""What is asked of a run before any of its processes starts: whatever these would refuse is refused here, on one of them.

Needs no torch for a run that begins with a new model; else the model or the checkpoint that it begins with is opened.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_jobs import stability
from megatron_jobs.config import RunConfig
from megatron_jobs.data import feeder, phases
from megatron_jobs.data.order import DataOrder
from megatron_jobs.monitoring import wandb_run
from megatron_jobs.planning import layers, layouts
from megatron_jobs.planning.layers import Layers
from megatron_jobs.stability import Guard
from mujina.user_input import UserError

if TYPE_CHECKING:
    from megatron_jobs.checkpoints.checkpoint import Checkpoint


def check(config: RunConfig, processes: int, of_ranks: Layers | None = None) -> tuple[RunConfig, DataOrder]:
    """The run with the budgets of its phases, and the order of its data. `of_ranks`: the layers that they will have; None: of this machine.

    Raises UserError when it cannot be on so many processes, with these layers and data, from this model, or behind this checkpoint.
    """
    layouts.check(config, processes)
    layers.check(config, of_ranks or layers.of_this_machine(config))
    sources = feeder.facts(feeder.open_sources(config))
    config = phases.resolve(config, sources)
    order = DataOrder(config, sources)
    if newest := _newest(config):
        phases.check_resumable(newest.config, config, newest.step)
        order.check_continues(newest.ledger)
        if config.adapter:
            _check_base(config, newest)
    else:
        _check_start(config)
    if config.wandb:
        wandb_run.library()
    return config, order


def _newest(config: RunConfig) -> "Checkpoint | None":
    """The checkpoint that the run goes on from, if its files are what they were: the ranks read them, each a share."""
    folder = config.run / "checkpoints"
    if not any(folder.glob("step-*")):
        return None
    from megatron_jobs.checkpoints.checkpoint import newest_described

    guard = Guard(config.stability, stability.read_rollbacks(config.run))
    return newest_described(folder, lambda checkpoint: guard.agrees(checkpoint.step, checkpoint.ledger.interventions))


def _check_base(config: RunConfig, newest: "Checkpoint") -> None:
    """Raises UserError when the base is not there, or is not that of the adapter in the newest checkpoint."""
    from megatron_jobs.conversion.start import check_base, open_base

    assert config.train.init_from is not None  # RunConfig sees to it
    _check_there("train.init_from", config.train.init_from)
    check_base(newest, open_base(config))


def _check_start(config: RunConfig) -> None:
    """Raises UserError when what the run begins with is not there, or is another model."""
    upcycled = config.moe.upcycle_from if config.moe else None
    if upcycled:
        _check_there("moe.upcycle_from", upcycled)
        from megatron_jobs.conversion.upcycle import Mixture

        Mixture(config, upcycled, "moe.upcycle_from")
    elif path := config.train.init_from:
        _check_there("train.init_from", path)
        from megatron_jobs.conversion.start import open_adapter, open_weights

        opened = open_weights(path, config, "train.init_from", config.moe)
        if config.adapter and config.adapter.init_from:
            open_adapter(config, opened)


def _check_there(field: str, path: Path) -> None:
    run = path.with_name(path.name.partition("@")[0])  # RUN@PHASE
    if not path.exists() and not run.exists():
        raise UserError(f"{field} ({path}): no such folder: check the path, which starts at the folder where the command runs")
