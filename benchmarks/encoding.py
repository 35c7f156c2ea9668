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
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from benchmarks import harness, mini
from benchmarks.harness import Figure
from graft.lengths import SAMPLE_RATE, SAMPLES_PER_ENCODER_FRAME, encoder_frames
from graft.model.config import FEATURE_DTYPE
from graft.model.encoder import SpeechEncoder, log_mels

BATCH = 16  # the default of audio.encode_batch_size
TINY = {
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_layers": 1,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 1536,
    "num_mel_bins": 80,
}
GEMM = [(384, 384)] * 4 + [(384, 1536), (1536, 384)]


def report() -> Iterator[Figure]:
    """Mels alone, then mels and encoder."""
    with tempfile.TemporaryDirectory() as folder:
        whisper_tiny(Path(folder))
        encoder = SpeechEncoder(folder, harness.fast_dtype())
    clips = waveforms(2 * BATCH)
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


def whisper_tiny(folder: Path) -> None:
    """A random Whisper of the tiny model's encoder."""
    torch.manual_seed(1)
    WhisperForConditionalGeneration(WhisperConfig(**TINY)).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=TINY["num_mel_bins"]).save_pretrained(folder)


def waveforms(count: int) -> list[np.ndarray]:
    """Noise as long as the first clips of the fixed list."""
    chance = np.random.default_rng(1)
    samples = [frames * SAMPLES_PER_ENCODER_FRAME for frames in mini.clip_frames()[:count]]
    return [chance.standard_normal(size).astype(np.float32) * 0.1 for size in samples]


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
