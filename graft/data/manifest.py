"""Manifest lines -> checked utterances; every line ends as used or in a list with the reason.

Ours is JSONL with ``id``, ``audio_filepath``, ``duration``, ``text`` and optional ``offset``, ``instruction``,
``language``, ``speaker``, ``image``. The key names of NeMo, SLAM-LLM and Hugging Face are read too. Paths are relative
to the manifest.

Two kinds of fault: a line that says nothing certain (not JSON, a key missing, an id twice) makes the whole manifest
invalid, and all such lines are reported together; an utterance that cannot be used (no text, no file) is rejected,
and counted.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from graft.data.text import clean_text
from graft.recipe import View
from graft.run_dir import write_whole

ALIASES: dict[str, tuple[str, ...]] = {  # ours first, then NeMo's, SLAM-LLM's, Hugging Face's
    "id": ("id", "key", "utt_id"),
    "audio_filepath": ("audio_filepath", "source", "audio", "path", "file"),
    "text": ("text", "answer", "target", "sentence", "transcription", "transcript"),
    "duration": ("duration",),
    "offset": ("offset",),
    "instruction": ("instruction", "context", "prompt"),
    "language": ("language", "lang"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "image": ("image",),
}
LONGEST_KEY = 80  # characters; a USTAR member name holds 100, with the extension
LONGEST_S = 1e9  # a duration beyond thirty years is a mistake; NaN fails the comparison too
MOST_FAULTS_TOLD, REASONS_TOLD = 20, 3


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording, or a piece of one, with its transcript; ``duration`` and ``offset`` in seconds."""

    id: str
    audio_filepath: Path
    duration: float | None
    text: str
    offset: float = 0.0
    instruction: str | None = None
    language: str | None = None
    speaker: str | None = None
    image: Path | None = None
    view: View | None = None  # None: as it is

    @property
    def heard_s(self) -> float | None:
        """Seconds that the encoder hears: a faster view is shorter than its recording."""
        return None if self.duration is None else self.duration / (self.view.speed if self.view else 1)

    def extras(self) -> dict[str, Any]:
        """The optional fields that are set and are words: what a shard keeps beside the text."""
        optional = {"instruction": self.instruction, "language": self.language, "speaker": self.speaker}
        return {name: value for name, value in optional.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Reject:
    """An utterance that is not used, and why; ``line`` is its line in the manifest, from 1."""

    line: int
    id: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """What a manifest holds; ``sha256`` is of its bytes."""

    path: Path
    utterances: list[Utterance]
    rejects: list[Reject]
    lines: list[int] = field(default_factory=list)  # of each utterance
    sha256: str = ""


def read_manifest(path: str | Path, *, check_files: bool = True) -> Manifest:
    """Read and check a manifest.

    Args:
        check_files: look for each sound file; where that is left to whoever reads the audio, say False.

    Raises:
        ValueError: there is no such file, no line in it, or lines that say nothing certain, each with its number.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"manifest {path} does not exist; shards/make_manifest.py makes one")
    data = path.read_bytes()
    read = _Reading(path, check_files)
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            read.add(number, line)
    read.raise_faults()
    return Manifest(path, read.utterances, read.rejects, read.lines, sha256(data).hexdigest())


def write_manifest(path: str | Path, utterances: Iterable[Utterance]) -> None:
    """Write utterances as a manifest of our own key names, audio relative to it; it appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        for utterance in utterances:
            file.write(json.dumps(_line(utterance, path.parent), ensure_ascii=False) + "\n")
    os.replace(partial, path)


def write_rejects(path: str | Path, rejects: Iterable[Reject]) -> None:
    """Write rejects as JSON lines with ``line``, ``id`` and ``reason``; the file appears whole or not at all."""
    lines = [json.dumps({"line": r.line, "id": r.id, "reason": r.reason}, ensure_ascii=False) for r in rejects]
    write_whole(Path(path), "".join(f"{line}\n" for line in lines))


def common(reasons: Iterable[str]) -> str:
    """The most frequent reasons with their counts; what comes before the last colon (a file's name) is left out."""
    kinds = Counter(reason.rsplit(": ", 1)[-1] for reason in reasons)
    return "; ".join(f"{count} x {kind}" for kind, count in kinds.most_common(REASONS_TOLD))


def sample_key(utterance_id: str) -> str:
    """Name of an utterance inside a shard: different for different ids, no dot (WebDataset splits there), no slash."""
    key = quote(utterance_id, safe="").replace(".", "%2E").replace("~", "%7E")
    if len(key) <= LONGEST_KEY:
        return key
    return f"{key[:40]}-{sha256(utterance_id.encode()).hexdigest()[:32]}"


class _Reading:
    """Sorts the lines of one manifest into utterances, rejects and faults."""

    def __init__(self, path: Path, check_files: bool) -> None:
        self.path, self.check_files = path, check_files
        self.utterances: list[Utterance] = []
        self.rejects: list[Reject] = []
        self.lines: list[int] = []
        self.faults: list[str] = []
        self.first_line: dict[str, int] = {}

    def add(self, number: int, line: bytes) -> None:
        try:
            utterance = parse_line(_object(line), self.path.parent)
        except ValueError as error:
            self.faults.append(f"{self.path}:{number}: {error}")
            return
        first = self.first_line.setdefault(utterance.id, number)
        if first != number:
            self.faults.append(f"{self.path}:{number}: id '{utterance.id}' is already on line {first}")
            return
        reason = self._unusable(utterance)
        if reason:
            self.rejects.append(Reject(number, utterance.id, reason))
        else:
            self.utterances.append(utterance)
            self.lines.append(number)

    def _unusable(self, utterance: Utterance) -> str | None:
        if not utterance.text:
            return "empty text"
        if utterance.duration is not None and utterance.duration <= 0:
            return f"empty audio: duration {utterance.duration:g} s"
        if utterance.image is not None:  # to learn what is said of a picture without seeing it is to learn to invent
            return "an image beside the audio, which is not shown to the model; without the key its speech is used"
        if self.check_files and not utterance.audio_filepath.is_file():
            return f"{utterance.audio_filepath}: no such file"
        return None

    def raise_faults(self) -> None:
        told, more = self.faults[:MOST_FAULTS_TOLD], len(self.faults) - MOST_FAULTS_TOLD
        if told:
            end = [f"... and {more} more"] if more > 0 else []
            raise ValueError("\n".join([f"manifest {self.path} cannot be used:", *told, *end]))
        if not self.first_line:
            raise ValueError(f"manifest {self.path} holds no lines; expected one JSON object per line")


def parse_line(line: Mapping[str, Any], folder: Path) -> Utterance:
    """An utterance from one decoded manifest line; relative paths start at ``folder``.

    Raises:
        ValueError: a key is missing or its value is of the wrong kind; says which.
    """
    found = {name: _first(line, aliases) for name, aliases in ALIASES.items()}
    audio = found["audio_filepath"]
    if isinstance(audio, Mapping):  # Hugging Face writes {"path": ..., "sampling_rate": ...}
        audio = audio.get("path")
    if not isinstance(audio, str) or not audio:
        raise ValueError(f"no audio path: expected a string under one of {', '.join(ALIASES['audio_filepath'])}")
    if not isinstance(found["text"], str):
        raise ValueError(f"no text: expected a string under one of {', '.join(ALIASES['text'])}")
    for name in ("id", "text"):
        _check_encodable(found[name], name)
    offset = _seconds(found["offset"], "offset") or 0.0
    optional = {name: _optional_text(found[name], name) for name in ("instruction", "language", "speaker", "image")}
    image = optional.pop("image")
    return Utterance(
        id=_id(found["id"], audio, offset),
        audio_filepath=folder / audio,
        duration=_seconds(found["duration"], "duration"),
        text=clean_text(found["text"]),
        offset=offset,
        image=folder / image if image else None,
        **optional,
    )


def _object(line: bytes) -> dict[str, Any]:
    try:
        decoded = json.loads(line.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): {line[:60].decode('utf-8', 'replace')!r}") from error
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"not JSON that can be read: {error}") from error
    if not isinstance(decoded, dict):
        raise ValueError(f'a JSON {type(decoded).__name__}, expected an object such as {{"audio_filepath": ...}}')
    return decoded


def _check_encodable(value: Any, name: str) -> None:
    try:
        str(value).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half of a surrogate pair, which is no character: {value!r}") from None


def _first(line: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((line[name] for name in names if line.get(name) is not None), None)


def _id(given: Any, audio: str, offset: float) -> str:
    """The line's own id, or one made from its path (and offset), which NeMo's and Hugging Face's lines lack."""
    if given is None:
        stem = os.path.splitext(audio)[0]
        return f"{stem}@{offset:g}" if offset else stem
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise ValueError(f"id is {given!r}, expected a string that is not empty")
    return str(given)


def _seconds(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LONGEST_S:
        raise ValueError(f"{name} is {str(value)[:40]!r}, expected seconds, a number not below 0")
    return float(value)


def _optional_text(value: Any, name: str) -> str | None:
    if value is not None and not isinstance(value, str | int):
        raise ValueError(f"{name} is {value!r}, expected a string")
    return None if value is None or value == "" else str(value)


def _line(utterance: Utterance, folder: Path) -> dict[str, Any]:
    """What is written for an utterance: our key names, optional ones only where set."""
    line: dict[str, Any] = {"id": utterance.id, "audio_filepath": _relative(utterance.audio_filepath, folder)}
    if utterance.duration is not None:
        line["duration"] = utterance.duration
    line["text"] = utterance.text
    if utterance.offset:
        line["offset"] = utterance.offset
    return line | utterance.extras()


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()
