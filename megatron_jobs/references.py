"""What the reference of a phase of preferences makes of its pairs: computed once, by the run itself, before its first step.

The reference is the weights that the phase begins with; in a run with an adapter it is the base alone, in every phase, whatever the phases
before have trained.

RUN/references/PHASE/ holds about.json (of which weights, tokenizer and template they are) and for each source SOURCE.f32: float32, two for
each pair of the binary, the log-probabilities of the chosen and of the rejected answer; NaN: not asked for, or not yet computed. They are
written as they come, so that an interrupted run goes on where it stopped, and no second model is ever in memory.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np

from megatron_jobs import ranks
from megatron_jobs.config import RunConfig
from megatron_jobs.config.phase import Phase
from megatron_jobs.data import phases
from megatron_jobs.data.feeder import Feeder, MicroBatch
from megatron_jobs.data.ledger import Origin
from megatron_jobs.data.order import DataOrder
from megatron_jobs.data.packing import pack
from mujina.files import write_whole
from mujina.user_input import UserError, read_object

AT_ONCE = 64  # samples of a rank between two writes


def of_phase(
    config: RunConfig,
    index: int,
    order: DataOrder,
    about: dict[str, Any],
    feeder: Feeder,
    compute: Callable[[Phase, list[MicroBatch]], list[tuple[str, int, float, float]]] | None,
    say: Callable[[int, int], None],
) -> dict[str, np.ndarray]:
    """The references of the phase's pairs, by source: float32 [pairs of the binary, 2]. Every process of the run calls this.

    about      what they are of, see `identity`
    compute    `Passes.log_probabilities`; None: the phase is under way, and the weights that it began with are gone (a base never is)
    say        is told how many pairs are done, and of how many

    Raises UserError when what is there is of something else, or is to be completed and cannot be.
    """
    phase = config.phases[index]
    folder = config.run / "references" / phase.name
    wanted = _wanted(order, index)
    found = ranks.from_rank_0(_read(folder, about, wanted, order) if ranks.rank() == 0 else None)
    total = sum(map(len, wanted.values()))
    missing = sum(int(np.isnan(found[name][numbers]).any(1).sum()) for name, numbers in wanted.items())
    if missing and compute is None:
        raise UserError(
            f"{folder}: lacks the references of {missing:,} of {total:,} pairs, and phase {phase.name} has begun, so that its first "
            "weights are no more in memory: put the folder back, or start this phase as a run of its own (train.init_from) from the "
            "checkpoint at the end of the phase before"
        )
    # The same samples side by side, whatever was done before: their neighbours decide the last bits.
    for samples in batched(_samples(config, phase, order, wanted), AT_ONCE * feeder.ranks):
        here = sum(int(np.isnan(found[name][list(pairs)]).any(1).sum()) for name, pairs in samples)
        if not here:
            continue
        assert compute is not None
        micro_batches, _ = feeder.share(samples, phase)
        for name, pair, *values in compute(phase, list(micro_batches)):
            found[name][pair] = values
        if ranks.rank() == 0:
            _write(folder, {name: found[name] for name, _ in samples})
        missing -= here
        say(total - missing, total)
    for name, numbers in wanted.items():
        if not np.isfinite(found[name][numbers]).all():
            raise UserError(f"phases.{phase.name}.sources.{name}: the model finds answers impossible (a log-probability that is no number)")
    return found


def identity(
    config: RunConfig,
    order: DataOrder,
    index: int,
    origin: Origin | None,
    base: dict[str, Any] | None,
    rollbacks: list[dict[str, Any]],
) -> dict[str, Any]:
    """What decides the weights at the start of a phase: where the run came from, and what it was trained on, how, since then. And the
    tokens of its pairs, which tokenizer and template have made. Of an adapter's `base`, which nothing trains, its files decide; it is
    that of step 0."""
    before, told = 0, {name: getattr(config, name) and getattr(config, name).model_dump(mode="json") for name in ("model", "moe")}
    if base is not None:
        told["base"] = base["files"]
    else:
        before = phases.num_steps(config.phases[:index])
        told |= {
            "origin": origin and origin.model_dump(mode="json", exclude={"ledger"}),
            "trained": order.ledger(before).model_dump(mode="json", exclude_none=True)["phases"][:index],
            "phases": [phase.model_dump(mode="json") for phase in config.phases[:index]],
            "passed over": [back for back in rollbacks if back["first"] <= before],
            "optimizer": config.optimizer.model_dump(mode="json"),
            "seed": config.seed,
        }
    binaries = {share.source: order.sources[share.source].checksum for share in order.shares[index]}
    return {
        "binaries": binaries,
        "weights": hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest(),
        "step": before,
    }


def _wanted(order: DataOrder, index: int) -> dict[str, np.ndarray]:
    """The numbers of the pairs that the phase trains on, and of those that are held out, by source."""
    wanted: dict[str, list[np.ndarray]] = {}
    for share in order.shares[index]:
        assert share.taken is not None  # as in every phase of dialogues
        wanted.setdefault(share.source, []).append(share.taken.packs.items)
    for name, packed in order.validation(order.phases[index]):
        wanted.setdefault(name, []).append(np.array(packed, np.int64))
    return {name: np.unique(np.concatenate(numbers)) for name, numbers in wanted.items()}


def _samples(config: RunConfig, phase: Phase, order: DataOrder, wanted: dict[str, np.ndarray]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The pairs in packs of their own: each is computed once, however many epochs there are."""
    for name, numbers in wanted.items():
        dialogues = order.sources[name].dialogues
        if dialogues and len(numbers):
            packs = pack(np.minimum(dialogues.lengths[numbers], phase.sequence_length), phase.sequence_length, config.seed, "references")
            for number in range(len(packs)):
                yield name, tuple(numbers[list(packs[number])].tolist())


def _read(folder: Path, about: dict[str, Any], wanted: dict[str, np.ndarray], order: DataOrder) -> dict[str, np.ndarray]:
    path = folder / "about.json"
    if path.exists() and (there := read_object(path, f"remove {folder}, and its references are computed again")) != about:
        differs = next(key for key in about if there.get(key) != about[key])
        raise UserError(
            f"{folder}: holds the references of other weights, or of other binaries ({differs} is {str(there.get(differs))[:12]} there, "
            f"and {str(about[differs])[:12]} here): restore the configuration and the binaries, or remove the folder, and they are "
            "computed again at the start of the phase"
        )
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in wanted:
        dialogues = order.sources[name].dialogues
        assert dialogues is not None
        file = folder / f"{name}.f32"
        shape = len(dialogues.lengths), 2
        whole = file.exists() and file.stat().st_size == 8 * shape[0]
        found[name] = np.fromfile(file, "<f4").reshape(shape) if whole else np.full(shape, np.nan, "<f4")
    write_whole(path, json.dumps(about, indent=1).encode())
    return found


def _write(folder: Path, found: dict[str, np.ndarray]) -> None:
    for name, values in found.items():
        write_whole(folder / f"{name}.f32", values.tobytes())
