"""A feature set on disk, and reading it: WebDataset tars, with an index outside them that proves they are whole.

A tar protects nothing but its headers: a cut at a member boundary, a zeroed header or a flipped byte of data read as
a shorter or different set, without an error. So every set is

    index.json               written last; counts, sizes and digests of all else, and which encoder made it
    samples.jsonl            one line per utterance: text, lengths, and where its bytes are
    <split>-000000.tar ...   per utterance <key>.json and <key>.safetensors; stock WebDataset reads them
    rejects.jsonl            utterances that are not in the set, and why
    parts/                   one file per finished shard: what a rerun needs to go on

and a sample is read by its place and checked by its digest: XXH3 of 64 bits, which no read waits for (CRC-32 takes
three times as long as the copy). Nothing is unpickled, and no size is believed before it has
been compared with the index. The files are those of a folder, or come from elsewhere: see :mod:`graft.data.cache`.

F: encoder frames of 20 ms    D: numbers per frame
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from xxhash import xxh3_64_hexdigest

from graft.run_dir import window_of

FORMAT = 2
INDEX, SAMPLES, REJECTS, PARTS = "index.json", "samples.jsonl", "rejects.jsonl", "parts"
TENSOR, SCALE = "audio_features", "scale"
METADATA, SEAL = "__metadata__", "utterance"  # the first is safetensors' own name
DTYPES = {"bfloat16": ("BF16", 2), "int8": ("I8", 1)}  # in a recipe -> in a safetensors header, bytes
TORCH_DTYPES = {"BF16": torch.bfloat16, "I8": torch.int8, "F32": torch.float32}
SHA256 = re.compile(r"[0-9a-f]{64}")
MOST_INDEX_BYTES = 1 << 28  # a shard takes about 200
MOST_HEADER_BYTES = 4096  # of a sample's safetensors header: ours take 80 to 200


class DamagedShard(ValueError):
    """Bytes of a set are not those its index promises; the message names the shard."""


@dataclass(frozen=True, slots=True)
class SampleEntry:
    """One line of ``samples.jsonl``: ``offset`` and ``size`` are the place of the safetensors bytes in ``shard``."""

    id: str
    key: str
    text: str
    num_frames: int
    duration: float
    shard: str
    offset: int
    size: int
    xxh3: str
    instruction: str | None = None
    language: str | None = None
    speaker: str | None = None

    def as_line(self) -> dict[str, Any]:
        """The entry as it is written; what is not set is left out."""
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}


class SetFiles(Protocol):
    """The files of a set, wherever they are."""

    most_open: int  # descriptors that a reader should keep

    def name(self, file: str) -> str:
        """What a message calls ``file``."""
        ...

    def read_index(self, most: int) -> bytes:
        """``index.json``; ValueError where there is none or it has more than ``most`` bytes."""
        ...

    def expect(self, index: Mapping[str, Any]) -> None:
        """Compare with the index what can be compared without reading; DamagedShard names what differs."""
        ...

    def open(self, file: str) -> int:
        """A descriptor for reading; FileNotFoundError where there is none."""
        ...

    def damaged(self, file: str, what: str) -> DamagedShard:
        """The error for a damaged file, with the remedy."""
        ...


class Folder:
    """A set's files in a folder of this machine."""

    most_open = 64

    def __init__(self, path: Path) -> None:
        self.path = path

    def name(self, file: str) -> str:
        """Its path."""
        return str(self.path / file)

    def read_index(self, most: int) -> bytes:
        """See :class:`SetFiles`."""
        path = self.path / INDEX
        if not path.is_file():
            started = self.path / PARTS
            begun = " (it was begun: run shards/precompute.py again to finish it)" if started.is_dir() else ""
            raise ValueError(f"no finished feature set in {self.path}: no {INDEX}{begun}")
        size = path.stat().st_size
        if size > most:
            raise DamagedShard(f"{path} has {size} bytes, an index has at most {most}")
        return path.read_bytes()

    def expect(self, index: Mapping[str, Any]) -> None:
        """Every shard is there and has its size."""
        for shard in index["shards"]:
            path = self.path / shard["file"]
            if not path.is_file():
                raise damaged(path, "missing")
            found = path.stat().st_size
            if found != shard["size"]:
                raise damaged(path, f"{found} bytes, the index says {shard['size']}")

    def open(self, file: str) -> int:
        """See :class:`SetFiles`."""
        return os.open(self.path / file, os.O_RDONLY)

    def damaged(self, file: str, what: str) -> DamagedShard:
        """See :class:`SetFiles`."""
        return damaged(self.path / file, what)


class FeatureSet:
    """An opened set: ``entries`` in order, and ``read`` for the features of one of them."""

    def __init__(self, files: SetFiles, index: Mapping[str, Any], entries: Sequence[SampleEntry]) -> None:
        self.files, self.index, self.entries = files, index, entries
        self.name: str = index["name"]
        self.dtype: str = index["dtype"]
        self.frame_size: int = index["frame_size"]
        self.window_frames: int = index["window_frames"]
        self.fingerprint: str = index["encoder"]["fingerprint"]
        self.audio_seconds: float = index["audio_seconds"]
        self._open = _OpenShards(files)

    @classmethod
    def open(cls, where: str | Path | SetFiles, expected_fingerprint: str | None = None) -> FeatureSet:
        """Open a set, in a folder or from elsewhere, after comparing what can be compared without reading the shards.

        Raises:
            ValueError: there is no finished set, or another encoder made it.
            DamagedShard: a file is missing, has another size, or the list of samples is not the index's.
        """
        files = Folder(Path(where)) if isinstance(where, str | Path) else where
        index = read_index(files)
        check_fingerprint(files, index, expected_fingerprint)
        files.expect(index)
        return cls(files, index, _read_entries(files, index))

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, position: int) -> torch.Tensor:
        """Features (F, D) in bf16 of the entry at ``position``.

        Raises:
            DamagedShard: the bytes are not those that were written.
        """
        return decode(self.read_bytes(position), self.entries[position], self.dtype, self.frame_size)

    def read_bytes(self, position: int) -> memoryview:
        """The safetensors bytes of the entry at ``position``, checked by their digest."""
        entry = self.entries[position]
        data = self._open.read(entry.shard, entry.offset, entry.size)
        if len(data) != entry.size or digest_of(data) != entry.xxh3:
            raise self.files.damaged(entry.shard, f"the features of '{entry.id}' are not those that were written")
        return data


def encode(features: torch.Tensor, dtype: str, seal: str = "") -> bytes:
    """Features (F, D) as safetensors bytes; ``int8`` adds one fp32 scale per frame (F,).

    ``seal`` goes into their header, and so under their digest; see :func:`seal_of`.
    """
    from safetensors.torch import save

    metadata = {SEAL: seal} if seal else None
    if dtype == "bfloat16":
        return save({TENSOR: features.to(torch.bfloat16).contiguous()}, metadata)
    peak = features.float().abs().amax(dim=1)
    scale = torch.where(peak > 0, peak / 127, 1.0)
    quantised = (features.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return save({TENSOR: quantised.contiguous(), SCALE: scale.contiguous()}, metadata)


def digest_of(data: bytes | memoryview) -> str:
    """XXH3 of 64 bits, 16 hexadecimal characters: against accidents; the sha256 of the index are against intent."""
    return xxh3_64_hexdigest(data)


def seal_of(about: Mapping[str, Any]) -> str:
    """16 characters that change when an utterance's id, text or lengths do.

    They bind the features to the rest: the list of samples of another build, in which the same audio has another text,
    holds other digests.
    """
    return blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()


def decode(data: memoryview, entry: SampleEntry, dtype: str, frame_size: int) -> torch.Tensor:
    """Features (F, D) in bf16 from safetensors bytes, whose header must be exactly what the index makes of it."""
    start, header = _header(data, entry)
    wanted = _layout(entry.num_frames, frame_size, dtype)
    if isinstance(header, dict):
        header.pop(METADATA, None)  # the seal: its part is done when the digest is right
    if header != wanted or len(data) - start != sample_size(entry.num_frames, frame_size, dtype):
        raise damaged(entry.shard, f"'{entry.id}' holds {str(header)[:200]}, the index says {wanted}")
    tensors = {name: _tensor(data, start, wanted[name]) for name in wanted}
    if dtype == "bfloat16":
        return tensors[TENSOR]
    return (tensors[TENSOR].float() * tensors[SCALE][:, None]).to(torch.bfloat16)


def sample_size(num_frames: int, frame_size: int, dtype: str) -> int:
    """Bytes of the tensors of one sample, without headers."""
    return num_frames * (frame_size * DTYPES[dtype][1] + (4 if dtype == "int8" else 0))


def shard_name(split: str, number: int) -> str:
    """File name of shard ``number`` of a set."""
    return f"{split}-{number:06d}.tar"


def damaged(shard: Path | str, what: str) -> DamagedShard:
    """The error for a damaged shard, with the remedy."""
    return DamagedShard(f"shard {shard}: {what}. Delete this shard and run shards/precompute.py again.")


def read_index(files: SetFiles) -> dict[str, Any]:
    """``index.json`` of a finished set, its keys and kinds checked.

    Raises:
        ValueError: there is none, or it is not one of ours.
    """
    data = files.read_index(MOST_INDEX_BYTES)
    try:
        index = json.loads(data.decode("utf-8"))
        _check_index(index)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedShard(f"{files.name(INDEX)} is damaged: {type(error).__name__}: {error}") from error
    return index


def check_fingerprint(files: SetFiles, index: Mapping[str, Any], expected: str | None) -> None:
    """Refuse a set that another encoder made, or the same one over other windows.

    Raises:
        ValueError: names both encoders and the two ways out.
    """
    found = index["encoder"]["fingerprint"]
    if expected is not None and window_of(found) != window_of(expected):
        raise ValueError(
            f"feature set {files.name('').rstrip('/')} was made with audio.window={window_of(found)}, the recipe has "
            f"audio.window={window_of(expected)}: set audio.window={window_of(found)}, or make the set again in "
            "another folder (data.shards)."
        )
    if expected is not None and found != expected:
        raise ValueError(
            f"feature set {files.name('').rstrip('/')} was made by another encoder: its fingerprint is {found[:12]} "
            f"(from {index['encoder'].get('source', 'unknown')}), the recipe's is {expected[:12]}. "
            "Point bases.whisper to the encoder that made it, or make the set again in another folder (data.shards)."
        )


def _check_index(index: Any) -> None:
    if index["format"] != FORMAT:
        raise ValueError(
            f"format {index['format']!r}, this version reads {FORMAT}: make the set again in another folder"
        )
    if index["dtype"] not in DTYPES:
        raise ValueError(f"dtype {index['dtype']!r}, expected one of {', '.join(DTYPES)}")
    for name in ("num_samples", "window_frames", "frame_size", "num_rejects"):
        _check_whole(index[name], name)
    for name in (index["name"], index["samples"]["file"], index["encoder"]["fingerprint"]):
        _check_plain(name)
    for shard in index["shards"]:
        _check_plain(shard["file"])
        _check_whole(shard["size"], "size")
        _check_whole(shard["num_samples"], "num_samples")
    if sum(shard["num_samples"] for shard in index["shards"]) != index["num_samples"]:
        raise ValueError("the shards' num_samples do not add up to the set's")
    for file in (index["samples"], *index["shards"]):
        if not isinstance(file["sha256"], str) or not SHA256.fullmatch(file["sha256"]):
            raise ValueError(f"the sha256 of {file['file']} is {file['sha256']!r}, expected 64 hexadecimal digits")
    _check_whole(index["samples"].get("size", 0), "size")
    index["audio_seconds"] = float(index["audio_seconds"])


def _check_whole(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} is {value!r}, expected a whole number")


def _check_plain(name: Any) -> None:
    if not isinstance(name, str) or not name or name != os.path.basename(name) or name in (".", ".."):
        raise ValueError(f"{name!r} is not a plain name")


def _read_entries(files: SetFiles, index: Mapping[str, Any]) -> list[SampleEntry]:
    path = files.name(index["samples"]["file"])
    try:
        with os.fdopen(files.open(index["samples"]["file"]), "rb") as file:
            data = file.read()
    except FileNotFoundError as error:
        raise DamagedShard(f"{path}: missing") from error
    if sha256(data).hexdigest() != index["samples"]["sha256"]:
        raise DamagedShard(f"{path}: its sha256 is not the index's: changed, cut, or of another build")
    sizes = {shard["file"]: shard["size"] for shard in index["shards"]}
    names = {name: name for name in sizes}  # one string per shard, not one per sample
    entries = []
    for number, line in enumerate(data.decode("utf-8").split("\n")[:-1], start=1):
        try:
            fields = json.loads(line)
            entry = SampleEntry(**fields | {"shard": names.get(fields["shard"], fields["shard"])})
            _check_entry(entry, sizes, index)
        except DamagedShard:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedShard(f"{path}:{number}: {type(error).__name__}: {error}") from error
        entries.append(entry)
    if len(entries) != index["num_samples"]:
        raise DamagedShard(f"{path}: {len(entries)} samples, the index says {index['num_samples']}")
    return entries


def _check_entry(entry: SampleEntry, sizes: Mapping[str, int], index: Mapping[str, Any]) -> None:
    """The place of a sample is inside its shard and its size follows from its frames: no read is larger."""
    for name in ("num_frames", "offset", "size"):
        _check_whole(getattr(entry, name), name)
    for name in ("id", "key", "text", "xxh3"):
        if not isinstance(getattr(entry, name), str):
            raise ValueError(f"{name} is {getattr(entry, name)!r}, expected a string")
    tensors = sample_size(entry.num_frames, index["frame_size"], index["dtype"])
    inside = entry.shard in sizes and entry.offset + entry.size <= sizes[entry.shard]
    if not inside or not tensors < entry.size <= tensors + MOST_HEADER_BYTES or entry.num_frames < 1:
        raise damaged(entry.shard, f"'{entry.id}' has an impossible place or size in {index['samples']['file']}")


def _layout(num_frames: int, frame_size: int, dtype: str) -> dict[str, dict[str, Any]]:
    """The safetensors header of a sample: the tensors of wider numbers come first."""
    stored_as, width = DTYPES[dtype]
    scale_end = 4 * num_frames if dtype == "int8" else 0
    end = scale_end + num_frames * frame_size * width
    layout = {TENSOR: {"dtype": stored_as, "shape": [num_frames, frame_size], "data_offsets": [scale_end, end]}}
    if dtype == "int8":
        layout[SCALE] = {"dtype": "F32", "shape": [num_frames], "data_offsets": [0, scale_end]}
    return layout


def _header(data: memoryview, entry: SampleEntry) -> tuple[int, Any]:
    """Where the tensors begin and what the safetensors header says of them."""
    length = int.from_bytes(data[:8], "little")
    if length > MOST_HEADER_BYTES or 8 + length > len(data):
        raise damaged(entry.shard, f"'{entry.id}' has a header of {length} bytes")
    try:
        return 8 + length, json.loads(bytes(data[8 : 8 + length]))
    except (ValueError, RecursionError) as error:
        raise damaged(entry.shard, f"'{entry.id}' has an unreadable header") from error


def _tensor(data: memoryview, start: int, layout: Mapping[str, Any]) -> torch.Tensor:
    """A view into ``data``, which is neither copied nor unpickled."""
    (begin, _), shape = layout["data_offsets"], layout["shape"]
    dtype = TORCH_DTYPES[layout["dtype"]]
    return torch.frombuffer(data, dtype=dtype, offset=start + begin, count=math.prod(shape)).reshape(shape)


class _OpenShards:
    """Descriptors of the shards read last; several threads may read at once."""

    def __init__(self, files: SetFiles) -> None:
        self._files = files
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, offset: int, size: int) -> memoryview:
        """Up to ``size`` bytes from ``offset``; fewer where the file ends."""
        descriptor, done = self._descriptor(name), 0
        data = memoryview(np.empty(size, np.uint8))  # a bytearray would be filled with zeros first
        while done < size:
            got = os.preadv(descriptor.number, [data[done:]], offset + done)
            if not got:
                return data[:done]
            done += got
        return data

    def _descriptor(self, name: str) -> _Descriptor:
        with self._lock:
            found = self._open.get(name)
            if found:
                self._open.move_to_end(name)
                return found
        made = self._opened(name)  # outside the lock: it may have to be fetched, and others read meanwhile
        with self._lock:
            self._open[name] = made
            while len(self._open) > self._files.most_open:
                self._open.popitem(last=False)  # closed when the last thread that reads from it lets go
        return made

    def _opened(self, name: str) -> _Descriptor:
        try:
            return _Descriptor(self._files.open(name))
        except FileNotFoundError as error:
            raise self._files.damaged(name, "missing") from error


class _Descriptor:
    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)
