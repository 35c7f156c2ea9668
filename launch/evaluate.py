"""Score a checkpoint: loss, WER and CER on a split or a manifest, with the right audio and with swapped audio.

    deepspeed launch/evaluate.py --checkpoint runs/tiny --split test
    deepspeed --num_gpus 8 launch/evaluate.py --checkpoint runs/7b --manifest my.jsonl --output scores
    python launch/evaluate.py --checkpoint runs/7b/checkpoints/step-00002000 --split valid evaluation.batch_size=32
    python launch/evaluate.py --recipe recipes/tiny.yaml --split test

A split is read as the run's recipe says, from shards or online; a manifest is always encoded on the fly. Writes
summary.json and hypotheses.jsonl, by default into <run>/eval/<split>. --base-whisper also scores the recipe's Whisper
with its own decoder on the same utterances, the bar for the graft; --recipe scores that Whisper alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "graft").is_dir():
    sys.path[0] = str(ROOT)  # a clone: the launcher puts this folder first, where evaluate.py would hide a package

from rich.console import Console

from graft import command
from graft import ranks as processes
from graft.data.loader import FeatureSource, OnlineEntry, OnlineSource
from graft.data.manifest import Manifest, Reject, read_manifest, write_rejects
from graft.data.prompt import PromptTemplate
from graft.data.views import read_split
from graft.evaluation.base_whisper import WhisperTranscriber, same_utterances
from graft.evaluation.evaluate import Evaluation, beside, evaluate, score_transcriber
from graft.evaluation.report import SUMMARY_FILE, summary_table, worst_utterances, write_evaluation
from graft.model.assemble import DTYPES, Assembled, assemble, load_trained
from graft.ranks import Ranks
from graft.recipe import Recipe, load_recipe
from graft.run_dir import check_encoder, find_checkpoint, read_state, run_of, verify_checkpoint
from graft.sources import Sources

LOG = logging.getLogger("graft.evaluate")
PATIENCE_S = 4 * 3600.0  # a rank that is done waits this long for the slowest
PACKAGES = ("torch", "transformers", "jiwer")  # a WER depends on them
NUM_WORST = 3


@dataclass(frozen=True)
class Task:
    """What is scored: a checkpoint of a recipe (None: only its base Whisper), on what, into which folder.

    ``manifest`` is None where a split is read from shards alone.
    """

    recipe: Recipe
    checkpoint: Path | None
    split: str | None
    manifest: Path | None
    output: Path

    @property
    def name(self) -> str:
        """The split, or the manifest's name without suffix."""
        return self.split or self.manifest.stem

    def read_manifest(self) -> Manifest:
        """The utterances, with their sound files."""
        return read_split(self.recipe, self.split) if self.split else read_manifest(self.manifest)


@dataclass(frozen=True)
class Scored:
    """An evaluation, with the rejects of its manifest and the sound files by utterance id, where they are known."""

    evaluation: Evaluation
    num_rejects: int
    rejects: list[Reject]
    audio_files: dict[str, str]


def main(arguments: argparse.Namespace) -> None:
    """Find the checkpoint, score it on all ranks, write and show the result."""
    ranks = processes.start(timeout_s=PATIENCE_S)
    try:
        task = ranks.together(lambda: plan(arguments))
        if task.checkpoint is None:
            scored = score_base_whisper(task, ranks, arguments.language)
        else:
            source = open_source(task, ranks)
            base = score_base_whisper(task, ranks, arguments.language, source) if arguments.base_whisper else None
            scored = score_checkpoint(task, ranks, source, arguments.swapped)
            if base:
                scored = replace(scored, evaluation=beside(scored.evaluation, base.evaluation, "encoder_base"))
        ranks.by_first(lambda: report(task, scored))
    finally:
        processes.stop()


def plan(arguments: argparse.Namespace) -> Task:
    """What the command line asks for.

    Raises:
        ValueError: if there is no such checkpoint, recipe, split or manifest.
    """
    checkpoint = find_checkpoint(arguments.checkpoint) if arguments.checkpoint else None
    recipe = load_recipe(run_of(checkpoint) / "recipe.yaml" if checkpoint else arguments.recipe, arguments.overrides)
    run_dir = run_of(checkpoint) if checkpoint else Path(recipe.run.dir)
    online = bool(arguments.manifest) or recipe.data.features == "online"
    needs_audio = online or arguments.base_whisper or not checkpoint
    manifest = arguments.manifest or (recipe.manifest(arguments.split) if needs_audio else None)
    if manifest and not manifest.is_file():
        raise ValueError(f"manifest {manifest} does not exist")
    name = arguments.split or manifest.stem
    output = arguments.output or run_dir / "eval" / (name if checkpoint else f"{name}-base-whisper")
    if not arguments.output:
        check_is_not_anothers(output, arguments.split, manifest)
    return Task(recipe, checkpoint, arguments.split, manifest, output)


def check_is_not_anothers(folder: Path, split: str | None, manifest: Path | None) -> None:
    """Refuse to write over scores of something else that has the same name.

    Raises:
        ValueError: the folder holds those of another split, or of another manifest.
    """
    path = folder / SUMMARY_FILE
    if not path.is_file():
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    scored = there["split"] or there["manifest"]
    if scored != (split or str(manifest)):
        raise ValueError(f"{folder} holds the scores of {scored}: name another folder with --output")


def open_source(task: Task, ranks: Ranks) -> FeatureSource:
    """What the checkpoint is scored on.

    Raises:
        ValueError: on every rank, if it cannot be used, or the checkpoint was trained on another encoder.
    """
    sources = Sources(task.recipe, ranks, ranks.device())
    source = sources.open(task.split) if task.split else sources.open_manifest(task.manifest)
    check_encoder(task.checkpoint, sources.fingerprint)
    return source


def score_checkpoint(task: Task, ranks: Ranks, source: FeatureSource, swapped: bool) -> Scored:
    """The graft's evaluation, with what it was made of in the summary."""
    graft = ranks.together(lambda: build(task, ranks))
    prompt = task.recipe.prompt
    evaluation = evaluate(
        graft.model,
        source,
        PromptTemplate.from_processor(graft.processor, prompt.system, prompt.instruction),
        ranks,
        settings=task.recipe.evaluation,
        device=ranks.device(),
        precision=task.recipe.run.precision,
        swapped=swapped,
        label=task.name,
    )
    about = {"checkpoint": str(task.checkpoint), "step": read_state(task.checkpoint)["step"]}
    if isinstance(source, OnlineSource):
        return Scored(
            described(evaluation, task, about), len(source.rejects), source.rejects, of_entries(source.entries)
        )
    num_rejects = source.feature_set.index["num_rejects"]
    return Scored(described(evaluation, task, about), num_rejects, [], of_manifest(task))


def build(task: Task, ranks: Ranks) -> Assembled:
    """The model with the checkpoint's tensors."""
    if ranks.is_first:
        verify_checkpoint(task.checkpoint)
    graft = assemble(task.recipe, device=ranks.device())
    load_trained(task.checkpoint, graft.model)
    return graft


def score_base_whisper(task: Task, ranks: Ranks, language: str | None, source: FeatureSource | None = None) -> Scored:
    """The evaluation of the recipe's Whisper with its own decoder, on the utterances of ``source``; None: on all."""
    recipe = task.recipe

    def manifest() -> Manifest:
        return task.read_manifest() if source is None else same_utterances(task.read_manifest(), source.entries)

    whisper = ranks.together(
        lambda: WhisperTranscriber(
            recipe.bases.whisper,
            manifest(),
            dtype=DTYPES[recipe.run.precision],
            device=ranks.device(),
            long_audio=recipe.audio.long_audio,
            language=language,
        ),
    )
    evaluation = score_transcriber(whisper, ranks, recipe.evaluation, label=f"{task.name}, base Whisper")
    about = {"base_whisper": recipe.bases.whisper, "language": language}
    files = of_entries(whisper.entries)
    return Scored(described(evaluation, task, about), len(whisper.rejects), whisper.rejects, files)


def described(evaluation: Evaluation, task: Task, about: dict[str, Any]) -> Evaluation:
    """The evaluation with what was scored, on what, by which versions."""
    summary = {
        **about,
        "split": task.split,
        "manifest": str(task.manifest) if task.manifest else None,
        **evaluation.summary,
        "precision": task.recipe.run.precision,
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    return Evaluation(summary, evaluation.lines)


def report(task: Task, scored: Scored) -> None:
    """Write the files and show the numbers."""
    summary = scored.evaluation.summary | {"num_rejects": scored.num_rejects}
    evaluation = Evaluation(summary, scored.evaluation.lines)
    task.output.mkdir(parents=True, exist_ok=True)
    write_evaluation(task.output, evaluation, scored.audio_files)
    rejects = task.output / "rejects.jsonl"
    rejects.unlink(missing_ok=True)
    if scored.rejects:
        write_rejects(rejects, scored.rejects)
        LOG.warning("%d utterances rejected, see %s", len(scored.rejects), rejects)
    console = Console(highlight=False)
    who = task.checkpoint or f"Whisper itself, {task.recipe.bases.whisper}"
    console.print(summary_table(summary, f"{task.name}: {who}"))
    console.print(worst_utterances(evaluation, NUM_WORST))
    console.print(f"written: {task.output}", soft_wrap=True)


def of_entries(entries: Sequence[OnlineEntry]) -> dict[str, str]:
    """Sound file by utterance id."""
    return {entry.id: str(entry.utterance.audio_filepath) for entry in entries}


def of_manifest(task: Task) -> dict[str, str]:
    """The same from the split's manifest, if it is at hand: shards are scored without it."""
    manifest = task.recipe.data.manifests.get(task.split or "")
    if manifest is None or not Path(manifest).is_file():
        return {}
    return {u.id: str(u.audio_filepath) for u in read_split(task.recipe, task.split, check_files=False).utterances}


def arguments_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command.parser(__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, metavar="RUN_DIR_OR_CHECKPOINT", help="of a run: its best")
    model.add_argument("--recipe", type=Path, help="score its Whisper alone")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--split", help="a split of the recipe")
    data.add_argument("--manifest", type=Path, help="any other speech")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: <run>/eval/<split>")
    parser.add_argument("--base-whisper", action="store_true", help="also score the Whisper base with its own decoder")
    parser.add_argument("--language", help="of the speech, for the Whisper base; default: it finds out")
    parser.add_argument("--no-swapped", dest="swapped", action="store_false", help="skip the pass with swapped audio")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the run's")
    return parser


if __name__ == "__main__":
    command.run(main, arguments_parser())
