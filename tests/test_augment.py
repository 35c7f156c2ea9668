"""Augmentation of frames: zeros in few spans, or all of them somewhat earlier; the same for the same key."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.data.augment import mask_frames, shift_frames


def masked_frames(features: torch.Tensor) -> list[bool]:
    return (features == 0).all(dim=1).tolist()


@settings(deadline=None)
@given(st.integers(1, 97), st.integers(1, 4), st.integers(1, 30), st.integers(0, 10**6))
def test_spans_of_zeros_and_the_rest_untouched(num_frames: int, num_masks: int, max_frames: int, seed: int) -> None:
    features = torch.arange(1.0, 3 * num_frames + 1).view(num_frames, 3)
    masked = mask_frames(features, num_masks, max_frames, (seed, 7))
    zeros = masked_frames(masked)
    assert sum(zeros) <= min(num_masks * max_frames, num_frames // 2)
    assert sum(a != b for a, b in zip([False, *zeros], [*zeros, False], strict=True)) <= 2 * num_masks
    kept = ~torch.tensor(zeros)
    assert torch.equal(masked[kept], features[kept])
    assert features.min() == 1.0, "the features themselves were changed"


def test_the_key_decides() -> None:
    features = torch.ones(200, 3)
    keys = [(1, 2, "a", 0), (2, 2, "a", 0), (1, 3, "a", 0), (1, 2, "b", 0), (1, 2, "a", 1)]
    first, *others = [mask_frames(features, 2, 30, key) for key in keys]
    assert torch.equal(first, mask_frames(features, 2, 30, keys[0]))
    assert not any(torch.equal(first, other) for other in others)


def test_no_masks() -> None:
    features = torch.ones(9, 3)
    assert torch.equal(mask_frames(features, 0, 30, (1,)), features)


@settings(deadline=None)
@given(st.integers(1, 97), st.integers(0, 9), st.integers(0, 10**6))
def test_a_shift_keeps_the_order_and_the_number(num_frames: int, max_frames: int, seed: int) -> None:
    features = torch.arange(1.0, 3 * num_frames + 1).view(num_frames, 3)
    shifted = shift_frames(features, max_frames, (seed, 7))
    shift = sum(masked_frames(shifted))
    assert shift <= min(max_frames, num_frames // 2)
    assert shifted.shape == features.shape
    assert torch.equal(shifted[: num_frames - shift], features[shift:])
    assert not shifted[num_frames - shift :].any()


def test_every_shift_is_drawn_and_the_key_decides() -> None:
    features = torch.ones(20, 3)
    shifts = [sum(masked_frames(shift_frames(features, 3, (1, epoch, "a", 0)))) for epoch in range(200)]
    assert all(shifts.count(n) > 30 for n in range(4))  # 50 each, within three standard deviations
    assert shifts == [sum(masked_frames(shift_frames(features, 3, (1, epoch, "a", 0)))) for epoch in range(200)]
    assert shifts != [sum(masked_frames(shift_frames(features, 3, (1, epoch, "b", 0)))) for epoch in range(200)]
