"""Which steps of a run have no line in its metrics any more. Imports nothing of ours."""

import itertools
from collections.abc import Iterable


def lost(steps: Iterable[int], last: int, passed_over: Iterable[tuple[int, int]]) -> str:
    """Of the steps 1 … `last`, those that are neither among `steps` nor `passed_over` (first, last), in words: "3, 7 to 9"; "" for none."""
    missing = set(range(1, last + 1)).difference(steps)
    for first, end in passed_over:
        missing.difference_update(range(first, min(end, last) + 1))
    spans = []
    for _, group in itertools.groupby(enumerate(sorted(missing)), key=lambda numbered: numbered[1] - numbered[0]):
        found = [step for _, step in group]
        spans.append(f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}")
    return ", ".join(spans[:5]) + (f" and {len(spans) - 5} more stretches" if len(spans) > 5 else "")
