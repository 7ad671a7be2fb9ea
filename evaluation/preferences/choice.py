"""Which of a prompt's answers become pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Texts = Sequence[Sequence[str | None]]  # the answers to each prompt, None in the place of one that is left out


@dataclass
class Judged:
    """What was made of the answers to one prompt.

    scores   of each answer by its number, higher is better; None: it was left out
    wins     (number of the better, number of the worse), in order
    """

    scores: list[float | None]
    wins: list[tuple[int, int]] = field(default_factory=list)


def by_scores(scores: list[float | None]) -> Judged:
    """Of two answers the one with the higher score wins; ties are no wins."""
    known = [(number, score) for number, score in enumerate(scores) if score is not None]
    return Judged(scores, [(i, j) for i, one in known for j, other in known if one > other])


def chosen_pairs(judged: Judged, texts: Sequence[str], choose: Literal["best_and_worst", "every_pair"]) -> list[tuple[int, int]]:
    """The pairs (number of the chosen, number of the rejected); the same two texts make one pair."""
    if choose == "best_and_worst":
        known = [(score, number) for number, score in enumerate(judged.scores) if score is not None]
        if not known:
            return []
        best = max(known, key=lambda one: (one[0], -one[1]))
        worst = min(known)
        return [(best[1], worst[1])] if best[0] > worst[0] else []
    different = {(texts[i], texts[j]): (i, j) for i, j in reversed(judged.wins)}
    return sorted(different.values())
