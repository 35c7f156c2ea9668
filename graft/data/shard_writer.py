"""Writing a feature set: the plan of its shards, one shard at a time, and the index last.

What a shard holds follows from the manifest and the settings alone, and its bytes from what it holds: no clock, no
rank, no process number. So any number of ranks, killed and started again any number of times, makes the same files.
A shard is written under a temporary name, forced to disk and renamed; its part file, written after it, proves it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from graft.data.manifest import Manifest, Reject, Utterance, sample_key, write_rejects
from graft.data.shard_format import (
    FORMAT,
    INDEX,
    PARTS,
    REJECTS,
    SAMPLES,
    SampleEntry,
    digest_of,
    encode,
    seal_of,
    shard_name,
)
from graft.lengths import seconds
from graft.run_dir import TRIMMED, naming, window_of, write_whole

BLOCK = 512  # bytes; tar's unit


@dataclass(frozen=True)
class SetDescription:
    """Everything a shard's bytes depend on; ``digest`` names it."""

    name: str
    manifest_sha256: str
    samples_per_shard: int
    long_audio: str
    dtype: str
    fingerprint: str
    source: str  # where the encoder came from: told to people, never compared
    precision: str  # of the encoder's forward pass
    mel: Mapping[str, Any]
    window_frames: int
    frame_size: int
    encode_batch_size: int

    @property
    def digest(self) -> str:
        """One name for all settings that decide the bytes."""
        settings = {name: value for name, value in vars(self).items() if name != "source"} | {"format": FORMAT}
        return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@dataclass
class Part:
    """What one finished shard holds; written beside it as JSON."""

    digest: str
    file: str
    size: int
    sha256: str
    samples: list[dict[str, Any]]
    rejects: list[dict[str, Any]]
    audio_seconds: float
    num_joined: int = 0
    num_truncated: int = 0


@dataclass(frozen=True)
class PlannedShard:
    """The utterances of one shard, with their manifest lines."""

    number: int
    utterances: Sequence[Utterance] = field(repr=False)
    lines: Sequence[int] = field(repr=False)


def plan_shards(manifest: Manifest, samples_per_shard: int) -> list[PlannedShard]:
    """Consecutive utterances of the manifest, ``samples_per_shard`` to a shard: the same for every rank."""
    starts = range(0, len(manifest.utterances), samples_per_shard)
    return [
        PlannedShard(
            number,
            manifest.utterances[start : start + samples_per_shard],
            manifest.lines[start : start + samples_per_shard],
        )
        for number, start in enumerate(starts)
    ]


class ShardWriter:
    """Writes one shard; use as a context manager, then take ``part``.

    ``add`` a sample or ``reject`` an utterance in the order of the plan. Leaving the context puts the shard and its
    part file in place; leaving it by an exception leaves neither.
    """

    def __init__(self, folder: Path, description: SetDescription, number: int) -> None:
        self._folder, self._description = folder, description
        self._path = folder / shard_name(description.name, number)
        self._partial = self._path.with_name(f".{self._path.name}.tmp")
        self.part = Part(description.digest, self._path.name, 0, "", [], [], 0.0)
        self._keys: set[str] = set()

    def __enter__(self) -> ShardWriter:
        self._file = _HashedFile(self._partial)
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        return self

    def add(
        self, utterance: Utterance, features: torch.Tensor, num_samples: int, whole_samples: int | None = None
    ) -> None:
        """Add an utterance's features (F, D), encoded from ``num_samples`` of its ``whole_samples`` samples."""
        key = sample_key(utterance.id)
        assert key not in self._keys, f"key {key} of '{utterance.id}' is already in {self._path.name}"
        self._keys.add(key)
        about = {
            "id": utterance.id,
            "text": utterance.text,
            "num_frames": len(features),
            "duration": seconds(num_samples),
        } | utterance.extras()
        data = encode(features, self._description.dtype, seal_of(about))
        about["xxh3"] = digest_of(data)
        self._add_member(f"{key}.json", json.dumps(about, ensure_ascii=False, sort_keys=True).encode())
        offset = self._add_member(f"{key}.safetensors", data)
        entry = SampleEntry(key=key, shard=self._path.name, offset=offset, size=len(data), **about)
        self.part.samples.append(entry.as_line())
        self.part.audio_seconds += about["duration"]
        self.part.num_joined += len(features) > self._description.window_frames
        self.part.num_truncated += num_samples < (whole_samples or num_samples)

    def reject(self, line: int, utterance: Utterance, reason: str) -> None:
        """Record that an utterance of the plan is not in the shard."""
        self.part.rejects.append({"line": line, "id": utterance.id, "reason": reason})

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            with contextlib.suppress(OSError):  # a full disk refuses what is still to be written of a file that goes
                self._file.close()
            self._partial.unlink(missing_ok=True)

    def _finish(self) -> None:
        self._tar.close()
        self._file.sync()
        os.replace(self._partial, self._path)
        self.part.size, self.part.sha256 = self._file.size, self._file.digest.hexdigest()
        write_whole(part_path(self._folder, self.part.file), json.dumps(vars(self.part), ensure_ascii=False))

    def _add_member(self, name: str, data: bytes) -> int:
        """Add a file to the tar; returns where its bytes begin."""
        info = tarfile.TarInfo(name)  # its defaults: time 0, owner 0, mode 0644
        info.size = len(data)
        offset = self._file.size + BLOCK
        self._tar.addfile(info, io.BytesIO(data))
        padded = -(-len(data) // BLOCK) * BLOCK
        assert self._file.size == offset + padded, f"{name} took more than one tar header"
        return offset


def part_path(folder: Path, shard_file: str) -> Path:
    """Where the part file of a shard is."""
    return folder / PARTS / f"{shard_file.removesuffix('.tar')}.json"


def finished_part(folder: Path, description: SetDescription, number: int) -> Part | None:
    """The part of a shard that is complete and was made with these settings, or None.

    Raises:
        ValueError: the shard was made with other settings.
    """
    file = shard_name(description.name, number)
    path = part_path(folder, file)
    try:
        part = Part(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None  # not finished, or cut by a crash of the machine: it is made again
    if part.digest != description.digest:
        raise ValueError(_other_settings(folder, "it holds shards made by another encoder, manifest or settings"))
    shard = folder / file
    whole = shard.is_file() and shard.stat().st_size == part.size
    return part if whole else None


def check_existing(folder: Path, description: SetDescription) -> None:
    """Refuse to write into a set that something else made.

    Raises:
        ValueError: says what differs and what to do.
    """
    path = folder / INDEX
    if not path.is_file():
        return
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
        digest, settings = made["digest"], made["settings"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(_other_settings(folder, f"its {INDEX} is not readable")) from None
    if digest != description.digest:
        raise ValueError(_other_settings(folder, "; ".join(_differences(settings, description)) or "made otherwise"))


def merge_parts(folder: Path, description: SetDescription, parts: Sequence[Part], rejects: Iterable[Reject]) -> None:
    """Make ``samples.jsonl``, ``rejects.jsonl`` and, last, ``index.json`` of finished shards.

    ``rejects`` are the manifest's own; those of the shards are added.
    """
    lines = [json.dumps(sample, ensure_ascii=False) for part in parts for sample in part.samples]
    samples = "".join(f"{line}\n" for line in lines)
    data = samples.encode()
    all_rejects = sorted([*rejects, *(Reject(**r) for part in parts for r in part.rejects)], key=lambda r: r.line)
    write_whole(folder / SAMPLES, samples)
    write_rejects(folder / REJECTS, all_rejects)
    shards = [
        {"file": part.file, "num_samples": len(part.samples), "size": part.size, "sha256": part.sha256}
        for part in parts
    ]
    index = {
        "format": FORMAT,
        "name": description.name,
        "encoder": {"fingerprint": description.fingerprint, "source": description.source},
        "mel": dict(description.mel),
        "window_frames": description.window_frames,
        "frame_size": description.frame_size,
        "dtype": description.dtype,
        "num_samples": len(lines),
        "audio_seconds": sum(part.audio_seconds for part in parts),
        "num_rejects": len(all_rejects),
        "num_joined": sum(part.num_joined for part in parts),
        "num_truncated": sum(part.num_truncated for part in parts),
        "digest": description.digest,
        "settings": _comparable(description),
        "samples": {"file": SAMPLES, "size": len(data), "sha256": sha256(data).hexdigest()},
        "shards": shards,
    }
    write_whole(folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False) + "\n")


COMPARED = {
    "fingerprint": "encoder",
    "window": "audio.window",
    "precision": "run.precision",
    "manifest_sha256": "manifest or data.views",
    "samples_per_shard": "data.samples_per_shard",
    "long_audio": "audio.long_audio",
    "dtype": "audio.feature_dtype",
    "encode_batch_size": "audio.encode_batch_size",
    "name": "split",
}


def _comparable(description: SetDescription) -> dict[str, Any]:
    """Settings by their names; the fingerprint stands for the encoder and for its windows."""
    encoder, *_ = description.fingerprint.partition(TRIMMED)
    told = {**vars(description), "fingerprint": encoder, "window": window_of(description.fingerprint)}
    return {name: told[name] for name in COMPARED}


def _differences(settings: Mapping[str, Any], description: SetDescription) -> list[str]:
    wanted = _comparable(description)
    settings = {"window": "full", **settings}  # a set older than the setting
    return [
        f"{words} was {_short(settings.get(name))}, is now {_short(wanted[name])}"
        for name, words in COMPARED.items()
        if settings.get(name) != wanted[name]
    ]


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _other_settings(folder: Path, what: str) -> str:
    return (
        f"{folder} already holds another feature set: {what}. "
        "Give data.shards another folder, or delete this one if it is no longer wanted."
    )


class _HashedFile:
    """A file for writing only that knows the size and the SHA-256 of what went through it; errors name it."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self.size, self.digest = path, path.open("wb"), 0, sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        with naming(self._path):
            return self._file.write(data)

    def tell(self) -> int:
        return self.size

    def sync(self) -> None:
        with naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
