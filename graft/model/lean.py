"""Less memory and less work in training, with the same values.

*Kept for the backward pass.* Of a decoder layer's tensors it needs the inputs of both norms, q, k, v, the attention's
output, gate and up. Stock Qwen2-VL also keeps SiLU(gate) and fp32 copies of the norms' inputs, half as much again. Here
gradients are written out by hand: cheap elementwise results are made again, and those of norms and rotations take half
the passes over memory. No matrix product is computed twice, unlike with gradient checkpointing.

*Computed.* Attention is causal: where all rows of a batch begin with the same prompt, the positions of that prompt are
the same in each, and are computed once. Padding, which only makes rows of a rectangle, is computed nowhere but in
attention. What follows the last layer's attention is needed only where a label is.

B: rows    T: positions of a row    H: hidden size    N: positions that are computed    L: label positions
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2MLP,
    Qwen2VLAttention,
    Qwen2VLDecoderLayer,
    Qwen2VLRMSNorm,
)

from graft.model.attention import causal_attention


@dataclass(frozen=True)
class Line:
    """B rows of T positions as one line of N: the shared beginning, then what is real of each row behind it.

    kept: (N,) into all B * T positions, which stands where in the line; None: all of them, in their order
    places: (B * T,) into the line, the other way; padding, and only that, points at a place that is not its own
    wanted: (L,) into the line, the positions whose last hidden states are asked for
    """

    shape: torch.Size
    num_shared: int
    kept: Tensor | None
    places: Tensor | None
    wanted: Tensor

    @classmethod
    def of(cls, shape: torch.Size, num_shared: int, kept: Tensor, predicts: Tensor) -> Line:
        """A line of rows (B, T): of their positions those ``kept``, in order, which are all that are real.

        Of the first ``num_shared``, the same in all rows, the first row's alone are kept. ``predicts`` (L,) are indices
        into all B * T, of positions that are kept.
        """
        if len(kept) == shape.numel():
            return cls(shape, 0, None, None, predicts)
        places = kept.new_zeros(shape.numel()).index_copy_(0, kept, torch.arange(len(kept), device=kept.device))
        places.unflatten(0, shape)[1:, :num_shared] = places[:num_shared]
        return cls(shape, num_shared, kept, places, places.index_select(0, predicts))

    def join(self, rows: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...)."""
        flat = rows.flatten(0, 1)
        return (flat if self.kept is None else _Joined.apply(flat, self)).unsqueeze(0)

    def part(self, line: Tensor) -> Tensor:
        """(1, N, ...) -> (B, T, ...); padding has finite values of no meaning, and no gradient."""
        flat = line.squeeze(0)
        return (flat if self.kept is None else _Parted.apply(flat, self)).unflatten(0, self.shape)

    def pick(self, line: Tensor) -> Tensor:
        """(1, N, ...) -> (1, L, ...)."""
        return line.index_select(1, self.wanted)


class _Joined(torch.autograd.Function):
    """(B * T, ...) -> (N, ...). Autograd's own gradient would add up by index, which on a GPU is slow."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, line: Line) -> Tensor:
        ctx.line = line
        return rows.index_select(0, line.kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        line = ctx.line
        return grad.new_zeros(line.shape.numel(), *grad.shape[1:]).index_copy_(0, line.kept, grad), None


class _Parted(torch.autograd.Function):
    """(N, ...) -> (B * T, ...). The gradients of what rows share are added up, in their order."""

    @staticmethod
    def forward(ctx: FunctionCtx, joined: Tensor, line: Line) -> Tensor:
        ctx.line = line
        return joined.index_select(0, line.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        line = ctx.line
        of_joined = grad.index_select(0, line.kept)
        if line.num_shared:
            of_joined[: line.num_shared] = grad.unflatten(0, line.shape)[:, : line.num_shared].sum(0)
        return of_joined, None


class LeanAttention(Qwen2VLAttention):
    """On a line: projections and rotations of each position once, causal attention of each row."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        line: Line | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(1, N, H) -> (1, N, H), or (1, L, H) in the last layer; without ``line`` as the parent's."""
        if line is None:
            return super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = (angles.unsqueeze(2) for angles in position_embeddings)
        q, k = _Turned.apply(q, cos, sin), _Turned.apply(k, cos, sin)
        dropout = self.attention_dropout if self.training else 0.0
        attended = causal_attention(*(line.part(heads) for heads in (q, k, v)), dropout)
        attended = line.join(attended).flatten(2)
        return self.o_proj(line.pick(attended) if _is_last(self) else attended), None


class LeanDecoderLayer(Qwen2VLDecoderLayer):
    """On a line, the last layer goes on from its attention with the wanted positions alone."""

    def forward(self, hidden_states: Tensor, line: Line | None = None, **kwargs: Any) -> Tensor:
        """(1, N, H) -> (1, N, H), or (1, L, H) in the last layer; without ``line`` as the parent's."""
        if line is None:
            return super().forward(hidden_states, **kwargs)
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), line=line, **kwargs)
        hidden_states = attended + (line.pick(hidden_states) if _is_last(self.self_attn) else hidden_states)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LeanRMSNorm(Qwen2VLRMSNorm):
    """Keeps its input as it came, and one number of each position."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        if self.weight.requires_grad or hidden_states.dtype == torch.float32:  # in fp32 stock keeps no copy
            return super().forward(hidden_states)
        return _Normed.apply(hidden_states, self.weight, self.variance_epsilon)


class LeanMLP(Qwen2MLP):
    """Keeps gate and up, and not what becomes of them. Its activation is SiLU, as in every Qwen2-VL."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        return self.down_proj(_Gated.apply(self.gate_proj(x), self.up_proj(x)))


class _Normed(torch.autograd.Function):
    """RMSNorm with a frozen weight: bit by bit what ``Qwen2VLRMSNorm`` gives, gradient and all."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32), copy=True)
        scale = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return wide.mul_(scale).to(hidden.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        hidden, weight, scale = ctx.saved_tensors
        wide, grad = hidden.to(scale.dtype, copy=True), (grad * weight).to(scale.dtype)
        # As autograd goes back through the stock norm, operation by operation, so that the bits are its own
        of_scale = (grad * wide).sum(-1, keepdim=True)
        of_mean = -0.5 * of_scale * scale.pow(3) / hidden.shape[-1]
        return grad.mul_(scale).add_(wide.mul_(2 * of_mean)).to(hidden.dtype), None, None


class _Turned(torch.autograd.Function):
    """Rotary embedding; its gradient is turned back, and nothing but the angles is kept."""

    @staticmethod
    def forward(ctx: FunctionCtx, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(heads, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(..., head_dim), its first half and its second as pairs, by angles of which both halves have the same."""
    turned = heads * cos
    (first, second), (sin, _) = heads.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    to_first, to_second = turned.chunk(2, dim=-1)
    to_first.addcmul_(second, sin, value=-1)
    to_second.addcmul_(first, sin)
    return turned


class _Gated(torch.autograd.Function):
    """SiLU(gate) * up: the values and gradients of the two operations, keeping gate and up but not SiLU(gate).

    Gate and up are nobody else's, and each is overwritten by the other's gradient: the widest tensors of a layer need
    no third and fourth of their size. Going back a second time, autograd sees that and refuses.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward.grad_input(up.mul_(grad), gate, grad_input=up)
        return of_gate, F.silu(gate, inplace=True).mul_(grad)


_LEAN: dict[type[nn.Module], type[nn.Module]] = {
    Qwen2VLRMSNorm: LeanRMSNorm,
    Qwen2MLP: LeanMLP,
    Qwen2VLAttention: LeanAttention,
    Qwen2VLDecoderLayer: LeanDecoderLayer,
}


def save_less(language_model: nn.Module) -> None:
    """Let a Qwen2-VL language model keep and compute less in training, in place; names and weights stay."""
    for module in language_model.modules():
        module.__class__ = _LEAN.get(type(module), type(module))


def runs_on_a_line(language_model: nn.Module) -> bool:
    """Whether :func:`save_less` prepared it, and its attention is plain causal SDPA."""
    causal = language_model.config._attn_implementation == "sdpa" and not language_model.has_sliding_layers
    return causal and isinstance(language_model.layers[-1], LeanDecoderLayer)


def _is_last(attention: Qwen2VLAttention) -> bool:
    return attention.layer_idx == attention.config.num_hidden_layers - 1
