"""Padding of the plan and balance between ranks, against batches drawn at random: counts, no clocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.harness import Figure
from graft.data.plan import Plan, cut_step, padded_tokens, rank_share
from graft.ranks import Ranks

NUM_UTTERANCES, NUM_RANKS = 100_000, 8
UNEVEN = 20_000  # steps of 253: some ranks have 32 utterances, others 31, and no share-out of 8 is below 1.011
BATCH, MICRO_BATCH_TOKENS, POOL = 256, 8_192, 64
PROMPT_TOKENS, TOKENS_PER_SECOND = 60, 12.5  # a prompt and a transcript; stack_factor 4
# Log-normal durations in seconds, (mean, sigma of the logarithm), cut at 30 s: read speech and spontaneous speech.
DURATIONS = {"read": (12.0, 0.3), "spontaneous": (10.0, 0.6)}


def report() -> Iterator[Figure]:
    """Padding and balance for each distribution of lengths."""
    for name, (mean, sigma) in DURATIONS.items():
        costs = token_counts(mean, sigma)
        padding, imbalance = planned(costs)
        what = f"{name} speech, {NUM_UTTERANCES:,} utterances, {NUM_RANKS} ranks"
        random = {"random micro-batches of 8": at_random(costs, 8)}
        yield Figure(f"count.padding.{name}", padding, "x", f"{what}: padded / real tokens", "<= 1.010", facts=random)
        fewer = {f"{UNEVEN:,} utterances, {UNEVEN // -(-UNEVEN // BATCH)} a step": planned(costs[:UNEVEN])[1]}
        waits = f"{what}: dearest rank / mean rank"
        yield Figure(f"count.imbalance.{name}", imbalance, "x", waits, "<= 1.010", facts=fewer)


def token_counts(mean: float, sigma: float) -> list[int]:
    """Positions of each utterance."""
    rng = np.random.default_rng(1)
    seconds = np.minimum(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, NUM_UTTERANCES), 30.0)
    return (PROMPT_TOKENS + np.ceil(seconds * TOKENS_PER_SECOND)).astype(int).tolist()


def planned(costs: Sequence[int]) -> tuple[float, float]:
    """(padded / real tokens, mean over steps of the dearest rank's tokens / the mean rank's) of one epoch."""
    padded, imbalances = 0, []
    for step in Plan(costs, seed=1, global_batch_size=BATCH, shuffle_pool=POOL).epoch(0):
        groups = cut_step(step, costs, NUM_RANKS, MICRO_BATCH_TOKENS)
        shares = [rank_share(groups, costs, Ranks(rank, NUM_RANKS, rank)) for rank in range(NUM_RANKS)]
        per_rank = [sum(padded_tokens(groups[number], costs) for number in share) for share in shares]
        padded += sum(per_rank)
        imbalances.append(max(per_rank) / (sum(per_rank) / NUM_RANKS))
    return padded / sum(costs), float(np.mean(imbalances))


def at_random(costs: Sequence[int], size: int) -> float:
    """Padded / real tokens of micro-batches of ``size`` utterances as they come."""
    order = np.random.default_rng(2).permutation(len(costs))
    groups = [order[i : i + size].tolist() for i in range(0, len(order), size)]
    return sum(padded_tokens(group, costs) for group in groups) / sum(costs)
