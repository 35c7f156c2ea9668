"""Whose run directory is this? A run goes on where it stopped; another run is refused, never overwritten."""

from __future__ import annotations

import json
import logging
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from graft.differences import there_and_here
from graft.model.assemble import load_trained
from graft.model.grafted import AudioGraftForConditionalGeneration
from graft.model.lora import add_lora, check_settings, has_lora
from graft.recipe import Recipe
from graft.run_dir import (
    best_steps,
    checkpoint_steps,
    find_checkpoint,
    read_evaluations,
    read_state,
    step_folder,
    take_lock,
    verify_checkpoint,
    write_whole,
)
from graft.train.checkpoint import Position, newest, position_of, stage_of

LOG = logging.getLogger(__name__)
RUN_FILE, LOCK_FILE = "run.json", ".lock"
LEAVING_S = 30  # a training that is asked to stop saves and leaves in less
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "webdataset", "jiwer", "tensorboard", "safetensors", "numpy")
DATA_THAT_MATTERS = ("manifests", "views", "train_split", "features", "shuffle_pool")
GRAFT_SECTIONS = ("bases", "audio", "projector", "prompt")  # what a stage-2 run shares with its stage 1


def settings_that_matter(recipe: Recipe, stage: int) -> dict[str, Any]:
    """What makes two starts of a stage the same run: the settings that change its numbers.

    ``max_steps`` is left out, so that a finished run can be made longer.
    """
    tree = recipe.model_dump(mode="json")
    kept = {section: tree[section] for section in GRAFT_SECTIONS}
    kept["data"] = {name: tree["data"][name] for name in DATA_THAT_MATTERS}
    kept["run"] = {name: tree["run"][name] for name in ("seed", "precision")}
    kept[f"stage{stage}"] = {name: value for name, value in tree[f"stage{stage}"].items() if name != "max_steps"}
    return kept | ({"lora": tree["lora"]} if stage == 2 else {})


def check_is_ours(run_dir: Path, recipe: Recipe, stage: int) -> dict[str, Any]:
    """What the runs of ``run_dir`` were, by stage: this one, or none.

    Raises:
        ValueError: if the folder holds another run, with the settings that differ, or something else altogether.
    """
    claimed = _claimed(run_dir)
    ours = settings_that_matter(recipe, stage)
    theirs = _to_compare(claimed, stage, settings_that_matter(Recipe(bases=recipe.bases), stage))
    told = there_and_here(theirs, {name: ours.get(name) for name in theirs})
    if told:
        lines = "\n  ".join([f"{run_dir} holds another run:", *told])
        raise ValueError(f"{lines}\nTake another run.dir, or remove that folder.")
    return claimed


def keep_others_out(run_dir: Path) -> None:
    """Lock ``run_dir`` until this process ends; one that was asked to stop, and still saves, is waited for.

    Raises:
        ValueError: another training goes on there, or the folder cannot be written.
    """
    for seconds_left in reversed(range(LEAVING_S + 1)):
        try:
            lock = take_lock(run_dir / LOCK_FILE)
        except OSError as error:
            raise _not_writable(run_dir, error) from error
        if lock is not None:
            return
        if seconds_left == LEAVING_S:
            LOG.info("another training writes to %s: waiting %d s for it to leave", run_dir, LEAVING_S)
        time.sleep(1)
    raise ValueError(f"another training writes to {run_dir}: wait for its end, stop it, or take another run.dir")


def claim(run_dir: Path, recipe: Recipe, stage: int, ds_config: dict[str, Any]) -> None:
    """Make ``run_dir`` this run's, and write down what is run. Called by rank 0 alone.

    Raises:
        ValueError: as :func:`check_is_ours`, or if the folder cannot be written.
    """
    claimed = check_is_ours(run_dir, recipe, stage) | {str(stage): settings_that_matter(recipe, stage)}
    try:
        write_whole(run_dir / RUN_FILE, json.dumps(claimed, indent=2) + "\n")
        write_whole(run_dir / "recipe.yaml", recipe.as_yaml())
        write_whole(run_dir / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")
        write_whole(run_dir / "versions.json", json.dumps(versions(), indent=2) + "\n")
    except OSError as error:
        raise _not_writable(run_dir, error) from error


def versions() -> dict[str, str]:
    """Of Python and of the packages that change results."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


def beginning(run_dir: Path, stage: int, start_from: Path | None) -> tuple[Position, Path | None]:
    """Where a stage begins, and the checkpoint whose trained tensors it begins with.

    A stage that has a checkpoint goes on from its newest. Else stage 1 is fresh, and stage 2 starts from ``start_from``
    or from stage 1 of the same run.

    Raises:
        ValueError: for stage 2 without a stage 1, or with one that is not finished.
    """
    resumed = newest(run_dir, stage)
    if resumed:
        return position_of(resumed), resumed
    if stage == 1:
        return Position(stage=1, step=0, first_step=0), _checked(start_from)
    if start_from:  # steps are numbered on, so that stage 1 of this very folder keeps its checkpoints and curves
        step = max(checkpoint_steps(run_dir), default=0)
        return Position(stage=2, step=step, first_step=step), _checked(start_from)
    last = newest(run_dir, 1)
    if last is None:
        raise ValueError(
            f"stage 2 starts from a projector that stage 1 has trained, and {run_dir} holds none: "
            "run --stage 1 first, or name one with --from RUN_DIR_OR_CHECKPOINT"
        )
    step = _finished_step(run_dir, last)
    best = step_folder(run_dir, best_steps(run_dir).get(1, step))
    return Position(stage=2, step=step, first_step=step), _checked(best)


def is_over(run_dir: Path, position: Position, max_steps: int) -> bool:
    """Whether a stage has nothing left to do: it is trained to its end, and scored or gone on from.

    Raises:
        ValueError: it is not at its end, and a later stage has steps behind it, which it would write over.
    """
    later = [step for step in checkpoint_steps(run_dir) if step > position.step]
    later = [step for step in later if (stage_of(step_folder(run_dir, step)) or 0) > position.stage]
    if later and position.stage_step < max_steps:
        raise ValueError(
            f"stage {position.stage} of {run_dir} stands at step {position.stage_step} of {max_steps}, and the next "
            f"stage has begun behind it: going on would write over {step_folder(run_dir, later[0])} and what was "
            "logged since. Take another run.dir, or remove the later checkpoints"
        )
    if position.stage_step > max_steps:
        raise ValueError(
            f"stage {position.stage} of {run_dir} stands at step {position.stage_step}, and max_steps is {max_steps}: "
            "a stage does not go back. Take as many at least, or another run.dir"
        )
    is_scored = position.step in read_evaluations(run_dir).get(position.stage, {})
    return position.stage_step >= max_steps and (bool(later) or is_scored)


def dress(model: AudioGraftForConditionalGeneration, recipe: Recipe, stage: int, checkpoint: Path | None) -> None:
    """Give the model the adapters of its stage and the trained tensors it begins with.

    Raises:
        ValueError: ``checkpoint`` does not fit the model, or its adapters are not those of the recipe.
    """
    if checkpoint:
        load_trained(checkpoint, model)
    if stage == 2 and not has_lora(model):
        add_lora(model, recipe.lora, recipe.run.seed)
    elif stage == 2:
        check_settings(model, recipe.lora, str(checkpoint))


def check_same_inputs(checkpoint: Path, inputs: dict[str, Any]) -> None:
    """Refuse to go on with other utterances than the stage began with: which are read when follows from all of them.

    Raises:
        ValueError: with what differs.
    """
    there = read_state(checkpoint).get("inputs", inputs)  # not told by those from before it was
    told = there_and_here(there, inputs)
    if told:
        lines = "\n  ".join([f"what is trained on is not what {checkpoint} was trained on:", *told])
        raise ValueError(
            f"{lines}\nPut it back; or begin the stage anew from those weights, with --from {checkpoint} and another "
            "run.dir"
        )


def _not_writable(run_dir: Path, error: OSError) -> ValueError:
    return ValueError(f"run.dir={run_dir} cannot be written: {error}. Mend that, or name another run.dir")


def _finished_step(run_dir: Path, checkpoint: Path) -> int:
    position, max_steps = position_of(checkpoint), read_state(checkpoint)["max_steps"]
    if position.stage_step < max_steps:
        raise ValueError(
            f"stage 1 of {run_dir} stands at step {position.stage_step} of {max_steps}: finish it with --stage 1, or "
            f"start from it as it is with --from {checkpoint}"
        )
    return position.step


def _checked(start_from: Path | None) -> Path | None:
    if start_from is None:
        return None
    checkpoint = find_checkpoint(start_from)
    verify_checkpoint(checkpoint)
    return checkpoint


def _claimed(run_dir: Path) -> dict[str, Any]:
    path, traces = run_dir / RUN_FILE, (run_dir / "metrics.jsonl", *(run_dir / "checkpoints").glob("step-*"))
    trained = any(trace.is_dir() or (trace.is_file() and trace.stat().st_size) for trace in traces)
    if path.is_file():  # a start that failed before its first step claims nothing
        return json.loads(path.read_text(encoding="utf-8")) if trained else {}
    foreign = [name for name in ("checkpoints", "metrics.jsonl", "tensorboard") if (run_dir / name).exists()]
    if foreign:
        raise ValueError(f"{run_dir} holds {', '.join(foreign)} of something that is not a run of ours (no {RUN_FILE})")
    return {}


def _to_compare(claimed: dict[str, Any], stage: int, defaults: dict[str, Any]) -> dict[str, Any]:
    """What the folder's run was of what this one must be; nothing where neither stage has begun.

    A setting that was not there when the run was claimed counts as what its default means today.
    """
    if str(stage) in claimed:
        theirs, sections = claimed[str(stage)], [*defaults, *claimed[str(stage)]]
    elif "1" in claimed:
        theirs, sections = claimed["1"], list(GRAFT_SECTIONS)
    else:
        return {}
    return {section: defaults.get(section, {}) | theirs.get(section, {}) for section in sections}
