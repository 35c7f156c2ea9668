"""Speak the tiny corpus with espeak-ng: ``corpus/audio/<split>/<id>.ogg`` and ``corpus/<split>.jsonl``.

    python examples/tiny/make_corpus.py [--output FOLDER] [--seed 1]

Sentences of valid and test occur nowhere else, and each split has voices of its own.
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

import soundfile

from grammar import sentences
from voices import SAMPLE_RATE, draw_voice, synthesise

HERE = Path(__file__).resolve().parent
# In this order: a later split avoids the sentences of the earlier.
SIZES = {"test": 150, "valid": 100, "train": 2_400}
OPUS_COMPRESSION = 0.98  # libsndfile's scale; about 11 kbit/s


@dataclass(frozen=True)
class Plan:
    """One utterance before it is spoken. ``voices`` names the split whose voices may speak it."""

    id: str
    text: str
    voices: str
    seed: str


def plan_split(split: str, count: int, seed: int, excluded: Iterable[str] = ()) -> list[Plan]:
    """``count`` plans of different sentences, none of them in ``excluded``."""
    texts = sentences(count, Random(f"{seed}/{split}/sentences"), set(excluded))
    return [Plan(f"{split}-{i:05d}", text, split, f"{seed}/{split}/{i}") for i, text in enumerate(texts)]


def plan_corpus(seed: int) -> dict[str, list[Plan]]:
    """The plans of all splits; no sentence is in two of them."""
    plans: dict[str, list[Plan]] = {}
    for split, count in SIZES.items():
        plans[split] = plan_split(split, count, seed, texts_of(plans))
    return plans


def texts_of(plans: dict[str, list[Plan]]) -> set[str]:
    return {plan.text for split in plans.values() for plan in split}


def speak(plan: Plan, folder: Path) -> dict:
    """Speak one plan into ``folder/<id>.ogg`` and return its manifest line, the path still absolute."""
    voice = draw_voice(plan.voices, Random(plan.seed))
    waveform = synthesise(plan.text, voice)
    path = folder / f"{plan.id}.ogg"
    soundfile.write(path, waveform, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=OPUS_COMPRESSION)
    duration = round(soundfile.info(path).frames / SAMPLE_RATE, 4)
    return {"id": plan.id, "audio_filepath": path, "duration": duration, "text": plan.text, "speaker": voice.speaker}


def speak_all(plans: list[Plan], folder: Path, manifest: Path) -> None:
    """Speak every plan on all cores and write the manifest, its paths relative to it. Progress is printed."""
    folder.mkdir(parents=True, exist_ok=True)
    start, lines = time.monotonic(), []
    with ProcessPoolExecutor() as pool:
        for line in pool.map(speak, plans, [folder] * len(plans), chunksize=16):
            line["audio_filepath"] = line["audio_filepath"].relative_to(manifest.parent).as_posix()
            lines.append(json.dumps(line))
            if len(lines) % 500 == 0 or len(lines) == len(plans):
                left = (time.monotonic() - start) / len(lines) * (len(plans) - len(lines))
                print(f"{manifest.stem}: {len(lines)}/{len(plans)} utterances, {left:.0f} s left", flush=True)
    manifest.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "corpus")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    for split, plans in plan_corpus(arguments.seed).items():
        speak_all(plans, output / "audio" / split, output / f"{split}.jsonl")


if __name__ == "__main__":
    main()
