"""The loss at the 7B's true vocabulary: ours at label positions against Hugging Face's at every position.

From the last hidden states (B, T, H) to their gradient, the output matrix frozen. Bytes are the most that tensors made
on the way hold at once: counted, and the same on any machine of one precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.loss.loss_utils import ForCausalLMLoss

from benchmarks import harness
from benchmarks.harness import Figure, WithoutProducts
from graft.model.grafted import IGNORE_INDEX, find_label_positions
from graft.model.loss import frozen_head_loss

HIDDEN, VOCAB = 3584, 152064  # Qwen2-VL-7B
BATCH, POSITIONS, LABELS = 2, 435, 30  # two clips of 30 s with stack_factor 4


def report() -> Iterator[Figure]:
    """Bytes, then time."""
    chance = torch.Generator().manual_seed(1)
    head = torch.empty(VOCAB, HIDDEN, dtype=harness.fast_dtype()).normal_(0.0, 0.02, generator=chance)
    hidden = torch.empty(BATCH, POSITIONS, HIDDEN, dtype=head.dtype).normal_(generator=chance)
    labels = torch.randint(VOCAB, (BATCH, POSITIONS), generator=chance)
    labels[:, :-LABELS] = IGNORE_INDEX
    losses = {"ours": ours, "hf": hugging_face}
    sides = {name: lambda loss=loss: step(loss, hidden, head, labels) for name, loss in losses.items()}
    peaks = {}
    for name, side in sides.items():
        with PeakBytes() as counted, WithoutProducts():
            side()
        peaks[name] = counted.peak
    what = f"loss and its gradient, {BATCH} x {POSITIONS} positions, {LABELS} labels each, vocabulary {VOCAB:,}"
    sizes = {"ours MB": peaks["ours"] / 1e6, "Hugging Face MB": peaks["hf"] / 1e6}
    value = peaks["ours"] / peaks["hf"]
    yield Figure("count.loss_bytes", value, "x", f"{what}: peak bytes, ours / Hugging Face", "<= 0.0833", facts=sizes)
    facts = compare(sides["ours"](), sides["hf"]())
    taken = harness.rounds(sides, harness.gemm_probe([(HIDDEN, VOCAB // 16)], head.dtype, BATCH * LABELS))
    value, agrees, clocks = harness.ratio(taken, "hf", "ours")
    yield Figure("loss.speed", value, "x", f"{what}: time, Hugging Face / ours", ">= 10", agrees, {**clocks, **facts})


def ours(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """As in the graft's ``forward``: where a label is, summed, divided once."""
    predicts = find_label_positions(labels)
    picked, wanted = hidden.flatten(0, 1)[predicts], labels.flatten()[predicts + 1]
    return frozen_head_loss(picked, head, wanted) / len(predicts)


def hugging_face(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """As in every causal model of transformers."""
    return ForCausalLMLoss(F.linear(hidden, head), labels, VOCAB)


def step(loss: Callable[..., Tensor], hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """The loss and its gradient in the hidden states."""
    hidden = hidden.detach().requires_grad_(True)
    value = loss(hidden, head, labels)
    return value.item(), torch.autograd.grad(value, hidden)[0]


def compare(mine: tuple[float, Tensor], theirs: tuple[float, Tensor]) -> dict[str, float]:
    """Relative differences; AssertionError if they are not the same loss."""
    facts = {
        "loss differs by": abs(mine[0] / theirs[0] - 1),
        "gradient differs by": ((mine[1] - theirs[1]).float().norm() / theirs[1].float().norm()).item(),
    }
    assert all(fact <= 2e-2 for fact in facts.values()), f"not the same loss: {facts}"
    return facts


class PeakBytes(TorchDispatchMode):
    """The most bytes that storages made inside hold at once, as seen after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._held, self._before = 0, {}, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, made = tree_leaves((args, kwargs or {})), func(*args, **(kwargs or {}))
        for tensor in given:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._held:
                self._before.add(tensor.untyped_storage()._cdata)  # it was there already
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._before:
                self._held[key] = (StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes())
        self._held = {key: (ref, size) for key, (ref, size) in self._held.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return made
