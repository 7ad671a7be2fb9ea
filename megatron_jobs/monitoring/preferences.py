"""Watches a phase of preferences: chosen answers that become less likely while the margin grows."""

from collections.abc import Mapping
from typing import Any

WINDOW = 32  # steps, each half of which is a mean


class Watch:
    """The margin of DPO also grows when both answers lose probability and the rejected one loses more: the model unlearns what was chosen
    (Pal et al. 2024, arXiv 2402.13228). It is told once a phase."""

    def __init__(self) -> None:
        self._phase, self._last, self._is_told = "", list[tuple[float, float]](), False

    def look(self, record: Mapping[str, Any]) -> str | None:
        """What to tell of a step, whose line of metrics.jsonl this is."""
        if record["phase"] != self._phase:
            self._phase, self._last, self._is_told = record["phase"], [], False
        if "chosen_reward" not in record or self._is_told:
            return None
        self._last = [*self._last, (record["chosen_reward"], record["reward_margin"])][-WINDOW:]
        half = WINDOW // 2
        (chosen_before, margin_before), (chosen, margin) = (
            (sum(values) / half for values in zip(*part, strict=True)) if len(part) == half else (0.0, 0.0)
            for part in (self._last[:-half], self._last[-half:])
        )
        if len(self._last) < WINDOW or not (chosen < min(0.0, chosen_before) and margin > margin_before):
            return None
        self._is_told = True
        return (
            f"the chosen answers become less likely (reward {chosen_before:.3f} → {chosen:.3f}) while the margin grows "
            f"({margin_before:.3f} → {margin:.3f}): a higher phases.{self._phase}.loss.beta, a lower learning rate or loss.nll_weight "
            "keeps them"
        )
