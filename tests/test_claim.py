"""Whose run directory it is: the same run goes on, another one is refused with what differs."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from graft.ranks import Ranks
from graft.recipe import Recipe
from graft.run_dir import checkpoint_steps, step_folder, take_lock, whole_folder, write_whole
from graft.train.checkpoint import Checkpoints, Position
from graft.train.claim import LOCK_FILE, RUN_FILE, beginning, check_same_inputs, claim, is_over, keep_others_out

BASES = {"whisper": "openai/whisper-large-v3-turbo", "qwen2_vl": "Qwen/Qwen2-VL-2B-Instruct"}


def recipe(**sections: Any) -> Recipe:
    return Recipe(bases=BASES, **sections)


def begun(run_dir: Path, made: Recipe, stage: int = 1) -> Path:
    """A run directory in which ``stage`` has taken a step."""
    claim(run_dir, made, stage, {})
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    return run_dir


def forget(run_dir: Path, stage: int, section: str, name: str | None = None) -> None:
    """Leave ``run_dir`` as a version would that did not know the setting, or the whole section."""
    claimed = json.loads((run_dir / RUN_FILE).read_text())
    (claimed[str(stage)][section] if name else claimed[str(stage)]).pop(name or section)
    (run_dir / RUN_FILE).write_text(json.dumps(claimed))


def test_the_same_run_goes_on_and_may_be_longer(tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run", recipe(stage1={"max_steps": 100}))
    claim(run_dir, recipe(stage1={"max_steps": 200}), 1, {})


def test_another_run_is_refused_with_all_that_differs(tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run", recipe())
    with pytest.raises(ValueError, match="holds another run") as error:
        claim(run_dir, recipe(run={"seed": 7}, stage1={"learning_rate": 0.5}), 1, {})
    assert "run.seed: 1 there, 7 here" in str(error.value)
    assert "stage1.learning_rate: 0.001 there, 0.5 here" in str(error.value)


def test_a_start_without_a_step_claims_nothing(tmp_path: Path) -> None:
    claim(tmp_path, recipe(), 1, {})
    claim(tmp_path, recipe(run={"seed": 7}), 1, {})


@pytest.mark.parametrize(("section", "name"), [("stage1", "micro_batches"), ("data", "train_split"), ("audio", None)])
def test_a_setting_younger_than_the_run_counts_as_its_default(tmp_path: Path, section: str, name: str | None) -> None:
    run_dir = begun(tmp_path / "run", recipe())
    forget(run_dir, 1, section, name)
    claim(run_dir, recipe(), 1, {})
    assert json.loads((run_dir / RUN_FILE).read_text())["1"] == claimed_by(tmp_path / "fresh", recipe())


def claimed_by(run_dir: Path, made: Recipe) -> dict[str, Any]:
    return json.loads((begun(run_dir, made) / RUN_FILE).read_text())["1"]


@pytest.mark.parametrize(
    ("section", "name", "value", "told"),
    [
        ("stage1", "micro_batches", 16, "stage1.micro_batches: 8 there, 16 here"),
        ("data", "train_split", "more", "data.train_split: 'train' there, 'more' here"),
        ("audio", None, {"long_audio": "join"}, "audio.long_audio: 'reject' there, 'join' here"),
    ],
)
def test_a_younger_setting_that_is_not_its_default_is_another_run(
    tmp_path: Path, section: str, name: str | None, value: Any, told: str
) -> None:
    """Also where the file was made by the very recipe that comes again: nothing shows that it was so."""
    changed = recipe(**{section: {name: value} if name else value})
    run_dir = begun(tmp_path / "run", changed)
    forget(run_dir, 1, section, name)
    with pytest.raises(ValueError) as error:
        claim(run_dir, changed, 1, {})
    assert told in str(error.value)


def test_a_setting_that_is_known_there_alone_is_another_run(tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run", recipe())
    claimed = json.loads((run_dir / RUN_FILE).read_text())
    claimed["1"]["stage1"]["pace"] = 3
    (run_dir / RUN_FILE).write_text(json.dumps(claimed))
    with pytest.raises(ValueError, match="stage1.pace: 3 there, None here"):
        claim(run_dir, recipe(), 1, {})


def test_stage_2_shares_the_graft_with_stage_1_and_nothing_else(tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run", recipe())
    forget(run_dir, 1, "projector", "kind")
    with pytest.raises(ValueError, match="projector.kind: 'mlp' there, 'swiglu' here"):
        claim(run_dir, recipe(projector={"kind": "swiglu"}), 2, {})
    claim(run_dir, recipe(run={"seed": 7}, data={"train_split": "more"}), 2, {})


MIXED = {"train": 1, "noisy": 0.5}


@pytest.mark.parametrize(
    ("train_split", "told"),
    [
        ({"train": 1, "noisy": 0.25}, "data.train_split.noisy: 0.5 there, 0.25 here"),
        ({"train": 1}, "data.train_split: {'noisy': 0.5, 'train': 1.0} there, 'train' here"),
        ({"train": 1, "noisy": 0.5, "far": 2}, "data.train_split.far: None there, 2.0 here"),
    ],
)
def test_another_mixture_is_another_run(tmp_path: Path, train_split: dict[str, float], told: str) -> None:
    run_dir = begun(tmp_path / "run", recipe(data={"train_split": MIXED}))
    with pytest.raises(ValueError) as error:
        claim(run_dir, recipe(data={"train_split": train_split}), 1, {})
    assert told in str(error.value)


def test_the_order_of_splits_is_no_difference(tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run", recipe(data={"train_split": MIXED}))
    claim(run_dir, recipe(data={"train_split": dict(reversed(MIXED.items()))}), 1, {})


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    with pytest.raises(ValueError, match="holds tensorboard of something that is not a run of ours"):
        claim(tmp_path, recipe(), 1, {})


def test_a_stage_2_from_elsewhere_numbers_its_steps_on(tmp_path: Path) -> None:
    """At step 0 its checkpoints would stand before those of the folder's own stage 1, and be the first to go."""
    for folder, step in ((tmp_path / "run", 40), (tmp_path / "other", 7)):
        saved(folder, 1, step)
    position, start = beginning(tmp_path / "run", 2, tmp_path / "other")
    assert (position.step, position.first_step, position.stage_step) == (40, 40, 0)
    assert start == step_folder(tmp_path / "other", 7)
    assert beginning(tmp_path / "fresh", 2, tmp_path / "other")[0].step == 0


def saved(run_dir: Path, stage: int, step: int) -> None:
    with whole_folder(step_folder(run_dir, step)) as checkpoint:
        (checkpoint / "state.json").write_text(json.dumps({"stage": stage, "step": step}))


def test_a_stage_is_over_when_it_is_scored_or_gone_on_from(tmp_path: Path) -> None:
    stage_1, stage_2 = Position(1, step=40, first_step=0), Position(2, step=60, first_step=40)
    saved(tmp_path, 1, 40)
    assert not is_over(tmp_path, stage_1, 40), "its evaluation is still due"
    write_whole(tmp_path / "checkpoints" / "evaluations.json", json.dumps({"1": {"40": 0.1}}))
    assert is_over(tmp_path, stage_1, 40) and not is_over(tmp_path, stage_1, 50)
    saved(tmp_path, 2, 60)
    assert not is_over(tmp_path, stage_2, 20) and not is_over(tmp_path, stage_2, 30)
    write_whole(tmp_path / "checkpoints" / "evaluations.json", "{}")
    assert is_over(tmp_path, stage_1, 40)


def test_a_stage_does_not_go_back(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stands at step 30, and max_steps is 20"):
        is_over(tmp_path, Position(1, step=30, first_step=0), 20)


def test_a_stage_does_not_write_over_the_next_one(tmp_path: Path) -> None:
    """Made longer, or with its last checkpoint lost: what the next stage did would be gone without a word."""
    saved(tmp_path, 1, 30)
    saved(tmp_path, 2, 60)
    for step in (30, 0):
        with pytest.raises(ValueError, match=f"stands at step {step} of 40, and the next stage has begun") as error:
            is_over(tmp_path, Position(1, step, first_step=0), 40)
        assert str(step_folder(tmp_path, 60)) in str(error.value)


def test_where_a_stage_ended_stays(tmp_path: Path) -> None:
    """The second stage saves often; the first one's end is what shows that it was finished."""
    for stage, step in ((1, 20), (1, 40), (2, 60), (2, 80)):
        saved(tmp_path, stage, step)
    Checkpoints(tmp_path, Ranks(), keep=1, about={})._prune(80)
    assert checkpoint_steps(tmp_path) == [40, 80]


def test_a_second_training_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.train.claim.LEAVING_S", 1)
    held = take_lock(tmp_path / LOCK_FILE)
    with pytest.raises(ValueError, match="another training writes to"):
        keep_others_out(tmp_path)
    threading.Timer(0.3, os.close, [held]).start()
    keep_others_out(tmp_path)


@pytest.mark.parametrize("known", [True, False])
def test_other_data_are_refused_where_they_are_known(tmp_path: Path, known: bool) -> None:
    inputs = {"utterances": ["48 of 48"], "utterances_digest": "a"}
    (tmp_path / "state.json").write_text(json.dumps({"inputs": inputs} if known else {}))
    check_same_inputs(tmp_path, inputs)
    other = {"utterances": ["40 of 40"], "utterances_digest": "b"}
    if not known:  # a checkpoint of an earlier version
        return check_same_inputs(tmp_path, other)
    with pytest.raises(ValueError, match=r"utterances: \['48 of 48'\] there, \['40 of 40'\] here"):
        check_same_inputs(tmp_path, other)
