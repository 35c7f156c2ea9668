"""Reading features from shards, in one thread, against stock webdataset and against the least that reading can be.

Ours is read by its place and checked by its digest. The peer is webdataset decoding the same features as ``.pth``, as
peers store them, unchecked. The least is ``readinto`` of the same bytes, sample after sample into one buffer that the
processor's cache holds. All from the page cache. What the digest alone takes stands beside them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import webdataset

from benchmarks import harness
from benchmarks.harness import Figure
from benchmarks.sets import make_set, random_features
from graft.data.shard_format import FeatureSet, digest_of

NUM_SAMPLES, NUM_FRAMES, FRAME_SIZE = 100, 500, 1_280  # 10 s clips of the large encoder
MEGABYTES = NUM_SAMPLES * NUM_FRAMES * FRAME_SIZE * 2 / 1e6
PTH_TAR = "pth.tar"


def report() -> Iterator[Figure]:
    """Both ratios, and the megabytes a second behind them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_set(folder, ["text"] * NUM_SAMPLES, NUM_FRAMES, FRAME_SIZE)
        make_pth(folder)
        sides = {
            "ours": lambda: complete(read_ours(folder)),
            "webdataset": lambda: complete(read_webdataset(folder / PTH_TAR)),
            "readinto": lambda: read_into(folder),
            "digest": lambda: check_only(folder),
        }
        taken = harness.rounds(sides, harness.gemm_probe([(512, 512)], torch.float32))
    speeds = {f"{side} MB/s": MEGABYTES / min(r.spent[side].wall for r in taken) for side in sides}
    for name, peer, target, what in (
        ("io.read", "webdataset", ">= 5", "checked by digest, ours / webdataset decoding .pth, unchecked"),
        ("io.read.readinto", "readinto", ">= 0.45", "checked by digest, ours / readinto into one buffer, unchecked"),
    ):
        value, agrees, clocks = harness.ratio(taken, peer, "ours")
        clocks |= {"readinto / webdataset": speeds["readinto MB/s"] / speeds["webdataset MB/s"]}
        yield Figure(name, value, "x", f"features from page cache, {what}", target, agrees, {**clocks, **speeds})


def complete(num_frames: int) -> None:
    """Reading must have given every frame."""
    assert num_frames == NUM_SAMPLES * NUM_FRAMES, "a sample is missing"


def read_ours(folder: Path) -> int:
    """Frames read through an opened set."""
    feature_set = FeatureSet.open(folder)
    return sum(feature_set.read(i).shape[0] for i in range(len(feature_set)))


def read_webdataset(tar: Path) -> int:
    """Frames read by webdataset's own decoding."""
    samples = webdataset.WebDataset([str(tar)], shardshuffle=False).decode()
    return sum(sample["pth"].shape[0] for sample in samples)


def read_into(folder: Path) -> None:
    """The bytes of every sample, where they stand in the tars, into one buffer."""
    entries = FeatureSet.open(folder).entries
    buffer = memoryview(bytearray(max(entry.size for entry in entries)))
    with (folder / entries[0].shard).open("rb", buffering=0) as file:
        for entry in entries:
            file.seek(entry.offset)
            assert file.readinto(buffer[: entry.size]) == entry.size, "a sample was cut"


def check_only(folder: Path) -> None:
    """The digest of as many bytes, of one sample that the cache holds."""
    feature_set = FeatureSet.open(folder)
    data, expected = feature_set.read_bytes(0), feature_set.entries[0].xxh3
    assert all(digest_of(data) == expected for _ in range(NUM_SAMPLES))


def make_pth(folder: Path) -> None:
    """The same features as peers store them."""
    features = random_features(NUM_FRAMES, FRAME_SIZE)
    with webdataset.TarWriter(str(folder / PTH_TAR)) as tar:
        for number in range(NUM_SAMPLES):
            tar.write({"__key__": f"u{number}", "pth": features})
