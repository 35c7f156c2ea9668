"""Encoding speech: mels and the frames of a whisper-tiny-shaped encoder, ours against Hugging Face's own calls.

Ours is what ``shards/precompute.py`` calls: ``log_mels`` and ``SpeechEncoder.encode``. The peer calls the extractor as
its documentation shows, one clip at a time, and stock ``WhisperEncoder`` on the same batches. Seconds are of speech.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import WhisperFeatureExtractor

from benchmarks import harness, mini
from benchmarks.harness import Figure
from benchmarks.shapes import WHISPER_TINY
from benchmarks.whisper import noise, random_whisper
from graft.lengths import SAMPLE_RATE, SAMPLES_PER_ENCODER_FRAME, encoder_frames
from graft.model.config import FEATURE_DTYPE
from graft.model.encoder import SpeechEncoder, log_mels

BATCH = 16  # the default of audio.encode_batch_size
GEMM = [(384, 384)] * 4 + [(384, 1536), (1536, 384)]


def report() -> Iterator[Figure]:
    """Mels alone, then mels and encoder."""
    with tempfile.TemporaryDirectory() as folder:
        random_whisper(Path(folder), WHISPER_TINY)
        encoder = SpeechEncoder(folder, harness.fast_dtype())
    clips = noise([frames * SAMPLES_PER_ENCODER_FRAME for frames in mini.clip_frames()[: 2 * BATCH]])
    batches = [clips[i : i + BATCH] for i in range(0, len(clips), BATCH)]
    facts = compare(encoder, batches[0])
    sides = {
        "our mels": lambda: [log_mels(encoder.extractor, batch, encoder.window) for batch in batches],
        "hf mels": lambda: [hf_mels(encoder.extractor, batch) for batch in batches],
        "our frames": lambda: [encoder.encode(batch) for batch in batches],
        "hf frames": lambda: [hf_frames(encoder, batch) for batch in batches],
    }
    taken = harness.rounds(sides, harness.gemm_probe(GEMM, harness.fast_dtype()))
    for name, side, target, peer in (
        ("enc.mel", "mels", ">= 4", "Hugging Face's extractor"),
        ("enc.tiny", "frames", ">= 1.5", "Hugging Face's extractor and encoder"),
    ):
        value, agrees, clocks = harness.ratio(taken, f"hf {side}", f"our {side}")
        speed = sum(map(len, clips)) / SAMPLE_RATE / min(r.spent[f"our {side}"].wall for r in taken)
        told = {**clocks, "audio s/s": speed, **facts, "CTranslate2": "owed: not installed"}
        yield Figure(name, value, "x", f"full 30 s windows, ours / {peer}", target, agrees, told)


def hf_mels(extractor: WhisperFeatureExtractor, batch: list[np.ndarray]) -> torch.Tensor:
    """Log-mels (B, n_mels, 3000), clip by clip."""
    return torch.cat([extractor(w, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features for w in batch])


@torch.no_grad()
def hf_frames(encoder: SpeechEncoder, batch: list[np.ndarray]) -> torch.Tensor:
    """Frames (B, 1500, D)."""
    return encoder.model(hf_mels(encoder.extractor, batch).to(encoder.dtype)).last_hidden_state


def compare(encoder: SpeechEncoder, batch: list[np.ndarray]) -> dict[str, float]:
    """How far our frames are from Hugging Face's; AssertionError if they are others."""
    theirs = hf_frames(encoder, batch).to(FEATURE_DTYPE).float()
    ours = encoder.encode(batch)
    counts = [encoder_frames(len(waveform)) for waveform in batch]
    worst = max((a.float() - b[:n]).abs().max().item() for a, b, n in zip(ours, theirs, counts, strict=True))
    assert worst <= 0.05, f"frames differ by {worst}"
    return {"frames differ by": worst}
