"""Whole dialogues, packed into samples: best fit, a pure function of their lengths, the sequence length and a key.

Every process computes the same packs for itself: there is no file, and nobody waits for rank 0.
"""

from dataclasses import dataclass

import numpy as np

from megatron_jobs.data.permutation import permute


@dataclass(frozen=True)
class Packs:
    """Groups of dialogues, each of which fills a sample: pack n holds `items[starts[n] : starts[n + 1]]`."""

    items: np.ndarray  # int64 [dialogues]
    starts: np.ndarray  # int64 [packs + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> tuple[int, ...]:
        return tuple(self.items[self.starts[number] : self.starts[number + 1]].tolist())


def joined(several: list[Packs]) -> Packs:
    """All packs, one list behind the other."""
    ends = np.cumsum([0, *(len(packs.items) for packs in several)])
    starts = [packs.starts[:-1] + end for packs, end in zip(several, ends, strict=False)]
    return Packs(np.concatenate([packs.items for packs in several]), np.concatenate([*starts, ends[-1:]]))


def pack(lengths: np.ndarray, room: int, *key: object) -> Packs:
    """Packs items of `lengths` (from 1 to `room`) into samples of `room` places: best fit decreasing (Johnson 1973), in the order of `key`.

    The longest item comes first, into the fullest sample that still takes it; items of one length are put in at once, since a sample
    with so many places left is like any other. `key` decides which of the equally long ones goes where, and the order of the packs.
    """
    mixed = permute(np.arange(len(lengths)), len(lengths), *key, "items")
    longest_first = mixed[np.argsort(-lengths[mixed], kind="stable")]
    bounds = np.flatnonzero(np.diff(lengths[longest_first], prepend=-1, append=-1))
    pack_of, num_packs = np.empty(len(lengths), np.int64), 0
    left: list[list[np.ndarray]] = [[] for _ in range(room + 1)]  # by places left: the packs that have so many
    num_left = np.zeros(room + 1, np.int64)

    def leave(places: int, packs: np.ndarray) -> None:
        if len(packs):
            left[places].append(packs)
            num_left[places] += len(packs)

    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        length, items = int(lengths[longest_first[first]]), longest_first[first:last]
        while len(items):
            places = length + int((num_left[length:] > 0).argmax())
            if num_left[places]:
                packs = left[places].pop()
                num_left[places] -= len(packs)
            else:
                places = room
                packs = np.arange(num_packs, num_packs + -(-len(items) // (room // length)))
                num_packs += len(packs)
            in_each = places // length
            used = min(len(packs), -(-len(items) // in_each))
            now, items = items[: used * in_each], items[used * in_each :]
            pack_of[now] = packs[np.arange(len(now)) // in_each]
            leave(places - length * in_each, packs[: used - 1])
            leave(places - length * (len(now) - (used - 1) * in_each), packs[used - 1 : used])
            leave(places, packs[used:])
    pack_of = permute(np.arange(num_packs), num_packs, *key, "packs")[pack_of]
    starts = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=num_packs))])
    return Packs(np.argsort(pack_of, kind="stable"), starts)
