"""Errors are counted over the corpus, by hand-written answers, and add up over utterances and ranks."""

from __future__ import annotations

from itertools import pairwise

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.evaluation.wer import ErrorCounts, alignment, confidence_interval, score, score_each

# reference, hypothesis, (hits, substitutions, deletions, insertions) of words, worked out by hand
CASES = [
    ("one two three", "one two three", (3, 0, 0, 0)),
    ("one two three", "one too three", (2, 1, 0, 0)),
    ("one two three", "one three", (2, 0, 1, 0)),
    ("one three", "one two three", (2, 0, 0, 1)),
    ("a b c d e", "", (0, 0, 5, 0)),
    ("", "uh oh", (0, 0, 0, 2)),
    ("", "", (0, 0, 0, 0)),
    ("seven", "no seven ate nine", (1, 0, 0, 3)),
]


def words(counts: ErrorCounts) -> tuple[int, int, int, int]:
    return counts.hits, counts.substitutions, counts.deletions, counts.insertions


@pytest.mark.parametrize(("reference", "hypothesis", "expected"), CASES)
def test_word_errors_of_one_utterance(reference: str, hypothesis: str, expected: tuple[int, ...]) -> None:
    assert words(score([reference], [hypothesis], "none")) == expected


def test_each_pair_has_its_own_counts() -> None:
    counts = score_each([case[0] for case in CASES], [case[1] for case in CASES], "none")
    assert [words(each) for each in counts] == [case[2] for case in CASES]


def test_the_rate_is_the_corpus_not_a_mean_of_utterances() -> None:
    counts = score(["a b c d e f g h i", "x"], ["a b c d e f g h i", "y"], "none")
    assert counts.wer == 1 / 10  # the mean of 0 and 1 would be 0.5
    assert counts.num_words == 10


def test_more_insertions_than_words_are_more_than_one() -> None:
    assert score(["seven"], ["no seven ate nine"], "none").wer == 3


def test_characters() -> None:
    counts = score(["abc de"], ["abx de f"], "none")  # c becomes x, " f" is new; the space within counts
    assert (counts.char_hits, counts.char_substitutions, counts.char_deletions, counts.char_insertions) == (5, 1, 0, 2)
    assert counts.num_characters == 6
    assert counts.cer == 3 / 6


def test_no_reference_at_all() -> None:
    assert score([], [], "none").wer == 0
    assert score([""], [""], "basic").wer == 0
    assert score([""], ["two words"], "basic").wer == 2  # insertions, as jiwer defines it; not infinite, not hidden


def test_the_normalizer_is_applied_to_both_sides() -> None:
    reference, hypothesis = "It's TEN, o'clock!", "it s ten o clock"
    assert score([reference], [hypothesis], "basic").wer == 0
    assert score([reference], [hypothesis], "none").wer > 0


def test_an_unknown_normalizer_is_refused() -> None:
    with pytest.raises(ValueError, match="'whisper'.*basic"):
        score(["a"], ["a"], "whisper")


TEXT = st.text(alphabet="ab \u00e9\u0928", max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8), st.integers(0, 8))
def test_parts_add_up_to_the_whole(pairs: list[tuple[str, str]], cut: int) -> None:
    references, hypotheses = map(list, zip(*pairs, strict=True))
    whole = score(references, hypotheses, "none")
    parts = score(references[:cut], hypotheses[:cut], "none") + score(references[cut:], hypotheses[cut:], "none")
    assert parts == whole
    assert whole == ErrorCounts(*whole.as_list())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text("ab ", max_size=12), st.text("ab ", max_size=12)), min_size=1, max_size=8))
def test_totals_are_jiwers(pairs: list[tuple[str, str]]) -> None:
    references, hypotheses = (list(map(str.strip, side)) for side in zip(*pairs, strict=True))
    output = jiwer.process_words(references, hypotheses)
    counts = score(references, hypotheses, "none")
    assert words(counts) == (output.hits, output.substitutions, output.deletions, output.insertions)


def test_alignment_marks_the_errors() -> None:
    shown = alignment("One two three four five.", "one too four five six", "basic").splitlines()
    assert shown[0].split() == ["REF:", "one", "two", "three", "four", "five", "***"]
    assert shown[1].split() == ["HYP:", "one", "too", "*****", "four", "five", "six"]
    assert shown[2].split() == ["S", "D", "I"]
    assert alignment("Same.", "same", "basic") == ""


def of(errors: int, num_words: int) -> ErrorCounts:
    return ErrorCounts(hits=num_words - errors, substitutions=errors)


def test_the_interval_holds_the_rate_and_narrows() -> None:
    few = [of(1, 7), of(0, 5), of(3, 9), of(0, 11)] * 5
    many = few * 25
    rate = sum(few, start=ErrorCounts()).wer
    (low, high), (low_many, high_many) = confidence_interval(few), confidence_interval(many)
    assert low < rate < high
    assert high_many - low_many < (high - low) / 3  # a 25th of the variance, a fifth of the width


def test_the_interval_is_about_that_of_theory() -> None:
    """One word per utterance: the number of errors is binomial, whose spread is known."""
    counts = [of(i % 10 == 0, 1) for i in range(2000)]
    low, high = confidence_interval(counts)
    expected = 1.96 * np.sqrt(0.1 * 0.9 / 2000)
    assert (low, high) == pytest.approx((0.1 - expected, 0.1 + expected), abs=0.002)


def test_the_interval_is_the_same_for_the_same_seed() -> None:
    counts = [of(i % 3, 3 + i % 7) for i in range(40)]
    same, other = confidence_interval(counts, seed=4), confidence_interval(counts, seed=5)
    assert confidence_interval(counts, seed=4) == same != other


def test_the_interval_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [of(i % 3, 5) for i in range(40)]
    whole = confidence_interval(counts)
    monkeypatch.setattr("graft.evaluation.wer.MOST_NUMBERS_AT_ONCE", 130)
    assert confidence_interval(counts) == whole


def test_the_interval_without_errors_has_no_width() -> None:
    assert confidence_interval([of(0, 4)] * 3) == (0, 0)
    assert confidence_interval([]) == (0, 0)


def test_wider_levels_are_wider() -> None:
    counts = [of(i % 3, 5) for i in range(40)]
    widths = [high - low for low, high in (confidence_interval(counts, level=level) for level in (0.5, 0.8, 0.99))]
    assert all(narrow < wide for narrow, wide in pairwise(widths))
