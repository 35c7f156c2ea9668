"""The loss over parts of the vocabulary, and its gradient, against the whole softmax."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from graft.model import loss as module
from graft.model.grafted import find_label_positions, find_line_positions
from graft.model.loss import frozen_head_loss, summed_cross_entropy

HIDDEN = 24


def made(num_labels: int, vocab: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(100 * num_labels + vocab)
    hidden, head = (torch.randn(n, HIDDEN, generator=chance, dtype=torch.float64) for n in (num_labels, vocab))
    return hidden * spread, head, torch.randint(vocab, (num_labels,), generator=chance)


def with_gradient(loss_of: object, hidden: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = hidden.clone().requires_grad_(True)
    loss = loss_of(hidden, *others)  # type: ignore[operator]
    return loss.detach(), torch.autograd.grad(3 * loss, hidden)[0]


def whole(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden @ head.T, labels, reduction="sum")


@settings(deadline=None, max_examples=60)
@given(
    num_labels=st.integers(0, 35),
    vocab=st.integers(1, 50),
    at_a_time=st.integers(1, 60),
    spread=st.sampled_from([0.0, 1.0, 100.0]),
)
def test_parts_are_the_whole(num_labels: int, vocab: int, at_a_time: int, spread: float) -> None:
    """Whatever the parts, also of one row and of more than there are; logits of thousands do not overflow."""
    hidden, head, labels = made(num_labels, vocab, spread)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS_AT_A_TIME_ON_CPU", at_a_time)
        loss, gradient = with_gradient(frozen_head_loss, hidden, head, labels)
    expected, expected_gradient = with_gradient(whole, hidden, head, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


def test_by_hand() -> None:
    """Logits 0 and ln 3, label 0: p is 1/4, the loss ln 4, its gradient (3/4) (row 1 - row 0)."""
    hidden, head = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0], [math.log(3), 1.0]])
    loss, gradient = with_gradient(frozen_head_loss, hidden, head, torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)
    assert (gradient / 3).tolist()[0] == pytest.approx([0.75 * math.log(3), 0.75 * (1 - 5)], rel=1e-6)


def test_an_unsure_part_of_a_sure_label_survives_bf16() -> None:
    """A p of 0.999 is 1 in bf16, and p - 1 nothing: here the gradient is still right to bf16's own 3 digits."""
    hidden, head = torch.tensor([[1.0]]), torch.tensor([[7.0], [0.0], [-2.0]])
    expected = with_gradient(whole, hidden.double(), head.double(), torch.tensor([0]))[1]
    gradient = with_gradient(frozen_head_loss, hidden.bfloat16(), head.bfloat16(), torch.tensor([0]))[1]
    assert 1e-3 < -expected.item() / 3 / 7 < 2e-3
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_follow_the_autocast_and_sums_are_fp32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_AT_A_TIME_ON_CPU", 7)  # of which many sums are made
    hidden, head, labels = (t.float() if t.is_floating_point() else t for t in made(20, 300))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, gradient = with_gradient(frozen_head_loss, hidden, head, labels)
        plain = with_gradient(lambda x, w, y: summed_cross_entropy(F.linear(x, w), y), hidden, head, labels)
    assert loss.dtype == gradient.dtype == torch.float32
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(loss, plain[0], rtol=close, atol=0)
    assert (gradient - plain[1]).norm() <= close * plain[1].norm()
    exact = with_gradient(whole, *(t.double() if t.is_floating_point() else t for t in (hidden, head, labels)))[1]
    assert (gradient - exact).norm() <= 1.05 * (plain[1] - exact).norm() + 1e-6 * exact.norm()


def test_what_is_not_finite_stays_so() -> None:
    hidden, head, labels = made(3, 40)
    hidden[1, 0] = float("nan")
    loss, gradient = with_gradient(frozen_head_loss, hidden, head, labels)
    assert loss.isnan() and gradient[1].isnan().all() and gradient[[0, 2]].isfinite().all()


def test_label_positions_by_hand() -> None:
    labels = torch.tensor([[5, -100, 6, 7], [-100, 8, -100, -100], [9, -100, -100, 4]])
    assert find_label_positions(labels).tolist() == [1, 2, 4, 10]


def test_line_positions_by_hand() -> None:
    """The first row whole, of the others what no row before them has, and no padding but where a label is predicted."""
    labels = torch.tensor([[-100, -100, 6, 7], [-100, -100, 8, -100], [-100, -100, -100, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    assert find_line_positions(labels, 0).tolist() == [*range(12)]
    assert find_line_positions(labels, 1).tolist() == [0, 1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert find_line_positions(labels, 1, mask).tolist() == [0, 1, 2, 3, 5, 6, 9, 10]
    assert mask.sum() == 9, "the mask is left as it was"
