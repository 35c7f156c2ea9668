"""Steps of alignment in front of a 7B model: every kind of projector, in turns, samples a second.

The language model does not run in them: one layer of it stands for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks import mini
from benchmarks.gpu.bench import Bench, rate
from benchmarks.gpu.steps import STACK_FACTOR, batches, sizes
from benchmarks.harness import Figure
from benchmarks.ours import Ours
from graft.model.projector import KINDS


def report(bench: Bench) -> Iterator[Figure]:
    """Micro-batches as in stage 1 of the same model."""
    full, num_clips = sizes(bench, "7b")
    shape = replace(full, layers=1)
    clips = batches(num_clips, num_clips, shape, bench, align=True)
    sides = {}
    for kind in KINDS:
        model = mini.graft(STACK_FACTOR, torch.bfloat16, shape, device=bench.device, projector_kind=kind)
        sides[kind] = Ours(model, 1, clips)
    taken = bench.rounds({kind: side.step for kind, side in sides.items()}, shape)
    for kind, side in sides.items():
        facts = {"clips a step": num_clips, "engine": side.engine_name}
        what = f"10 s clips a second, aligned with their words by the projector '{kind}'"
        yield rate(f"align.7b.{kind}", taken, kind, num_clips, "samples/s", what, **facts)
