"""Saving and resuming a stage: trained tensors, Adam's moments, position. No pickle, no frozen weight, any world size.

Adam's moments are gathered by parameter name, not by partition, so that a run goes on with another number of ranks.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from graft.model.assemble import save_trained
from graft.ranks import Ranks
from graft.run_dir import (
    EVALUATIONS_FILE,
    STATE_FILE,
    best_steps,
    checkpoint_steps,
    clear_debris,
    read_evaluations,
    read_state,
    remove_folder,
    step_folder,
    verify_checkpoint,
    whole_folder,
    write_whole,
)
from graft.train.engine import Engine

LOG = logging.getLogger(__name__)
OPTIMIZER_FILE = "optimizer.safetensors"


@dataclass
class Position:
    """How far a run has come; enough to go on on any number of ranks.

    step counts optimiser steps over both stages; first_step is where the stage began; num_updates leaves out the
    steps that were skipped for gradients that are not finite.
    """

    stage: int
    step: int
    first_step: int
    num_updates: int = 0

    @property
    def stage_step(self) -> int:
        """Steps done in this stage."""
        return self.step - self.first_step


class Checkpoints:
    """The checkpoints of one run directory; every rank calls, rank 0 writes."""

    def __init__(self, run_dir: Path, ranks: Ranks, keep: int, about: dict[str, Any]) -> None:
        """``about`` goes into every ``state.json``: what the checkpoint belongs to."""
        self.run_dir, self.ranks, self.keep, self.about = run_dir, ranks, keep, about
        self._evaluations = ranks.gather(ranks.by_first(lambda: read_evaluations(run_dir)))[0]

    def save(self, engine: Engine, position: Position) -> Path:
        """Write the checkpoint of ``position``; the oldest ones go when it is there.

        Raises:
            RuntimeError: on every rank, when it could not be written; older checkpoints stay.
        """
        moments = engine.optimizer_state()  # a collective: before anything that can fail on one rank
        folder = step_folder(self.run_dir, position.step)
        self.ranks.by_first(lambda: self._write(folder, engine, position, moments))
        return folder

    def is_evaluated(self, position: Position) -> bool:
        """Whether the evaluation of ``position`` was finished; the same on every rank."""
        return position.step in self._evaluations.get(position.stage, {})

    def note_evaluation(self, position: Position, wer: float) -> None:
        """Remember that ``position`` was evaluated, and with which word error rate."""
        self._evaluations.setdefault(position.stage, {})[position.step] = wer
        self._write_evaluations()

    def forget_evaluations_after(self, position: Position) -> None:
        """Their steps will be taken again."""
        of_stage = self._evaluations.get(position.stage, {})
        kept = {step: wer for step, wer in of_stage.items() if step <= position.step}
        if kept != of_stage:
            self._evaluations[position.stage] = kept
            self._write_evaluations()

    def _write_evaluations(self) -> None:
        path = self.run_dir / "checkpoints" / EVALUATIONS_FILE
        self.ranks.by_first(lambda: write_whole(path, json.dumps(self._evaluations, indent=2) + "\n"))

    def _write(self, folder: Path, engine: Engine, position: Position, moments: dict[str, torch.Tensor]) -> None:
        clear_debris(self.run_dir)
        try:
            with whole_folder(folder) as temporary:
                save_trained(temporary, engine.model)
                save_file(moments, temporary / OPTIMIZER_FILE)
                state = asdict(position) | self.about
                (temporary / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"checkpoint {folder} could not be written: {error}. Older ones are whole: see to that disk, then "
                "start the same command again to go on from the newest"
            ) from error
        self._prune(position.step)

    def _prune(self, saved: int) -> None:
        """Keep the newest up to ``saved``, and where each stage ended; later ones are damaged or another start's."""
        steps = [step for step in checkpoint_steps(self.run_dir) if step <= saved]
        ends = {stage_of(step_folder(self.run_dir, step)): step for step in steps}
        for step in sorted({*steps[: -self.keep]} - {*best_steps(self.run_dir).values(), *ends.values()}):
            try:
                remove_folder(step_folder(self.run_dir, step))
            except OSError as error:  # the new checkpoint is there, which is what matters
                LOG.warning("%s", error)


def newest(run_dir: Path, stage: int) -> Path | None:
    """The newest checkpoint of ``stage`` that is whole, if there is one.

    Raises:
        ValueError: if there were some and all of them are damaged; never a silent fresh start.
    """
    damaged: list[str] = []
    for step in reversed(checkpoint_steps(run_dir)):
        folder = step_folder(run_dir, step)
        if stage_of(folder) not in (stage, None):
            continue
        try:
            verify_checkpoint(folder)
            return folder
        except (ValueError, OSError) as error:
            damaged.append(str(error))
            LOG.warning("%s", error)
    if damaged:
        raise ValueError(
            f"no checkpoint of stage {stage} in {run_dir} is whole: {damaged[0]}. Remove the damaged ones to begin "
            "the stage afresh."
        )
    return None


def stage_of(checkpoint: Path) -> int | None:
    """The stage of a checkpoint, None where its state cannot be read."""
    try:
        return read_state(checkpoint)["stage"]
    except (OSError, ValueError, KeyError):
        return None


def position_of(checkpoint: Path) -> Position:
    """Where a checkpoint stands."""
    state = read_state(checkpoint)
    return Position(**{name: state[name] for name in Position.__dataclass_fields__})


def resume_optimizer(engine: Engine, checkpoint: Path, position: Position) -> None:
    """Give the engine the optimiser state of a checkpoint whose trained tensors the model already holds.

    Raises:
        ValueError: if its tensors are not those that train now.
    """
    state = load_file(checkpoint / OPTIMIZER_FILE)
    expected = {key: engine.trained[key.partition("/")[2]].shape for key in engine.optimizer_state_keys()}
    found = {key: tensor.shape for key, tensor in state.items()}
    if found != expected:
        odd = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise ValueError(f"{checkpoint / OPTIMIZER_FILE} does not fit what trains now: {len(odd)} tensors, {odd[:3]}")
    engine.load_optimizer_state(state, position.num_updates)
