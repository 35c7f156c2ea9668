"""Attention: torch's own, or on a CPU in bf16 matrix products of whole blocks.

*Causal, of a training step.* On a CPU the backward pass of torch's fused kernel takes longer in bf16 than in fp32: 7.7
against 5.4 ms for 4 rows of 209 positions and 7 heads of 64 on two cores of an AMD EPYC with AVX512, and 4.4 ms in
blocks. A block of queries meets all keys up to its last, the weights are made again in the backward pass, and query
heads that share keys and values are rows of the same product.

*Of all positions, of a frozen encoder.* On those cores torch's kernel runs at 130 GFLOP/s, since its scores are fp32,
and a product that gives bf16 at 400: :func:`attend_all`.

B: rows    T: positions    G: query heads of each head of keys    R: pairs of row and head of keys    d: size of a head
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface

ALL_IN_BLOCKS = "all_in_blocks"  # transformers' name for attend_all
EVERY = 16  # keys: of those the greatest score is estimated
QUERIES = 512  # at a time
BLOCK = 64  # positions: more leave more of the triangle above the diagonal in, fewer make small products


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Queries (B, T, heads, d), keys and values (B, T, heads / G, d) -> (B, T, heads, d)."""
    if not dropout and in_blocks(q):
        return _attend_in_blocks(q, k, v)
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=True).transpose(1, 2)


def in_blocks(q: Tensor) -> bool:
    """Where torch's kernel is the slower one."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16


@torch.compiler.disable  # the number of blocks follows from that of positions: every length would be traced anew
def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _InBlocks.apply(q, k, v)


class _InBlocks(torch.autograd.Function):
    """Keeps q, k and v alone. Scores and softmax are fp32, as in torch's kernel; weights and gradients are rounded.

    Autocast is off, in both directions: it would round the scores.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        group = q.shape[2] // k.shape[2]
        queries, keys, values = _grouped(q, group), _grouped(k), _grouped(v)
        scaled, attended = _scaled(keys), torch.empty_like(queries)
        for block, seen, later in _blocks(scaled, group):
            weights = _weights(queries[:, block], scaled[:, :, seen], later)
            attended[:, block] = torch.bmm(weights, values[:, seen])
        return _ungrouped(attended, q.shape)

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        group = q.shape[2] // k.shape[2]
        queries, keys, values, grads = _grouped(q, group), _grouped(k), _grouped(v), _grouped(grad, group)
        scaled, of_queries = _scaled(keys), torch.empty_like(queries)
        of_keys, of_values = (torch.zeros_like(keys, dtype=scaled.dtype) for _ in range(2))
        for block, seen, later in _blocks(scaled, group):
            weights = _weights(queries[:, block], scaled[:, :, seen], later)
            of_weights = torch.bmm(grads[:, block], values[:, seen].mT)
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_queries[:, block] = torch.bmm(of_scores, keys[:, seen])
            of_keys[:, seen] += torch.bmm(of_scores.mT, queries[:, block])
            of_values[:, seen] += torch.bmm(weights.mT, grads[:, block])
        scale = q.shape[-1] ** -0.5
        of_queries, of_keys = of_queries.mul_(scale), of_keys.mul_(scale).to(k.dtype)
        return _ungrouped(of_queries, q.shape), _ungrouped(of_keys, k.shape), _ungrouped(of_values.to(v.dtype), v.shape)


def _blocks(scaled: Tensor, group: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows of a block of queries, the keys that some of them may see, and -inf where one of its own is later."""
    later = scaled.new_full((BLOCK, BLOCK), -torch.inf).triu_(1).repeat_interleave(group, dim=0)
    num_positions = scaled.shape[2]
    for first in range(0, num_positions, BLOCK):
        end = min(first + BLOCK, num_positions)
        yield slice(first * group, end * group), slice(end), later[: (end - first) * group, : end - first]


def _weights(queries: Tensor, scaled: Tensor, later: Tensor) -> Tensor:
    """(R, rows, d), (R, d, keys), (rows, the last of the keys) -> (R, rows, keys)."""
    scores = torch.bmm(queries.to(scaled.dtype), scaled)
    scores[:, :, -later.shape[1] :] += later
    return scores.softmax(-1).to(queries.dtype)


def _scaled(keys: Tensor) -> Tensor:
    """(R, T, d) -> (R, d, T) in fp32, by the square root of d."""
    return (keys.to(torch.promote_types(keys.dtype, torch.float32)) * keys.shape[-1] ** -0.5).mT


def _grouped(heads: Tensor, group: int = 1) -> Tensor:
    """(B, T, heads, d) -> (R, T * group, d): heads of a group are neighbours at each position."""
    return heads.unflatten(2, (-1, group)).transpose(1, 2).reshape(-1, heads.shape[1] * group, heads.shape[-1])


def _ungrouped(rows: Tensor, shape: torch.Size) -> Tensor:
    """(R, T * group, d) -> ``shape``, (B, T, heads, d)."""
    num_rows, num_positions, _, size = shape
    return rows.view(num_rows, -1, num_positions, rows.shape[1] // num_positions, size).transpose(1, 2).flatten(2, 3)


def attend_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled queries (B, heads, T, d) of all keys and values (B, heads, S, d) -> (B, T, heads, d), without a gradient.

    Scores are rounded to bf16, about an estimate of each query's greatest, which stands in one more column of queries
    and of keys: those that count are near it, and so are hardly rounded. A softmax does not depend on what is taken off
    all scores, so a poor estimate costs digits, and nothing else. Frames of the tiny Whisper are as far from those in
    fp32 as with torch's kernel: 0.7 %, and 0.9 % without the column.
    """
    greatest = torch.matmul(q, k[:, :, ::EVERY].mT).amax(-1, keepdim=True)
    q, k = torch.cat([q, -greatest], -1), F.pad(k, (0, 1), value=1.0).mT
    attended = v.new_empty(len(q), q.shape[2], q.shape[1], v.shape[-1])
    together = min(torch.get_num_threads(), q.shape[1])
    room = v.new_empty(together * min(QUERIES, q.shape[2]) * k.shape[-1])  # fresh pages would cost as much again
    for row in zip(q, k, v, attended.transpose(1, 2), strict=True):
        for queries, keys, values, places in zip(*(heads.split(together) for heads in row), strict=True):
            for block, place in zip(queries.split(QUERIES, 1), places.split(QUERIES, 1), strict=True):
                shape = len(block), block.shape[1], keys.shape[-1]
                scores = torch.bmm(block, keys, out=room[: math.prod(shape)].view(shape))
                place.copy_(torch.bmm(torch.softmax(scores, -1, out=scores), values))
    return attended


def _for_transformers(_: nn.Module, q: Tensor, k: Tensor, v: Tensor, *__: Any, **___: Any) -> tuple[Tensor, None]:
    """Of Whisper's encoder, which scales its queries and has neither mask nor, when frozen, dropout."""
    return attend_all(q, k, v), None


AttentionInterface.register(ALL_IN_BLOCKS, _for_transformers)
