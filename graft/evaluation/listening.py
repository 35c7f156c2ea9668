"""Does the model listen? Each utterance is scored once more with the audio of another one.

A model that reads the language model's mind instead of the audio writes the same text either way; a model that
listens writes what the other audio says, and its error rate goes up to where chance is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from graft.data.loader import Entry, FeatureSource
from graft.data.plan import permuted

SWAPPED_PAIRS = 3  # what the permutation is for; the plan of an epoch uses 1 and 2


@dataclass(frozen=True, slots=True)
class SwappedEntry:
    """An utterance whose audio is another one's: ``num_frames`` and ``duration`` are those of that audio."""

    id: str
    text: str
    num_frames: int
    duration: float
    instruction: str | None


class SwappedSource:
    """A source whose utterances keep their text and have the audio of ``partners``."""

    def __init__(self, source: FeatureSource, partners: Sequence[int]) -> None:
        assert len(partners) == len(source.entries), f"{len(partners)} partners of {len(source.entries)} utterances"
        self._source, self._partners = source, partners
        self.entries = [
            SwappedEntry(own.id, own.text, other.num_frames, other.duration, own.instruction)
            for own, other in zip(source.entries, (source.entries[p] for p in partners), strict=True)
        ]

    def read_many(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Features (F_i, D) of the partners."""
        return self._source.read_many([self._partners[i] for i in indices])


def swapped_partners(entries: Sequence[Entry], texts: Sequence[str], seed: int) -> list[int]:
    """For every utterance another one with another text and about the same length; the same for the same seed.

    A permutation, so that every audio is heard once, unless one text is more than half of them: then some audio is
    used again.

    Args:
        texts: of each utterance, normalised: two that count as equal when scored are equal here.

    Raises:
        ValueError: if all texts are the same.
    """
    if len(set(texts)) < 2:
        raise ValueError(
            f"the split has {len(set(texts))} distinct texts in {len(texts)} utterances: swapping their audio proves "
            "nothing. Score it without swapped audio, or take a split with other texts."
        )
    shuffled = permuted(np.arange(len(entries)), len(entries), (seed, SWAPPED_PAIRS)).tolist()
    order = sorted(shuffled, key=lambda i: entries[i].num_frames)  # stable: equal lengths stay shuffled
    ordered_texts = [texts[i] for i in order]
    partners = _neighbours(ordered_texts)
    chosen = [0] * len(order)
    for position, partner in enumerate(partners):
        chosen[order[position]] = order[partner]
    return chosen


def _neighbours(texts: Sequence[str]) -> list[int]:
    """For every position the next one, repaired wherever its text is the same."""
    count = len(texts)
    partners = [(position + 1) % count for position in range(count)]
    for position in range(count):
        if texts[partners[position]] == texts[position]:
            _repair(partners, texts, position)
    return partners


def _repair(partners: list[int], texts: Sequence[str], position: int) -> None:
    """Exchange partners with the nearest position where both then have another text.

    There is one unless the text is more than half of all: of n positions, at most m have this text and at most m a
    partner with it, ``position`` being both, so one of n > 2m - 1 is neither.
    """
    text = texts[position]
    by_distance = sorted(range(len(texts)), key=lambda other: abs(other - position))
    for other in by_distance:
        if texts[other] != text and texts[partners[other]] != text:
            partners[position], partners[other] = partners[other], partners[position]
            return
    partners[position] = next(other for other in by_distance if texts[other] != text)
