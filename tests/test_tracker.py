"""Numbers, texts and sounds of a run are on disk once, whatever stops it, and only numbers are numbers."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from graft.ranks import Ranks
from graft.tracker import LAYOUT, NullTracker, Tracker, markdown_table, tracker_for


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def board(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard")).Reload()


def points(run_dir: Path, tag: str) -> dict[int, float]:
    """As TensorBoard shows them; a step that is there twice fails."""
    events = board(run_dir).Scalars(tag)
    assert len({event.step for event in events}) == len(events), f"a step twice: {events}"
    return {event.step: event.value for event in events}


def train(run_dir: Path, steps: range, resume_step: int | None = None, scale: float = 1.0) -> None:
    tracker = Tracker(run_dir, resume_step)
    for step in steps:
        tracker.scalars(step, {"train/loss": scale / step, "train/lr": 0.5})
    tracker.close()


def test_one_line_and_one_point_per_call(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.scalars(3, {"train/loss": 1.5, "train/lr": 1e-3})
    tracker.scalars(7, {"eval/wer": 0.25})
    tracker.close()
    first, second = lines(tmp_path)
    assert {key: first[key] for key in first if key != "time"} == {"step": 3, "train/loss": 1.5, "train/lr": 1e-3}
    assert second["step"] == 7 and second["eval/wer"] == 0.25
    assert 0 <= first["time"] <= second["time"] < 60
    assert points(tmp_path, "train/loss") == {3: 1.5}
    assert points(tmp_path, "eval/wer") == {7: 0.25}


def test_a_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.scalars(1, {"train/loss": 2})
    assert [line["step"] for line in lines(tmp_path)] == [1]
    tracker.close()


NUMBERS = [2, 2.0, np.float32(2), np.int64(2), np.array(2.0), torch.tensor(2), torch.tensor(2.0, dtype=torch.bfloat16)]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: type(value).__name__)
def test_all_kinds_of_numbers(tmp_path: Path, value: object) -> None:
    tracker = Tracker(tmp_path)
    tracker.scalars(1, {"train/loss": value})
    tracker.close()
    assert lines(tmp_path)[0]["train/loss"] == 2


NO_NUMBERS = ["0.5", None, [1.0], torch.zeros(2), np.zeros((1, 1)), True, torch.tensor(True), {"a": 1}]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: type(value).__name__)
def test_what_is_no_number_is_refused_and_nothing_is_written(tmp_path: Path, value: object) -> None:
    tracker = Tracker(tmp_path)
    with pytest.raises(TypeError, match="train/loss at step 5 .*number"):
        tracker.scalars(5, {"train/lr": 1.0, "train/loss": value})
    tracker.close()
    assert lines(tmp_path) == []
    assert "train/lr" not in board(tmp_path).Tags()["scalars"]


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    """JSON has no NaN: readers other than Python's would stop at the line."""
    tracker = Tracker(tmp_path)
    tracker.scalars(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 1.0})
    tracker.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["train/loss"] is None
    assert math.isnan(points(tmp_path, "train/loss")[1])


def test_resuming_cuts_what_will_be_logged_again(tmp_path: Path) -> None:
    train(tmp_path, range(1, 10))
    train(tmp_path, range(6, 13), resume_step=6, scale=3.0)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 13))
    expected = {step: pytest.approx((1.0 if step < 6 else 3.0) / step) for step in range(1, 13)}
    assert {line["step"]: line["train/loss"] for line in lines(tmp_path)} == expected
    assert points(tmp_path, "train/loss") == expected


def test_utterances_of_a_step_stand_once(tmp_path: Path) -> None:
    for first, resume_step in ((1, None), (3, 3)):
        tracker = Tracker(tmp_path, resume_step)
        for step in range(first, 6):
            tracker.utterances(step, [f"{first}-{step}", "b"])
        tracker.close()
    read = [json.loads(line) for line in (tmp_path / "utterances.jsonl").read_text().splitlines()]
    expected = {1: ["1-1", "b"], 2: ["1-2", "b"], 3: ["3-3", "b"], 4: ["3-4", "b"], 5: ["3-5", "b"]}
    assert [(line["step"], line["ids"]) for line in read] == list(expected.items())


def test_resuming_after_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    train(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "time": 0.1, "train/lo')
    train(tmp_path, range(4, 6), resume_step=4)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_damaged_line_is_not_thrown_away_in_silence(tmp_path: Path) -> None:
    train(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    damaged = path.read_text().replace('"step": 2', '"stp": 2')
    path.write_text(damaged)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a line of metrics"):
        Tracker(tmp_path, resume_step=3)
    assert path.read_text() == damaged


def test_time_goes_on_after_a_resume(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 100.0, "a": 1}\n{"step": 2, "time": 999.0, "a": 1}\n')
    train(tmp_path, range(2, 3), resume_step=2)
    assert 100 <= lines(tmp_path)[1]["time"] < 160


def test_a_run_that_begins_again_leaves_nothing_of_the_first_start(tmp_path: Path) -> None:
    train(tmp_path, range(1, 6))
    train(tmp_path, range(1, 3), scale=3.0)
    assert [line["train/loss"] for line in lines(tmp_path)] == [3.0, 1.5]
    assert points(tmp_path, "train/loss") == {1: 3.0, 2: 1.5}


def test_tables_texts_and_audio(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.table(4, "eval/transcripts", [{"reference": "a|b", "wer": 0.33333}, {"reference": "c\nd", "wer": 0.0}])
    tracker.text(4, "run/prompt", "**hello**")
    tracker.audio(4, "eval/audio", np.array([0.0, 2.0, -0.5], np.float32), 16_000)
    tracker.close()
    events = board(tmp_path)
    (table,) = events.Tensors("eval/transcripts/text_summary")
    assert table.tensor_proto.string_val[0].decode().splitlines() == [
        "| reference | wer |",
        "| --- | --- |",
        "| a\\|b | 0.3333 |",
        "| c d | 0 |",
    ]
    assert "run/prompt/text_summary" in events.Tags()["tensors"]
    (sound,) = events.Audio("eval/audio")
    assert (sound.step, sound.sample_rate, sound.length_frames) == (4, 16_000, 3)


def test_audio_must_be_mono(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    with pytest.raises(AssertionError, match=r"\(2, 9\).*\(S,\)"):
        tracker.audio(1, "eval/audio", np.zeros((2, 9), np.float32), 16_000)
    tracker.close()


def test_hparams_refer_to_the_curves_and_add_no_point(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.scalars(9, {"eval/wer": 0.5})
    tracker.hparams({"stage1": {"learning_rate": 1e-3, "betas": [0.9, 0.98]}, "name": "tiny"}, ["eval/wer"])
    tracker.close()
    assert points(tmp_path, "eval/wer") == {9: 0.5}
    assert [path for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()] == []
    data = board(tmp_path).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"stage1.learning_rate" in data and b"[0.9, 0.98]" in data and b"tiny" in data


def test_the_page_of_curves_is_there(tmp_path: Path) -> None:
    Tracker(tmp_path).close()
    content = board(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    for tags in (chart[1] for page in LAYOUT.values() for chart in page.values()):
        assert all(tag.encode() in content for tag in tags)


def test_an_empty_table() -> None:
    assert markdown_table([]) == "(no rows)"


def test_other_ranks_take_the_same_calls_and_write_nothing(tmp_path: Path) -> None:
    tracker = NullTracker()
    tracker.scalars(1, {"train/loss": "not even a number"})
    tracker.utterances(1, ["u0"])
    tracker.table(1, "t", [{"a": 1}])
    tracker.audio(1, "a", np.zeros(3, np.float32), 16_000)
    tracker.hparams({}, [])
    tracker.text(1, "t", "x")
    tracker.close()
    methods = [name for name, _ in inspect.getmembers(Tracker, inspect.isfunction) if not name.startswith("_")]
    assert methods, "a tracker without methods"
    for name in methods:
        assert inspect.signature(getattr(Tracker, name)) == inspect.signature(getattr(NullTracker, name)), name


def test_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, None])  # the other rank has no error
    assert type(tracker_for(Ranks(1, 2), tmp_path / "second")) is NullTracker
    assert not (tmp_path / "second").exists()
    tracker = tracker_for(Ranks(0, 2), tmp_path / "first")
    assert type(tracker) is Tracker
    tracker.close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((RuntimeError, ValueError), match="file"):
        tracker_for(Ranks(), tmp_path / "file" / "run")
