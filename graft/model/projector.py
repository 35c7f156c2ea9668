"""The trained bridge: k encoder frames are joined and become one embedding of the language model.

B: utterances    F: encoder frames    D: size of a frame    k: stack_factor    A: audio tokens, ceil(F / k)
H: hidden size of the language model
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import nn
from torch.nn import functional as F

from graft import lengths

KINDS = ("linear", "mlp", "swiglu", "conv")
_INPUT_MEAN_SQUARE = 1.0  # of a frame: what a Whisper encoder's last layer norm gives, to within a few times
_GELU_MEAN_SQUARE = 0.4252  # of GELU(x) for x ~ N(0, 1), by numerical integration
_SILENT_MEAN_SQUARE = 0.01  # after the gate: what is smaller is not made as large as speech
_KERNEL_TOKENS = 13  # 1 s at 50 frames a second, stacked by 4


class StackFrames(nn.Module):
    """(B, F, D) -> (B, ceil(F / k), k * D). Missing frames of the last group are zeros; none is dropped."""

    def __init__(self, stack_factor: int):
        super().__init__()
        self.stack_factor = stack_factor

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        batch, num_frames, frame_size = frames.shape
        num_tokens = lengths.audio_tokens(num_frames, self.stack_factor)
        frames = F.pad(frames, (0, 0, 0, num_tokens * self.stack_factor - num_frames))
        return frames.reshape(batch, num_tokens, self.stack_factor * frame_size)


class Projector(nn.Module, ABC):
    """What every kind has. Its first parameter is the first layer's that has any."""

    first_layer_runs = 1  # for an audio token

    @abstractmethod
    def initialise(self, output_std: float, generator: torch.Generator) -> None:
        """Fill all parameters, so that outputs spread like ``output_std``."""


class LinearProjector(Projector):
    """One linear map of the joined frames."""

    def __init__(self, stack_factor: int, frame_size: int, hidden_size: int, text_size: int):
        super().__init__()
        self.stack = StackFrames(stack_factor)
        self.linear = nn.Linear(stack_factor * frame_size, text_size)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, F, D) -> (B, A, H)."""
        return self.linear(self.stack(frames))

    @torch.no_grad()
    def initialise(self, output_std: float, generator: torch.Generator) -> None:
        """Random weights whose outputs spread like ``output_std``."""
        _normal(self.linear, output_std / math.sqrt(_INPUT_MEAN_SQUARE), generator)


class MlpProjector(Projector):
    """Linear, GELU, linear: as SLAM-ASR (arXiv 2402.08846) and LLaVA 1.5 have it."""

    def __init__(self, stack_factor: int, frame_size: int, hidden_size: int, text_size: int):
        super().__init__()
        self.stack = StackFrames(stack_factor)
        self.linear_1 = nn.Linear(stack_factor * frame_size, hidden_size)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden_size, text_size)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, F, D) -> (B, A, H)."""
        return self.linear_2(self.act(self.linear_1(self.stack(frames))))

    @torch.no_grad()
    def initialise(self, output_std: float, generator: torch.Generator) -> None:
        """Random weights: activations of about 1 inside, outputs that spread like ``output_std``."""
        _normal(self.linear_1, 1 / math.sqrt(_INPUT_MEAN_SQUARE), generator)
        _normal(self.linear_2, output_std / math.sqrt(_GELU_MEAN_SQUARE), generator)


class WideRMSNorm(nn.RMSNorm):
    """In the precision of its weight, to which torch would bring a bf16 input too, but without its fused kernel."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., H) -> (..., H)."""
        return super().forward(hidden.to(self.weight.dtype))


class SwigluProjector(Projector):
    """RMSNorm, linear, SwiGLU, RMSNorm, linear: Ultravox's projector with its norm in the middle (its v0.5 and later).

    https://github.com/fixie-ai/ultravox, ``ultravox/model/ultravox_model.py: UltravoxProjector``. As there,
    ``hidden_size`` counts both halves that SwiGLU multiplies, and no layer has a bias.
    """

    def __init__(self, stack_factor: int, frame_size: int, hidden_size: int, text_size: int):
        super().__init__()
        _check_even(hidden_size)
        self.stack = StackFrames(stack_factor)
        self.norm_in = WideRMSNorm(stack_factor * frame_size, eps=1e-6)
        self.linear_1 = nn.Linear(stack_factor * frame_size, hidden_size, bias=False)
        self.norm_mid = WideRMSNorm(hidden_size // 2, eps=1e-6)
        self.linear_2 = nn.Linear(hidden_size // 2, text_size, bias=False)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, F, D) -> (B, A, H)."""
        return self.linear_2(self.norm_mid(_gated(self.linear_1(self.norm_in(self.stack(frames))))))

    @torch.no_grad()
    def initialise(self, output_std: float, generator: torch.Generator) -> None:
        """Random weights: the norms are 1, so the last layer's inputs are 1 too."""
        self.norm_in.weight.fill_(1.0)
        self.norm_mid.weight.fill_(1.0)
        _normal(self.linear_1, 1.0, generator)
        _normal(self.linear_2, output_std, generator)


class ConvProjector(Projector):
    """Each frame is widened and gated, an audio token is the mean of its frames, and hears the tokens around it.

    Normalise, widen, gate, depthwise convolution, normalise, project: the order of Conformer's convolution module
    (arXiv 2005.08100, figure 2). What a sound is does not depend on its place in an audio token: one matrix for each of
    the k frames sees k times as many examples as one for all of them, stacked. Neither norm has weights: the linear
    layer behind it has. Beyond an utterance the convolution hears zeros, which is also what padding gives: an
    utterance's embeddings do not depend on what stands beside it.
    """

    def __init__(self, stack_factor: int, frame_size: int, hidden_size: int, text_size: int):
        super().__init__()
        _check_even(hidden_size)
        channels = hidden_size // 2
        self.stack, self.first_layer_runs = StackFrames(stack_factor), stack_factor
        self.norm_in = nn.RMSNorm(frame_size, eps=1e-6, elementwise_affine=False)
        self.linear_1 = nn.Linear(frame_size, hidden_size, bias=False)
        # Of two dimensions, (A, 1): for channels-last input torch has a fast one on CPUs, and none of one dimension
        self.conv = nn.Conv2d(
            channels, channels, (_KERNEL_TOKENS, 1), padding=(_KERNEL_TOKENS // 2, 0), groups=channels, bias=False
        )
        self.norm_mid = nn.RMSNorm(channels, eps=_SILENT_MEAN_SQUARE, elementwise_affine=False)
        self.linear_2 = nn.Linear(channels, text_size)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, F, D) -> (B, A, H)."""
        groups = self.stack(frames).unflatten(-1, (self.stack.stack_factor, -1))  # (B, A, k, D)
        hidden = _gated(self.linear_1(self.norm_in(groups))).mean(2)
        around = self.conv(_channels_last(hidden)).permute(0, 2, 3, 1).squeeze(2)
        return self.linear_2(self.norm_mid(hidden + around))

    @torch.no_grad()
    def initialise(self, output_std: float, generator: torch.Generator) -> None:
        """Random weights, outputs that spread like ``output_std``; a tenth of what is around, and of the bias.

        Not nothing of them: silence would have an embedding of no size, and dividing by that gives gradients beyond
        measure.
        """
        _normal(self.linear_1, 1.0, generator)
        _normal(self.linear_2, output_std, generator)
        _fill_normal(self.linear_2.bias, 0.1 * output_std, generator)
        _fill_normal(self.conv.weight, 0.1 / math.sqrt(_KERNEL_TOKENS), generator)


_CLASSES: dict[str, type[Projector]] = {
    "linear": LinearProjector,
    "mlp": MlpProjector,
    "swiglu": SwigluProjector,
    "conv": ConvProjector,
}


def build_projector(
    kind: str, frame_size: int, stack_factor: int, hidden_size: int | None, text_size: int
) -> Projector:
    """A projector (B, F, ``frame_size``) -> (B, ceil(F / ``stack_factor``), ``text_size``).

    ``hidden_size`` None means ``text_size``; ``linear`` has no hidden layer and ignores it.

    Raises:
        ValueError: if there is no such kind.
    """
    if kind not in _CLASSES:
        raise ValueError(f"projector.kind is '{kind}'; there are {', '.join(KINDS)}")
    return _CLASSES[kind](stack_factor, frame_size, hidden_size or text_size, text_size)


def _check_even(hidden_size: int) -> None:
    if hidden_size % 2:
        raise ValueError(f"projector.hidden_size is {hidden_size}: its gate takes one half, so it must be even")


def _channels_last(hidden: torch.Tensor) -> torch.Tensor:
    """(B, A, C) -> (B, C, A, 1), a view. Torch takes it for channels-last by all strides, that of the size 1 too."""
    return hidden.unsqueeze(2).permute(0, 3, 1, 2)


def _gated(hidden: torch.Tensor) -> torch.Tensor:
    """SwiGLU: (..., 2 C), value and gate, -> (..., C)."""
    value, gate = hidden.chunk(2, dim=-1)
    return F.silu(gate) * value


def _normal(linear: nn.Linear, gain: float, generator: torch.Generator) -> None:
    """Weights so that inputs of mean square 1 give outputs of standard deviation ``gain``; the bias is zero."""
    _fill_normal(linear.weight, gain / math.sqrt(linear.in_features), generator)
    if linear.bias is not None:
        linear.bias.zero_()


def _fill_normal(weight: nn.Parameter, std: float, generator: torch.Generator) -> None:
    if not weight.is_meta:
        weight.copy_(std * torch.randn(weight.shape, generator=generator))  # on the CPU: the same on every device
