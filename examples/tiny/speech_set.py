"""Speech in memory: int16 waveforms with their texts, and batches of it for the pretraining of a tiny Whisper."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

from augmentation import SAMPLE_RATE, Augmentation, change_speed, change_tempo, disturb


@dataclass
class SpeechSet:
    """Utterances in RAM: ``waveforms`` are int16 (samples,) at 16 kHz."""

    waveforms: list[np.ndarray] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def __add__(self, other: SpeechSet) -> SpeechSet:
        return SpeechSet(self.waveforms + other.waveforms, self.texts + other.texts)

    def utterance(self, index: int) -> tuple[np.ndarray, str]:
        """Waveform as float32 (samples,) in -1..1, and text."""
        return self.waveforms[index].astype(np.float32) / 32_768, self.texts[index]

    def append(self, waveform: np.ndarray, text: str) -> None:
        """Add a float waveform (samples,) in -1..1."""
        self.waveforms.append((np.clip(waveform, -1, 1) * 32_767).astype(np.int16))
        self.texts.append(text)


def read_manifest(path: Path) -> SpeechSet:
    """Read every utterance of a JSONL manifest whose audio is 16 kHz mono."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: make the corpus first, with examples/tiny/make_corpus.py")
    result = SpeechSet()
    for line in map(json.loads, path.read_text().splitlines()):
        with soundfile.SoundFile(path.parent / line["audio_filepath"]) as file:
            if file.samplerate != SAMPLE_RATE:
                raise ValueError(f"{line['audio_filepath']} is {file.samplerate} Hz, expected {SAMPLE_RATE} Hz")
            file.seek(round(line.get("offset", 0) * SAMPLE_RATE))
            waveform = file.read(round(line["duration"] * SAMPLE_RATE), dtype="float32")
        result.append(waveform, line["text"])
    return result


def save_cache(speech: SpeechSet, path: Path) -> None:
    """Write a set to one npz file, whole or not at all."""
    lengths = np.array([len(waveform) for waveform in speech.waveforms])
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, samples=np.concatenate(speech.waveforms), lengths=lengths, texts=np.array(speech.texts))
    partial.replace(path)


def load_cache(path: Path) -> SpeechSet:
    """Read what ``save_cache`` wrote."""
    stored = np.load(path)
    return SpeechSet(np.split(stored["samples"], np.cumsum(stored["lengths"])[:-1]), stored["texts"].tolist())


Draw = Callable[[np.random.Generator], tuple[np.ndarray, str]]


def joined(
    draw: Draw, how: Augmentation, max_samples: int, join_probability: float, rng: np.random.Generator
) -> tuple[np.ndarray, str]:
    """An augmented utterance; with ``join_probability`` one more behind it, and so on while ``max_samples`` holds them.

    Joined utterances fill the window, so that its later positions are trained as well as its first ones.
    """
    waveform, text = augmented(*draw(rng), how, max_samples, rng)
    while rng.random() < join_probability:
        following, more = augmented(*draw(rng), how, max_samples, rng)
        if len(waveform) + len(following) > max_samples:
            break
        waveform, text = np.concatenate([waveform, following]), f"{text} {more}"
    return waveform, text


def augmented(
    waveform: np.ndarray, text: str, how: Augmentation, max_samples: int, rng: np.random.Generator
) -> tuple[np.ndarray, str]:
    """One utterance with its speed and sound disturbed; never longer than ``max_samples``."""
    waveform = change_tempo(waveform, rng.uniform(*how.tempo))
    slowest = len(waveform) / max_samples
    waveform = change_speed(waveform, max(rng.uniform(*how.speed), slowest))[:max_samples]
    return disturb(waveform, how, rng), text
