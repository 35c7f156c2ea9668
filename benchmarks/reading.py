"""Reading features from shards, checked, against stock webdataset decoding the same tars. A ratio of best times."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import webdataset
from safetensors.torch import load

from benchmarks import harness
from benchmarks.harness import Figure
from graft.data.manifest import Utterance
from graft.data.shard_format import FeatureSet
from graft.data.shard_writer import SetDescription, ShardWriter, merge_parts

NUM_SAMPLES, NUM_FRAMES, FRAME_SIZE = 100, 500, 1_280  # 10 s clips of the large encoder


def report() -> Iterator[Figure]:
    """The ratio, and the megabytes behind it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_set(folder)
        sides = {"ours": lambda: complete(read_ours(folder)), "webdataset": lambda: complete(read_webdataset(folder))}
        taken = harness.rounds(sides, harness.gemm_probe([(512, 512)], torch.float32))
    value, agrees, clocks = harness.ratio(taken, "webdataset", "ours")
    megabytes = NUM_SAMPLES * NUM_FRAMES * FRAME_SIZE * 2 / 1e6
    what = "features from page cache, CRC of every sample checked / stock webdataset, unchecked"
    facts = {**clocks, "MB/s": megabytes / min(r.spent["ours"].wall for r in taken)}
    yield Figure("io.read", value, "x", what, ">= 5", agrees, facts)


def complete(num_frames: int) -> None:
    """Reading must have given every frame."""
    assert num_frames == NUM_SAMPLES * NUM_FRAMES, "a sample is missing"


def read_ours(folder: Path) -> int:
    feature_set = FeatureSet.open(folder)
    return sum(feature_set.read(i).shape[0] for i in range(len(feature_set)))


def read_webdataset(folder: Path) -> int:
    tars = sorted(map(str, folder.glob("*.tar")))
    samples = webdataset.WebDataset(tars, shardshuffle=False)
    return sum(load(sample["safetensors"])["audio_features"].shape[0] for sample in samples)


def make_set(folder: Path) -> None:
    """A set of random features, in the format of ``shards/precompute.py``."""
    description = SetDescription(
        name="bench",
        manifest_sha256="",
        samples_per_shard=NUM_SAMPLES,
        long_audio="reject",
        dtype="bfloat16",
        fingerprint="0" * 64,
        source="",
        precision="bf16",
        mel={},
        window_frames=1_500,
        frame_size=FRAME_SIZE,
        encode_batch_size=1,
    )
    (folder / "parts").mkdir()
    features = torch.randn(NUM_FRAMES, FRAME_SIZE, generator=torch.Generator().manual_seed(1)).bfloat16()
    with ShardWriter(folder, description, 0) as writer:
        for number in range(NUM_SAMPLES):
            writer.add(Utterance(f"u{number}", Path("u.wav"), 10.0, "text"), features, 160_000)
    merge_parts(folder, description, [writer.part], [])
