"""Make a manifest of speech that lies about in one of four forms, with durations from the sound files' headers.

    python shards/make_manifest.py folder SOURCE --output M.jsonl   a.flac beside a.txt; LibriSpeech's *.trans.txt
    python shards/make_manifest.py jsonl SOURCE --output M.jsonl    key names of NeMo, SLAM-LLM, Hugging Face
    python shards/make_manifest.py kaldi SOURCE --output M.jsonl    wav.scp, text and, where there, segments, utt2spk
    python shards/make_manifest.py fsdd SOURCE --split train --seed 1 --output M.jsonl

``fsdd`` is the Free Spoken Digit Dataset made into connected digits: two to five recordings of one speaker joined
with short pauses, each utterance a FLAC file in a folder beside the manifest; every recording of the split is used
once per pass.

What cannot be used is counted and listed, with the reason, in ``M.rejects.jsonl``.
"""

from __future__ import annotations

import argparse
import logging
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "graft").is_dir():
    sys.path[0] = str(ROOT)  # a clone: Python puts this folder first, where a file would hide a package of its name

import numpy as np

from graft import command
from graft.data.audio import AudioError, check_length, header_duration, read_pcm, write_pcm
from graft.data.manifest import Reject, Utterance, common, read_manifest, write_manifest, write_rejects
from graft.data.progress import clock, track
from graft.data.text import clean_text

LOG = logging.getLogger("graft.make_manifest")

SOUND_FILES = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au"}  # what libsndfile reads
Found = Utterance | Reject
Numbered = tuple[int, Found]  # by its line in a table or manifest, from 1, or by its place

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FSDD_NAME = re.compile(r"(\d)_([^_]+)_(\d+)")  # digit, speaker, index
FSDD_TEST = range(5)  # of each digit and speaker, indices 0-4 are the data set's own test split
PAUSE_S = (0.05, 0.25)
FEWEST_DIGITS, MOST_DIGITS = 2, 5


def main(arguments: argparse.Namespace) -> None:
    """Collect, fill in durations, write, report."""
    source, output = Path(arguments.source), Path(arguments.output)
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    if output.resolve() == source.resolve():
        raise ValueError(f"--output {output} is the source itself, whose rejected lines would be lost: name another")
    found = COLLECTORS[arguments.form](source, arguments)
    found = _without_twins([(number, _with_duration(item, number)) for number, item in track(found, "headers")])
    utterances = [item for item in found if isinstance(item, Utterance)]
    rejects = [item for item in found if isinstance(item, Reject)]
    rejects_path = output.with_suffix(".rejects.jsonl")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_rejects(rejects_path, rejects)
    if not utterances:
        raise ValueError(f"nothing in {source} can be used; {rejects_path} says why. {output} is not written")
    write_manifest(output, utterances)
    _report(output, utterances, rejects, rejects_path)


def from_folder(source: Path, arguments: argparse.Namespace) -> list[Numbered]:
    """Sound files below ``source``, each with its transcript in ``<name>.txt`` or in a ``*.trans.txt`` beside it."""
    del arguments
    sounds = sorted(path for path in source.rglob("*") if path.suffix.lower() in SOUND_FILES and path.is_file())
    if not sounds:
        raise ValueError(f"{source} holds no sound files ({', '.join(sorted(SOUND_FILES))})")
    listed = {folder: _trans_txt(folder) for folder in {path.parent for path in sounds}}
    return [(number, _of_folder(path, source, listed[path.parent], number)) for number, path in enumerate(sounds, 1)]


def from_jsonl(source: Path, arguments: argparse.Namespace) -> list[Numbered]:
    """The lines of a manifest in any of the key names that are read."""
    del arguments
    manifest = read_manifest(source)
    found = [*zip(manifest.lines, manifest.utterances, strict=True), *((r.line, r) for r in manifest.rejects)]
    return sorted(found, key=lambda pair: pair[0])


def from_kaldi(source: Path, arguments: argparse.Namespace) -> list[Numbered]:
    """A Kaldi data folder. Its ``wav.scp`` must name files: commands (``... |``) and archives are refused."""
    del arguments
    recordings = {key: _kaldi_path(source, key, value) for key, value in _table(source / "wav.scp").items()}
    texts = _table(source / "text")
    speakers = _table(source / "utt2spk") if (source / "utt2spk").is_file() else {}
    is_cut = (source / "segments").is_file()
    segments = _table(source / "segments") if is_cut else dict.fromkeys(recordings, "")
    found: list[Found] = []
    for number, (key, segment) in enumerate(segments.items(), 1):
        recording, start, end = _segment(source, key, segment) if is_cut else (key, 0.0, None)
        if recording not in recordings:
            found.append(Reject(number, key, f"recording '{recording}' is not in wav.scp"))
        elif not clean_text(texts.get(key, "")):
            found.append(Reject(number, key, "empty text" if key in texts else "no line in text"))
        else:
            duration = None if end is None else end - start
            path, text = recordings[recording], clean_text(texts[key])
            found.append(Utterance(key, path, duration, text, offset=start, speaker=speakers.get(key)))
    unheard = [key for key in texts if key not in segments]
    found += [Reject(len(found) + n, key, "text without audio") for n, key in enumerate(unheard, 1)]
    return list(enumerate(found, 1))


def from_fsdd(source: Path, arguments: argparse.Namespace) -> list[Numbered]:
    """Connected digits; writes their sound files into the folder ``<output without suffix>``."""
    recordings = _select(_recordings(source), arguments)
    output = Path(arguments.output)
    folder = output.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    short = [r for r in recordings if r.duration <= arguments.max_seconds]
    found: list[Found] = [
        Reject(0, r.path.stem, f"{r.duration:.2f} s, longer than --max-seconds {arguments.max_seconds:g}")
        for r in recordings
        if r.duration > arguments.max_seconds
    ]
    planned = list(_connect(short, arguments.seed, arguments.passes, arguments.max_seconds))
    for name, group, pauses in track(planned, "joining"):
        found.append(_join(folder / f"{name}.flac", f"{output.stem}-{name}", group, pauses))
    return list(enumerate(found, 1))


def _with_duration(item: Found, number: int) -> Found:
    """The utterance with its duration from the header, or the reject that its sound file makes of it."""
    if isinstance(item, Reject):
        return item
    try:
        rest = header_duration(item.audio_filepath) - item.offset
        check_length(item.audio_filepath, rest, item.duration)
    except AudioError as error:
        return Reject(number, item.id, str(error))
    if not item.text:
        return Reject(number, item.id, "empty text")
    return item if item.duration is not None else replace(item, duration=round(rest, 6))


def _without_twins(found: Sequence[Numbered]) -> list[Found]:
    """``found`` with every later utterance of an id that was used before as a reject."""
    seen: set[str] = set()
    kept: list[Found] = []
    for number, item in found:
        is_twin = isinstance(item, Utterance) and item.id in seen
        kept.append(Reject(number, item.id, f"{item.audio_filepath}: id used before") if is_twin else item)
        seen.add(item.id)
    return kept


def _report(output: Path, utterances: Sequence[Utterance], rejects: Sequence[Reject], rejects_path: Path) -> None:
    total = sum(utterance.duration or 0.0 for utterance in utterances)
    LOG.info("%s: %d utterances, %s of audio", output, len(utterances), clock(total))
    if rejects:
        LOG.info("%d rejected, listed in %s: %s", len(rejects), rejects_path, common(r.reason for r in rejects))


def _of_folder(path: Path, source: Path, listed: dict[str, str], number: int) -> Found:
    name = path.relative_to(source).with_suffix("").as_posix()
    beside = path.with_suffix(".txt")
    try:
        text = beside.read_text(encoding="utf-8-sig") if beside.is_file() else listed.get(path.stem)
    except UnicodeDecodeError:
        return Reject(number, name, f"{beside}: not UTF-8")
    if text is None:
        return Reject(number, name, f"{path}: no transcript, neither a .txt of its name nor a line in a *.trans.txt")
    return Utterance(name, path, None, clean_text(text))


def _trans_txt(folder: Path) -> dict[str, str]:
    """LibriSpeech's transcripts of a folder: ``<name> <text>`` per line."""
    lines = [line for path in sorted(folder.glob("*.trans.txt")) for line in _read_text(path).splitlines()]
    return {name: text for name, _, text in (line.partition(" ") for line in lines)}


def _table(path: Path) -> dict[str, str]:
    """A Kaldi table: key, white space, value; in the order of the file."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a Kaldi data folder holds wav.scp and text")
    table: dict[str, str] = {}
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        key, *value = line.split(maxsplit=1)[:2] or [""]
        if key in table:
            raise ValueError(f"{path}:{number}: '{key}' is there twice")
        if key:
            table[key] = value[0].strip() if value else ""
    return table


def _read_text(path: Path) -> str:
    """What a file of UTF-8 says, without the mark that some editors begin it with."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None


def _kaldi_path(source: Path, key: str, value: str) -> Path:
    if value.endswith("|") or value.startswith("|"):
        raise ValueError(
            f"{source / 'wav.scp'}: '{key}' is a command ({value}). Commands of a data set are not run here: write "
            "its output to files first (Kaldi's wav-copy scp:wav.scp ark,scp:... or the command itself) and name those"
        )
    if not value or re.search(r"\.ark(:\d+)?$", value):
        raise ValueError(f"{source / 'wav.scp'}: '{key}' is {value!r}, expected the path of a sound file")
    beside = source / value
    return beside if beside.is_file() else Path(value)  # Kaldi's own paths are relative to where its recipe ran


def _segment(source: Path, key: str, segment: str) -> tuple[str, float, float | None]:
    """(recording, start, end) in seconds; an end of None is the recording's."""
    try:
        recording, start, end = segment.split()[:3]
        start, end = float(start), float(end)
    except ValueError:
        raise ValueError(
            f"{source / 'segments'}: '{key}' has {segment!r} behind it, expected a recording, its start and end in s"
        ) from None
    if end >= 0 and end <= start:
        raise ValueError(f"{source / 'segments'}: '{key}' ends at {end:g} s, before its start at {start:g} s")
    return recording, start, end if end >= 0 else None  # Kaldi writes -1 for the end of the recording


@dataclass(frozen=True)
class Recording:
    """One digit by one speaker."""

    path: Path
    digit: int
    speaker: str
    index: int
    duration: float


def _recordings(source: Path) -> list[Recording]:
    found = []
    for path in sorted(source.iterdir()):
        match = FSDD_NAME.fullmatch(path.stem)
        if match and path.suffix.lower() in SOUND_FILES:
            digit, speaker, index = match.groups()
            found.append(Recording(path, int(digit), speaker, int(index), header_duration(path)))
    if not found:
        raise ValueError(f"{source} holds no recordings named <digit>_<speaker>_<index>.wav or .flac")
    return found


def _select(recordings: Sequence[Recording], arguments: argparse.Namespace) -> list[Recording]:
    known = sorted({recording.speaker for recording in recordings})
    for name in [*(arguments.speakers or []), *(arguments.leave_out or [])]:
        if name not in known:
            raise ValueError(f"no speaker '{name}'; there are {', '.join(known)}")
    wanted = set(arguments.speakers or known) - set(arguments.leave_out or [])
    in_split = {"train": lambda i: i not in FSDD_TEST, "test": lambda i: i in FSDD_TEST, "all": lambda i: True}
    chosen = [r for r in recordings if r.speaker in wanted and in_split[arguments.split](r.index)]
    if not chosen:
        raise ValueError(f"no recordings left of split {arguments.split} and speakers {', '.join(sorted(wanted))}")
    return chosen


def _connect(
    recordings: Sequence[Recording], seed: int, passes: int, max_seconds: float
) -> Iterator[tuple[str, list[Recording], list[float]]]:
    """(name, recordings, pauses in s) of each utterance: all recordings once per pass, one speaker to an utterance."""
    for number in range(passes):
        for speaker in sorted({recording.speaker for recording in recordings}):
            chance = random.Random(f"{seed} {speaker} {number}")  # a string: its own sequence, the same everywhere
            waiting = [recording for recording in recordings if recording.speaker == speaker]
            chance.shuffle(waiting)
            groups = _pair_singles(_group(waiting, chance, max_seconds), max_seconds)
            for position, group in enumerate(groups):
                pauses = _pauses(group, chance, max_seconds)
                yield f"{speaker}-{number}-{position:04d}", group, pauses


def _group(waiting: Sequence[Recording], chance: random.Random, max_seconds: float) -> list[list[Recording]]:
    """Two to five recordings to a group, fewer where they would not fit with the longest pauses."""
    groups: list[list[Recording]] = []
    position = 0
    while position < len(waiting):
        group = list(waiting[position : position + chance.randint(FEWEST_DIGITS, MOST_DIGITS)])
        while len(group) > 1 and not _fits(group, max_seconds):
            group.pop()
        groups.append(group)
        position += len(group)
    return groups


def _pair_singles(groups: list[list[Recording]], max_seconds: float) -> list[list[Recording]]:
    """``groups`` where a recording left alone has joined, or got company from, another group that allows it."""
    kept = [group for group in groups if len(group) > 1]
    for single in (group for group in groups if len(group) == 1):
        roomy = next((g for g in kept if len(g) < MOST_DIGITS and _fits(g + single, max_seconds)), None)
        rich = next((g for g in kept if len(g) > FEWEST_DIGITS and _fits([*single, g[-1]], max_seconds)), None)
        if roomy is not None:
            roomy += single
        elif rich is not None:
            kept.append([*single, rich.pop()])
        else:
            kept.append(single)
    return kept


def _fits(group: Sequence[Recording], max_seconds: float) -> bool:
    """Whether a group fits even with the shortest pauses."""
    return sum(r.duration for r in group) + PAUSE_S[0] * (len(group) - 1) <= max_seconds


def _pauses(group: Sequence[Recording], chance: random.Random, max_seconds: float) -> list[float]:
    """A pause for each gap, as long as chance and the room that is left want it."""
    gaps = len(group) - 1
    room = max_seconds - sum(r.duration for r in group)
    longest = min(PAUSE_S[1], room / gaps) if gaps else 0.0
    return [chance.uniform(PAUSE_S[0], longest) for _ in range(gaps)]


def _join(path: Path, utterance_id: str, group: Sequence[Recording], pauses: Sequence[float]) -> Utterance:
    """Write the recordings, samples untouched, with silence between; the text is the digits in words."""
    pieces: list[np.ndarray] = []
    rates = set()
    for recording, pause in zip(group, [*pauses, 0.0], strict=True):
        samples, rate = read_pcm(recording.path)
        pieces += [samples, np.zeros(int(pause * rate), np.int16)]
        rates.add(rate)
    if len(rates) > 1:
        raise ValueError(f"recordings of {group[0].speaker} have several sampling rates: {sorted(rates)} Hz")
    write_pcm(path, np.concatenate(pieces), rate)
    text = " ".join(DIGITS[recording.digit] for recording in group)
    return Utterance(utterance_id, path, None, text, speaker=group[0].speaker)


COLLECTORS = {"folder": from_folder, "jsonl": from_jsonl, "kaldi": from_kaldi, "fsdd": from_fsdd}


def _arguments() -> argparse.ArgumentParser:
    parser = command.parser(__doc__)
    parser.add_argument("form", choices=COLLECTORS, help="what SOURCE is")
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--output", required=True, metavar="M.jsonl")
    digits = parser.add_argument_group("fsdd only")
    digits.add_argument("--split", choices=("train", "test", "all"), default="train")
    digits.add_argument("--seed", type=int, default=1, metavar="N")
    digits.add_argument("--speakers", nargs="+", metavar="NAME", help="only these")
    digits.add_argument("--leave-out", nargs="+", metavar="NAME", help="all but these")
    digits.add_argument("--max-seconds", type=float, default=3.9, metavar="S", help="longest utterance (default 3.9)")
    digits.add_argument("--passes", type=int, default=1, metavar="N", help="times each recording is used (default 1)")
    return parser


if __name__ == "__main__":
    command.run(main, _arguments())
