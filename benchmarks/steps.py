"""Training steps of the miniature, ours and peers', in one process and in turns: clips a second, share of the GEMM.

Ours is what ``launch/train.py`` runs: ``train_step`` on the DeepSpeed engine, one rank. A peer's is forward, backward,
clipping and AdamW of the same torch. Before any clock runs, both sides' code is given the same micro-batches, and
their loss and the gradient of the projector must be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks import harness, mini, peers
from benchmarks.harness import Figure, Round, Spent
from graft.data.collate import Batch
from graft.model.lora import add_lora
from graft.model.trainable import select_trainable
from graft.recipe import Lora, Stage
from graft.train.engine import Engine, resolve_ds_config, start_process_group
from graft.train.step import train_step

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
TARGETS = {(1, 4): ">= 22", (1, 8): ">= 32", (2, 4): ">= 22"}


def report() -> Iterator[Figure]:
    """Stage 1 at both stackings, then stage 2."""
    yield from stage_1()
    yield from stage_2()


def stage_1() -> Iterator[Figure]:
    """Against the seed's form, against Hugging Face on our tokens, and against the GEMM."""
    ours = {k: Ours(1, k) for k in (4, 8)}
    plain, seed = peers.Peer(peers.stock(ours[4].model, False), ours[4].batches), peers.seed_form(1)
    facts = compare(ours[4], plain)
    sides: dict[str, Callable[[], object]] = {f"ours {k}": side.step for k, side in ours.items()}
    taken = harness.rounds({**sides, "hf": plain.step, "seed": seed.step}, probe())
    for k, side in ours.items():
        yield seed_ratio(taken, f"ours {k}", side, seed, 1, facts)
    value, agrees, clocks = harness.ratio(taken, "hf", "ours 4")
    yield Figure(
        "step1.hf_same_tokens", value, "x", "Hugging Face's forward(labels=) on the same micro-batches / ours",
        ">= 1.4", agrees, {**clocks, **facts},
    )  # fmt: skip
    yield gemm_fraction(taken, "ours 4", ours[4])


def stage_2() -> Iterator[Figure]:
    """Against the seed's form: PEFT's fp32 adapters with dropout, checkpointing."""
    ours, seed = Ours(2, 4), peers.seed_form(2)
    settings = {"r": mini.R, "lora_alpha": 2 * mini.R, "lora_dropout": 0.0}
    same = peers.Peer(peers.stock(ours.model, True, **settings), ours.batches)
    peers.copy_adapters(ours.model, same.model)
    facts = compare(ours, same)
    taken = harness.rounds({"ours 4": ours.step, "seed": seed.step}, probe())
    yield seed_ratio(taken, "ours 4", ours, seed, 2, facts)


class Ours:
    """Our step of a stage: 64 clips at true length through the engine."""

    def __init__(self, stage: int, stack_factor: int) -> None:
        self.precision = {torch.bfloat16: "bf16", torch.float32: "fp32"}[harness.fast_dtype()]
        self.model = mini.graft(stack_factor, harness.fast_dtype())
        if stage == 2:
            add_lora(self.model, Lora(r=mini.R, alpha=2 * mini.R))
            _fill_lora_b(self.model)
        self.batches = mini.step_batches(stack_factor)
        self.num_clips, self.num_labels = peers.clips_and_labels(self.batches)
        settings, ranks = Stage(), start_process_group(timeout_s=600, start_timeout_s=60)
        trained = select_trainable(self.model, stage)
        config = resolve_ds_config(harness.ROOT / "ds_configs" / "zero2.json", settings)
        self.engine = Engine(self.model, dict.fromkeys(trained, mini.RATE), settings, config, ranks)
        self.projector = self.model.model.multi_modal_projector

    def step(self) -> None:
        """One optimiser step."""
        train_step(self.engine, self.batches, range(len(self.batches)), self.num_labels, 1.0, self.precision)

    def loss(self, batch: Batch) -> Tensor:
        """A micro-batch's share of the step's loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(**batch.model_inputs(), num_items_in_batch=self.num_labels, use_cache=False).loss


def compare(ours: Ours, peer: peers.Peer) -> dict[str, float]:
    """Differences of loss and projector gradient on the same micro-batches, relative; AssertionError if they differ."""
    losses, gradients = zip(*(_loss_and_gradient(side) for side in (ours, peer)), strict=True)
    facts = {
        "loss differs by": abs(losses[0] / losses[1] - 1),
        "gradient differs by": ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item(),
    }
    same = all(fact <= TOLERANCE[harness.fast_dtype()] for fact in facts.values())  # not so for a NaN
    assert same, f"the two sides are not the same model: {facts}"
    return facts


def seed_ratio(taken: Sequence[Round], name: str, ours: Ours, seed: peers.Peer, stage: int, facts: dict) -> Figure:
    """Clips a second, ours over the seed's."""
    value, agrees, clocks = harness.ratio(taken, "seed", name, ours.num_clips / seed.num_clips)
    clips = ours.num_clips / min(r.spent[name].wall for r in taken)
    what = "clips a second, ours / the seed's form on stock Hugging Face"
    k = ours.model.config.stack_factor
    facts = {**clocks, "clips/s": clips, **facts}
    return Figure(f"step{stage}.seed_ratio.stack{k}", value, "x", what, TARGETS[stage, k], agrees, facts)


def gemm_fraction(taken: Sequence[Round], name: str, ours: Ours) -> Figure:
    """FLOPs that real tokens need, a second, over those of the GEMM probe in the same round; the median round.

    Some of them are spared (see :func:`executed`), so 1 is no bound; the facts tell the share without those. The last
    layer is a seventh of the miniature, and a 28th of the 7B: there it spares a quarter as much.
    """
    layers, head = mini.LAYERS * sum(n * m for n, m in mini.LAYER_SHAPES), mini.WIDTH * mini.VOCAB
    tokens = sum(int(batch.attention_mask.sum()) for batch in ours.batches)
    gigaflop = 4e-9 * (layers * tokens + head * ours.num_labels)  # forward and dX; frozen weights have no dW
    wall, cpu = (
        harness.median([gigaflop / getattr(r.spent[name], clock) / getattr(r.probe, clock) for r in taken])
        for clock in ("wall", "cpu")
    )
    padded = sum(batch.num_positions for batch in ours.batches)
    done = sum(map(executed, ours.batches)) / gigaflop
    facts = {"wall": wall, "cpu": cpu, "rounds": len(taken), "padded/real tokens": padded / tokens}
    facts |= {"FLOPs executed / needed": done, "fraction by executed FLOPs": wall * done}
    what = "FLOPs of real tokens a second / GEMM at the layer shapes, same round"
    return Figure("step1.gemm_fraction", wall, "", what, ">= 0.75", harness.publishable(wall, cpu, len(taken)), facts)


def executed(batch: Batch) -> float:
    """GFLOP of a micro-batch's linear layers: the shared prompt once, label positions alone behind the last q, k, v.

    Attention's own products, the projector's and the adapters' are not counted, as they are not among the needed ones.
    """
    rows, positions = batch.input_ids.shape
    line = positions * rows - batch.num_shared * (rows - 1)
    q, _, k, v, *_ = layer = [n * m for n, m in mini.LAYER_SHAPES]
    to_the_last = (mini.LAYERS - 1) * sum(layer) + q + k + v
    behind = sum(layer) - q - k - v + mini.WIDTH * mini.VOCAB
    return 4e-9 * (to_the_last * line + behind * batch.num_label_tokens)


def probe() -> Callable[[], Spent]:
    """GEMM at the shapes of a layer."""
    return harness.gemm_probe(mini.LAYER_SHAPES, harness.fast_dtype())


def _loss_and_gradient(side: Ours | peers.Peer) -> tuple[float, Tensor]:
    weight = side.projector.linear_1.weight
    total, gradient = 0.0, torch.zeros_like(weight)
    for batch in side.batches:
        loss = side.loss(batch)
        total += loss.item()
        gradient += torch.autograd.grad(loss, weight)[0]
    return total, gradient


@torch.no_grad()
def _fill_lora_b(model: nn.Module) -> None:
    """Fresh adapters add nothing: let them count before two models are compared."""
    chance = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=chance) * 0.02)
