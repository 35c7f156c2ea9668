"""Augmentation of encoder frames: what can still be done to an utterance whose features are in a shard.

What is drawn follows from a key (seed, epoch, utterance id, pass) and from nothing else: not from the rank, the step
or the utterances beside it. So any number of ranks, and a resumed run, change the same frames. Voices alone come from
the utterances of the same step, which follow from the plan. The number of frames stays what it was: an utterance's
placeholders and its share of a token budget follow from it.

F: encoder frames    D: numbers per frame
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graft.data.chance import Chance

UNIT = 1 << 32  # what a share is drawn in parts of
LEAST_SPREAD = 1e-4  # of a number that never changes in an utterance


def draw_lender(num_utterances: int, key: Sequence[int | str]) -> int:
    """Which of a step's ``num_utterances`` lends its voice; it may be the utterance itself."""
    return Chance("lender", *key).below(num_utterances)


def mix_voice(features: torch.Tensor, lender: torch.Tensor, most: float, key: Sequence[int | str]) -> torch.Tensor:
    """``features`` (F, D) as if ``lender`` (F', D) had lent its voice, by a share of 0 to ``most``.

    Mean and spread of each number over an utterance are of voice, room and microphone rather than of words. They are
    moved towards another's, as MixStyle does (arXiv 2104.02008) with images: the projector hears each sentence in many
    more voices than have said it.
    """
    frames, share = features.float(), most * Chance("voice", *key).below(UNIT) / UNIT
    (mean, spread), (other_mean, other_spread) = _voice(frames), _voice(lender.float())
    mixed = (frames - mean) * (1 + share * (other_spread / spread - 1)) + mean + share * (other_mean - mean)
    return mixed.to(features.dtype)


def _voice(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return frames.mean(0), frames.std(0, correction=0).clamp(min=LEAST_SPREAD)


def shift_frames(features: torch.Tensor, max_frames: int, key: Sequence[int | str]) -> torch.Tensor:
    """``features`` (F, D) without the first 0 .. ``max_frames`` frames, with as many zeros behind.

    Audio tokens are made of ``stack_factor`` frames, counted from the first: a word then falls into them otherwise,
    and a projector learns from one utterance what it would else need ``stack_factor`` of. At least half of the frames
    stay.
    """
    return later(features, Chance("time shift", *key).below(min(max_frames, len(features) // 2) + 1))


def later(features: torch.Tensor, shift: int) -> torch.Tensor:
    """``features`` (F, D) without the first ``shift`` frames, with as many zeros behind."""
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
