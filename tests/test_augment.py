"""Augmentation of frames: zeros in few spans, or all of them somewhat earlier; the same for the same key."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.data.augment import draw_lender, mask_frames, mix_voice, shift_frames


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


def voices(*shapes: tuple[float, float], num_frames: int = 40) -> list[torch.Tensor]:
    """Utterances (F, 2) of given mean and spread."""
    chance = torch.Generator().manual_seed(4)
    made = []
    for i, (mean, spread) in enumerate(shapes):
        frames = torch.randn(num_frames + i, 2, generator=chance)
        made.append((frames - frames.mean(0)) / frames.std(0, correction=0) * spread + mean)
    return made


def test_a_voice_is_another_one_by_the_share_that_is_drawn() -> None:
    """Of two voices: mean and spread lie on one line between them, as far for one as for the other; words stay."""
    own, other = voices((1.0, 2.0), (5.0, 0.5))
    shares = []
    for seed in range(200):
        mixed = mix_voice(own, other, 0.8, (seed, 1))
        share = (mixed.mean() - 1) / 4
        shares.append(share.item())
        torch.testing.assert_close(mixed.std(0, correction=0), torch.full((2,), 2 - 1.5 * share.item()))
        assert torch.corrcoef(torch.stack([mixed[:, 0], own[:, 0]]))[0, 1] > 0.9999
    assert 0 <= min(shares) < 0.05 and 0.75 < max(shares) < 0.8 and 80 < sum(share > 0.4 for share in shares) < 120


def test_voices_follow_from_the_key() -> None:
    own, other = voices((1.0, 2.0), (5.0, 0.5))
    first = mix_voice(own, other, 1.0, (1, 2, "a", 0))
    assert torch.equal(first, mix_voice(own, other, 1.0, (1, 2, "a", 0)))
    assert not torch.equal(first, mix_voice(own, other, 1.0, (1, 3, "a", 0)))
    assert all(map(torch.allclose, (own, other), voices((1.0, 2.0), (5.0, 0.5)))), "the features were changed"


def test_every_utterance_lends_as_often_as_another() -> None:
    """Not as the share is drawn: who lends says nothing of how much."""
    keys = [(1, epoch, "a", 0) for epoch in range(400)]
    lenders = [draw_lender(4, key) for key in keys]
    assert lenders == [draw_lender(4, key) for key in keys]
    assert all(70 < lenders.count(n) < 130 for n in range(4))  # 100 each, within three and a half standard deviations
    own, other = voices((0.0, 1.0), (1.0, 1.0))
    shares = torch.tensor([mix_voice(own, other, 1.0, key).mean().item() for key in keys])
    assert torch.corrcoef(torch.stack([shares, torch.tensor(lenders).float()]))[0, 1].abs() < 0.15


def test_a_voice_of_its_own_and_a_number_that_never_changes() -> None:
    still = torch.tensor([[1.0, 3.0], [2.0, 3.0]], dtype=torch.bfloat16)
    alone = mix_voice(still, still, 1.0, (1,))
    assert alone.dtype == torch.bfloat16 and torch.equal(alone, still)
    for seed in range(20):
        mixed = mix_voice(still, still + 4, 1.0, (seed, 1))
        assert mixed.isfinite().all() and mixed[0, 1] == mixed[1, 1]
