"""Keyed permutations: the place of each of many numbers, one by one, without a table."""

import hashlib
from functools import lru_cache

import numpy as np

ROUNDS = 6


def permute(indices: np.ndarray, size: int, *key: object) -> np.ndarray:
    """The places of `indices` (int64 in [0, size)) under the permutation of [0, size) that `key` selects."""
    return permute_each(np.array(indices, np.int64), np.full(len(indices), size), np.broadcast_to(round_keys(*key), (len(indices), ROUNDS)))


@lru_cache(maxsize=1 << 16, typed=True)
def round_keys(*key: object) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest(), np.uint64)


def permute_each(indices: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Each index under a permutation of its own: indices and sizes [n], keys [n, ROUNDS].

    A Feistel network over pairs (left, right) of [0, a) × [0, b) with a·b ≥ size, and cycle walking: a value that falls
    outside [0, size) is sent through again until it is inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    result = indices.copy()
    outside = np.arange(len(result))
    while len(outside):
        size, key = sizes[outside], keys[outside]
        a = np.ceil(np.sqrt(size)).astype(np.int64)
        b = -(-size // a)
        left, right = np.divmod(result[outside], b)
        for round in range(ROUNDS):
            if round % 2:
                left = (left + _mix(right, key[:, round]) % a) % a
            else:
                right = (right + _mix(left, key[:, round]) % b) % b
        result[outside] = left * b + right
        outside = outside[result[outside] >= size]
    return result


def _mix(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A 63-bit hash of each value (the finaliser of splitmix64)."""
    z = values.astype(np.uint64) ^ keys
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)
