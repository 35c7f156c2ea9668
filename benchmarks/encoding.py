"""Encoding speech: mels and the frames of a whisper-tiny-shaped encoder, ours against what others call.

Ours is what ``shards/precompute.py`` calls: ``LogMels`` and ``SpeechEncoder.encode``, over full windows (exact) and
over trimmed ones. The peers call Hugging Face's extractor as its documentation shows, one clip at a time, and then
stock ``WhisperEncoder`` or CTranslate2's int8 ``Whisper.encode`` on the same batches. Seconds are of speech.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from benchmarks import harness, mini
from benchmarks.harness import Figure
from benchmarks.shapes import WHISPER_TINY
from benchmarks.whisper import noise, random_whisper
from graft.data import shard_format
from graft.lengths import (
    ENCODER_FRAMES_PER_SECOND,
    SAMPLE_RATE,
    SAMPLES_PER_ENCODER_FRAME,
    encoder_frames,
)
from graft.model.config import FEATURE_DTYPE
from graft.model.encoder import SpeechEncoder, load_encoder

CLIP_S, TURBO_SIZE = 10, 1280  # of the counted bytes: seconds of a clip, and a frame of whisper-large-v3-turbo
BATCH = 16  # the default of audio.encode_batch_size
REPEATS = 10  # of the mels: threads of the side before wait busily for some milliseconds, which must not count
GEMM = [(384, 384)] * 4 + [(384, 1536), (1536, 384)]


HF, CT2 = "Hugging Face's extractor and encoder", "Hugging Face's extractor and CTranslate2's int8 encoder"
COMPARED = (  # figure, slower side, faster side, target, what is told
    ("enc.mel", "hf mels", "our mels", ">= 4", "full 30 s windows, one thread, ours / Hugging Face's extractor"),
    ("enc.tiny", "hf frames", "our frames", ">= 1.5", f"full 30 s windows, ours / {HF}"),
    ("enc.tiny.trimmed", "hf frames", "trimmed frames", ">= 3", f"trimmed windows, ours / {HF} over full ones"),
    ("enc.tiny.ct2", "ct2 frames", "our frames", ">= 1.0", f"full 30 s windows, ours / {CT2}"),
    ("enc.tiny.ct2.trimmed", "ct2 frames", "trimmed frames", "", f"trimmed windows, ours / {CT2} over full ones"),
)


def report() -> Iterator[Figure]:
    """Bytes, mels alone, then mels and encoder."""
    yield from bytes_per_hour()
    with tempfile.TemporaryDirectory() as folder:
        random_whisper(Path(folder) / "hf", WHISPER_TINY)
        words = str(Path(folder) / "hf"), harness.fast_dtype(), "cpu"
        full, trimmed, stock = SpeechEncoder(*words), SpeechEncoder(*words, "trimmed"), load_encoder(*words)
        ct2, version = ctranslate2_frames(Path(folder) / "hf", Path(folder) / "ct2", full.extractor)
    clips = noise([frames * SAMPLES_PER_ENCODER_FRAME for frames in mini.clip_frames()[:BATCH]])

    def theirs() -> torch.Tensor:
        return hf_frames(stock, full.extractor, clips)

    facts = compare(theirs(), full, trimmed, clips)
    sides: dict[str, Callable[[], Any]] = {
        "our mels": repeated(lambda: full.log_mels(clips)),
        "hf mels": repeated(lambda: hf_mels(full.extractor, clips)),
        "our frames": lambda: full.encode(clips),
        "hf frames": theirs,
        "trimmed frames": lambda: trimmed.encode(clips),
    }
    if ct2:
        sides["ct2 frames"] = lambda: ct2(clips)
    taken = harness.rounds(sides, harness.gemm_probe(GEMM, harness.fast_dtype()))
    busiest = harness.busiest(sides["our frames"], most=3)
    for name, slower, faster, target, what in COMPARED:
        if slower not in sides:
            continue
        value, agrees, clocks = harness.ratio(taken, slower, faster)
        heard = sum(map(len, clips)) / SAMPLE_RATE * (REPEATS if "mels" in faster else 1)
        speed = heard / min(r.spent[faster].wall for r in taken)
        told = {**clocks, "audio s/s": speed, **facts, "time of our full windows": busiest, "CTranslate2": version}
        yield Figure(name, value, "x", what, target, agrees, told)


def bytes_per_hour() -> Iterator[Figure]:
    """What an hour of speech takes in shards, as safetensors of ten-second clips; tar headers come on top."""
    frames = torch.zeros(CLIP_S * ENCODER_FRAMES_PER_SECOND, TURBO_SIZE)
    for dtype in shard_format.DTYPES:
        size = len(shard_format.encode(frames, dtype)) * 3600 // CLIP_S
        what = f"an hour of speech in {dtype} frames of {TURBO_SIZE} numbers (large-v3-turbo), clips of {CLIP_S} s"
        yield Figure(f"count.bytes_per_hour.{dtype}", size / 1e6, "MB", what, facts={"bytes": f"{size:,}"})


def repeated(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same call in one thread, as a worker that prepares data would make it, REPEATS times."""
    return harness.in_one_thread(lambda: [call() for _ in range(REPEATS)])


def hf_mels(extractor: WhisperFeatureExtractor, batch: list[np.ndarray]) -> torch.Tensor:
    """Log-mels (B, n_mels, 3000), clip by clip."""
    return torch.cat([extractor(w, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features for w in batch])


@torch.no_grad()
def hf_frames(encoder: WhisperEncoder, extractor: WhisperFeatureExtractor, batch: list[np.ndarray]) -> torch.Tensor:
    """Frames (B, 1500, D)."""
    return encoder(hf_mels(extractor, batch).to(encoder.dtype)).last_hidden_state


def ctranslate2_frames(
    base: Path, made: Path, extractor: WhisperFeatureExtractor
) -> tuple[Callable[[list[np.ndarray]], np.ndarray] | None, str]:
    """A call that gives frames (B, 1500, D) by CTranslate2 in int8, with its version; or None and the reason."""
    if importlib.util.find_spec("ctranslate2") is None:
        return None, "left out: not installed (the extra 'bench' has it)"
    import ctranslate2

    try:
        ctranslate2.converters.TransformersConverter(str(base)).convert(str(made), quantization="int8")
        threads = torch.get_num_threads()
        model = ctranslate2.models.Whisper(str(made), device="cpu", compute_type="int8", intra_threads=threads)
    except (RuntimeError, ValueError, ImportError) as error:  # no int8 on this CPU, or a converter of another time
        return None, f"left out: {type(error).__name__}: {error}"

    def frames(batch: list[np.ndarray]) -> np.ndarray:
        mels = ctranslate2.StorageView.from_array(hf_mels(extractor, batch).numpy())
        return np.asarray(model.encode(mels))  # on the CPU a view of the result, which is awaited here

    return frames, ctranslate2.__version__


def compare(
    theirs: torch.Tensor, full: SpeechEncoder, trimmed: SpeechEncoder, batch: list[np.ndarray]
) -> dict[str, float]:
    """How far our frames are from Hugging Face's; AssertionError if those of full windows are others."""
    theirs = theirs.to(FEATURE_DTYPE).float()
    counts = [encoder_frames(len(waveform)) for waveform in batch]
    exact = torch.cat([row[:count] for row, count in zip(theirs, counts, strict=True)])
    ours, shorter = (torch.cat(encoder.encode(batch)).float() for encoder in (full, trimmed))
    worst = (ours - exact).abs().max().item()
    assert worst <= 0.05, f"frames differ by {worst}"
    relative = ((shorter - exact).norm() / exact.norm()).item()
    return {"frames differ by": worst, "trimmed ones, relatively, by": relative}
