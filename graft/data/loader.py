"""Where features come from, and having them ready before they are asked for.

A source gives ``entries`` (what is known of each utterance without its features) and ``read_many`` (the features).
``ShardSource`` reads a feature set; ``OnlineSource`` encodes the audio on the fly with an ``encode`` handed to it;
``MixedSource`` is several of them as one.

F: encoder frames    D: numbers per frame    S: samples at 16 kHz
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from graft.data.audio import AudioError, LongAudio, piece_duration, windows
from graft.data.manifest import Manifest, Reject, Utterance
from graft.data.shard_format import FeatureSet
from graft.data.views import load_utterance
from graft.lengths import Window, WindowExceeded, encoder_frames, num_samples

Encode = Callable[[list[np.ndarray]], list[torch.Tensor]]  # waveforms (S_i,) -> features (F_i, D), one window each
Item = TypeVar("Item")
Made = TypeVar("Made")


class Entry(Protocol):
    """What is known of an utterance without its features; ``num_frames`` may be one off where audio is resampled."""

    id: str
    text: str
    num_frames: int
    duration: float
    instruction: str | None


class FeatureSource(Protocol):
    """Utterances and their features."""

    entries: Sequence[Entry]

    def read_many(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Features (F_i, D) in bf16 of the entries at ``indices``."""
        ...


@dataclass(frozen=True, slots=True)
class FeatureSample:
    """An utterance with its features (F, D)."""

    id: str
    text: str
    audio_features: torch.Tensor
    instruction: str | None = None


def read_samples(source: FeatureSource, indices: Sequence[int]) -> list[FeatureSample]:
    """The samples at ``indices``, in that order."""
    entries = [source.entries[i] for i in indices]
    features = source.read_many(indices)
    return [FeatureSample(e.id, e.text, f, e.instruction) for e, f in zip(entries, features, strict=True)]


class ShardSource:
    """Features from a set on disk."""

    def __init__(self, feature_set: FeatureSet) -> None:
        self.feature_set = feature_set
        self.entries = feature_set.entries

    def read_many(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Features (F_i, D); see :meth:`FeatureSet.read` for the errors."""
        return [self.feature_set.read(i) for i in indices]


@dataclass(frozen=True, slots=True)
class OnlineEntry:
    """An utterance to be encoded when it is needed."""

    id: str
    text: str
    num_frames: int
    duration: float
    instruction: str | None
    utterance: Utterance


class OnlineSource:
    """Features encoded on the fly; utterances that cannot be used are found at once and listed in ``rejects``."""

    def __init__(self, manifest: Manifest, encode: Encode, *, window: Window, long_audio: LongAudio = "reject") -> None:
        """Reads the header of every sound file: an utterance is rejected now or used, never dropped in the middle."""
        self._encode, self._window, self._long_audio = encode, window, long_audio
        self.entries: list[OnlineEntry] = []
        self.rejects: list[Reject] = list(manifest.rejects)
        for line, utterance in zip(manifest.lines, manifest.utterances, strict=True):
            try:
                self.entries.append(self._entry(utterance))
            except (AudioError, WindowExceeded) as error:
                self.rejects.append(Reject(line, utterance.id, str(error)))

    def read_many(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Features (F_i, D) of the entries at ``indices``.

        Raises:
            AudioError: a file that could be opened cannot be decoded; names it.
        """
        pieces = [self._pieces(self.entries[i].utterance) for i in indices]
        frames = iter(self._encode([piece for several in pieces for piece in several]))
        return [torch.cat([next(frames) for _ in several]) for several in pieces]

    def _entry(self, utterance: Utterance) -> OnlineEntry:
        duration = piece_duration(utterance.audio_filepath, utterance.offset, utterance.duration)
        duration = replace(utterance, duration=duration).heard_s
        samples = num_samples(duration)
        if self._long_audio == "reject":
            self._window.check(samples, f"'{utterance.id}'")
        elif self._long_audio == "truncate":
            samples = min(samples, self._window.num_samples)
        text, instruction = utterance.text, utterance.instruction
        return OnlineEntry(utterance.id, text, encoder_frames(samples), duration, instruction, utterance)

    def _pieces(self, utterance: Utterance) -> list[np.ndarray]:
        waveform = load_utterance(utterance)
        return windows(waveform, self._window, self._long_audio, f"'{utterance.id}'")


class MixedSource:
    """The sources of several splits, one after the other, as one of ``sizes``.

    The same recording may stand in two splits, so an id here is ``<split>/<id>``.
    """

    def __init__(self, sources: Mapping[str, FeatureSource]) -> None:
        """Raises ValueError for a split without utterances."""
        for split, source in sources.items():
            if not source.entries:
                raise ValueError(f"no utterances to train on in split '{split}': the set is empty")
        self._sources = list(sources.values())
        self.sizes = [len(source.entries) for source in self._sources]
        self._firsts = [0, *accumulate(self.sizes)][:-1]
        self.entries = _MixedEntries({split: source.entries for split, source in sources.items()})

    def read_many(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Features (F_i, D) in bf16 of the entries at ``indices``, in their order; one call per source."""
        features: dict[int, torch.Tensor] = {}  # place in ``indices`` -> (F_i, D)
        for source, first, size in zip(self._sources, self._firsts, self.sizes, strict=True):
            places = [place for place, index in enumerate(indices) if first <= index < first + size]
            if places:
                frames = source.read_many([indices[place] - first for place in places])
                features.update(zip(places, frames, strict=True))
        return [features[place] for place in range(len(indices))]


class _MixedEntries(Sequence[Entry]):
    """Entries of several sources, made when they are asked for: there may be a hundred million."""

    def __init__(self, entries: Mapping[str, Sequence[Entry]]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    def __getitem__(self, index: int) -> Entry:
        for split, entries in self._entries.items():
            if 0 <= index < len(entries):
                return _of_split(entries[index], split)
            index -= len(entries)
        raise IndexError(f"no such utterance among {len(self)}")

    def __iter__(self) -> Iterator[Entry]:
        return (_of_split(entry, split) for split, entries in self._entries.items() for entry in entries)


def _of_split(entry: Entry, split: str) -> Entry:
    return replace(entry, id=f"{split}/{entry.id}")


class Prefetcher(Generic[Item, Made]):
    """Makes items ahead in background threads; order is kept, an error comes out where its item would have.

    Use as an iterator, and as a context manager where the consumer may leave early::

        with Prefetcher(read, steps, depth=4) as ready:
            for batch in ready: ...
    """

    def __init__(
        self,
        make_item: Callable[[Item], Made],
        items: Iterable[Item],
        depth: int = 2,
        threads: int = 1,
        torch_threads: int | None = None,
    ) -> None:
        """At most ``depth`` made items wait; ``items`` is drawn from in the consumer's thread and may be endless.

        ``torch_threads``: how many threads an operation of torch may take in each of the threads here, and in any that
        is started later and does not say; None: as many as the consumer's. With 1 for light work a training step on the
        CPU keeps its cores: beside a second team of OpenMP threads there are more threads than cores, then every team
        sleeps between operations, and a step takes a fifth longer or more.
        """
        if depth < 1 or threads < 1 or (torch_threads is not None and torch_threads < 1):
            raise ValueError(f"depth {depth}, threads {threads} and torch_threads {torch_threads} must be at least 1")
        own = torch.get_num_threads()  # asked for, it is settled for the consumer's thread, whatever others set later
        begin = partial(torch.set_num_threads, own if torch_threads is None else torch_threads)
        self._results = self._run(make_item, items, depth, ThreadPoolExecutor(threads, "prefetch", begin))

    def __iter__(self) -> Iterator[Made]:
        return self._results

    def __next__(self) -> Made:
        return next(self._results)

    def __enter__(self) -> Prefetcher[Item, Made]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop: what is being made is finished, what waits is dropped, the threads end."""
        self._results.close()

    @staticmethod
    def _run(
        make_item: Callable[[Item], Made], items: Iterable[Item], depth: int, pool: ThreadPoolExecutor
    ) -> Iterator[Made]:
        pending: deque[Future[Made]] = deque()
        with pool:
            try:
                for item in items:
                    pending.append(pool.submit(make_item, item))
                    if len(pending) > depth:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for waiting in pending:
                    waiting.cancel()
