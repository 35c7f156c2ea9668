"""Warm-up and cosine: hand-written answers at the corners."""

import pytest

from graft.train.schedule import scheduled_share

SHAPE = {"warmup_steps": 3, "max_steps": 14, "min_lr_ratio": 0.1}


@pytest.mark.parametrize(("step", "share"), [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0), (8, 0.55), (13, 0.1)])
def test_corners(step: int, share: float) -> None:
    assert scheduled_share(step, **SHAPE) == pytest.approx(share)


def test_falls_after_the_warm_up() -> None:
    shares = [scheduled_share(step, **SHAPE) for step in range(3, 14)]
    assert shares == sorted(shares, reverse=True) and len(set(shares)) == 11


def test_no_warm_up_and_a_single_step() -> None:
    assert scheduled_share(0, warmup_steps=0, max_steps=1, min_lr_ratio=0.1) == 1.0
