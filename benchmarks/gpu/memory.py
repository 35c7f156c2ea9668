"""The largest micro-batch that the GPU's memory holds without checkpointing, in positions."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import mini
from benchmarks.gpu.bench import Bench, fits_memory, free, largest
from benchmarks.gpu.steps import POSITIONS, R, batches, graft, lean
from benchmarks.harness import Figure
from benchmarks.ours import Ours
from graft.model.lora import add_lora
from graft.recipe import Lora

MOST_CLIPS = 400  # 74,000 positions: more than any GPU of today holds
TARGETS = {1: ">= 34000", 2: ">= 23000"}


def report(bench: Bench) -> Iterator[Figure]:
    """Each stage: whole optimiser steps of one micro-batch, larger and larger."""
    for stage in (1, 2):
        num_clips, engine = largest_micro_batch(bench, stage)
        free()
        facts = {"clips": num_clips, "engine": engine}
        what = f"positions of the largest micro-batch, stage {stage}, 7B, {POSITIONS} positions a clip"
        yield Figure(f"mem.stage{stage}", float(num_clips * POSITIONS), "positions", what, TARGETS[stage], facts=facts)


def largest_micro_batch(bench: Bench, stage: int) -> tuple[int, str]:
    """Its clips, and the engine that stepped on it."""
    shape = bench.seven_b
    model = graft(bench, shape)
    if stage == 2:
        add_lora(model, Lora(r=bench.size(R, 4)))
    most = bench.size(MOST_CLIPS, 6)
    side = Ours(lean(model), stage, [], plain=True)  # an engine interrupted by a full memory is none any more

    def fits(num_clips: int) -> bool:
        batch = batches(num_clips, num_clips, shape, bench)
        num_labels = mini.clips_and_labels(batch)[1]
        done = fits_memory(lambda: bench.wait_for(lambda: side.step_on(batch, num_labels)))
        side.model.zero_grad()
        free()
        return done

    return largest(fits, 1, most), side.engine_name
