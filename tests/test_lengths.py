"""Seconds to audio tokens: hand-written answers, and that nothing is ever dropped."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.lengths import Window, WindowExceeded, audio_tokens, encoder_frames, num_samples, seconds


@pytest.mark.parametrize(
    ("samples", "frames"), [(1, 1), (320, 1), (321, 2), (16_000, 50), (480_000, 1_500), (177_601, 556)]
)
def test_encoder_frames(samples: int, frames: int) -> None:
    assert encoder_frames(samples) == frames


@pytest.mark.parametrize(
    ("frames", "factor", "tokens"), [(1_500, 1, 1_500), (1_500, 4, 375), (1_499, 8, 188), (1, 4, 1)]
)
def test_audio_tokens(frames: int, factor: int, tokens: int) -> None:
    assert audio_tokens(frames, factor) == tokens


@given(st.integers(1, 10**8), st.integers(1, 16))
def test_the_tail_is_padded_never_dropped(samples: int, factor: int) -> None:
    frames = encoder_frames(samples)
    assert 0 <= frames * 320 - samples < 320
    assert 0 <= audio_tokens(frames, factor) * factor - frames < factor


def test_whispers_window() -> None:
    window = Window(1_500)
    assert (window.num_mel_frames, window.num_samples, window.seconds) == (3_000, 480_000, 30.0)
    assert num_samples(30.0) == 480_000 and seconds(480_000) == 30.0


def test_beyond_the_window_names_both_lengths() -> None:
    """The seed's truncation experiment: one sample too many is an error of ours, not a shape mismatch."""
    Window(200).check(64_000, "'a'")
    with pytest.raises(WindowExceeded, match=r"'a' is 64001 samples \(4.00 s\).*64000 \(4.00 s, 200 frames\)"):
        Window(200).check(64_001, "'a'")
