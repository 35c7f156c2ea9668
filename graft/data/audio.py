"""Sound file -> waveform: 16 kHz mono float32, or an error that says what is wrong with the file.

Decoding is libsndfile's (WAV, FLAC, OGG, Opus, MP3), resampling soxr's. Nothing unreadable becomes silence and
nothing is cut without a word.

S: samples at 16 kHz
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import soxr

from graft.lengths import SAMPLE_RATE, Window

LongAudio = Literal["reject", "join", "truncate"]

BLOCK = 1 << 20  # frames per read: memory follows what the file holds, not what its header claims
TOO_LONG_S = 0.02  # a file this much longer than its manifest says is a rounded duration (one encoder frame)
TOO_SHORT_S, TOO_SHORT_SHARE = 0.1, 0.01  # and this much shorter, in s or of the whole; beyond it is damaged


class AudioError(ValueError):
    """A sound file cannot be used; the message names it and the reason."""


def load_audio(path: Path, offset: float = 0.0, duration: float | None = None) -> np.ndarray:
    """The waveform (S,) of a file, or of the piece of it that starts at ``offset`` and lasts ``duration`` seconds.

    Raises:
        AudioError: missing, unreadable, empty, shorter than ``offset + duration``, or with NaN or infinite samples.
    """
    samples, rate = _read(path, offset, duration)
    if not len(samples):
        raise AudioError(f"{path}: holds no samples{f' after {offset:g} s' if offset else ''}")
    check_length(path, len(samples) / rate, duration)
    if not np.isfinite(samples).all():
        raise AudioError(f"{path}: holds NaN or infinite samples")
    waveform = samples if rate == SAMPLE_RATE else soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")
    if not len(waveform):
        raise AudioError(f"{path}: {len(samples)} samples at {rate} Hz are too few to resample")
    return np.ascontiguousarray(waveform, dtype=np.float32)


def change_speed(waveform: np.ndarray, factor: float) -> np.ndarray:
    """(S,) played ``factor`` times as fast, (S / factor,): pitch and formants move with it, as on a turntable."""
    return np.ascontiguousarray(soxr.resample(waveform, SAMPLE_RATE * factor, SAMPLE_RATE, quality="HQ"))


def header_duration(path: Path) -> float:
    """Length of a sound file in seconds, from its header alone.

    Raises:
        AudioError: missing, unreadable or empty.
    """
    with _open(path) as file:
        if file.frames <= 0:
            raise AudioError(f"{path}: holds no samples")
        return file.frames / file.samplerate


def piece_duration(path: Path, offset: float = 0.0, duration: float | None = None) -> float:
    """Seconds that :func:`load_audio` will give of the same piece, from the file's header alone.

    Raises:
        AudioError: as it would, but for what only its samples tell.
    """
    rest = header_duration(path) - offset
    check_length(path, rest, duration)
    return rest if duration is None or rest - duration <= TOO_LONG_S else duration


def check_length(path: Path, found_s: float, expected_s: float | None) -> None:
    """Refuse a file that holds less than its manifest line says: it is damaged, or another one.

    Raises:
        AudioError: names both lengths.
    """
    if found_s <= 0:
        raise AudioError(f"{path}: holds no samples where its manifest line begins")
    if expected_s is not None and found_s < expected_s - max(TOO_SHORT_S, TOO_SHORT_SHARE * expected_s):
        raise AudioError(f"{path}: {found_s:.3f} s of audio, its manifest line says {expected_s:g} s")


def windows(waveform: np.ndarray, window: Window, policy: LongAudio, who: str = "audio") -> list[np.ndarray]:
    """What the encoder is given for a waveform (S,): pieces no longer than its window.

    ``reject`` raises :class:`graft.lengths.WindowExceeded`, ``join`` gives consecutive windows whose frames are to
    be joined, ``truncate`` the first window.
    """
    size = window.num_samples
    if policy == "reject":
        window.check(len(waveform), who)
    if policy == "truncate":
        return [waveform[:size]]
    return [waveform[start : start + size] for start in range(0, len(waveform), size)]


def read_pcm(path: Path) -> tuple[np.ndarray, int]:
    """All samples of a mono file as int16 (N,), untouched, and their rate in Hz.

    Raises:
        AudioError: missing, unreadable, or of several channels.
    """
    with _open(path) as file:
        if file.channels != 1:
            raise AudioError(f"{path}: {file.channels} channels, a mono recording was expected")
        return file.read(dtype="int16"), file.samplerate


def write_pcm(path: Path, samples: np.ndarray, rate: int) -> None:
    """Write int16 samples (N,) as a sound file of the kind that its suffix names."""
    soundfile.write(str(path), samples, rate)


def _open(path: Path) -> soundfile.SoundFile:
    if not Path(path).is_file():
        raise AudioError(f"{path}: no such file")
    if Path(path).stat().st_size == 0:
        raise AudioError(f"{path}: empty file (0 bytes)")
    try:
        return soundfile.SoundFile(str(path))
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a headerless .raw file
        raise AudioError(f"{path}: not readable as audio: {getattr(error, 'error_string', error)}") from error


def _read(path: Path, offset: float, duration: float | None) -> tuple[np.ndarray, int]:
    """Samples (N,), channels averaged, and their rate."""
    with _open(path) as file:
        rate = file.samplerate
        start, wanted = round(offset * rate), None if duration is None else round(duration * rate)
        if wanted is not None and file.frames - start - wanted <= TOO_LONG_S * rate:
            wanted = None  # the rest of the file, up to the rounding of its duration
        try:
            if start:
                file.seek(min(start, file.frames))
            blocks = _blocks(file, wanted)
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{path}: damaged: {error.error_string}") from error
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32), rate


def _blocks(file: soundfile.SoundFile, wanted: int | None) -> list[np.ndarray]:
    blocks: list[np.ndarray] = []
    while wanted is None or wanted > 0:
        block = file.read(BLOCK if wanted is None else min(BLOCK, wanted), dtype="float32", always_2d=True)
        if not len(block):
            break
        blocks.append(block.mean(axis=1))
        wanted = None if wanted is None else wanted - len(block)
    return blocks
