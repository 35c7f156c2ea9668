"""SpecAugment's time masks (arXiv 1904.08779) on encoder frames: the one augmentation that needs no encoder.

What is masked follows from a key (seed, epoch, utterance id, pass) and from nothing else: not from the rank, the step
or the utterances beside it. So any number of ranks, and a resumed run, mask the same frames.

F: encoder frames    D: numbers per frame
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graft.data.chance import Chance


def mask_frames(features: torch.Tensor, num_masks: int, max_frames: int, key: Sequence[int | str]) -> torch.Tensor:
    """A copy of ``features`` (F, D) with ``num_masks`` spans of 0 .. ``max_frames`` frames set to zero.

    At least half of the frames stay: a short utterance gets shorter spans.
    """
    chance, masked = Chance("time masks", *key), features.clone()
    longest = min(max_frames, len(features) // (2 * max(1, num_masks)))
    for _ in range(num_masks):
        length = chance.below(longest + 1)
        start = chance.below(len(features) - length + 1)
        masked[start : start + length] = 0
    return masked
