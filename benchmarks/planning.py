"""The plan of a hundred million utterances: seconds and memory until the first step, a far one, and the next."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator

import numpy as np

from graft.data.plan import Plan

NUM_UTTERANCES, BATCH, POOL = 100_000_000, 256, 64
FAR_STEP, NEXT_STEPS = 1_000_000, 20
MICRO_BATCH_TOKENS = 8_192


def report() -> Iterator[str]:
    """One line; times are of this machine, memory is what the plan adds to the lengths themselves."""
    costs = np.random.default_rng(1).integers(40, 400, NUM_UTTERANCES, dtype=np.int32)
    before, started = peak_mebibytes(), time.perf_counter()
    plan = Plan(costs, seed=1, global_batch_size=BATCH, shuffle_pool=POOL, micro_batch_tokens=MICRO_BATCH_TOKENS)
    made = time.perf_counter()
    plan.step(FAR_STEP)
    resumed = time.perf_counter()
    for number in range(FAR_STEP + 1, FAR_STEP + 1 + NEXT_STEPS):
        plan.step(number)
    each = (time.perf_counter() - resumed) / NEXT_STEPS
    yield (
        f"{NUM_UTTERANCES:,} utterances: {made - started:.1f} s and {peak_mebibytes() - before:.0f} MiB beside the "
        f"{costs.nbytes / 2**20:.0f} MiB of lengths; resumed at step {FAR_STEP:,} in {1e3 * (resumed - made):.0f} ms, "
        f"{1e3 * each:.0f} ms a step from there"
    )


def peak_mebibytes() -> float:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
