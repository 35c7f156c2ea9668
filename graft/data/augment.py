"""Augmentation of encoder frames: what can still be done to an utterance whose features are in a shard.

What is drawn follows from a key (seed, epoch, utterance id, pass) and from nothing else: not from the rank, the step
or the utterances beside it. So any number of ranks, and a resumed run, change the same frames. The number of frames
stays what it was: an utterance's placeholders and its share of a token budget follow from it.

F: encoder frames    D: numbers per frame
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graft.data.chance import Chance


def shift_frames(features: torch.Tensor, max_frames: int, key: Sequence[int | str]) -> torch.Tensor:
    """``features`` (F, D) without the first 0 .. ``max_frames`` frames, with as many zeros behind.

    Audio tokens are made of ``stack_factor`` frames, counted from the first: a word then falls into them otherwise,
    and a projector learns from one utterance what it would else need ``stack_factor`` of. At least half of the frames
    stay.
    """
    shift = Chance("time shift", *key).below(min(max_frames, len(features) // 2) + 1)
    return torch.cat([features[shift:], features.new_zeros(shift, features.shape[1])])


def mask_frames(features: torch.Tensor, num_masks: int, max_frames: int, key: Sequence[int | str]) -> torch.Tensor:
    """A copy of ``features`` (F, D) with ``num_masks`` spans of 0 .. ``max_frames`` frames set to zero.

    SpecAugment's time masks (arXiv 1904.08779), on encoder frames. At least half of the frames stay: a short utterance
    gets shorter spans.
    """
    chance, masked = Chance("time masks", *key), features.clone()
    longest = min(max_frames, len(features) // (2 * max(1, num_masks)))
    for _ in range(num_masks):
        length = chance.below(longest + 1)
        start = chance.below(len(features) - length + 1)
        masked[start : start + length] = 0
    return masked
