"""A random Whisper in stock Hugging Face format, and noise for it to hear."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from benchmarks.shapes import EncoderShape


def random_whisper(folder: Path, shape: EncoderShape, dtype: torch.dtype = torch.float32) -> None:
    """A folder that :class:`graft.model.encoder.SpeechEncoder` reads."""
    torch.manual_seed(1)
    config = WhisperConfig(**shape.whisper_config())
    WhisperForConditionalGeneration(config).to(dtype).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=shape.num_mel_bins).save_pretrained(folder)


def noise(num_samples: Sequence[int]) -> list[np.ndarray]:
    """Waveforms (S_i,) of these lengths."""
    chance = np.random.default_rng(1)
    return [chance.standard_normal(size).astype(np.float32) * 0.1 for size in num_samples]
