"""What the console and TensorBoard say of a step: sums divided once, without time that was not spent on training."""

import time

import pytest
import torch

from graft.data.collate import Batch
from graft.ranks import Ranks
from graft.train.meter import Clock, StepMeter, console_line, what_bound
from graft.train.step import StepResult
from graft.train.utilisation import ModelFlops, Peak


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


def test_utilisation_is_of_the_real_tokens() -> None:
    """7 + 3 real positions of 14, and (7 x 7 + 3 x 3) / 2 pairs, in 0.2 s or more of a device that does 1000 FLOP/s."""
    flops = ModelFlops(per_token=2.0, per_pair=1.0, per_label=100.0, per_audio_token=100.0, per_comparison=1e9)
    meter = StepMeter(Ranks(), torch.device("cpu"), flops, Peak(1000.0, "by hand"))
    meter.add(result(1.0), [batch([7, 3], 7)], waited_s=0.0)
    time.sleep(0.2)
    mfu, flop = meter.scalars(result(1.0), 0.1)["train/mfu"], 2.0 * 10 + 1.0 * 29
    assert flop / 1000 / 5 < mfu <= flop / 1000 / 0.2


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


SPENT = {"read": 1, "forward": 30, "backward": 60, "reduce": 3, "update": 2, "agree": 1, "write": 1, "save": 1}
SPENT |= {"evaluate": 1, "profile": 900}


def test_what_bound_the_run() -> None:
    """100 s in all; the hundreds spent on the profile are not the training's."""
    assert what_bound(SPENT, 2, 0.412) == (
        "bound by computing: 90% of the time in forward and backward (MFU 0.41), 1% waiting for data, "
        "4% for other ranks, 2% updating, 2% saving and evaluating"
    )
    assert what_bound(SPENT, 1, None) == (
        "bound by computing: 90% of the time in forward and backward, 1% waiting for data, 6% updating, "
        "2% saving and evaluating"
    )


@pytest.mark.parametrize(
    ("phase", "bound", "hint"),
    [
        ("read", "data", "raise data.prefetch"),
        ("reduce", "other ranks", "micro_batch_tokens"),
        ("evaluate", "saving and evaluating", "evaluation.every"),
    ],
)
def test_a_hint_for_what_can_be_helped(phase: str, bound: str, hint: str) -> None:
    """From a tenth of the time on there is a hint, and from the largest part on it is the verdict."""
    assert hint not in what_bound(SPENT | {phase: 5}, 2, 0.4)
    some = what_bound(SPENT | {phase: 20}, 2, 0.4)
    assert hint in some and some.startswith("bound by computing")
    assert what_bound(SPENT | {phase: 200}, 2, 0.4).startswith(f"bound by {bound}: ")


def test_the_whole_run_is_told() -> None:
    """Seconds of the phases in a run of known sleeps, logged steps and all."""
    meter = StepMeter(Ranks(), torch.device("cpu"))
    for phase, seconds in (("read", 0.3), ("forward", 0.02), ("save", 0.1)):
        with meter.phases(phase):
            time.sleep(seconds)
        meter.phases.read()
    assert meter.verdict().startswith("bound by data: ")
    assert "raise data.prefetch" in meter.verdict()


def test_the_line_for_people() -> None:
    tags = ("loss", "lr", "grad_norm", "audio_seconds_per_second", "tokens_per_second", "padding", "data_wait")
    values = (1.25, 1e-3, 0.5, 321.0, 4567.0, 0.031, 0.002)
    scalars = {f"train/{tag}": value for tag, value in zip(tags, values, strict=True)}
    start = "step 7/400 loss 1.2500 lr 1.00e-03 norm 0.500 321 audio-s/s 4567 tok/s padding 3.1% wait 0.2% "
    assert " ".join(console_line(7, 400, scalars, "1:05").split()) == start + "1:05 left"
    line = console_line(7, 400, scalars | {"train/mfu": 0.414}, "1:05")
    assert " ".join(line.split()) == start + "mfu 41.4% 1:05 left"


def test_time_left_counts_this_start_only() -> None:
    clock = Clock(first_step=100, last_step=110)
    time.sleep(0.1)
    assert clock.left(110) == "0:00"
