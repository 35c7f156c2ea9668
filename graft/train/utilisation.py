"""Model FLOP utilisation: the arithmetic that a step needs, divided by what the devices could do in its time.

Only real tokens count, and only what the model needs: padding, and what checkpointing computes twice, are losses.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from graft.data.collate import Batch
from graft.model.projector import Projector

# Dense bf16 with fp32 accumulation by NVIDIA's data sheets, FLOP/s (where they give the figure for sparse matrices,
# half of it), by words of the device's name. What stands first is found first.
DATA_SHEETS: dict[tuple[str, ...], float] = {
    ("B200",): 2250e12,
    ("H200", "NVL"): 835e12,
    ("H200",): 989e12,
    ("H100", "PCIe"): 756e12,
    ("H100", "NVL"): 835e12,
    ("H100",): 989e12,
    ("A100",): 312e12,
    ("L40S",): 362e12,
    ("A40",): 149.7e12,
    ("A10",): 125e12,
    ("L4",): 121e12,
}
MEASURED_SIZE = {"cpu": 1024, "cuda": 8192}  # of a square product
MEASURE_S, FEWEST_ROUNDS = 0.3, 3


@dataclass(frozen=True)
class Peak:
    """What a device could do at best, FLOP/s, and who says so."""

    flops: float
    source: str


def peak_of(device: torch.device, precision: str) -> Peak:
    """The peak of this rank's device at ``precision`` ('bf16' or 'fp32'): the data sheet's, or else measured here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    listed = data_sheet(name) if precision == "bf16" else None
    if listed:
        return Peak(listed, f"{name}, dense bf16 by its data sheet")
    size = MEASURED_SIZE[device.type]
    return Peak(
        measure(device, precision, size), f"{name}, best product of {size} x {size} in {precision} at the start"
    )


def data_sheet(name: str) -> float | None:
    """FLOP/s of the device of this name; None for one that is not listed, or a slice of one (MIG)."""
    words = set(re.split(r"[\s-]+", name))
    if "MIG" in words:
        return None
    return next((peak for parts, peak in DATA_SHEETS.items() if words.issuperset(parts)), None)


def measure(device: torch.device, precision: str, size: int) -> float:
    """FLOP/s of the fastest of a few matrix products; leaves the random state as it is."""
    chance = torch.Generator(device).manual_seed(1)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    left, right = (torch.randn(size, size, generator=chance, device=device).to(dtype) for _ in range(2))
    rounds, until = [], time.perf_counter() + MEASURE_S
    while len(rounds) < FEWEST_ROUNDS or time.perf_counter() < until:
        _wait_for(device)
        start = time.perf_counter()
        torch.mm(left, right)
        _wait_for(device)
        rounds.append(time.perf_counter() - start)
    return 2 * size**3 / min(rounds)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class ModelFlops:
    """FLOP of forward and backward, by what there is of each.

    A weight costs 2 FLOP per position forward and 2 for the gradient of its input. Only a trained one costs 2 more for
    its own gradient: with a frozen base this is 4 N, not the usual 6 N (arXiv 2001.08361).
    """

    per_token: float
    per_pair: float  # of positions of which one attends to the other
    per_label: float
    per_audio_token: float
    per_comparison: float  # of an audio token with a word, where audio is aligned

    def of(self, batches: Iterable[Batch]) -> float:
        """FLOP of one forward and backward over these micro-batches."""
        return sum(map(self._of_one, batches))

    def _of_one(self, batch: Batch) -> float:
        projector = self.per_audio_token * batch.num_audio_tokens
        if batch.words is not None:  # aligned: the language model does not run
            return projector + self.per_comparison * batch.num_audio_tokens * len(batch.words)
        tokens = self.per_token * (batch.num_positions - batch.num_padding)
        return projector + tokens + self.per_pair * batch.num_attended_pairs + self.per_label * batch.num_label_tokens


def model_flops(model: nn.Module) -> ModelFlops:
    """Of the graft as it trains now: call it when what is trained has been selected.

    Counted are the products of the language model with its adapters, of causal attention, of the logits at label
    positions and of the projector. The encoder is not part of a step. Positions that rows share, and what of the last
    layer no label needs, count as in the plain model, though :mod:`graft.model.lean` spares them.
    """
    layers = model.model.language_model.layers
    # q k and p v, 2 FLOP each per channel of all heads; backward is twice that
    channels = sum(layer.self_attn.num_heads * layer.self_attn.head_dim for layer in layers)
    return ModelFlops(
        per_token=_linear(layers),
        per_pair=12.0 * channels,
        per_label=_linear(model.lm_head),
        per_audio_token=_projector(model.model.multi_modal_projector),
        per_comparison=6.0 * model.config.text_config.hidden_size,  # 2 each: cosine, its gradient, mixture of rows
    )


def _projector(projector: Projector) -> float:
    """FLOP for an audio token. Frames need no gradient: only behind something trained the first product makes one."""
    first = next(projector.parameters())
    if first.ndim == 1:
        return _linear(projector)
    runs = projector.first_layer_runs
    return _linear(projector) + first.numel() * ((runs - 1) * (6.0 if first.requires_grad else 4.0) - 2.0 * runs)


def _linear(module: nn.Module) -> float:
    weights = [weight for weight in module.parameters() if weight.ndim > 1]  # of products and depthwise convolutions
    return float(sum((6 if weight.requires_grad else 4) * weight.numel() for weight in weights))
