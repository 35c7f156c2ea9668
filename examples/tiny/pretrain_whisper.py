"""Pretrain the tiny Whisper on espeak-ng speech and save it, in stock Hugging Face format, to ``whisper/``.

    python examples/tiny/pretrain_whisper.py [--steps 2200] [--cache FOLDER] [--output FOLDER]

The pretraining speech is made on the first run: sentences of the grammar that are in no split of the corpus, spoken by
voices of its own, named and invented. Nothing of the corpus itself is heard. Run the same command again after an
interruption and it goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import torch
from transformers import WhisperForConditionalGeneration

from augmentation import Augmentation
from make_corpus import HERE, NUM_PRETRAINING, Plan, plan_pretraining
from speech_set import SpeechSet, load_cache, read_manifest, save_cache
from voices import draw_voice, synthesise
from whisper_base import make_config, make_generation_config, make_tokenizer
from whisper_pretraining import Pretrainer, Schedule, Training, blank_id, draw_from, pretrain, word_error_rate

AUGMENTATION = Augmentation(
    speed=(0.85, 1.2),
    tempo=(0.85, 1.15),
    noise_probability=0.25,
    snr_db=(15.0, 40.0),
    filter_probability=0.25,
    tilt_db=6.0,
    high_cut_hz=(3_500.0, 8_000.0),
    time_masks=1,
    time_mask_frames=12,
    band_masks=1,
    band_mask_bins=8,
)


def speak(plan: Plan) -> np.ndarray:
    return synthesise(plan.text, draw_voice(plan.voices, Random(plan.seed)))


def pretraining_speech(count: int, seed: int, cache: Path) -> SpeechSet:
    """The pretraining set, spoken on all cores on the first call and read from ``cache`` afterwards."""
    path = cache / f"speech-{seed}-{count}.npz"
    if not path.exists():
        save_cache(speak_all(plan_pretraining(count, seed)), path)
    return load_cache(path)


def speak_all(plans: list[Plan]) -> SpeechSet:
    """Speak every plan; progress is printed."""
    speech, start = SpeechSet(), time.monotonic()
    with ProcessPoolExecutor() as pool:
        for plan, waveform in zip(plans, pool.map(speak, plans, chunksize=32), strict=True):
            speech.append(waveform, plan.text)
            if len(speech) % 1_000 == 0:
                left = (time.monotonic() - start) / len(speech) * (len(plans) - len(speech))
                print(f"speaking {len(speech)}/{len(plans)} utterances, {left:.0f} s left", flush=True)
    return speech


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=HERE / "corpus")
    parser.add_argument("--output", type=Path, default=HERE / "whisper")
    parser.add_argument("--cache", type=Path, default=HERE.parents[1] / "runs" / "tiny-whisper")
    parser.add_argument("--utterances", type=int, default=NUM_PRETRAINING)
    parser.add_argument("--steps", type=int, default=2_200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)

    valid, test = (read_manifest(arguments.corpus / f"{split}.jsonl") for split in ("valid", "test"))
    speech = pretraining_speech(arguments.utterances, arguments.seed, arguments.cache)
    tokenizer = make_tokenizer(speech.texts)
    whisper = WhisperForConditionalGeneration(make_config(tokenizer))
    whisper.generation_config = make_generation_config(tokenizer)
    pretrainer = Pretrainer(whisper, blank_id(tokenizer))
    checkpoint = arguments.cache / "checkpoint.pt"
    training = Training(pretrainer, tokenizer, draw_from(speech), AUGMENTATION, valid, checkpoint, arguments.output)
    pretrain(training, Schedule(arguments.steps, seed=arguments.seed), report=lambda line: print(line, flush=True))
    print(f"test: WER of the decoder on unseen voices {word_error_rate(whisper.eval(), tokenizer, test):.2%}")


if __name__ == "__main__":
    main()
