"""SpecAugment's time masks (arXiv 1904.08779) on encoder frames: the one augmentation that needs no encoder.

What is masked follows from a key (seed, step, utterance) and not from the rank, so that any number of ranks, and a
resumed run, mask the same frames.

F: encoder frames    D: numbers per frame
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def mask_frames(features: torch.Tensor, num_masks: int, max_frames: int, key: Sequence[int]) -> torch.Tensor:
    """A copy of ``features`` (F, D) with ``num_masks`` spans of 0 .. ``max_frames`` frames set to zero.

    At least half of the frames stay: a short utterance gets shorter spans.
    """
    rng, masked = np.random.default_rng(list(key)), features.clone()
    longest = min(max_frames, len(features) // (2 * max(1, num_masks)))
    for _ in range(num_masks):
        length = int(rng.integers(0, longest + 1))
        start = int(rng.integers(0, len(features) - length + 1))
        masked[start : start + length] = 0
    return masked
