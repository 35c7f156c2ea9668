"""Write down what is said in sound files: wav, flac, mp3 or ogg, of any rate, mono or stereo.

    python launch/transcribe.py --checkpoint runs/tiny hello.wav talk.mp3
    python launch/transcribe.py --checkpoint runs/7b/checkpoints/step-00002000 --json *.flac
    python launch/transcribe.py --checkpoint runs/7b --instruction "Translate the speech into German." talk.mp3

Prints a line per file, "path: text", or a JSON object. Audio longer than the encoder's window is encoded window by
window and the frames are joined, as far as the language model has positions for it and its transcript. A file that
cannot be read, or is longer, is named on stderr, the others are done, and the exit code is 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "graft").is_dir():
    sys.path[0] = str(ROOT)  # a clone: Python puts this folder first, where a file would hide a package of its name

import numpy as np
import torch

from graft import command, lengths
from graft.data.audio import load_audio, windows
from graft.data.loader import FeatureSample
from graft.data.prompt import PromptTemplate
from graft.data.text import clean_text
from graft.evaluation.transcribe import generate, inferring
from graft.model.assemble import DTYPES, assemble, load_trained
from graft.model.encoder import SpeechEncoder
from graft.ranks import Ranks
from graft.recipe import Recipe, load_recipe
from graft.run_dir import check_encoder, find_checkpoint, run_of, verify_checkpoint


@dataclass(frozen=True)
class Result:
    """A file's transcript, or why there is none; ``duration`` in seconds."""

    path: str
    duration: float = 0.0
    text: str = ""
    error: str | None = None

    def as_json(self) -> str:
        """One line, with the key names of NeMo's manifests."""
        told = {"error": self.error} if self.error else {"duration": round(self.duration, 3), "pred_text": self.text}
        return json.dumps({"audio_filepath": self.path, **told}, ensure_ascii=False)


@dataclass(frozen=True)
class Heard:
    """A file's frames (F, D), of ``num_windows`` encoder windows."""

    path: str
    duration: float
    audio_features: torch.Tensor
    num_windows: int


def main(arguments: argparse.Namespace) -> int:
    """Transcribe every file; returns the exit code."""
    checkpoint = find_checkpoint(arguments.checkpoint)
    verify_checkpoint(checkpoint)
    recipe = load_recipe(run_of(checkpoint) / "recipe.yaml", arguments.overrides)
    scribe = Scribe(recipe, checkpoint, Ranks.from_environment().device(), arguments.instruction)
    failed = False
    for result in scribe.transcribe(arguments.audio):
        failed |= result.error is not None
        tell(result, arguments.json)
    return command.USER_ERROR if failed else command.DONE


class Scribe:
    """A trained graft with its encoder."""

    def __init__(self, recipe: Recipe, checkpoint: Path, device: torch.device, instruction: str | None) -> None:
        graft = assemble(recipe, device=device)
        load_trained(checkpoint, graft.model)
        self.model, self.device, self.recipe, self.instruction = graft.model, device, recipe, instruction
        self.template = PromptTemplate.from_processor(graft.processor, recipe.prompt.system, recipe.prompt.instruction)
        precision = DTYPES[recipe.run.precision]
        self.encoder = SpeechEncoder(recipe.bases.whisper, precision, device, recipe.audio.window)
        check_encoder(checkpoint, self.encoder.fingerprint)
        self.most_positions: int = graft.config.text_config.max_position_embeddings

    def transcribe(self, paths: Sequence[str]) -> Iterator[Result]:
        """The results in order, a batch at a time; what is longer than the window is a batch of its own."""
        batch: list[Heard | Result] = []
        for path in paths:
            item = self.hear(path)
            if isinstance(item, Heard) and item.num_windows > 1:
                yield from self._answer(batch)
                yield from self._answer([item])
                batch = []
                continue
            batch.append(item)
            if len(batch) == self.recipe.evaluation.batch_size:
                yield from self._answer(batch)
                batch = []
        yield from self._answer(batch)

    def hear(self, path: str) -> Heard | Result:
        """A file's frames, or what is wrong with it."""
        try:
            waveform = load_audio(Path(path))
            pieces = windows(waveform, self.encoder.window, "join")
            self._check(path, len(waveform), len(pieces))
        except ValueError as error:  # AudioError is one
            return Result(path, error=str(error))
        return Heard(path, lengths.seconds(len(waveform)), self._encode(pieces), len(pieces))

    def _check(self, path: str, num_samples: int, num_windows: int) -> None:
        num_tokens = self.template.num_audio_tokens(lengths.encoder_frames(num_samples))
        prompt = len(self.template.prompt_ids(num_tokens, self.instruction))
        needed = prompt + self.recipe.evaluation.max_new_tokens * num_windows
        if needed > self.most_positions:
            raise ValueError(
                f"{path}: {lengths.seconds(num_samples):.0f} s need {needed} positions with their transcript, the "
                f"language model has {self.most_positions}: cut the file into pieces"
            )
        if num_windows > 1 and self.recipe.audio.long_audio != "join":
            note = f"longer than the {self.encoder.window.seconds:g} s this model was trained on; expect more errors"
            print(f"{path}: {note}", file=sys.stderr)

    def _encode(self, pieces: Sequence[np.ndarray]) -> torch.Tensor:
        """Windows (S_i,) -> their frames one behind the other, (F, D)."""
        size = self.recipe.audio.encode_batch_size
        groups = [list(pieces[first : first + size]) for first in range(0, len(pieces), size)]
        return torch.cat([frames for group in groups for frames in self.encoder.encode(group)])

    def _answer(self, batch: Sequence[Heard | Result]) -> Iterator[Result]:
        heard = [item for item in batch if isinstance(item, Heard)]
        texts = iter(self._replies(heard) if heard else [])
        for item in batch:
            yield item if isinstance(item, Result) else Result(item.path, item.duration, next(texts))

    def _replies(self, heard: Sequence[Heard]) -> list[str]:
        samples = [FeatureSample(item.path, "", item.audio_features, self.instruction) for item in heard]
        settings = self.recipe.evaluation
        most = settings.max_new_tokens * max(item.num_windows for item in heard)
        with inferring(self.model, self.device, self.recipe.run.precision):
            return generate(self.model, samples, self.template, most, self.device, settings.alignment_weight)[0]


def tell(result: Result, as_json: bool) -> None:
    """One line on stdout; what went wrong also on stderr."""
    if result.error:
        print(f"error: {result.error}", file=sys.stderr)
    if as_json:
        print(result.as_json(), flush=True)
    elif not result.error:
        print(f"{result.path}: {clean_text(result.text)}", flush=True)  # one line, whatever the model wrote


def arguments_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command.parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN_DIR_OR_CHECKPOINT")
    parser.add_argument("--instruction", help="what to ask instead of the recipe's prompt.instruction")
    parser.add_argument("--json", action="store_true", help="a JSON object per file")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="section.key=value")
    parser.add_argument("audio", nargs="+", metavar="AUDIO", help="sound files")
    return parser


if __name__ == "__main__":
    command.run(main, arguments_parser())
