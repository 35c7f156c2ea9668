"""What a transcript becomes before it is learnt, and before it is scored."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graft.data.text import NORMALIZERS, clean_text, normalize


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  the   Commission's\treport ", "the Commission's report"),
        ("two\nlines", "two lines"),
        ("two\r\nlines", "two lines"),
        ("old\rmac", "old mac"),
        (r"spelled\nout", "spelled out"),
        (r"spelled\r\nout\tagain", "spelled out again"),
        ("\ufeffwith a mark", "with a mark"),
        ("cafe\u0301", "café"),
        ("null\x00byte", "null byte"),
        ("no\u00a0break", "no break"),
        ("line\u2028separator", "line separator"),
        ("نیم\u200cفاصله", "نیم\u200cفاصله"),  # a zero-width non-joiner is spelling, not white space
        ("Case, punctuation: kept!", "Case, punctuation: kept!"),
        (r"\n", ""),
        (" \r\n ", ""),
    ],
)
def test_clean_text(raw: str, clean: str) -> None:
    assert clean_text(raw) == clean


SPACES = st.text(st.sampled_from(["\\", "n", "r", " ", "\n", "\r", "\u0301", "e", "\ufeff", "\x00", "é", "a"]))


@settings(deadline=None)
@given(st.one_of(st.text(), SPACES))
@example("\\\ufeffn")
@example("e\ufeff\u0301")
@example("\\\\nn")
def test_clean_text_is_stable_and_one_line(raw: str) -> None:
    clean = clean_text(raw)
    assert clean_text(clean) == clean
    assert unicodedata.is_normalized("NFC", clean)
    assert clean == clean.strip() and "  " not in clean
    assert not set("\n\r\t\x00\ufeff") & set(clean) and "\\n" not in clean


@settings(deadline=None)
@given(st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1))
def test_clean_text_keeps_all_that_is_written(raw: str) -> None:
    composed = unicodedata.normalize("NFC", raw)
    if "\\" not in composed:
        assert clean_text(raw) == composed


@pytest.mark.parametrize(
    ("name", "raw", "normalised"),
    [
        ("none", "It's  TEN o'clock.", "It's TEN o'clock."),
        ("basic", "It's  TEN o'clock.", "it s ten o clock"),
        ("basic", "(laughs) so [noise] well <unk> then", "so well then"),
        ("basic", "नमस्ते दुनिया", "नमस्ते दुनिया"),  # Whisper's own gives "नमस त द न य"
        ("basic", "ภาษาไทย", "ภาษาไทย"),
        ("basic", "ﬁne ℡", "fine tel"),
        ("basic", "می\u200cخواهم", "میخواهم"),
        ("basic", "Straße ÉCOLE", "straße école"),
        ("english", "It's  TEN past.", "it is 10 past"),
        ("english", "Mr. Smith won't pay twenty-one dollars", "mister smith will not pay $21"),
        ("english", "um, seven three", "73"),
    ],
)
def test_normalize(name: str, raw: str, normalised: str) -> None:
    assert normalize(raw, name) == normalised


@settings(deadline=None)
@given(st.text(max_size=30))
@example("℡")
@example("İ")
@example("a\u00ad\u0301")
def test_basic_is_stable(raw: str) -> None:
    once = normalize(raw, "basic")
    assert normalize(once, "basic") == once


@settings(deadline=None)
@given(st.lists(st.text(st.sampled_from("azÉßñжяनमस्तेไทยข้าา漢字"), min_size=1), min_size=1, max_size=4))
def test_basic_splits_no_word_and_joins_none(words: list[str]) -> None:
    assert len(normalize(", ".join(words), "basic").split()) == len(words)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_a_spelled_out_newline_costs_no_error(name: str) -> None:
    assert normalize(r"first line\nsecond", name) == normalize("first line\nsecond", name)


def test_unknown_normalizer() -> None:
    with pytest.raises(ValueError, match="'whisper', expected one of none, basic, english"):
        normalize("text", "whisper")
