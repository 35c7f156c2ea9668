"""Make a tiny Whisper that has heard people: the one of examples/tiny, trained on with recordings of spoken digits.

    python examples/digits/make_base.py [--recordings FOLDER] [--output FOLDER] [--leave-out SPEAKER]

Train recordings are joined to connected digits and strongly disturbed; synthetic digits and some of the tiny corpus
are between them. A speaker who is left out is in nothing but the scores at the end. Test recordings are only scored.
Run the same command again after an interruption and it goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from random import Random

import torch

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny"
sys.path.insert(0, str(TINY))

from connected_digits import Recordings, connected_set, draw_digits, only, read_recordings

from augmentation import Augmentation
from grammar import DIGITS
from make_corpus import Plan
from pretrain_whisper import speak_all
from speech_set import SpeechSet, load_cache, read_manifest, save_cache
from whisper_base import load_base
from whisper_pretraining import (
    Pretrainer,
    Schedule,
    Training,
    blank_id,
    draw_from,
    draw_mixture,
    pretrain,
    word_error_rate,
)

SHARES = {"people": 0.75, "synthetic": 0.15, "tiny": 0.1}
AUGMENTATION = Augmentation(
    speed=(0.8, 1.25),
    tempo=(0.8, 1.25),
    snr_db=(5.0, 40.0),
    filter_probability=0.7,
    tilt_db=10.0,
    low_cut_hz=(20.0, 350.0),
    high_cut_hz=(2_500.0, 8_000.0),
    echo_probability=0.4,
)
UTTERANCES_A_SPEAKER = 60
NUM_SYNTHETIC = 1_000


def synthetic_digits(cache: Path, seed: int) -> SpeechSet:
    """Connected digits in voices of the tiny Whisper's pretraining, spoken once and read from ``cache`` afterwards."""
    path = cache / f"synthetic-digits-{seed}.npz"
    if not path.exists():
        rng = Random(f"{seed}/digits")
        texts = [" ".join(rng.choices(DIGITS, k=rng.randint(2, 6))) for _ in range(NUM_SYNTHETIC)]
        plans = [Plan(str(i), text, "pretraining", f"{seed}/digits/{i}") for i, text in enumerate(texts)]
        save_cache(speak_all(plans), path)
    return load_cache(path)


def check_speaker(recordings: Recordings, speaker: str | None) -> None:
    if speaker is not None and speaker not in recordings:
        raise ValueError(f"--leave-out {speaker}: no such speaker; the recordings have {', '.join(sorted(recordings))}")


def make_training(arguments: argparse.Namespace, people: Recordings, test: SpeechSet, cache: Path) -> Training:
    """The tiny Whisper, and the mixture of speech that it goes on with."""
    whisper, tokenizer = load_base(arguments.start)
    sources = {
        "people": draw_digits(people),
        "synthetic": draw_from(synthetic_digits(cache, arguments.seed)),
        "tiny": draw_from(read_manifest(TINY / "corpus" / "train.jsonl")),
    }
    draw = draw_mixture([(SHARES[name], source) for name, source in sources.items()])
    checkpoint = cache / f"checkpoint-without-{arguments.leave_out or 'nobody'}.pt"
    return Training(
        Pretrainer(whisper, blank_id(tokenizer)),
        tokenizer,
        draw,
        AUGMENTATION,
        test,
        checkpoint,
        arguments.output,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=Path, default=ROOT.parent / "shared" / "data" / "fsdd")
    parser.add_argument("--start", type=Path, default=TINY / "whisper", help="the Whisper to go on with")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "digits" / "whisper")
    parser.add_argument("--leave-out", metavar="SPEAKER", help="a speaker who is never heard in training")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def make_base(arguments: argparse.Namespace) -> None:
    """Train and save; progress and scores are printed."""
    train, test = (read_recordings(arguments.recordings, split) for split in ("train", "test"))
    check_speaker(train, arguments.leave_out)
    heard = [speaker for speaker in train if speaker != arguments.leave_out]
    cache = arguments.output.parent / f"{arguments.output.name}-pretraining"
    cache.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)

    heard_test = connected_set(only(test, heard), UTTERANCES_A_SPEAKER, arguments.seed)
    training = make_training(arguments, only(train, heard), heard_test, cache)
    schedule = Schedule(
        arguments.steps, peak_lr=8e-4, warmup_steps=40, join_probability=0.1, seed=arguments.seed,
        evaluate_every=arguments.steps,
    )  # fmt: skip
    pretrain(training, schedule, report=lambda line: print(line, flush=True))
    whisper, tokenizer = load_base(arguments.output)
    for speaker in sorted(test):
        wer = word_error_rate(whisper, tokenizer, connected_set(only(test, [speaker]), UTTERANCES_A_SPEAKER, 1))
        print(f"{speaker}{' (never heard)' if speaker == arguments.leave_out else ''}: WER of the decoder {wer:.2%}")


def main() -> None:
    try:
        make_base(parse_arguments())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
