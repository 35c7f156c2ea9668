"""Read every byte of feature sets back and compare it with what their indexes promise.

    python shards/verify.py shards/sets/tiny             every set below a folder
    python shards/verify.py shards/sets/tiny/train       one set
    python shards/verify.py https://host/sets/tiny/train
    python shards/verify.py "pipe:aws s3 cp s3://bucket/sets/tiny/train/{file} -"

A set that is not on a local disk is read as training reads it: what the cache lacks is fetched, several shards at once,
and stays there. So this also fills the cache before a training; with --cache-dir at an empty folder, nothing but what
the address holds now is verified. Exit code 0 when all is as it was written, 2 when a shard is damaged or cannot be
had; the shard is named.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "graft").is_dir():
    sys.path[0] = str(ROOT)  # a clone: Python puts this folder first, where a file would hide a package of its name

from rich import box
from rich.console import Console
from rich.table import Table

from graft import command
from graft.data.cache import GB, Cache, RemoteFiles
from graft.data.fetch import origin_of
from graft.data.progress import Meter, clock
from graft.data.shard_format import (
    INDEX,
    PARTS,
    REJECTS,
    DamagedShard,
    FeatureSet,
    SampleEntry,
    SetFiles,
    decode,
    digest_of,
)
from graft.recipe import Data

BLOCK = 1 << 22  # bytes read at once
LOG_WIDTH = 120  # columns where there is no terminal
READERS = 4  # threads; hashing and reading leave Python's lock


@dataclass
class Verified:
    """What was found in one set."""

    name: str
    num_samples: int = 0
    num_rejects: int = 0
    num_shards: int = 0
    audio_s: float = 0.0
    size: int = 0
    dtype: str = ""
    encoder: str = ""
    faults: list[str] = field(default_factory=list)


def main(arguments: argparse.Namespace) -> int:
    """Verify each set, print the table, name what is damaged."""
    origin = origin_of(arguments.folder)
    if origin is None:
        sets: Sequence[Path | SetFiles] = find_sets(Path(arguments.folder))
    else:
        sets = [RemoteFiles(origin, Cache(arguments.cache_dir, arguments.cache_gb * GB))]
    verified = [verify_set(one) for one in sets]
    _print(verified)
    faults = [fault for one in verified for fault in one.faults]
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return command.USER_ERROR if faults else command.DONE


def find_sets(folder: Path) -> list[Path]:
    """``folder`` itself, or the sets directly below it, begun ones too.

    Raises:
        ValueError: there are none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    is_set = [f for f in (folder, *sorted(folder.iterdir())) if (f / INDEX).is_file() or (f / PARTS).is_dir()]
    if not is_set:
        raise ValueError(f"no feature set in {folder}; shards/precompute.py makes them")
    return is_set


def verify_set(where: Path | SetFiles) -> Verified:
    """Read one set whole. Faults of single shards are collected, so that one run names them all."""
    verified = Verified(where.name if isinstance(where, Path) else where.name(""))
    try:
        feature_set = FeatureSet.open(where)
    except (ValueError, OSError) as error:
        verified.faults.append(str(error))
        return verified
    if isinstance(where, Path):
        verified.faults += strangers(where, feature_set.index) + lost_rejects(where, feature_set.index)
    _read_shards(feature_set, verified)
    return verified


def strangers(folder: Path, index: Mapping[str, Any]) -> list[str]:
    """Tars that lie beside the shards: training does not look at them, but whoever reads ``*.tar`` would."""
    known = {shard["file"] for shard in index["shards"]}
    return [
        f"shard {path}: the index does not know it. Delete it, or run shards/precompute.py again."
        for path in sorted(folder.glob("*.tar"))
        if path.name not in known
    ]


def lost_rejects(folder: Path, index: Mapping[str, Any]) -> list[str]:
    """Where the list of what was not used is not as long as the index says."""
    path = folder / REJECTS
    there = len(path.read_bytes().splitlines()) if path.is_file() else None
    if there == index["num_rejects"]:
        return []
    what = "is not there" if there is None else f"has {there} lines"
    return [f"{path} {what}, the index counts {index['num_rejects']} rejects: make the set anew to have their list"]


def _read_shards(feature_set: FeatureSet, verified: Verified) -> None:
    index = feature_set.index
    verified.num_samples, verified.num_rejects = index["num_samples"], index["num_rejects"]
    verified.num_shards, verified.audio_s = len(index["shards"]), feature_set.audio_seconds
    verified.size = sum(shard["size"] for shard in index["shards"])
    verified.dtype, verified.encoder = feature_set.dtype, feature_set.fingerprint[:12]
    by_shard: dict[str, list[SampleEntry]] = {shard["file"]: [] for shard in index["shards"]}
    for entry in feature_set.entries:
        by_shard[entry.shard].append(entry)
    with Meter(verified.name, verified.size / 1e6, "MB") as meter, ThreadPoolExecutor(READERS) as pool:
        checked = pool.map(lambda s: _faults(feature_set, s, by_shard[s["file"]]), index["shards"])
        for shard, faults in zip(index["shards"], checked, strict=True):
            verified.faults += faults
            meter.advance(shard["size"] / 1e6)


def _faults(feature_set: FeatureSet, shard: dict[str, Any], entries: Sequence[SampleEntry]) -> list[str]:
    files, name = feature_set.files, shard["file"]
    try:
        with os.fdopen(files.open(name), "rb") as file:
            _check_digest(file, shard["sha256"])
            file.seek(0)
            _check_members(file, feature_set, shard, entries)
    except _Wrong as error:
        return [str(files.damaged(name, str(error)))]
    except DamagedShard as error:
        return [str(error)]
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        return [f"shard {files.name(name)}: {type(error).__name__}: {error}"]
    return []


class _Wrong(Exception):
    """What is wrong with a shard, in words that follow its name."""


def _check_digest(file: BinaryIO, expected: str) -> None:
    digest = sha256()
    while block := file.read(BLOCK):
        digest.update(block)
    if digest.hexdigest() != expected:
        raise _Wrong("its sha256 is not the index's: a byte has changed")


def _check_members(
    file: BinaryIO, feature_set: FeatureSet, shard: dict[str, Any], entries: Sequence[SampleEntry]
) -> None:
    """Walk the tar as a stranger would and compare each pair of members with its entry."""
    walked = _pairs(file)
    count = 0
    for entry, (key, about, offset, data) in zip(entries, walked, strict=False):
        count += 1
        if (key, offset, len(data), digest_of(data)) != (entry.key, entry.offset, entry.size, entry.xxh3):
            raise _Wrong(f"'{entry.id}' is not where, or what, the index says")
        said = {
            name: value for name, value in entry.as_line().items() if name not in ("key", "shard", "offset", "size")
        }
        if about != said:
            raise _Wrong(f"the JSON of '{entry.id}' is not its line in samples.jsonl")
        features = decode(data, entry, feature_set.dtype, feature_set.frame_size)
        if not features.isfinite().all():
            raise _Wrong(f"'{entry.id}' holds NaN or infinite numbers")
    if count != len(entries) or count != shard["num_samples"] or next(walked, None) is not None:
        raise _Wrong(f"the tar holds another number of samples than the index: {len(entries)}")


def _pairs(file: BinaryIO) -> Iterator[tuple[str, dict[str, Any], int, bytearray]]:
    """(key, JSON, place of the tensors, their bytes) of each sample of a tar, in order."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        members = iter(tar)
        for first in members:
            second = next(members, None)
            key = first.name.removesuffix(".json")
            if second is None or (first.name, second.name) != (f"{key}.json", f"{key}.safetensors"):
                raise _Wrong(f"member '{first.name}' is not a pair of .json and .safetensors")
            about = json.load(io.TextIOWrapper(tar.extractfile(first), encoding="utf-8"))
            yield key, about, second.offset_data, bytearray(tar.extractfile(second).read())


def _print(verified: Sequence[Verified]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("set", "samples", "rejects", "audio", "shards", "GB", "dtype", "encoder", ""):
        table.add_column(title, justify="left" if title in ("set", "dtype", "encoder", "") else "right")
    for one in verified:
        state = "[red]DAMAGED[/red]" if one.faults else "ok"
        numbers = [f"{one.num_samples:,}", f"{one.num_rejects:,}", clock(one.audio_s), f"{one.num_shards:,}"]
        table.add_row(one.name, *numbers, f"{one.size / 1e9:.3f}", one.dtype, one.encoder, state)
    Console(width=None if sys.stdout.isatty() else LOG_WIDTH).print(table)


def _arguments() -> argparse.ArgumentParser:
    parser = command.parser(__doc__)
    defaults = Data()
    parser.add_argument("folder", metavar="SET_FOLDER", help="or the address of one set")
    parser.add_argument("--cache-dir", type=Path, default=defaults.cache_dir, help="default: data.cache_dir's")
    parser.add_argument("--cache-gb", type=float, default=defaults.cache_gb, help="default: data.cache_gb's")
    return parser


if __name__ == "__main__":
    command.run(main, _arguments())
