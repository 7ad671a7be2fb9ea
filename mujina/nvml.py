"""What NVML's reasons for a lowered clock mean (nvmlClocksEventReason…)."""

import math

REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown (driver)",
    0x40: "thermal slowdown (hardware)",
    0x80: "power brake (power supply)",
}
# An idle GPU, a clock that an administrator has set, and the power cap, at which a busy GPU always runs, are no trouble.
TROUBLE = 0x08 | 0x20 | 0x40 | 0x80


def in_words(bits: float, mask: int = -1) -> list[str]:
    """The reasons in `mask` that stand in NVML's bit field (NaN: not told)."""
    return [] if math.isnan(bits) else [words for bit, words in REASONS.items() if int(bits) & bit & mask]
