"""Encode every utterance of a recipe's manifests once, with the frozen encoder, into shards of features.

    deepspeed shards/precompute.py recipes/tiny.yaml
    deepspeed --hostfile hosts shards/precompute.py recipes/digits.yaml data.shards=/fast/digits
    python shards/precompute.py recipes/tiny.yaml --split valid --split test

The set of a split is ``<data.shards>/<split>/``. Which utterances make a shard follows from the manifest alone and
the ranks share the shards, so any number of ranks on any number of nodes (one file system) makes the same bytes.
Killed and started again, it goes on where it was: shards that are whole are not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "graft").is_dir():
    sys.path[0] = str(ROOT)  # a clone: Python puts this folder first, where a file would hide a package of its name

import numpy as np
import torch

from graft import command, lengths
from graft import ranks as processes
from graft.data.audio import AudioError, windows
from graft.data.fetch import origin_of
from graft.data.loader import Prefetcher
from graft.data.manifest import Manifest, Utterance, common
from graft.data.progress import Meter, clock
from graft.data.shard_format import INDEX, PARTS, REJECTS, FeatureSet, sample_size
from graft.data.shard_writer import (
    Part,
    PlannedShard,
    SetDescription,
    ShardWriter,
    check_existing,
    finished_part,
    merge_parts,
    part_path,
    plan_shards,
)
from graft.data.views import load_utterance, read_split
from graft.lengths import Window, WindowExceeded
from graft.model.encoder import SpeechEncoder
from graft.ranks import USERS_FAULTS, AgreedValueError, Ranks
from graft.recipe import Recipe, load_recipe
from graft.run_dir import naming, take_lock, window_of

LOG = logging.getLogger("graft.precompute")

PATIENCE_S = 7 * 24 * 3600.0  # a rank that is done waits this long for the slowest; a dead one is noticed at once
HEARTBEAT_S = 2.0  # between two looks at the other ranks
FILE_SYSTEM_S = 60.0  # within this, what one node has written is seen by another
TRIMMED_POOL = 16  # batches; among so many utterances those of one trimmed window are brought together
DECODERS = 4  # threads that read and resample ahead of the encoder
OVERHEAD = 3 * 512 + 1024  # bytes per utterance besides its features: tar headers, JSON, padding


def main(arguments: argparse.Namespace) -> None:
    """Every split in turn, by all ranks together."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_is_folder(recipe.data.shards)
    ranks = processes.start(timeout_s=PATIENCE_S)
    try:
        encoder = ranks.together(lambda: load_encoder(recipe, ranks))
        for split in arguments.split or recipe.data.manifests:
            precompute(recipe, split, encoder, ranks)
    finally:
        processes.stop()


def check_is_folder(shards: str) -> None:
    """Refuse an address: shards are written to a local disk, and copied by whatever your store has for that."""
    if origin_of(shards) is not None:
        raise ValueError(
            f"data.shards is '{shards}': shards are made in a folder. Give data.shards=FOLDER here, copy that folder "
            "when it is finished, and train with the address"
        )


def precompute(recipe: Recipe, split: str, encoder: SpeechEncoder, ranks: Ranks) -> None:
    """Make, finish or confirm the set of one split.

    Raises:
        ValueError: on every rank, when any rank finds the manifest, the folder or too many utterances unusable.
    """
    job = ranks.together(lambda: Job.prepare(recipe, split, encoder))
    check_alike(job, ranks)
    with locked(job.folder, ranks):
        todo = ranks.gather(ranks.by_first(job.unfinished))[0]
        if not todo and ranks.gather(ranks.is_first and job.is_merged())[0]:
            LOG.info("%s: complete, nothing to do", job.folder)
            return
        ranks.together(lambda: job.begin(todo) if ranks.is_first else job.wait_for_folder())
        with watched(job, todo, ranks):
            ranks.together(lambda: Worker(job, encoder, ranks, todo).run())
        ranks.by_first(job.merge)


def check_alike(job: Job, ranks: Ranks) -> None:
    """Refuse ranks that read another manifest or another encoder, as nodes without a common file system may."""
    others = ranks.differing(job.description.digest)
    if others:
        raise AgreedValueError(
            f"ranks {', '.join(map(str, others))} read another manifest, encoder or recipe than rank 0 "
            f"({job.manifest.path}, {job.description.source}): give every node the same files"
        )


def load_encoder(recipe: Recipe, ranks: Ranks) -> SpeechEncoder:
    """The recipe's encoder on this rank's device."""
    dtype = torch.float32 if recipe.run.precision == "fp32" else torch.bfloat16
    return SpeechEncoder(recipe.bases.whisper, dtype, ranks.device(), recipe.audio.window)


@contextmanager
def locked(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Keep a second precomputation out of ``folder``; the lock goes with the process that holds it, killed or not."""

    def lock() -> int | None:
        if not ranks.is_first:
            return None
        descriptor = take_lock(folder / PARTS / ".lock")
        if descriptor is None:
            raise ValueError(f"another precomputation is writing {folder}; wait for it or stop it")
        return descriptor

    descriptor = ranks.together(lock)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@dataclass(frozen=True)
class Job:
    """One split: what is to be encoded, into which folder, with which settings."""

    folder: Path
    manifest: Manifest
    description: SetDescription
    shards: list[PlannedShard]
    max_rejects: float

    @classmethod
    def prepare(cls, recipe: Recipe, split: str, encoder: SpeechEncoder) -> Job:
        """Read the manifest and plan the shards; sound files are looked at when their turn comes."""
        manifest = read_split(recipe, split, check_files=False)
        description = SetDescription(
            name=split,
            manifest_sha256=manifest.sha256,
            samples_per_shard=recipe.data.samples_per_shard,
            long_audio=recipe.audio.long_audio,
            dtype=recipe.audio.feature_dtype,
            fingerprint=encoder.fingerprint,
            source=recipe.bases.whisper,
            precision=recipe.run.precision,
            mel=encoder.mel_settings,
            window_frames=encoder.window.num_frames,
            frame_size=encoder.frame_size,
            encode_batch_size=recipe.audio.encode_batch_size,
        )
        shards = plan_shards(manifest, recipe.data.samples_per_shard)
        return cls(recipe.set_folder(split), manifest, description, shards, recipe.audio.max_rejects)

    def unfinished(self) -> list[int]:
        """Numbers of the shards that are still to be made.

        Raises:
            ValueError: the folder holds a set made by another encoder, manifest or settings.
        """
        check_existing(self.folder, self.description)
        return [s.number for s in self.shards if not finished_part(self.folder, self.description, s.number)]

    def is_merged(self) -> bool:
        """Whether the set as a whole can be opened."""
        try:
            FeatureSet.open(self.folder, self.description.fingerprint)
        except ValueError:
            return False
        return True

    def begin(self, todo: Sequence[int]) -> None:
        """Tell what will be made and how large it gets; clear what an earlier start has left.

        Raises:
            ValueError: the disk is too small.
        """
        (self.folder / INDEX).unlink(missing_ok=True)
        for stale in (self.folder / PARTS).glob(".rank-*"):
            stale.unlink()
        failure_file(self.folder).unlink(missing_ok=True)
        size = self.forecast(todo)
        LOG.info(
            "%s: %d utterances%s in %d shards, %d of them to be made: %s",
            self.description.name,
            len(self.manifest.utterances),
            self._audio_length(),
            len(self.shards),
            len(todo),
            "size unknown, the manifest lacks durations" if size is None else f"about {readable(size)}",
        )
        free = shutil.disk_usage(self.folder).free
        if size is not None and size > free:
            raise ValueError(
                f"{self.folder} needs {readable(size)}, its disk has {readable(free)} free. Give data.shards a larger "
                "one, or audio.feature_dtype=int8 for half the size"
            )

    def wait_for_folder(self) -> None:
        """See that this rank and rank 0 write to one file system."""
        patience = time.monotonic() + FILE_SYSTEM_S
        while not (self.folder / PARTS).is_dir():
            if time.monotonic() > patience:
                raise ValueError(
                    f"{socket.gethostname()} does not see {self.folder}, which rank 0 has made: data.shards must be "
                    "on a file system that all nodes share"
                )
            time.sleep(0.2)

    def forecast(self, numbers: Sequence[int]) -> int | None:
        """Bytes of these shards, from the manifest's durations; None where it has none."""
        total = 0
        for utterance in (u for number in numbers for u in self.shards[number].utterances):
            if utterance.heard_s is None:
                return None
            frames = lengths.encoder_frames(lengths.num_samples(utterance.heard_s))
            if self.description.long_audio != "join":
                frames = min(frames, self.description.window_frames)
            total += sample_size(frames, self.description.frame_size, self.description.dtype) + OVERHEAD
        return total

    def merge(self) -> None:
        """Put the parts together; the index, written last, makes them a set.

        Raises:
            ValueError: more utterances were rejected than ``audio.max_rejects`` allows, or all were.
        """
        parts = [finished_part(self.folder, self.description, shard.number) for shard in self.shards]
        whole = [part for part in parts if part]
        assert len(whole) == len(parts), f"{len(parts) - len(whole)} shards of {self.folder} are not finished"
        reasons = [r.reason for r in self.manifest.rejects] + [r["reason"] for p in whole for r in p.rejects]
        self.check_rejects(reasons, whole)
        merge_parts(self.folder, self.description, whole, self.manifest.rejects)
        for file in (self.folder / PARTS).glob(".rank-*"):
            file.unlink()
        self._report(whole, reasons)

    def check_rejects(self, reasons: Sequence[str], parts: Sequence[Part] = ()) -> None:
        """Refuse more rejects than allowed; shards that hold some will be made again by the next start."""
        total = len(self.manifest.utterances) + len(self.manifest.rejects)
        if len(reasons) <= self.max_rejects * total and len(reasons) < total:
            return
        for part in parts:
            if part.rejects:
                part_path(self.folder, part.file).unlink()
        raise ValueError(
            f"{self.manifest.path}: {len(reasons)} of {total} utterances cannot be used, audio.max_rejects allows "
            f"{self.max_rejects:.0%}: {common(reasons)}. Mend them and start again, or raise audio.max_rejects"
        )

    def _report(self, parts: Sequence[Part], reasons: Sequence[str]) -> None:
        size, samples = sum(part.size for part in parts), sum(len(part.samples) for part in parts)
        audio = sum(part.audio_seconds for part in parts)
        LOG.info("%s: %d samples, %s of audio, %s", self.folder, samples, clock(audio), readable(size))
        for words, count in (
            ("longer than the window, windows joined", sum(part.num_joined for part in parts)),
            ("longer than the window, truncated", sum(part.num_truncated for part in parts)),
        ):
            if count:
                LOG.info("  %d %s", count, words)
        if reasons:
            LOG.info("  %d rejected (%s): %s", len(reasons), self.folder / REJECTS, common(reasons))

    def _audio_length(self) -> str:
        durations = [utterance.heard_s for utterance in self.manifest.utterances]
        return "" if None in durations else f", {clock(sum(durations))} of audio,"


@dataclass(frozen=True)
class Sample:
    """An utterance on its way: windows (S_i,) of its waveform, then features (F, D), or the reason for neither."""

    shard: int
    line: int
    utterance: Utterance
    pieces: Sequence[np.ndarray] = ()
    whole_samples: int = 0
    features: torch.Tensor | None = None
    reason: str = ""

    @property
    def num_samples(self) -> int:
        """Samples that are encoded: all, or a window's under ``truncate``."""
        return sum(len(piece) for piece in self.pieces)


def _batches(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Consecutive samples of one shard, at most ``size`` together."""
    for _, of_shard in itertools.groupby(samples, key=lambda sample: sample.shard):
        while batch := list(itertools.islice(of_shard, size)):
            yield batch


class Worker:
    """One rank's part of a job."""

    def __init__(self, job: Job, encoder: SpeechEncoder, ranks: Ranks, todo: Sequence[int]) -> None:
        self.job, self.encoder, self.rank = job, encoder, ranks.rank
        self.mine = [job.shards[number] for number in todo[ranks.rank :: ranks.world_size]]
        self.done, self.audio_s = 0, 0.0
        self.reasons: list[str] = []
        self._told = 0.0

    def run(self) -> None:
        """Make this rank's shards; give up what is begun when another rank has failed."""
        try:
            self._make_shards()
            self._tell()
        except _AnotherFailed:
            return  # that rank has the error, and all ranks hear of it next
        except Exception as error:
            with suppress(OSError):  # on a full disk the other ranks find out by themselves
                failure_file(self.job.folder).touch()
            if not isinstance(error, OSError) or isinstance(error, USERS_FAULTS):
                raise
            raise OSError(
                f"{error}. Finished shards stay: see to that disk, then start the same command again to go on"
            ) from error

    def _make_shards(self) -> None:
        """Sound files are read ahead in threads, the encoder runs in another, this one writes."""
        items = ((shard, *pair) for shard in self.mine for pair in zip(shard.lines, shard.utterances, strict=True))
        size = self.job.description.encode_batch_size
        trimmed = window_of(self.job.description.fingerprint) == "trimmed"
        pool = TRIMMED_POOL * size if trimmed else size  # utterances of one window are found among these
        with (
            Prefetcher(self._decode, items, depth=2 * size, threads=DECODERS) as decoded,
            Prefetcher(self._encode, _batches(decoded, pool), depth=1) as encoded,
        ):
            for number, batches in itertools.groupby(encoded, key=lambda batch: batch[0].shard):
                with ShardWriter(self.job.folder, self.job.description, number) as writer:
                    for batch in batches:
                        self._write(batch, writer)

    def _decode(self, item: tuple[PlannedShard, int, Utterance]) -> Sample:
        """Read one sound file."""
        shard, line, utterance = item
        made = Sample(shard.number, line, utterance)
        try:
            waveform = load_utterance(utterance)
            if not waveform.any():
                raise AudioError(f"{utterance.audio_filepath}: nothing but silence, every sample is zero")
            pieces = windows(waveform, self.encoder.window, self.job.description.long_audio, f"'{utterance.id}'")
        except (AudioError, WindowExceeded) as error:
            return replace(made, reason=str(error))
        return replace(made, pieces=pieces, whole_samples=len(waveform))

    def _encode(self, batch: Sequence[Sample]) -> list[Sample]:
        """Encode a batch; batches are the same whatever the ranks, and so are the bits."""
        pieces = [piece for sample in batch for piece in sample.pieces]
        made: dict[int, torch.Tensor] = {}
        for group in self._together(pieces):
            made.update(zip(group, self.encoder.encode([pieces[i] for i in group]), strict=True))
        frames = iter([made[index] for index in range(len(pieces))])
        return [
            replace(sample, features=torch.cat([next(frames) for _ in sample.pieces])) if sample.pieces else sample
            for sample in batch
        ]

    def _together(self, pieces: Sequence[np.ndarray]) -> list[list[int]]:
        """Indices of the pieces of each forward: in order, those of one trimmed window together."""
        size = self.job.description.encode_batch_size
        groups: dict[Window, list[int]] = {}
        for index, piece in enumerate(pieces):
            groups.setdefault(self.encoder.window_of(len(piece)), []).append(index)
        return [group[n : n + size] for group in groups.values() for n in range(0, len(group), size)]

    def _write(self, batch: Sequence[Sample], writer: ShardWriter) -> None:
        for sample in batch:
            if sample.features is None:
                self._reject(sample, sample.reason, writer)
            elif not sample.features.isfinite().all():
                self._reject(sample, "the encoder gave NaN or infinite numbers", writer)
            else:
                writer.add(sample.utterance, sample.features, sample.num_samples, sample.whole_samples)
            self.audio_s += lengths.seconds(sample.num_samples)
        self.done += len(batch)
        if time.monotonic() - self._told > HEARTBEAT_S:
            self._tell()

    def _reject(self, sample: Sample, reason: str, writer: ShardWriter) -> None:
        writer.reject(sample.line, sample.utterance, reason)
        self.reasons.append(reason)
        self.job.check_rejects(self.reasons)  # what one rank has is enough to know the end

    def _tell(self) -> None:
        """Leave word of what is done where rank 0 looks, and look whether another rank has failed."""
        self._told = time.monotonic()
        told = self.job.folder / PARTS / f".rank-{self.rank:05d}"
        with naming(told):
            told.write_text(json.dumps({"done": self.done, "audio_s": self.audio_s}))
        if failure_file(self.job.folder).exists():
            raise _AnotherFailed


class _AnotherFailed(Exception):
    """Another rank has failed: there is nothing left to work for."""


@contextmanager
def watched(job: Job, todo: Sequence[int], ranks: Ranks) -> Iterator[None]:
    """On rank 0, show the progress of all ranks while the body runs."""
    if not ranks.is_first:
        yield
        return
    total = sum(len(job.shards[number].utterances) for number in todo)
    stop = threading.Event()
    with Meter(job.description.name, total, "utterances") as meter:

        def watch() -> None:
            while not stop.wait(HEARTBEAT_S):
                told = [_read_told(path) for path in (job.folder / PARTS).glob(".rank-*")]
                audio_s = sum(rank["audio_s"] for rank in told)
                speed = f"{audio_s / meter.elapsed:,.1f} s of audio/s on {ranks.world_size} ranks"
                meter.set(sum(rank["done"] for rank in told), speed)

        watcher = threading.Thread(target=watch, name="progress", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()


def _read_told(path: Path) -> dict[str, float]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # being written just now
        return {"done": 0, "audio_s": 0.0}


def failure_file(folder: Path) -> Path:
    """Its presence tells every rank that one has failed."""
    return folder / PARTS / ".failed"


def readable(size: float) -> str:
    """Bytes in kB, MB, GB or TB."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, int(math.log10(max(size, 1)) // 3))
    return f"{size / 1000**power:.3g} {units[power]}"


def _arguments() -> argparse.ArgumentParser:
    parser = command.parser(__doc__)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the recipe")
    parser.add_argument(
        "--split", action="append", metavar="NAME", help="only this one; may be said again (default: all)"
    )
    return parser


if __name__ == "__main__":
    command.run(main, _arguments())
