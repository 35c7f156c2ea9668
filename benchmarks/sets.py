"""Feature sets of random features, written by the library's own writer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from graft.data.manifest import Utterance
from graft.data.shard_writer import SetDescription, ShardWriter, merge_parts
from graft.lengths import ENCODER_FRAMES_PER_SECOND, num_samples

SAMPLES_PER_SHARD = 512  # the default of data.samples_per_shard


def make_set(folder: Path, texts: Sequence[str], num_frames: int, frame_size: int) -> None:
    """A set with an utterance for each text, all of the same random features (F, D), in the format of precompute."""
    description = describe(frame_size)
    (folder / "parts").mkdir(parents=True)
    features = random_features(num_frames, frame_size)
    duration, parts = num_frames / ENCODER_FRAMES_PER_SECOND, []
    for number, first in enumerate(range(0, len(texts), SAMPLES_PER_SHARD)):
        with ShardWriter(folder, description, number) as writer:
            for position, text in enumerate(texts[first : first + SAMPLES_PER_SHARD], start=first):
                utterance = Utterance(f"u{position}", Path("u.wav"), duration, text)
                writer.add(utterance, features, num_samples(duration))
        parts.append(writer.part)
    merge_parts(folder, description, parts, [])


def describe(frame_size: int, fingerprint: str = "0" * 64) -> SetDescription:
    """What is said of a set besides its samples."""
    return SetDescription(
        name="bench",
        manifest_sha256="",
        samples_per_shard=SAMPLES_PER_SHARD,
        long_audio="reject",
        dtype="bfloat16",
        fingerprint=fingerprint,
        source="",
        precision="bf16",
        mel={},
        window_frames=1_500,
        frame_size=frame_size,
        encode_batch_size=1,
    )


def random_features(num_frames: int, frame_size: int) -> torch.Tensor:
    """(F, D) in bf16."""
    return torch.randn(num_frames, frame_size, generator=torch.Generator().manual_seed(1)).bfloat16()
