"""The voices of the tiny corpus: espeak-ng accents and variants, dealt to splits so that no variant is in two."""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import soundfile
import soxr

import invented_voices

SAMPLE_RATE = 16_000
MAX_DURATION_S = 3.7
KEPT_SILENCE_S = (0.05, 0.12)  # before and after the speech
SPEED_STEP = 15  # words a minute
INVENTED_SHARE = 0.6  # of what Whisper is pretrained on

ACCENTS = "en-us en-gb en-gb-scotland en-gb-x-rp en-gb-x-gbclan en-gb-x-gbcwmd en-029 en-us-nyc".split()

# Whispers, robots, croaks and cartoon voices of espeak-ng are in no split; relatives (steph, steph2, ...) share one.
# Train has none of these: all its voices are invented, and Whisper has heard none of them, so that a projector learns
# from frames that are as little sure of themselves as those of the voices it is tested with.
VARIANTS: dict[str, list[str]] = {
    "test": "m4 f4 Andy belinda boris paul linda Michael victor Alicia".split(),
    "valid": "m6 f2 caleb shelby ed Mario Jacky sandro".split(),
    "pretraining": (
        "m1 m2 m3 m5 m7 m8 f1 f3 f5 Alex Andrea Annie Denis Diogo Gene Gene2 Henrique Hugo Lee Marco Mike adam anika "
        "announcer antonio aunty benjamin david edward edward2 grandma grandpa gustave iven iven2 iven3 iven4 john "
        "klatt klatt2 klatt3 marcelo max michel miguel norbert pablo pedro quincy rob robert steph steph2 steph3 travis"
    ).split(),
}
INVENTED: dict[str, range] = {"pretraining": range(600), "train": range(600, 2_600)}


@dataclass(frozen=True)
class Voice:
    """One way of speaking: ``pitch`` is espeak's 0-99, ``speed`` is in words a minute."""

    accent: str
    variant: str
    pitch: int
    speed: int

    @property
    def speaker(self) -> str:
        return f"{self.accent}+{self.variant}"


def draw_voice(split: str, rng: Random) -> Voice:
    """A voice of ``split``: its accent, pitch and speed are free, its variant belongs to the split."""
    return Voice(rng.choice(ACCENTS), draw_variant(split, rng), rng.randint(25, 75), rng.randint(130, 185))


def draw_variant(split: str, rng: Random) -> str:
    """A variant of ``split``, named or invented."""
    if split == "train" or (split == "pretraining" and rng.random() < INVENTED_SHARE):
        return invented_voices.invented(rng.choice(INVENTED[split]))
    return rng.choice(VARIANTS[split])


def synthesise(text: str, voice: Voice) -> np.ndarray:
    """Speak ``text``: float32 (samples,) at 16 kHz with tidy ends; spoken faster where it would be too long."""
    for speed in range(voice.speed, 400, SPEED_STEP):
        waveform = trim_silence(run_espeak(text, voice, speed))
        if len(waveform) <= MAX_DURATION_S * SAMPLE_RATE:
            return waveform
    raise ValueError(f"{text!r} is longer than {MAX_DURATION_S} s at every speed: use a shorter sentence")


def run_espeak(text: str, voice: Voice, speed: int) -> np.ndarray:
    """The raw output of ``espeak-ng`` at 16 kHz, float32 (samples,)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "speech.wav")
        command = ["espeak-ng", "-v", voice.speaker, "-p", str(voice.pitch), "-s", str(speed), "-w", str(path), text]
        try:
            is_invented = invented_voices.is_invented(voice.variant)
            environment = invented_voices.prepare(voice.variant, path.parent) if is_invented else {}
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment})
        except FileNotFoundError:
            raise ValueError("espeak-ng is not installed (Debian: apt-get install espeak-ng)") from None
        waveform, sample_rate = soundfile.read(path, dtype="float32")
    return soxr.resample(waveform, sample_rate, SAMPLE_RATE)


def trim_silence(waveform: np.ndarray, threshold: float = 0.01) -> np.ndarray:
    """Cut silence at both ends of (samples,) down to ``KEPT_SILENCE_S``; zeros are added where there was less."""
    loud = np.flatnonzero(np.abs(waveform) > threshold * np.abs(waveform).max())
    before, after = (int(seconds * SAMPLE_RATE) for seconds in KEPT_SILENCE_S)
    padded = np.pad(waveform, (before, after))
    return padded[loud[0] : loud[-1] + 1 + before + after]
