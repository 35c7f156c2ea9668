"""The learning rate of a step: linear warm-up, then half a cosine (arXiv 1608.03983, without restarts)."""

from __future__ import annotations

import math


def scheduled_share(step: int, *, warmup_steps: int, max_steps: int, min_lr_ratio: float) -> float:
    """Share of the peak learning rate that ``step`` (0 is the first) uses: in (0, 1].

    The first step already learns: it takes ``1 / (warmup_steps + 1)`` of the peak. The last one takes
    ``min_lr_ratio`` of it.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min_lr_ratio + (1 - min_lr_ratio) * cosine
