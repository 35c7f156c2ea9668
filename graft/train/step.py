"""One optimiser step: the numerics of training, and nothing else.

The loss of a step is the cross entropy summed over every label position of the step's utterances, on all ranks and
in all micro-batches, divided once by the number of those positions. No mean of means: a rank or micro-batch with few
labels does not weigh more for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from graft.data.collate import Batch
from graft.train.engine import Engine
from graft.train.heartbeat import Heart
from graft.train.phases import BACKWARD, FORWARD, REDUCE, UPDATE, Phases


@dataclass(frozen=True)
class StepResult:
    """What is left on the device is read when the step is logged.

    loss_share: this rank's part of the step's loss, a scalar; the sum over ranks is whole.
    """

    loss_share: torch.Tensor
    grad_norm: torch.Tensor | float
    applied: bool


def train_step(
    engine: Engine,
    micro_batches: Sequence[Batch],
    seeds: Sequence[int],
    num_label_tokens: int,
    share_of_peak: float,
    heart: Heart | None = None,
    phases: Phases | None = None,
) -> StepResult:
    """Forward and backward of this rank's micro-batches, one reduction, one update.

    The host runs ahead of a GPU until the reduction, where DeepSpeed looks whether every rank's gradients are finite.

    Args:
        micro_batches: this rank's share of the step.
        seeds: of the dropout in each of them.
        num_label_tokens: label positions of the whole step, over all ranks.
        share_of_peak: learning rate as a share of its peak.
        heart: is told when this rank has done its part.
        phases: are given the time.
    """
    assert num_label_tokens > 0, "a step without a label has no loss"
    shares, phases = [], phases or Phases(engine.device)
    with ExitStack() as accumulation:
        accumulation.enter_context(engine.one_reduction())
        for batch, seed in zip(micro_batches, seeds, strict=True):
            torch.manual_seed(seed)
            with phases(FORWARD):
                inputs = batch.to(engine.device).model_inputs()
                loss = engine(**inputs, num_items_in_batch=num_label_tokens, use_cache=False).loss
            with phases(BACKWARD):
                engine.backward(loss * engine.ranks.world_size)  # ZeRO averages over ranks; here they must add up
            shares.append(loss.detach())
        if heart:
            heart.waits("gradients made")
        with phases(REDUCE):
            accumulation.close()  # what was added up here goes to the other ranks
    with phases(UPDATE):
        grad_norm, applied = engine.step(share_of_peak)
    return StepResult(torch.stack(shares).sum(), grad_norm, applied)
