"""One optimiser step: the numerics of training, and nothing else.

The loss of a step is the cross entropy summed over every label position of the step's utterances, on all ranks and
in all micro-batches, divided once by the number of those positions. No mean of means: a rank or micro-batch with few
labels does not weigh more for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graft.data.collate import Batch
from graft.train.engine import Engine
from graft.train.heartbeat import Heart


@dataclass(frozen=True)
class StepResult:
    """``loss_share``: this rank's part of the step's loss, a scalar left on the device; the sum over ranks is whole."""

    loss_share: torch.Tensor
    grad_norm: float
    applied: bool


def train_step(
    engine: Engine,
    micro_batches: Sequence[Batch],
    seeds: Sequence[int],
    num_label_tokens: int,
    share_of_peak: float,
    precision: str,
    heart: Heart | None = None,
) -> StepResult:
    """Forward and backward of this rank's micro-batches, one reduction, one update.

    Args:
        micro_batches: this rank's share of the step.
        seeds: of the dropout in each of them.
        num_label_tokens: label positions of the whole step, over all ranks.
        share_of_peak: learning rate as a share of its peak.
        precision: 'bf16' runs the forward pass under autocast.
        heart: is told when this rank has done its part.
    """
    assert num_label_tokens > 0, "a step without a label has no loss"
    shares = []
    with engine.one_reduction():
        for batch, seed in zip(micro_batches, seeds, strict=True):
            torch.manual_seed(seed)
            inputs = batch.to(engine.device).model_inputs()
            with torch.autocast(engine.device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = engine(**inputs, num_items_in_batch=num_label_tokens, use_cache=False).loss
            engine.backward(loss * engine.ranks.world_size)  # ZeRO averages over ranks; here they must add up
            shares.append(loss.detach())
        if heart:
            heart.waits("gradients made")
    grad_norm, applied = engine.step(share_of_peak)
    return StepResult(torch.stack(shares).sum(), grad_norm, applied)
