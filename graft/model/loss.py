"""Cross entropy at label positions, summed.

Where the output matrix is frozen, as it is in a graft, nothing but the hidden states asks for a gradient. Then logits
need never stand in memory together: the matrix is gone through once, some thousand rows at a time, and each part is
used for the loss and at once for the gradient, while the processor still holds it.

L: label positions    H: hidden size    V: vocabulary    C: rows of the output matrix at a time
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

# C: on a CPU a part is to stay in the cache, on a GPU every part costs a dozen launches
ROWS_AT_A_TIME, ROWS_AT_A_TIME_ON_CPU = 16_384, 4_096
MULTIPLE = 16  # of label positions: odd sizes leave tensor cores, and the kernels of CPUs, partly idle


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over (L, V) logits and (L,) labels, in fp32 whatever the autocast."""
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(logits.float(), labels, reduction="sum")


def frozen_head_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """``summed_cross_entropy(hidden @ head.T, labels)`` for a ``head`` (V, H) that learns nothing.

    The products are made in the precision of the autocast, or of ``head``; all else in fp32.

    Args:
        hidden: (L, H).
        labels: (L,), each in [0, V): none is ignored.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
    with torch.autocast(device, enabled=False):
        return _FrozenHeadLoss.apply(hidden.to(dtype), head, labels)


class _FrozenHeadLoss(torch.autograd.Function):
    """The softmax over all rows from parts of them: arXiv 1805.02867, algorithm 3.

    A label's own row is kept out of the products. The gradient of its logit is p - 1, and 1 - p is added up from the
    others' p: as a difference it would vanish where p, rounded to bf16, is 1.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        count, spare = len(labels), -len(labels) % MULTIPLE
        wide = torch.promote_types(hidden.dtype, torch.float32)
        columns = F.pad(hidden, (0, 0, 0, spare)).T.contiguous()  # (H, L)
        labels = F.pad(labels, (0, spare))
        own_rows = head.index_select(0, labels).T.to(wide)  # (H, L)
        own = (columns * own_rows).sum(0)  # (L,), each label's logit
        highest, others, grad = own, torch.zeros_like(own), torch.zeros_like(own_rows)
        at_a_time = ROWS_AT_A_TIME_ON_CPU if hidden.device.type == "cpu" else ROWS_AT_A_TIME
        for first in range(0, len(head), at_a_time):
            rows = head[first : first + at_a_time].to(hidden.dtype)  # (C, H)
            logits = _without((rows @ columns).to(wide), labels - first)
            before, highest = highest, torch.maximum(highest, logits.amax(0))
            shrink, weights = (before - highest).exp(), logits.sub_(highest).exp_()
            others = others * shrink + weights.sum(0)
            grad.mul_(shrink).add_(rows.T @ weights.to(rows.dtype))
        total = others + (own - highest).exp()
        ctx.save_for_backward(((grad - others * own_rows) / total).T[:count])
        ctx.dtype = hidden.dtype
        return (highest - own + total.log())[:count].sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (made,) = ctx.saved_tensors
        return (made * grad).to(ctx.dtype), None, None


def _without(logits: Tensor, places: Tensor) -> Tensor:
    """Logits (C, L) with -inf where ``places`` (L,) names a row of theirs; nothing waits for a GPU."""
    rows = places.clamp(0, len(logits) - 1).unsqueeze(0)
    kept = logits.gather(0, rows).masked_fill(rows == places, float("-inf"))
    return logits.scatter_(0, rows, kept)
