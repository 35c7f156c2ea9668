"""Less memory for the backward pass at almost no work: cheap elementwise results are made again, not kept.

Of a decoder layer's tensors the backward pass needs the inputs of both norms, q, k, v, the attention's output, gate and
up. Stock Qwen2-VL also keeps SiLU(gate) and fp32 copies of the norms' inputs, half as much again. Values and gradients
are the same to the last bit; no matrix product is computed twice, unlike with gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2MLP, Qwen2VLRMSNorm


class LeanRMSNorm(Qwen2VLRMSNorm):
    """Keeps its input as it came."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        if hidden_states.dtype == torch.float32:  # stock keeps no copy then
            return super().forward(hidden_states)
        return _made_again(super().forward, hidden_states)


class LeanMLP(Qwen2MLP):
    """Keeps gate and up, and not what becomes of them."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        return self.down_proj(_made_again(self._gated, self.gate_proj(x), self.up_proj(x)))

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act_fn(gate) * up


_LEAN: dict[type[nn.Module], type[nn.Module]] = {Qwen2VLRMSNorm: LeanRMSNorm, Qwen2MLP: LeanMLP}


def save_less(language_model: nn.Module) -> None:
    """Let the norms and MLPs of a Qwen2-VL language model keep less, in place; names and weights stay."""
    for module in language_model.modules():
        module.__class__ = _LEAN.get(type(module), type(module))


def _made_again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
