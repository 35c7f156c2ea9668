"""What the console and TensorBoard say of a step: sums divided once, without time that was not spent on training."""

import time

import pytest
import torch

from graft.data.collate import Batch
from graft.ranks import Ranks
from graft.train.meter import Clock, StepMeter, console_line
from graft.train.step import StepResult


def batch(lengths: list[int], width: int) -> Batch:
    """Rows of ``lengths`` tokens padded to ``width``; 25 frames each, half a second."""
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    return Batch(
        ids=tuple(f"u{i}" for i in range(len(lengths))),
        input_ids=torch.ones_like(mask),
        attention_mask=mask,
        labels=None,
        audio_features=torch.zeros(len(lengths), 25, 3),
        audio_feature_lengths=torch.full((len(lengths),), 25),
    )


def result(loss: float) -> StepResult:
    return StepResult(torch.tensor(loss), grad_norm=0.5, applied=True)


def test_sums_are_divided_once() -> None:
    meter = StepMeter(Ranks(), torch.device("cpu"))
    meter.add(result(3.0), [batch([7, 3], 7)], waited_s=0.0)
    meter.add(result(1.0), [batch([5], 5), batch([2, 1], 4)], waited_s=0.0)
    time.sleep(0.2)
    scalars = meter.scalars(result(1.0), learning_rate=1e-3)
    assert scalars["train/loss"] == 2.0 and scalars["train/lr"] == 1e-3 and scalars["train/grad_norm"] == 0.5
    assert scalars["train/padding"] == pytest.approx(9 / 27)  # 18 real positions of 14 + 5 + 8
    assert scalars["train/tokens_per_second"] / scalars["train/audio_seconds_per_second"] == pytest.approx(18 / 2.5)
    assert scalars["train/audio_seconds_per_second"] <= 2.5 / 0.2
    assert "train/mfu" not in scalars  # no known peak: no figure


def test_counts_begin_anew() -> None:
    meter = StepMeter(Ranks(), torch.device("cpu"))
    meter.add(result(9.0), [batch([7], 7)], waited_s=0.0)
    meter.scalars(result(9.0), 0.1)
    meter.add(result(4.0), [batch([2], 2)], waited_s=0.0)
    assert meter.scalars(result(4.0), 0.1)["train/loss"] == 4.0


def test_a_pause_does_not_count() -> None:
    meter = StepMeter(Ranks(), torch.device("cpu"))
    meter.add(result(1.0), [batch([4], 4)], waited_s=0.0)
    with meter.pause():
        time.sleep(0.5)
    assert meter.scalars(result(1.0), 0.1)["train/tokens_per_second"] > 4 / 0.25


def test_the_line_for_people() -> None:
    tags = ("loss", "lr", "grad_norm", "audio_seconds_per_second", "padding", "data_wait")
    scalars = {f"train/{tag}": value for tag, value in zip(tags, (1.25, 1e-3, 0.5, 321.0, 0.031, 0.002), strict=True)}
    line = console_line(7, 400, scalars, "1:05")
    expected = "step 7/400 loss 1.2500 lr 1.00e-03 norm 0.500 321 audio-s/s padding 3.1% wait 0.2% 1:05 left"
    assert " ".join(line.split()) == expected


def test_time_left_counts_this_start_only() -> None:
    clock = Clock(first_step=100, last_step=110)
    time.sleep(0.1)
    assert clock.left(110) == "0:00"
