"""Attention in blocks: the values and gradients of torch's own, and in bf16 about as near to the truth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graft.model import attention as attention_module
from graft.model.attention import BLOCK, EVERY, _InBlocks, attend_all, causal_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
SIZE = 8  # of a head


def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def drawn(num_positions: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the gradient of what comes out, of two rows."""
    chance = torch.Generator().manual_seed(num_positions + heads)
    shapes = [(2, num_positions, count, SIZE) for count in (heads, kv_heads, kv_heads, heads)]
    return [2 * torch.randn(shape, generator=chance).to(dtype) for shape in shapes]


def results(attention: Attention, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """What comes out, and the gradients of q, k and v."""
    q, k, v = (heads.detach().requires_grad_() for heads in (q, k, v))
    attended = attention(q, k, v)
    return [attended.detach(), *torch.autograd.grad(attended, (q, k, v), grad)]


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (7, 1)])
@pytest.mark.parametrize("num_positions", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_blocks_give_torchs_values_and_gradients(num_positions: int, heads: tuple[int, int]) -> None:
    given = drawn(num_positions, *heads)
    for mine, theirs in zip(results(_InBlocks.apply, *given), results(by_torch, *given), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_in_bf16_about_as_near_to_the_truth_as_torchs_and_nearer_for_keys_and_values() -> None:
    given = drawn(2 * BLOCK + 5, 7, 1, torch.bfloat16)
    exact = results(by_torch, *(tensor.double() for tensor in given))
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        ours, torchs = results(causal_attention, *given), results(by_torch, *given)
    assert all(mine.dtype == torch.bfloat16 for mine in ours)
    for mine, theirs, true, factor in zip(ours, torchs, exact, (1.5, 1.5, 1.0, 1.0), strict=True):
        assert (mine - true).norm() <= factor * (theirs - true).norm()
        assert (mine - true).norm() <= 0.01 * true.norm()


def test_no_position_hears_a_later_one() -> None:
    q, k, v, _ = drawn(BLOCK + 9, 4, 2, torch.bfloat16)
    before = causal_attention(q, k, v)
    for place in (3, BLOCK - 1, BLOCK, BLOCK + 8):
        later = [heads.clone() for heads in (q, k, v)]
        for heads in later:
            heads[:, place] = 9.0
        after = causal_attention(*later)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place], before[:, place])


@pytest.mark.parametrize(("dtype", "dropout", "in_blocks"), [
    (torch.bfloat16, 0.0, True), (torch.bfloat16, 0.1, False), (torch.float32, 0.0, False),
])  # fmt: skip
def test_where_blocks_are_used(dtype: torch.dtype, dropout: float, in_blocks: bool) -> None:
    """On a CPU, in bf16, without dropout; everywhere else torch has what is needed."""
    q, k, v, _ = drawn(5, 4, 2, dtype)
    attended = causal_attention(q.requires_grad_(), k, v, dropout)
    assert attended.shape == q.shape
    assert ("_InBlocks" in attended.grad_fn.name()) == in_blocks


def test_compiled_around_it_no_length_is_traced_anew() -> None:
    """As ``run.compile`` does with each layer."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Tensor]:
        graphs.append(graph)
        return graph.forward

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(2 * q, k, v) + 1

    compiled, traced = torch.compile(layer, dynamic=True, backend=count), []
    for num_positions in (5, BLOCK + 1, 2 * BLOCK + 3, 3 * BLOCK + 7):
        q, k, v, _ = drawn(num_positions, 4, 2, torch.bfloat16)
        assert torch.equal(compiled(q, k, v), layer(q, k, v))
        traced.append(len(graphs))
    assert traced[1] == traced[3] > 0, "new lengths made new graphs"


def all_by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)


def drawn_for_all(num_queries: int, num_keys: int, heads: int, offset: float = 0.0) -> list[Tensor]:
    """Scaled queries, keys and values of two rows; with ``offset`` all keys have a part in common, as trained ones."""
    chance = torch.Generator().manual_seed(num_queries + num_keys + heads)
    sizes = (num_queries, num_keys, num_keys)
    q, k, v = (torch.randn(2, heads, size, SIZE, generator=chance, dtype=torch.float64) for size in sizes)
    return [q, k + offset * torch.randn(heads, 1, SIZE, generator=chance, dtype=torch.float64), v]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("num_queries", "num_keys", "heads"), [(1, 1, 1), (7, 7, 5), (3, EVERY + 1, 2), (20, 33, 4)])
def test_of_all_positions_blocks_give_torchs_values(
    num_queries: int, num_keys: int, heads: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(attention_module, "QUERIES", 6)
    given = drawn_for_all(num_queries, num_keys, heads)
    torch.testing.assert_close(attend_all(*given), all_by_torch(*given), rtol=1e-10, atol=1e-12)


def test_of_all_positions_bf16_is_near_the_truth_where_scores_are_in_the_hundreds() -> None:
    """Rounded as they are, they would be many times as far off. Keys at random: of every 16th little can be guessed."""
    given = [tensor.bfloat16() for tensor in drawn_for_all(200, 300, 4, offset=12.0)]
    q, k, v = (tensor.double() for tensor in given)
    true = all_by_torch(q, k, v)
    rounded = ((q @ k.mT).bfloat16().double().softmax(-1) @ v).transpose(1, 2)
    assert (q @ k.mT).abs().max() > 100
    off, torchs, plainly = ((each - true).norm() for each in (attend_all(*given), all_by_torch(*given), rounded))
    assert off < 3 * torchs and off < 0.1 * plainly
