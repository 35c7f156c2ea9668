"""Swapped audio is always another text's, of about the same length, the same every time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.evaluation.listening import SwappedSource, swapped_partners


@dataclass(frozen=True)
class Utterance:
    id: str
    text: str
    num_frames: int
    duration: float = 0.0
    instruction: str | None = None


def utterances(texts: str, lengths: list[int] | None = None) -> list[Utterance]:
    """One per letter of ``texts``."""
    lengths = lengths or [7] * len(texts)
    return [Utterance(f"u{i}", text, frames) for i, (text, frames) in enumerate(zip(texts, lengths, strict=True))]


def partners(texts: str, lengths: list[int] | None = None, seed: int = 1) -> list[int]:
    return swapped_partners(utterances(texts, lengths), texts, seed)


TEXTS = st.text("abcd", min_size=2, max_size=23).filter(lambda texts: len(set(texts)) > 1)


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.data())
def test_the_audio_is_of_another_text(texts: str, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=len(texts), max_size=len(texts)))
    chosen = partners(texts, lengths, seed=data.draw(st.integers(0, 5)))
    assert all(texts[partner] != text for partner, text in zip(chosen, texts, strict=True))


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_every_audio_once_where_that_is_possible(texts: str) -> None:
    """It is, unless one text is more than half of all."""
    chosen = partners(texts)
    if max(Counter(texts).values()) <= len(texts) / 2:
        assert sorted(chosen) == list(range(len(texts)))


def test_two_utterances_exchange_their_audio() -> None:
    assert partners("ab", [3, 300]) == [1, 0]


def test_one_text_in_the_majority_still_gets_other_audio() -> None:
    chosen = partners("aaaab")
    assert chosen[:4] == [4, 4, 4, 4] and chosen[4] != 4


@pytest.mark.parametrize("texts", ["", "a", "aaa"])
def test_nothing_to_swap_is_an_error(texts: str) -> None:
    with pytest.raises(ValueError, match=f"{len(set(texts))} distinct texts in {len(texts)} utterances"):
        partners(texts)


def test_texts_that_count_as_equal_are_equal() -> None:
    """The caller normalises: 'Yes.' and 'yes' in each other's place would prove nothing."""
    spoken = [
        Utterance("u0", "Yes.", 5),
        Utterance("u1", "yes", 5),
        Utterance("u2", "no", 90),
        Utterance("u3", "No", 90),
    ]
    chosen = swapped_partners(spoken, ["yes", "yes", "no", "no"], seed=1)
    assert {chosen[0], chosen[1]} == {2, 3} and {chosen[2], chosen[3]} == {0, 1}


def test_lengths_are_near() -> None:
    """Else a model could tell by the length that the audio is not the text's."""
    lengths = [(37 * i) % 101 + 5 for i in range(101)]  # every length from 5 to 105 once, shuffled
    chosen = swapped_partners(
        [Utterance(f"u{i}", str(i), n) for i, n in enumerate(lengths)], list(map(str, lengths)), 1
    )
    apart = sorted(abs(lengths[partner] - lengths[own]) for own, partner in enumerate(chosen))
    assert apart[:-1] == [1] * 100  # the next longer one; only the longest has to take the shortest


def test_the_same_for_the_same_seed_only() -> None:
    texts = "abcdefghijkl"
    assert partners(texts, seed=4) == partners(texts, seed=4) != partners(texts, seed=5)


class Source:
    """Features that tell whose they are: (F, 1) filled with the index."""

    entries = utterances("abc", [2, 5, 3])

    def read_many(self, indices: list[int]) -> list[torch.Tensor]:
        return [torch.full((self.entries[i].num_frames, 1), float(i)) for i in indices]


def test_a_swapped_source_keeps_texts_and_exchanges_audio() -> None:
    swapped = SwappedSource(Source(), [2, 0, 1])
    assert [(e.id, e.text, e.num_frames) for e in swapped.entries] == [("u0", "a", 3), ("u1", "b", 2), ("u2", "c", 5)]
    assert [features.flatten().tolist() for features in swapped.read_many([2, 0])] == [[1.0] * 5, [2.0] * 3]
