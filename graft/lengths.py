"""Seconds -> samples -> mel frames -> encoder frames -> audio tokens, in whole numbers.

The one number that training data and model must agree on, the audio tokens of an utterance, is computed here
and nowhere else. Everything is an integer, so both sides agree exactly.

S: samples at 16 kHz    M: mel frames, 10 ms each    F: encoder frames, 20 ms each    A: audio tokens
"""

from __future__ import annotations

from dataclasses import dataclass

SAMPLE_RATE = 16_000  # Hz; the only rate Whisper was trained at (arXiv 2212.04356, section 2.2)
SAMPLES_PER_MEL_FRAME = 160  # a hop of 10 ms, same section
MEL_FRAMES_PER_ENCODER_FRAME = 2  # the stride of Whisper's second convolution
SAMPLES_PER_ENCODER_FRAME = SAMPLES_PER_MEL_FRAME * MEL_FRAMES_PER_ENCODER_FRAME
ENCODER_FRAMES_PER_SECOND = SAMPLE_RATE // SAMPLES_PER_ENCODER_FRAME
# Trimmed windows: some silence behind the speech, as Whisper always heard, brings frames nearer to those of the full
# window; whole half seconds let many utterances share one length.
TRIMMED_MARGIN, TRIMMED_STEP = 10, 25  # encoder frames


class WindowExceeded(ValueError):
    """Audio is longer than the encoder's window."""


def seconds(num_samples: int) -> float:
    """Duration of ``num_samples`` samples in seconds."""
    return num_samples / SAMPLE_RATE


def num_samples(duration_s: float) -> int:
    """Samples in ``duration_s`` seconds, rounded to the nearest."""
    return round(duration_s * SAMPLE_RATE)


def encoder_frames(num_samples: int) -> int:
    """Encoder frames that hold ``num_samples`` samples: the last one may be partly filled, never dropped."""
    return _ceil_div(num_samples, SAMPLES_PER_ENCODER_FRAME)


def audio_tokens(num_frames: int, stack_factor: int) -> int:
    """Audio tokens that ``num_frames`` encoder frames become when ``stack_factor`` of them are joined."""
    return _ceil_div(num_frames, stack_factor)


@dataclass(frozen=True)
class Window:
    """What the encoder takes at once: ``num_frames`` is its number of positions (1,500 for Whisper's 30 s)."""

    num_frames: int

    @property
    def num_mel_frames(self) -> int:
        """Mel frames in the window."""
        return self.num_frames * MEL_FRAMES_PER_ENCODER_FRAME

    @property
    def num_samples(self) -> int:
        """Samples in the window."""
        return self.num_frames * SAMPLES_PER_ENCODER_FRAME

    @property
    def seconds(self) -> float:
        """Length of the window in seconds."""
        return seconds(self.num_samples)

    def trimmed(self, num_samples: int) -> Window:
        """The least window of whole half seconds that holds ``num_samples`` samples and the margin, or all of this one.

        It follows from the utterance's own length alone: whatever is encoded beside it changes nothing.
        """
        steps = _ceil_div(encoder_frames(num_samples) + TRIMMED_MARGIN, TRIMMED_STEP)
        return Window(min(self.num_frames, steps * TRIMMED_STEP))

    def check(self, num_samples: int, who: str) -> None:
        """Raise :class:`WindowExceeded`, with both lengths, when ``who`` has more samples than the window."""
        if num_samples > self.num_samples:
            raise WindowExceeded(
                f"{who} is {num_samples} samples ({seconds(num_samples):.2f} s), the encoder's window holds "
                f"{self.num_samples} ({self.seconds:.2f} s, {self.num_frames} frames). Nothing is cut in silence: "
                "set audio.long_audio to 'join' (consecutive windows), 'reject' or 'truncate'."
            )


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
