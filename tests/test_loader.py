"""Features from shards and from audio, and having them ready in time."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.data.audio import AudioError
from graft.data.loader import MixedSource, OnlineSource, Prefetcher, ShardSource, read_samples
from graft.data.manifest import Manifest, Utterance
from graft.data.shard_format import DamagedShard, FeatureSet
from graft.lengths import Window, encoder_frames
from tests.test_shard_format import LENGTHS, features, write_set

WINDOW = Window(50)  # one second
RATE = 16_000


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    patience = time.monotonic() + 5
    while left := [t for t in threading.enumerate() if t not in before and t.is_alive()]:
        assert time.monotonic() < patience, f"threads left behind: {left}"
        time.sleep(0.01)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(), max_size=30), st.integers(1, 7), st.integers(1, 3))
def test_prefetching_changes_nothing(items: list[int], depth: int, threads: int) -> None:
    assert list(Prefetcher(lambda item: item * 3, items, depth, threads)) == [item * 3 for item in items]


def test_threads_have_their_own_number_of_torch_threads() -> None:
    """Fewer for light work, which takes none from the consumer, also from one that has never asked for its number."""
    seen: list[object] = []

    def consume() -> None:
        for wanted in (1, None, 2, None):
            with Prefetcher(lambda _: torch.get_num_threads(), range(4), threads=2, torch_threads=wanted) as ready:
                seen.append((wanted, *ready, torch.get_num_threads()))

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        consumer = threading.Thread(target=consume)
        consumer.start()
        consumer.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [(wanted, *[wanted or 3] * 4, 3) for wanted in (1, None, 2, None)]


def test_items_are_made_ahead_in_another_thread_and_no_further_than_depth() -> None:
    made: list[tuple[int, str]] = []

    def make(item: int) -> int:
        made.append((item, threading.current_thread().name))
        return item

    with Prefetcher(make, itertools.count(), depth=3) as ready:
        assert next(ready) == 0
        patience = time.monotonic() + 5
        while len(made) < 4 and time.monotonic() < patience:
            time.sleep(0.005)
        time.sleep(0.05)
        assert [item for item, _ in made] == [0, 1, 2, 3]
        assert all(name.startswith("prefetch") for _, name in made)


def test_an_error_comes_where_its_item_would_have() -> None:
    def make(item: int) -> int:
        if item == 2:
            raise AudioError("the third")
        return item

    ready = iter(Prefetcher(make, range(9), depth=4))
    assert [next(ready), next(ready)] == [0, 1]
    with pytest.raises(AudioError, match="the third"):
        next(ready)
    with pytest.raises(StopIteration):
        next(ready)


@pytest.mark.faults
@pytest.mark.parametrize("threads", [1, 3])
def test_no_memory_in_a_thread_comes_where_its_item_would_have(threads: int) -> None:
    """Also what is no ``Exception``: a thread that dies in silence would leave the training waiting for ever."""

    def make(item: int) -> int:
        if item == 1:
            return len(bytearray(sys.maxsize))  # no machine has so much
        if item == 3:
            raise SystemExit("a thread that leaves")
        return item

    for first, error in ((0, MemoryError), (2, SystemExit)):
        with Prefetcher(make, range(first, 9), depth=4, threads=threads) as ready:
            assert next(ready) == first
            with pytest.raises(error):
                next(ready)


def test_an_error_of_the_items_comes_through() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise RuntimeError("no more plan")

    with pytest.raises(RuntimeError, match="no more plan"):
        list(Prefetcher(lambda item: item, items()))


def test_leaving_early_ends_the_threads() -> None:
    started: list[int] = []
    with Prefetcher(started.append, itertools.count(), depth=5, threads=2) as ready:
        next(ready)
    assert len(started) <= 6


def test_closing_without_having_begun() -> None:
    Prefetcher(lambda item: item, range(3)).close()


@pytest.mark.parametrize(("depth", "threads"), [(0, 1), (1, 0)])
def test_impossible_depths(depth: int, threads: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Prefetcher(lambda item: item, [], depth, threads)


def test_a_set_as_a_source(tmp_path: Path) -> None:
    source = ShardSource(FeatureSet.open(write_set(tmp_path / "odd")))
    order = [4, 0, 2]
    assert [len(f) for f in source.read_many(order)] == [LENGTHS[i] for i in order]
    samples = read_samples(source, order)
    assert [sample.id for sample in samples] == ["u4.x", "u0.x", "u2.x"]
    assert all(torch.equal(s.audio_features, features(i)) for s, i in zip(samples, order, strict=True))
    assert samples[0].text == "text 4 é" and samples[0].instruction == "Write."


def test_the_first_damaged_sample_of_a_micro_batch_is_the_one_told(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "odd")
    whole = FeatureSet.open(folder)
    for position in (3, 1):
        entry = whole.entries[position]
        with (folder / entry.shard).open("r+b") as shard:
            shard.seek(entry.offset + entry.size - 1)
            last = shard.read(1)
            shard.seek(entry.offset + entry.size - 1)
            shard.write(bytes([last[0] ^ 1]))
    with pytest.raises(DamagedShard, match="features of 'u1.x'"):
        ShardSource(FeatureSet.open(folder)).read_many([0, 1, 2, 3])


def two_sets(folder: Path) -> dict[str, ShardSource]:
    """The same ids in both."""
    return {name: ShardSource(FeatureSet.open(write_set(folder / name))) for name in ("clean", "noisy")}


def test_several_sets_as_one(tmp_path: Path) -> None:
    sets = two_sets(tmp_path)
    source = MixedSource(sets)
    assert source.sizes == [5, 5] and len(source.entries) == 10
    ids = [f"{split}/u{number}.x" for split in ("clean", "noisy") for number in range(5)]
    assert [entry.id for entry in source.entries] == [source.entries[i].id for i in range(10)] == ids
    order = [7, 0, 9, 2, 7]
    samples = read_samples(source, order)
    assert [sample.id for sample in samples] == [ids[i] for i in order]
    assert all(torch.equal(s.audio_features, features(i % 5)) for s, i in zip(samples, order, strict=True))
    assert samples[0].text == "text 2 é" and samples[0].instruction == "Write."
    assert sets["clean"].entries[0].id == "u0.x", "the sets themselves were changed"


@pytest.mark.parametrize("index", [10, -1])
def test_no_such_utterance_in_a_mixture(tmp_path: Path, index: int) -> None:
    with pytest.raises(IndexError):
        MixedSource(two_sets(tmp_path)).entries[index]


def test_shards_and_audio_in_one_mixture(tmp_path: Path) -> None:
    """Each source is asked once, for its own."""
    online = OnlineSource(manifest(tmp_path, a=0.5, b=0.21), encode, window=WINDOW)
    source = MixedSource({"heard": online, "stored": two_sets(tmp_path)["clean"]})
    assert [len(f) for f in source.read_many([3, 1, 2, 0])] == [LENGTHS[1], 11, LENGTHS[0], 25]
    assert [len(f) for f in source.read_many([4])] == [LENGTHS[2]]


def test_an_empty_set_in_a_mixture_is_named(tmp_path: Path) -> None:
    empty = OnlineSource(Manifest(tmp_path / "m.jsonl", [], [], []), encode, window=WINDOW)
    with pytest.raises(ValueError, match="no utterances to train on in split 'none'"):
        MixedSource({**two_sets(tmp_path), "none": empty})


def encode(waveforms: list[np.ndarray]) -> list[torch.Tensor]:
    """Each frame holds the mean of its 320 samples and how many windows came with it."""
    encoded = []
    for waveform in waveforms:
        assert 0 < len(waveform) <= WINDOW.num_samples
        frames = np.array_split(np.pad(waveform, (0, -len(waveform) % 320)), encoder_frames(len(waveform)))
        encoded.append(torch.tensor([[frame.mean()] for frame in frames], dtype=torch.bfloat16))
    return encoded


def manifest(folder: Path, **seconds: float) -> Manifest:
    utterances = []
    for name, length in seconds.items():
        path = folder / f"{name}.wav"
        soundfile.write(path, np.linspace(-0.5, 0.5, round(length * RATE)), RATE, subtype="FLOAT")
        utterances.append(Utterance(name, path, None, f"text of {name}"))
    return Manifest(folder / "m.jsonl", utterances, [], list(range(1, len(utterances) + 1)))


def test_encoding_on_the_fly(tmp_path: Path) -> None:
    source = OnlineSource(manifest(tmp_path, a=0.5, b=0.21, c=1.0), encode, window=WINDOW)
    assert [(e.id, e.num_frames, e.duration) for e in source.entries] == [
        ("a", 25, 0.5),
        ("b", 11, 0.21),
        ("c", 50, 1.0),
    ]
    second, first = source.read_many([1, 0])
    assert second.shape == (11, 1) and first.shape == (25, 1) and not source.rejects


def test_what_cannot_be_used_is_found_before_training(tmp_path: Path) -> None:
    given_ = manifest(tmp_path, good=0.5, long=1.01, empty=0.0, torn=0.3)
    (tmp_path / "torn.wav").write_bytes(b"RIFF")
    source = OnlineSource(given_, encode, window=WINDOW)
    assert [e.id for e in source.entries] == ["good"]
    assert [(r.line, r.id) for r in source.rejects] == [(2, "long"), (3, "empty"), (4, "torn")]
    assert "16160 samples" in source.rejects[0].reason


@pytest.mark.parametrize(
    ("length", "told", "reason"),
    [
        (1.01, 1.0, "16160 samples"),  # a rounded duration: the whole file is heard, and is too long
        (0.5, 0.7, "0.500 s of audio, its manifest line says 0.7 s"),
        (0.5, 0.55, None),
        (1.5, 0.9, None),  # a piece of the file
    ],
)
def test_what_is_accepted_can_be_read(tmp_path: Path, length: float, told: float, reason: str | None) -> None:
    """A plan comes to the same utterance after each resume: it must not be refused there."""
    made = manifest(tmp_path, u=length)
    source = OnlineSource(replace(made, utterances=[replace(made.utterances[0], duration=told)]), encode, window=WINDOW)
    if reason:
        assert [r.id for r in source.rejects] == ["u"] and reason in source.rejects[0].reason
    else:
        assert [len(frames) for frames in source.read_many([0])] == [source.entries[0].num_frames]


@pytest.mark.parametrize(("policy", "frames"), [("join", 117), ("truncate", 50)])
def test_long_audio_by_policy(tmp_path: Path, policy: str, frames: int) -> None:
    source = OnlineSource(manifest(tmp_path, long=2.33, short=0.02), encode, window=WINDOW, long_audio=policy)
    assert [e.num_frames for e in source.entries] == [frames, 1]
    long, short = source.read_many([0, 1])
    assert long.shape == (frames, 1) and short.shape == (1, 1)
    whole = torch.cat(
        encode([np.linspace(-0.5, 0.5, 37280, dtype=np.float32)[s : s + 16000] for s in (0, 16000, 32000)])
    )
    assert torch.equal(long, whole[:frames])


def test_a_file_that_breaks_later_is_named(tmp_path: Path) -> None:
    source = OnlineSource(manifest(tmp_path, a=0.5), encode, window=WINDOW)
    (tmp_path / "a.wav").unlink()
    with pytest.raises(AudioError, match="a.wav: no such file"):
        source.read_many([0])
