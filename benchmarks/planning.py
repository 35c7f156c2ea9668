"""The plan of a hundred million utterances: seconds and memory until the first step, a far one, and the next."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator

import numpy as np

from benchmarks.harness import Figure
from graft.data.plan import Plan

NUM_UTTERANCES, BATCH, POOL = 100_000_000, 256, 64
FAR_STEP, NEXT_STEPS = 1_000_000, 20
MICRO_BATCH_TOKENS = 8_192


def report() -> Iterator[Figure]:
    """Times are of this machine, memory is what the plan adds to the lengths themselves."""
    costs = np.random.default_rng(1).integers(40, 400, NUM_UTTERANCES, dtype=np.int32)
    before, started = peak_mebibytes(), time.perf_counter()
    plan = Plan(costs, seed=1, global_batch_size=BATCH, shuffle_pool=POOL, micro_batch_tokens=MICRO_BATCH_TOKENS)
    made = time.perf_counter()
    plan.step(FAR_STEP)
    resumed = time.perf_counter()
    for number in range(FAR_STEP + 1, FAR_STEP + 1 + NEXT_STEPS):
        plan.step(number)
    each = (time.perf_counter() - resumed) / NEXT_STEPS
    of = f"the plan of {NUM_UTTERANCES:,} utterances"
    memory = {"MiB of lengths": costs.nbytes / 2**20}
    yield Figure("plan.start", made - started, "s", f"making {of}")
    yield Figure("plan.memory", peak_mebibytes() - before, "MiB", f"{of}, beside their lengths", facts=memory)
    yield Figure("plan.resume", 1e3 * (resumed - made), "ms", f"step {FAR_STEP:,} of {of}, at once")
    yield Figure("plan.step", 1e3 * each, "ms", f"each step of {of} from there")


def peak_mebibytes() -> float:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
