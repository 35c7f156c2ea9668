"""Chance from a key: even, independent of everything else, and the same for ever."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from graft.data.chance import Chance

KEYS = st.lists(st.integers() | st.text(), max_size=4)


@settings(deadline=None, max_examples=30)
@given(KEYS, st.lists(st.integers(1, 2**40), min_size=1, max_size=9))
def test_the_key_is_all_that_counts(key: list[int | str], bounds: list[int]) -> None:
    chance, again = Chance(*key), Chance(*key)
    drawn = [chance.below(bound) for bound in bounds]
    assert all(0 <= number < bound for number, bound in zip(drawn, bounds, strict=True))
    assert drawn == [again.below(bound) for bound in bounds]


@settings(deadline=None, max_examples=30)
@given(KEYS, KEYS)
def test_keys_that_differ_draw_differently(one: list[int | str], other: list[int | str]) -> None:
    """("1", 2) and (1, 2), ("ab",) and ("a", "b") too."""
    assert (Chance(*one).below(2**64) == Chance(*other).below(2**64)) == (one == other)


def test_even() -> None:
    """Over keys and over draws, each of 7 numbers comes about equally often, and so does each pair of neighbours."""
    drawn = [(chance.below(7), chance.below(7)) for chance in (Chance("even", key) for key in range(4900))]
    for counts, expected in (
        (Counter(first for first, _ in drawn), 700),
        (Counter(second for _, second in drawn), 700),
        (Counter(drawn), 100),
    ):
        assert len(counts) == 4900 // expected
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_for_ever() -> None:
    """A run that is resumed with other versions must go on as it began: these numbers may never change."""
    chance = Chance("time masks", 1, 0, "h\u00e9llo", 0)
    assert [chance.below(1000) for _ in range(5)] == [413, 988, 456, 140, 128]
