"""Waveform and mel augmentation for the pretraining of tiny Whispers; every choice comes from a passed generator.

Shapes: N samples at 16 kHz, B utterances, M mel bins, T mel frames (100 a second).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import soxr

SAMPLE_RATE = 16_000
TEMPO_WINDOW = 480  # samples


@dataclass(frozen=True)
class Augmentation:
    """How strongly to disturb. Ranges are (low, high); probabilities are 0..1."""

    speed: tuple[float, float] = (0.9, 1.1)
    tempo: tuple[float, float] = (1.0, 1.0)
    gain_db: tuple[float, float] = (-20.0, 2.0)
    snr_db: tuple[float, float] = (8.0, 40.0)
    noise_probability: float = 0.6
    filter_probability: float = 0.5
    tilt_db: float = 8.0
    low_cut_hz: tuple[float, float] = (20.0, 300.0)
    high_cut_hz: tuple[float, float] = (2_800.0, 8_000.0)
    echo_probability: float = 0.0
    time_masks: int = 2
    time_mask_frames: int = 16
    band_masks: int = 2
    band_mask_bins: int = 10


def disturb(waveform: np.ndarray, how: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Echo, filters, noise and gain on one float32 waveform (N,); the length stays."""
    if rng.random() < how.echo_probability:
        waveform = add_echo(waveform, rng)
    if rng.random() < how.filter_probability:
        waveform = shape_spectrum(waveform, how, rng)
    if rng.random() < how.noise_probability:
        waveform = add_noise(waveform, rng.uniform(*how.snr_db), rng)
    return (waveform * decibels(rng.uniform(*how.gain_db))).astype(np.float32)


def decibels(level: float | np.ndarray) -> float | np.ndarray:
    """Amplitude factor of a level in dB."""
    return 10.0 ** (level / 20)


def change_speed(waveform: np.ndarray, factor: float) -> np.ndarray:
    """Play (N,) ``factor`` times as fast, (N / factor,): pitch and formants move with it, as in resampling."""
    return soxr.resample(waveform, round(SAMPLE_RATE * factor), SAMPLE_RATE, quality="LQ")


def change_tempo(waveform: np.ndarray, factor: float) -> np.ndarray:
    """Speak (N,) ``factor`` times as fast at the same pitch, (about N / factor,), by WSOLA (similar pieces overlap)."""
    if len(waveform) <= 2 * TEMPO_WINDOW or factor == 1:
        return waveform
    hop, reach = TEMPO_WINDOW // 2, TEMPO_WINDOW // 4
    fade = np.hanning(TEMPO_WINDOW + 1)[:-1].astype(np.float32)
    padded = np.pad(waveform, (reach, 2 * TEMPO_WINDOW))
    result = np.zeros(int(len(waveform) / factor) + TEMPO_WINDOW, dtype=np.float32)
    continuation = padded[reach : reach + TEMPO_WINDOW]
    for start in range(0, len(result) - TEMPO_WINDOW, hop):
        target = min(int(start * factor), len(waveform) - 1)
        around = padded[target : target + TEMPO_WINDOW + 2 * reach]
        best = target + int(np.argmax(np.correlate(around, continuation)))
        result[start : start + TEMPO_WINDOW] += fade * padded[best : best + TEMPO_WINDOW]
        continuation = padded[best + hop : best + hop + TEMPO_WINDOW]
    return result


def shape_spectrum(waveform: np.ndarray, how: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """A random equaliser and a random band limit, as microphones and telephone lines have."""
    size = fast_length(len(waveform))
    hertz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    knots = np.geomspace(60, 8_000, 7)
    curve = np.interp(hertz, knots, rng.uniform(-how.tilt_db, how.tilt_db, len(knots)))
    low, high = rng.uniform(*how.low_cut_hz), rng.uniform(*how.high_cut_hz)
    octaves_outside = np.log2(np.maximum(np.maximum(low / np.maximum(hertz, 1), hertz / high), 1))
    spectrum = np.fft.rfft(waveform, size) * decibels(curve - 24 * octaves_outside)
    return np.fft.irfft(spectrum, size)[: len(waveform)].astype(np.float32)


def fast_length(length: int, unit: int = 1_000) -> int:
    """``length`` rounded up to a size the FFT is quick at."""
    return -(-length // unit) * unit


def add_noise(waveform: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Add noise between white and brown in colour, at a signal to noise ratio."""
    white = rng.standard_normal(len(waveform), dtype=np.float32)
    if rng.random() < 0.5:
        size = fast_length(len(white))
        slope = np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE), 50) ** -rng.uniform(0.2, 1.0)
        white = np.fft.irfft(np.fft.rfft(white, size) * slope, size)[: len(white)]
    level = np.sqrt(np.mean(waveform**2) / np.mean(white**2)) / decibels(snr_db)
    return waveform + level * white


def add_echo(waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A few decaying reflections within 80 ms, as a small room gives."""
    result = waveform.copy()
    for _ in range(rng.integers(1, 5)):
        delay = int(rng.uniform(0.004, 0.08) * SAMPLE_RATE)
        result[delay:] += rng.uniform(0.05, 0.4) * waveform[:-delay]
    return result


def mask_mel(mel: np.ndarray, how: Augmentation, rng: np.random.Generator) -> None:
    """SpecAugment in place: hide random spans of time and of frequency of (B, M, T) behind each utterance's mean."""
    for utterance in mel:
        mean = utterance.mean()
        for _ in range(how.time_masks):
            start, width = rng.integers(utterance.shape[1]), rng.integers(how.time_mask_frames + 1)
            utterance[:, start : start + width] = mean
        for _ in range(how.band_masks):
            start, width = rng.integers(utterance.shape[0]), rng.integers(how.band_mask_bins + 1)
            utterance[start : start + width] = mean
