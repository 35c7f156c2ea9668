"""Training steps at full size, ours and peers' in turns on the same frozen weights: samples a second.

Every clip is 10 s: 125 audio tokens with stack_factor 4, 185 positions, 30 labels. A step is one micro-batch of as many
clips as the budget holds, made by the real collator. A peer takes the same clips, in as many micro-batches as its
memory needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks import harness, mini, peers
from benchmarks.gpu.bench import Bench, fits_memory, free, rate, ratio, share_of_gemm, speed
from benchmarks.harness import Figure, Round
from benchmarks.ours import Ours, fill_lora_b
from benchmarks.shapes import Shape
from benchmarks.steps import differences
from benchmarks.words import REPLY
from graft.data.collate import Batch
from graft.model.grafted import AudioGraftForConditionalGeneration
from graft.model.lean import save_less
from graft.model.lora import add_lora
from graft.recipe import Lora

FRAMES, STACK_FACTOR, R = 500, 4, 64
POSITIONS = mini.num_positions(FRAMES, STACK_FACTOR)
BUDGET = {"7b": 16_384, "2b": 32_768}
TARGETS = {"step1.7b": ">= 120", "step2.7b": ">= 108", "step1.2b": ">= 500", "step2.2b": ">= 450"}
COMPARED = 4  # clips on which both sides must be the same model
TOLERANCE = 0.05  # of the gradient in bf16, through kernels that are not the same


def stage_1(bench: Bench, name: str) -> Iterator[Figure]:
    """The projector alone: against stock Hugging Face on the same clips and against the seed's form."""
    shape, num_clips = sizes(bench, name)
    base = graft(bench, shape)
    clips, sides = batches(num_clips, num_clips, shape, bench), {}
    if name == "7b":  # before an engine puts its hooks into what is copied
        sides["hf"] = fitted(peers.Peer(peers.stock(base, False), clips), num_clips, shape, bench)
        sides["seed"] = peers.seed_form(base, 1, shape)
        bare = peers.seed_form(base, 1, shape, checkpointing=False)
        sides |= {"seed without checkpointing": bare} if fits_memory(bare.step) else {}
        forget_gradients(bare)
    sides["ours compiled"] = Ours(compiled_copy(bench, base), 1, clips)
    sides["ours"] = Ours(lean(base), 1, clips)
    yield from figures(bench, f"step1.{name}", sides, shape, 0)


def stage_2(bench: Bench, name: str) -> Iterator[Figure]:
    """Projector and LoRA: against PEFT on stock Hugging Face, as PEFT's defaults have it and with adapters in bf16."""
    shape, num_clips = sizes(bench, name)
    r = bench.size(R, 4)
    base = graft(bench, shape)
    add_lora(base, Lora(r=r, alpha=2 * r))
    fill_lora_b(base)
    clips, sides = batches(num_clips, num_clips, shape, bench), {}
    for kind, in_fp32 in (("hf", True), ("peft in bf16", False)) if name == "7b" else ():
        model = peers.stock(base, False, r=r, lora_alpha=2 * r, lora_dropout=0.0, in_fp32=in_fp32)
        peers.copy_adapters(base, model)
        sides[kind] = fitted(peers.Peer(model, clips), num_clips, shape, bench)
    sides["ours compiled"] = Ours(compiled_copy(bench, base), 2, clips)
    sides["ours"] = Ours(lean(base), 2, clips)
    yield from figures(bench, f"step2.{name}", sides, shape, r)


def figures(bench: Bench, name: str, sides: dict[str, Any], shape: Shape, r: int) -> Iterator[Figure]:
    """Speeds of ours, ratios to the others."""
    ours, facts, same = sides["ours"], {}, True
    if "hf" in sides:
        few = batches(COMPARED, COMPARED, shape, bench)
        facts = differences(ours, sides["hf"], few)
        same = all(fact <= TOLERANCE for fact in facts.values())  # not so for a NaN
        forget_gradients(*sides.values())
    taken = bench.rounds({kind: side.step for kind, side in sides.items()}, shape)
    for kind, suffix, target in (("ours", "", TARGETS[name]), ("ours compiled", ".compiled", "")):
        what = f"10 s clips a second, {POSITIONS} positions each, {kind}"
        told = about(taken, kind, ours, shape, r)
        yield rate(name + suffix, taken, kind, ours.num_clips, "samples/s", what, target, **told)
    yield from ratios(name, taken, sides, facts, same)


def about(taken: Sequence[Round], kind: str, ours: Ours, shape: Shape, r: int) -> dict[str, Any]:
    """The facts behind a speed of ours."""
    flop = ours.num_clips * shape.row_flop(POSITIONS, REPLY, r)
    return {
        "share of GEMM": share_of_gemm(taken, kind, flop),
        "GEMM TFLOP/s": harness.median([r.probe.wall for r in taken]) / 1e3,
        "clips a step": ours.num_clips,
        "engine": ours.engine_name,
    }


PEERS = {
    ("step1", "hf"): ("Hugging Face's forward(labels=) on the same clips", ">= 1.6"),
    ("step1", "seed"): ("the seed's form on stock Hugging Face, with gradient checkpointing", ">= 15"),
    ("step1", "seed without checkpointing"): ("the seed's form without gradient checkpointing", ""),
    ("step2", "hf"): ("PEFT as its defaults have it, on stock Hugging Face, the same clips", ">= 2.2"),
    ("step2", "peft in bf16"): ("PEFT with adapters in bf16, on stock Hugging Face, the same clips", ">= 1.6"),
}


def ratios(name: str, taken: Sequence[Round], sides: dict[str, Any], facts: dict, same: bool) -> Iterator[Figure]:
    """Ours over each peer, samples a second."""
    for (step, kind), (what, target) in PEERS.items():
        if not name.startswith(step) or kind not in sides:
            continue
        peer, ours = sides[kind], sides["ours"]
        value, steady, clocks = ratio(taken, kind, "ours", ours.num_clips / peer.num_clips)
        told = {**clocks, "its samples/s": speed(taken, kind, peer.num_clips), "its micro-batches": len(peer.batches)}
        told |= facts if kind == "hf" else {}
        figure = f"{name}.{kind.replace(' ', '_')}_ratio"
        yield Figure(figure, value, "x", f"samples a second, ours / {what}", target, steady and same, told)


def sizes(bench: Bench, name: str) -> tuple[Shape, int]:
    """The language model, and the clips that its micro-batch holds."""
    shape = bench.seven_b if name == "7b" else bench.two_b
    return shape, bench.size(BUDGET[name] // POSITIONS, 4)


def graft(bench: Bench, shape: Shape) -> AudioGraftForConditionalGeneration:
    """A random one in bf16, not yet lean."""
    return mini.graft(STACK_FACTOR, torch.bfloat16, shape, device=bench.device, lean=False)


def compiled_copy(bench: Bench, model: AudioGraftForConditionalGeneration) -> AudioGraftForConditionalGeneration:
    """The same frozen weights, each decoder layer compiled as ``run.compile`` has it."""
    copied = mini.shared_copy(model)
    backend = bench.size("inductor", "aot_eager")  # small: traced as at full size, without a compiler's minutes
    for layer in copied.model.language_model.layers:
        layer.compile(dynamic=True, backend=backend)
    return copied


def lean(model: AudioGraftForConditionalGeneration) -> AudioGraftForConditionalGeneration:
    """As training has it without ``run.compile``."""
    save_less(model.model.language_model)
    return model


def batches(num_clips: int, each: int, shape: Shape, bench: Bench, align: bool = False) -> list[Batch]:
    """``num_clips`` clips in micro-batches of ``each``, ready to be copied to the GPU."""
    groups = [range(first, min(first + each, num_clips)) for first in range(0, num_clips, each)]
    made = [mini.batch(group, [FRAMES] * len(group), STACK_FACTOR, shape, align) for group in groups]
    return [batch.pin_memory() if bench.device.type == "cuda" else batch for batch in made]


def fitted(peer: peers.Peer, num_clips: int, shape: Shape, bench: Bench) -> peers.Peer:
    """A peer whose micro-batches are as large as its memory allows, halved until they fit."""
    each = num_clips
    while not fits_memory(peer.step):
        each = -(-each // 2)
        assert each > 1, "not even two clips fit"
        peer.batches = batches(num_clips, each, shape, bench)
        forget_gradients(peer)
    return peer


def forget_gradients(*sides: Any) -> None:
    """What an interrupted or untimed backward pass has left."""
    for side in sides:
        side.model.zero_grad()
    free()
