"""Training steps of the miniature, ours and peers', in one process and in turns: clips a second, share of the GEMM.

Ours is what ``launch/train.py`` runs: ``train_step`` on the DeepSpeed engine, one rank. A peer's is forward, backward,
clipping and AdamW of the same torch. Before any clock runs, both sides' code is given the same micro-batches, and
their loss and the gradient of the projector must be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import harness, mini, peers
from benchmarks.harness import Figure, Round, Spent
from benchmarks.ours import Ours, fill_lora_b
from benchmarks.shapes import MINI
from graft.data.collate import Batch
from graft.model.lora import add_lora
from graft.recipe import Lora

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
BARE = "seed without checkpointing"
TARGETS = {(1, 4): ">= 22", (1, 8): ">= 32", (2, 4): ">= 22"}


def report() -> Iterator[Figure]:
    """Stage 1 at both stackings, then stage 2."""
    yield from stage_1()
    yield from stage_2()


def stage_1() -> Iterator[Figure]:
    """Against the seed's form, against Hugging Face on our tokens, and against the GEMM."""
    sides = {k: ours(1, k) for k in (4, 8)}
    plain = peers.Peer(peers.stock(sides[4].model, False), sides[4].batches)
    seed, bare = (
        peers.seed_form(mini.graft(4, harness.fast_dtype()), 1, checkpointing=checkpointing)
        for checkpointing in (True, False)
    )
    facts = compare(sides[4], plain)
    steps: dict[str, Callable[[], object]] = {f"ours {k}": side.step for k, side in sides.items()}
    taken = harness.rounds({**steps, "hf": plain.step, "seed": seed.step, BARE: bare.step}, probe())
    for k, side in sides.items():
        yield seed_ratio(taken, f"ours {k}", side, seed, 1, facts)
        yield bare_ratio(taken, f"ours {k}", side, bare)
    value, agrees, clocks = harness.ratio(taken, "hf", "ours 4")
    yield Figure(
        "step1.hf_same_tokens", value, "x", "Hugging Face's forward(labels=) on the same micro-batches / ours",
        ">= 1.4", agrees, {**clocks, **facts},
    )  # fmt: skip
    yield gemm_fraction(taken, "ours 4", sides[4])


def stage_2() -> Iterator[Figure]:
    """Against the seed's form: PEFT's fp32 adapters with dropout, checkpointing."""
    side, seed = ours(2, 4), peers.seed_form(mini.graft(4, harness.fast_dtype()), 2)
    settings = {"r": mini.R, "lora_alpha": 2 * mini.R, "lora_dropout": 0.0}
    same = peers.Peer(peers.stock(side.model, True, **settings), side.batches)
    peers.copy_adapters(side.model, same.model)
    facts = compare(side, same)
    # Dropout's random numbers are drawn by one thread, whatever their number: with two the clocks could not agree.
    sides = {"ours 4": harness.in_one_thread(side.step), "seed": harness.in_one_thread(seed.step)}
    taken = harness.rounds(sides, harness.in_one_thread(probe()))
    yield seed_ratio(taken, "ours 4", side, seed, 2, facts)


def ours(stage: int, stack_factor: int) -> Ours:
    """Our step of a stage: 64 clips at true length through the engine."""
    model = mini.graft(stack_factor, harness.fast_dtype())
    if stage == 2:
        add_lora(model, Lora(r=mini.R, alpha=2 * mini.R))
        fill_lora_b(model)
    return Ours(model, stage, mini.step_batches(stack_factor))


def compare(side: Ours, peer: peers.Peer) -> dict[str, float]:
    """:func:`differences`; AssertionError if they are not the same model."""
    facts = differences(side, peer, side.batches)
    same = all(fact <= TOLERANCE[harness.fast_dtype()] for fact in facts.values())  # not so for a NaN
    assert same, f"the two sides are not the same model: {facts}"
    return facts


def differences(side: Ours, peer: peers.Peer, batches: Sequence[Batch]) -> dict[str, float]:
    """How far loss and projector gradient of two sides are apart on the same micro-batches, relative."""
    losses, gradients = zip(*(_loss_and_gradient(one, batches) for one in (side, peer)), strict=True)
    return {
        "loss differs by": abs(losses[0] / losses[1] - 1),
        "gradient differs by": ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item(),
    }


def seed_ratio(taken: Sequence[Round], name: str, ours: Ours, seed: peers.Peer, stage: int, facts: dict) -> Figure:
    """Clips a second, ours over the seed's."""
    value, agrees, clocks = harness.ratio(taken, "seed", name, ours.num_clips / seed.num_clips)
    clips = ours.num_clips / min(r.spent[name].wall for r in taken)
    what = "clips a second, ours / the seed's form on stock Hugging Face, with gradient checkpointing"
    k = ours.model.config.stack_factor
    facts = {**clocks, "clips/s": clips, **facts}
    return Figure(f"step{stage}.seed_ratio.stack{k}", value, "x", what, TARGETS[stage, k], agrees, facts)


def bare_ratio(taken: Sequence[Round], name: str, ours: Ours, seed: peers.Peer) -> Figure:
    """The same over the seed's form without checkpointing, which its script leaves out and its GPUs would need."""
    value, agrees, clocks = harness.ratio(taken, BARE, name, ours.num_clips / seed.num_clips)
    what = "clips a second, ours / the seed's form without gradient checkpointing"
    k = ours.model.config.stack_factor
    return Figure(f"step1.seed_ratio.stack{k}.bare", value, "x", what, published=agrees, facts=clocks)


def gemm_fraction(taken: Sequence[Round], name: str, ours: Ours) -> Figure:
    """FLOPs that real tokens need, a second, over those of the GEMM probe in the same round; the median round.

    Some of them are spared (see :func:`executed`), so 1 is no bound; the facts tell the share without those. The last
    layer is a seventh of the miniature, and a 28th of the 7B: there it spares a quarter as much.
    """
    tokens = sum(int(batch.attention_mask.sum()) for batch in ours.batches)
    gigaflop = 4e-9 * (
        MINI.layer_parameters * tokens + MINI.head_parameters * ours.num_labels
    )  # forward and dX; frozen weights have no dW
    wall, cpu = (
        harness.median([gigaflop / getattr(r.spent[name], clock) / getattr(r.probe, clock) for r in taken])
        for clock in ("wall", "cpu")
    )
    padded = sum(batch.num_positions for batch in ours.batches)
    done = sum(map(executed, ours.batches)) / gigaflop
    facts = {"wall": wall, "cpu": cpu, "rounds": len(taken), "padded/real tokens": padded / tokens}
    facts |= {"FLOPs executed / needed": done, "fraction by executed FLOPs": wall * done}
    facts |= {"time": harness.busiest(ours.step)}
    what = "FLOPs of real tokens a second / GEMM at the layer shapes, same round"
    return Figure("step1.gemm_fraction", wall, "", what, ">= 0.75", harness.publishable(wall, cpu, len(taken)), facts)


def executed(batch: Batch) -> float:
    """GFLOP of a micro-batch's linear layers: line positions, and label positions alone behind the last q, k, v.

    Attention's own products, the projector's and the adapters' are not counted, as they are not among the needed ones.
    """
    q, _, k, v, *_ = layer = [n * m for n, m in MINI.layer_shapes]
    to_the_last = (MINI.layers - 1) * sum(layer) + q + k + v
    behind = sum(layer) - q - k - v + MINI.head_parameters
    return 4e-9 * (to_the_last * len(batch.line_positions) + behind * batch.num_label_tokens)


def probe() -> Callable[[], Spent]:
    """GEMM at the shapes of a layer."""
    return harness.gemm_probe(MINI.layer_shapes, harness.fast_dtype())


def _loss_and_gradient(side: Ours | peers.Peer, batches: Sequence[Batch]) -> tuple[float, Tensor]:
    weight = side.projector.linear_1.weight
    total, gradient = 0.0, torch.zeros_like(weight)
    for batch in batches:
        loss = side.loss(batch)
        total += loss.item()
        gradient += torch.autograd.grad(loss, weight)[0]
    return total, gradient
