"""Connected digits from recordings of single ones: the folder of the Free Spoken Digit Dataset as utterances.

A recording is ``{digit}_{speaker}_{index}.wav`` or ``.flac``; by the data set's own split, index 0-4 is test and the
rest is train.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import soundfile
import soxr

from augmentation import SAMPLE_RATE
from grammar import DIGITS
from speech_set import Draw, SpeechSet

SUFFIXES = {".wav", ".flac"}
NUM_TEST_INDICES = 5
MAX_SAMPLES = int(3.9 * SAMPLE_RATE)
PAUSE_S = (0.05, 0.25)
NUM_JOINED = (2, 5)

Recordings = dict[str, list[tuple[str, np.ndarray]]]
"""By speaker: (word, float32 waveform (samples,) at 16 kHz) of every recording."""


def read_recordings(folder: Path, split: str) -> Recordings:
    """All recordings of ``train`` or ``test``."""
    paths = sorted(path for path in folder.glob("*_*_*") if path.suffix in SUFFIXES)
    if not paths:
        raise ValueError(
            f"{folder} holds no recordings like 7_george_12.wav or .flac: give the folder of the Free Spoken Digit "
            "Dataset (recordings/ of github.com/Jakobovski/free-spoken-digit-dataset) with --recordings"
        )
    recordings: Recordings = {}
    for path in paths:
        digit, speaker, index = path.stem.split("_")
        if (int(index) < NUM_TEST_INDICES) == (split == "test"):
            recordings.setdefault(speaker, []).append((DIGITS[int(digit)], read_at_16_khz(path)))
    return recordings


def read_at_16_khz(path: Path) -> np.ndarray:
    waveform, sample_rate = soundfile.read(path, dtype="float32")
    return soxr.resample(waveform, sample_rate, SAMPLE_RATE)


def only(recordings: Recordings, speakers: Collection[str]) -> Recordings:
    """The recordings of some speakers."""
    return {speaker: takes for speaker, takes in recordings.items() if speaker in speakers}


def draw_digits(recordings: Recordings) -> Draw:
    """A source of connected digits: two to five recordings of one speaker with short pauses between them."""
    speakers = sorted(recordings)

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, str]:
        takes = recordings[speakers[rng.integers(len(speakers))]]
        count = rng.integers(NUM_JOINED[0], NUM_JOINED[1] + 1)
        return join([takes[rng.integers(len(takes))] for _ in range(count)], rng)

    return draw


def join(takes: list[tuple[str, np.ndarray]], rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """One utterance of several takes; those that no longer fit into the window are left out."""
    pieces, words = [takes[0][1]], [takes[0][0]]
    for word, waveform in takes[1:]:
        pause = np.zeros(int(rng.uniform(*PAUSE_S) * SAMPLE_RATE), dtype=np.float32)
        if sum(map(len, pieces)) + len(pause) + len(waveform) > MAX_SAMPLES:
            break
        pieces += [pause, waveform]
        words.append(word)
    return np.concatenate(pieces), " ".join(words)


def connected_set(recordings: Recordings, utterances_a_speaker: int, seed: int) -> SpeechSet:
    """A fixed set for scoring, equally many utterances of each speaker."""
    speech = SpeechSet()
    for speaker in sorted(recordings):
        rng, draw = np.random.default_rng(seed), draw_digits(only(recordings, [speaker]))
        for _ in range(utterances_a_speaker):
            speech.append(*draw(rng))
    return speech
