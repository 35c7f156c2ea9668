"""Encoding speech with a large-v3-turbo-shaped encoder: waveforms on the host to frames on the host, mels on the GPU.

``enc.full`` pads every clip to the window, as Whisper was trained; its clips fill it. ``enc.trimmed`` encodes clips of
10 s as ``audio.window: trimmed`` does, over the half seconds that hold them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.bench import Bench, rate, ratio, share_of_gemm
from benchmarks.harness import CPU, Figure
from benchmarks.whisper import noise, random_whisper
from graft.data.loader import Prefetcher
from graft.lengths import SAMPLE_RATE
from graft.model.encoder import AudioWindow, SpeechEncoder

BATCH, NUM_BATCHES, CLIP_S = 64, 6, 10
SPEEDS = {"full": ">= 7800", "trimmed": ">= 7600"}


def full(bench: Bench) -> Iterator[Figure]:
    """Windows of 30 s, also against Hugging Face's own calls."""
    with tempfile.TemporaryDirectory() as folder:
        encoder = turbo(bench, Path(folder))
    batch = noise([encoder.window.num_samples] * bench.size(BATCH, 2))
    few = batch[: bench.size(8, 2)]
    mels = torch.randn(len(batch), bench.turbo.num_mel_bins, encoder.window.num_mel_frames, dtype=encoder.dtype)
    peers = {
        "hf with extractor": (lambda: stock(encoder, extracted(encoder, few)), len(few)),
        "hf encoder": (lambda: stock(encoder, mels.to(bench.device)), len(batch)),
        "hf with extractor on device": (lambda: stock(encoder, extracted(encoder, batch, bench.device)), len(batch)),
    }
    yield from figures(bench, "full", encoder, batch, peers)


def trimmed(bench: Bench) -> Iterator[Figure]:
    """Windows hardly longer than the clips."""
    with tempfile.TemporaryDirectory() as folder:
        encoder = turbo(bench, Path(folder), "trimmed")
    batch = noise([CLIP_S * SAMPLE_RATE] * bench.size(3 * BATCH, 2))
    yield from figures(bench, "trimmed", encoder, batch, {})


def figures(
    bench: Bench, kind: str, encoder: SpeechEncoder, batch: Sequence[np.ndarray], peers: dict[str, Any]
) -> Iterator[Figure]:
    """Hours of audio an hour, as precomputation encodes and with a second thread; ratios to peers."""
    batches = [batch] * bench.size(NUM_BATCHES, 1)
    sides: dict[str, Callable[[], Any]] = {
        "one thread": lambda: [encoder.encode(one) for one in batches],
        "two threads": lambda: in_threads(encoder, batches, 2),
    }
    sides |= {name: call for name, (call, _) in peers.items()}
    taken = bench.rounds(sides, bench.seven_b)
    clips = len(batch) * len(batches)
    frames = encoder.window_of(len(batch[0])).num_frames
    hours, flop = clips * len(batch[0]) / SAMPLE_RATE, clips * bench.turbo.flop(frames)
    for side, suffix, target in (("one thread", "", SPEEDS[kind]), ("two threads", ".two_threads", "")):
        facts = {"share of GEMM": share_of_gemm(taken, side, flop), "batch": len(batch), "clips": clips}
        what = (
            f"hours of audio an hour, {len(batch[0]) / SAMPLE_RATE:g} s clips, waveforms to frames on the host, {side}"
        )
        yield rate(f"enc.{kind}{suffix}", taken, side, hours, "audio-h/h", what, target, **facts)
    for (name, (_, count)), target in zip(peers.items(), (">= 5", "", ""), strict=False):
        value, steady, facts = ratio(taken, name, "one thread", clips / count)
        what = f"clips a second, waveforms to frames on the host / {name}, both in bf16"
        yield Figure(f"enc.{kind}.{name.replace(' ', '_')}_ratio", value, "x", what, target, steady, facts)


def turbo(bench: Bench, folder: Path, window: AudioWindow = "full") -> SpeechEncoder:
    """The encoder, random, in bf16 on the GPU."""
    random_whisper(folder, bench.turbo, torch.bfloat16)
    return SpeechEncoder(str(folder), torch.bfloat16, bench.device, window)


def in_threads(encoder: SpeechEncoder, batches: Sequence[Sequence[np.ndarray]], threads: int) -> None:
    """Several batches under way at a time, each thread on a CUDA stream of its own: copies run beside kernels."""

    def encode(batch: Sequence[np.ndarray]) -> list[torch.Tensor]:
        if encoder.device.type != "cuda":
            return encoder.encode(batch)
        with torch.cuda.stream(torch.cuda.Stream(encoder.device)):
            return encoder.encode(batch)

    for _ in Prefetcher(encode, batches, depth=threads, threads=threads):
        pass


def extracted(encoder: SpeechEncoder, batch: Sequence[np.ndarray], on: torch.device = CPU) -> torch.Tensor:
    """Mels (B, n_mels, M) by Hugging Face's extractor, clip by clip as its documentation has it."""
    make, said = encoder.extractor, {"sampling_rate": SAMPLE_RATE, "return_tensors": "pt", "device": str(on)}
    mels = [make(clip, **said).input_features for clip in batch]
    return torch.cat(mels).to(encoder.device, encoder.dtype)


@torch.inference_mode()
def stock(encoder: SpeechEncoder, mels: torch.Tensor) -> torch.Tensor:
    """Frames (B, F, D) on the host, by Hugging Face's encoder."""
    return encoder.model(mels).last_hidden_state.cpu()
