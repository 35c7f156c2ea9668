"""Speak the tiny corpus with espeak-ng: ``corpus/audio/<split>/*.ogg`` and ``corpus/<split>.jsonl``.

    python examples/tiny/make_corpus.py [--output FOLDER] [--seed 1]

Sentences of valid and test occur nowhere else, and each split has voices of its own. A sound file is named after the
first utterance in it; the others have an ``offset`` in the manifest.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import soundfile

from grammar import sentences
from voices import SAMPLE_RATE, draw_voice, synthesise

HERE = Path(__file__).resolve().parent
# In this order: a later plan avoids the sentences of the earlier. Train comes in two parts, the second of which also
# avoids what Whisper is pretrained on.
SIZES = {"test": 150, "valid": 100, "train": 2_400}
NUM_PRETRAINING = 16_000
NUM_MORE_TRAIN = 900
UTTERANCES_PER_FILE = {"test": 1, "valid": 1, "train": 100}  # a quarter of an Ogg file of one utterance is Ogg's own
OPUS_COMPRESSION = 0.98  # libsndfile's scale; about 11 kbit/s, and from 9 kbit/s down Opus leaves out all above 4 kHz


@dataclass(frozen=True)
class Plan:
    """One utterance before it is spoken. ``voices`` names the split whose voices may speak it."""

    id: str
    text: str
    voices: str
    seed: str


def plan_split(split: str, count: int, seed: int, excluded: Iterable[str], first: int = 0) -> list[Plan]:
    """``count`` plans of different sentences, none of them in ``excluded``; their numbers go up from ``first``."""
    stream = f"{seed}/{split}/sentences" + (f"/{first}" if first else "")
    texts = sentences(count, Random(stream), set(excluded))
    return [Plan(f"{split}-{i:05d}", text, split, f"{seed}/{split}/{i}") for i, text in enumerate(texts, first)]


def plan_corpus(seed: int) -> dict[str, list[Plan]]:
    """The plans of all splits; no sentence is in two of them, nor in what Whisper is pretrained on."""
    plans = _plan_first_part(seed)
    known = texts_of(plans) | {plan.text for plan in plan_pretraining(NUM_PRETRAINING, seed)}
    plans["train"] += plan_split("train", NUM_MORE_TRAIN, seed, known, first=len(plans["train"]))
    return plans


def plan_pretraining(count: int, seed: int) -> list[Plan]:
    """What Whisper hears in its pretraining: voices and sentences that are in no split of the corpus."""
    texts = sentences(count, Random(f"{seed}/pretraining/sentences"), texts_of(_plan_first_part(seed)))
    return [Plan(str(i), text, "pretraining", f"{seed}/pretraining/{i}") for i, text in enumerate(texts)]


def _plan_first_part(seed: int) -> dict[str, list[Plan]]:
    plans: dict[str, list[Plan]] = {}
    for split, count in SIZES.items():
        plans[split] = plan_split(split, count, seed, texts_of(plans))
    return plans


def texts_of(plans: dict[str, list[Plan]]) -> set[str]:
    return {plan.text for split in plans.values() for plan in split}


def speak(plans: list[Plan], folder: Path) -> list[dict]:
    """Speak ``plans`` one behind the other into one file in ``folder``; their manifest lines, the path absolute."""
    path, lines, waveforms, start = folder / f"{plans[0].id}.ogg", [], [], 0
    for plan in plans:
        voice = draw_voice(plan.voices, Random(plan.seed))
        waveforms.append(synthesise(plan.text, voice))
        place = {"audio_filepath": path, "duration": len(waveforms[-1]) / SAMPLE_RATE}
        if start:
            place["offset"] = start / SAMPLE_RATE
        lines.append({"id": plan.id, **place, "text": plan.text, "speaker": voice.speaker})
        start += len(waveforms[-1])
    joined = np.concatenate(waveforms)
    soundfile.write(path, joined, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=OPUS_COMPRESSION)
    return lines


def speak_all(plans: list[Plan], per_file: int, folder: Path, manifest: Path) -> None:
    """Speak every plan on all cores and write the manifest, its paths relative to it. Progress is printed."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [plans[i : i + per_file] for i in range(0, len(plans), per_file)]
    start, lines = time.monotonic(), []
    with ProcessPoolExecutor() as pool:
        for number, spoken in enumerate(pool.map(speak, files, [folder] * len(files)), 1):
            for line in spoken:
                line["audio_filepath"] = line["audio_filepath"].relative_to(manifest.parent).as_posix()
                lines.append(json.dumps(line))
            if number % max(1, len(files) // 5) == 0:
                left = (time.monotonic() - start) / number * (len(files) - number)
                print(f"{manifest.stem}: {len(lines)}/{len(plans)} utterances, {left:.0f} s left", flush=True)
    manifest.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "corpus")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    for split, plans in plan_corpus(arguments.seed).items():
        speak_all(plans, UTTERANCES_PER_FILE[split], output / "audio" / split, output / f"{split}.jsonl")


if __name__ == "__main__":
    main()
