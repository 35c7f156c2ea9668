"""Projectors: frames are stacked and none is lost; the first embeddings are as large as the model's own."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.model.projector import KINDS, StackFrames, build_projector


def made(kind: str, stack_factor: int = 3, frame_size: int = 5, text_size: int = 8, seed: int = 0) -> torch.nn.Module:
    projector = build_projector(kind, frame_size, stack_factor, hidden_size=12, text_size=text_size)
    projector.initialise(0.5, torch.Generator().manual_seed(seed))
    return projector


def trained_a_little(projector: torch.nn.Module) -> torch.nn.Module:
    """Away from the beginning, at which a convolution is next to nothing."""
    chance = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=chance))
    return projector


def test_stacking_by_hand() -> None:
    frames = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    assert StackFrames(2)(frames).tolist() == [[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 0.0, 0.0]]]


@given(num_frames=st.integers(1, 40), stack_factor=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_every_frame_is_in_exactly_one_token(num_frames: int, stack_factor: int) -> None:
    frames = torch.arange(1.0, num_frames + 1).view(1, num_frames, 1)
    stacked = StackFrames(stack_factor)(frames)
    assert stacked.shape == (1, -(-num_frames // stack_factor), stack_factor)
    flat = stacked.flatten().tolist()
    assert flat[:num_frames] == frames.flatten().tolist() and not any(flat[num_frames:])


@pytest.mark.parametrize(("kind", "num_heard"), [("linear", 1), ("mlp", 1), ("swiglu", 1), ("conv", 7)])
def test_which_audio_tokens_a_token_hears(kind: str, num_heard: int) -> None:
    """The last of 20 tokens: itself, and with a convolution the six before. Its group of frames is not full."""
    frames = torch.randn(1, 58, 5, requires_grad=True)  # groups of 3: the last frame stands alone
    output = trained_a_little(made(kind))(frames)
    assert output.shape == (1, 20, 8)
    output[0, 19].sum().backward()
    heard = frames.grad[0].abs().sum(1) > 0
    assert heard.nonzero().flatten().tolist() == list(range(57 - 3 * (num_heard - 1), 58))


@torch.no_grad()
def test_a_convolution_begins_near_to_none() -> None:
    projector, frames = made("conv"), torch.randn(8, 40, 5)
    whole = projector(frames)
    projector.conv.weight.zero_()
    without = projector(frames)
    assert 0.05 < (whole - without).std() / without.std() < 0.2


@torch.no_grad()
def test_a_convolving_projector_by_hand() -> None:
    """Two tokens of two frames of one number, one channel: RMSNorm of one number is its sign."""
    projector = build_projector("conv", frame_size=1, stack_factor=2, hidden_size=2, text_size=1)
    projector.linear_1.weight.copy_(torch.tensor([[2.0], [3.0]]))  # value and gate
    projector.conv.weight.zero_()
    projector.conv.weight[0, 0, 5, 0] = 10.0  # hears the token before
    projector.linear_2.weight.fill_(7.0)
    projector.linear_2.bias.fill_(0.5)
    projector.norm_mid = torch.nn.Identity()  # of one channel it would leave the sign alone
    up, down = 2 * 3 / (1 + math.exp(-3)), -2 * -3 / (1 + math.exp(3))  # SwiGLU of 1 and of -1
    expected = [0.5 + 7 * (up + down) / 2, 0.5 + 7 * (up + 10 * (up + down) / 2)]
    frames = torch.tensor([[[5.0], [-5.0], [4.0], [9.0]]])
    assert projector(frames).flatten().tolist() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_silence_has_a_size() -> None:
    """A tenth of what is heard, before anything is learnt."""
    projector = build_projector("conv", frame_size=64, stack_factor=4, hidden_size=None, text_size=96)
    projector.initialise(0.02, torch.Generator().manual_seed(3))
    assert 0.5 * 0.002 < projector(torch.zeros(1, 80, 64)).std().item() < 2 * 0.002


def test_silence_gives_no_gradient_beyond_measure() -> None:
    """Frames of zeros between others: where all of an audio token is zero, norms would divide by next to nothing."""
    frames = torch.randn(1, 60, 5)
    frames[:, 24:36] = 0
    projector = made("conv")
    torch.nn.functional.normalize(projector(frames), dim=-1)[0, :, 0].sum().backward()
    assert max(parameter.grad.norm() for parameter in projector.parameters()) < 1e4


@pytest.mark.parametrize("kind", KINDS)
def test_zero_frames_behind_change_no_token_before(kind: str) -> None:
    """So that an utterance's embeddings are the same whatever longer one stands in its micro-batch."""
    projector, frames = trained_a_little(made(kind)), torch.randn(2, 7, 5)
    longer = torch.nn.functional.pad(frames, (0, 0, 0, 4))
    torch.testing.assert_close(projector(longer)[:, :3], projector(frames), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_first_embeddings_have_the_asked_size(kind: str) -> None:
    projector = build_projector(kind, frame_size=64, stack_factor=4, hidden_size=None, text_size=96)
    projector.initialise(0.02, torch.Generator().manual_seed(3))
    spread = projector(torch.randn(8, 100, 64)).std().item()
    assert 0.9 * 0.02 < spread < 1.1 * 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_the_weights(kind: str) -> None:
    one, same, other = (made(kind, seed=seed).state_dict() for seed in (4, 4, 5))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_initialise_leaves_nothing_unset(kind: str) -> None:
    """Assembling makes the module without memory first: every parameter must get a value."""
    with torch.device("meta"):
        projector = build_projector(kind, 5, 3, 12, 8)
    projector.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.fill_(float("nan"))
    projector.initialise(0.5, torch.Generator().manual_seed(0))
    assert not any(parameter.isnan().any() for parameter in projector.parameters())


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'qformer'; there are linear, mlp, swiglu, conv"):
        build_projector("qformer", 5, 3, 12, 8)


def test_under_autocast_swiglus_norms_have_torchs_values_and_its_fused_kernel() -> None:
    """Without the kernel torch warns."""
    projector, frames = build_projector("swiglu", 5, 3, 12, 8), torch.randn(2, 9, 5).bfloat16()
    projector.initialise(1.0, torch.Generator().manual_seed(1))
    norms = projector.norm_in, projector.norm_mid

    def result() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            made = projector(frames)
        return [made, *torch.autograd.grad(made.float().square().sum(), list(projector.parameters()))]

    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = result()
        for norm in norms:
            norm.__class__ = torch.nn.RMSNorm
        with pytest.warns(UserWarning, match="fused"):
            theirs = result()
    finally:
        torch.set_warn_always(False)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_swiglu_needs_an_even_hidden_size() -> None:
    with pytest.raises(ValueError, match="hidden_size is 13"):
        build_projector("swiglu", 5, 3, 13, 8)
