"""Which utterances make which step, and which rank takes which of them: functions of numbers, nothing else.

The plan of an epoch follows from (costs, seed, epoch, global batch size, pool); the number of ranks does not enter. A
step is shared out afterwards. So any number of ranks takes the same steps, and a run is resumed at any step, on
another number of ranks too, from one number.

cost: padded positions an utterance takes in a forward pass (audio tokens, prompt, text)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graft.ranks import Ranks

SHUFFLE_UTTERANCES, SHUFFLE_STEPS = 1, 2  # what a permutation is for: each purpose its own
MOST_NAMED = 10


def plan_epoch(
    costs: Sequence[int], *, seed: int, epoch: int, global_batch_size: int, shuffle_pool: int
) -> list[list[int]]:
    """Steps of one epoch: every index exactly once, at most ``global_batch_size`` to a step.

    The utterances are shuffled, every ``shuffle_pool`` steps' worth of them is sorted by cost and cut into steps of
    similar cost, and the steps are shuffled. There are ``ceil(N / global_batch_size)`` steps whose sizes differ by at
    most one, so the last step of an epoch is a step like the others.
    """
    total = len(costs)
    num_steps = num_steps_per_epoch(total, global_batch_size)
    bounds = np.arange(num_steps + 1) * total // num_steps
    order = permutation(total, (seed, epoch, SHUFFLE_UTTERANCES))
    by_order = np.asarray(costs)[order]
    steps: list[list[int]] = []
    for first in range(0, num_steps, shuffle_pool):
        pool = bounds[first : first + shuffle_pool + 1]
        by_cost = np.argsort(by_order[pool[0] : pool[-1]], kind="stable")
        ranked = order[pool[0] : pool[-1]][by_cost]
        steps += [ranked[a - pool[0] : b - pool[0]].tolist() for a, b in zip(pool[:-1], pool[1:], strict=True)]
    return [steps[position] for position in permutation(num_steps, (seed, epoch, SHUFFLE_STEPS))]


def num_steps_per_epoch(num_utterances: int, global_batch_size: int) -> int:
    """Steps in which every utterance is used once."""
    if num_utterances < 1:
        raise ValueError("no utterances to train on: the set is empty")
    return -(-num_utterances // global_batch_size)


def rank_share(step: Sequence[int], costs: Sequence[int], ranks: Ranks, micro_batch_tokens: int) -> list[list[int]]:
    """This rank's micro-batches of a step: each at most ``micro_batch_tokens`` padded positions.

    The union over ranks is the step, without overlap. All ranks get the same number of micro-batches wherever the
    step has enough utterances for that, always at least one, and about the same number of positions.

    Raises:
        ValueError: fewer utterances than ranks, or one that alone exceeds the budget.
    """
    if len(step) < ranks.world_size:
        raise ValueError(
            f"a step of {len(step)} utterances cannot be shared by {ranks.world_size} ranks: raise global_batch_size "
            f"to {ranks.world_size} or more, give more data, or use fewer ranks"
        )
    check_budget([costs[i] for i in step], micro_batch_tokens, [f"utterance {i}" for i in step])
    ranked = sorted(step, key=lambda i: (-costs[i], i))
    groups = _equal_groups(ranked, costs, ranks.world_size, micro_batch_tokens)
    return _deal(groups, costs, ranks.world_size)[ranks.rank]


def evaluation_share(num_utterances: int, ranks: Ranks) -> list[int]:
    """This rank's utterances of a finite set, each on exactly one rank; a rank may have one fewer, or none."""
    return list(range(ranks.rank, num_utterances, ranks.world_size))


def check_budget(costs: Sequence[int], micro_batch_tokens: int, names: Sequence[str]) -> None:
    """Refuse utterances that alone exceed the budget of a micro-batch.

    Raises:
        ValueError: names them, with their costs.
    """
    over = [(names[i], cost) for i, cost in enumerate(costs) if cost > micro_batch_tokens]
    if over:
        told = ", ".join(f"{name} ({cost} tokens)" for name, cost in over[:MOST_NAMED])
        more = f" and {len(over) - MOST_NAMED} more" if len(over) > MOST_NAMED else ""
        raise ValueError(
            f"longer than micro_batch_tokens = {micro_batch_tokens}: {told}{more}. "
            f"Raise micro_batch_tokens to {max(cost for _, cost in over)} or take them out of the manifest."
        )


def padded_tokens(group: Sequence[int], costs: Sequence[int]) -> int:
    """Positions of a micro-batch, padding included."""
    return max(costs[i] for i in group) * len(group)


class Plan:
    """The endless sequence of steps of a training run: ``step(n)`` for any n, at once."""

    def __init__(
        self,
        costs: Sequence[int],
        *,
        seed: int,
        global_batch_size: int,
        shuffle_pool: int,
        micro_batch_tokens: int | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """``names`` are the utterances' ids, for the error when one exceeds ``micro_batch_tokens``."""
        if micro_batch_tokens is not None:
            check_budget(costs, micro_batch_tokens, names or [f"utterance {i}" for i in range(len(costs))])
        self.costs, self.seed = costs, seed
        self.global_batch_size, self.shuffle_pool = global_batch_size, shuffle_pool
        self.steps_per_epoch = num_steps_per_epoch(len(costs), global_batch_size)
        self._epoch, self._steps = -1, []

    def step(self, number: int) -> tuple[int, list[int]]:
        """(epoch, utterance indices) of step ``number``, from 0."""
        epoch, position = divmod(number, self.steps_per_epoch)
        if epoch != self._epoch:
            self._steps = plan_epoch(
                self.costs,
                seed=self.seed,
                epoch=epoch,
                global_batch_size=self.global_batch_size,
                shuffle_pool=self.shuffle_pool,
            )
            self._epoch = epoch
        return epoch, self._steps[position]


def permutation(size: int, key: Sequence[int]) -> np.ndarray:
    """A permutation of ``range(size)`` that depends on ``key`` alone, for ever.

    NumPy keeps the right to change what its generators return (NEP 19); a resumed run must not. This is SplitMix64
    (Steele, Lea, Flood 2014) over a counter, sorted.
    """
    state = np.uint64(0)
    for number in key:
        state = _mix(np.array([number], np.uint64) + state)[0]
    return np.argsort(_mix(np.arange(size, dtype=np.uint64) + state), kind="stable")


def _mix(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _equal_groups(ranked: Sequence[int], costs: Sequence[int], num_ranks: int, budget: int) -> list[list[int]]:
    """Cut utterances, dearest first, into micro-batches: a multiple of ``num_ranks`` of them, the dearest one cheap."""
    fewest = max(len(_cut(ranked, costs, budget)), num_ranks)
    equal = -(-fewest // num_ranks) * num_ranks
    wanted = equal if equal <= len(ranked) else fewest
    low, high = max(costs[i] for i in ranked), budget
    while low < high:  # the smallest budget that still gives no more than the wanted number
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cut(ranked, costs, middle)) <= wanted else (middle + 1, high)
    groups = _cut(ranked, costs, low)
    while len(groups) < wanted:
        groups = _split_dearest(groups, costs)
    return groups


def _cut(ranked: Sequence[int], costs: Sequence[int], budget: int) -> list[list[int]]:
    """Consecutive groups as full as the budget allows; the first of a group is its dearest."""
    groups: list[list[int]] = []
    for index in ranked:
        if groups and costs[groups[-1][0]] * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _split_dearest(groups: list[list[int]], costs: Sequence[int]) -> list[list[int]]:
    """``groups`` with the one of most padded positions, among those of several utterances, cut in two."""
    position = max(
        (p for p, group in enumerate(groups) if len(group) > 1), key=lambda p: (padded_tokens(groups[p], costs), -p)
    )
    group, half = groups[position], len(groups[position]) // 2
    return [*groups[:position], group[:half], group[half:], *groups[position + 1 :]]


def _deal(groups: Sequence[Sequence[int]], costs: Sequence[int], num_ranks: int) -> list[list[list[int]]]:
    """Each group to the least loaded rank that has room, dearest group first."""
    room = -(-len(groups) // num_ranks)
    shares: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for group in sorted(groups, key=lambda g: (-padded_tokens(g, costs), g[0])):
        rank = min((r for r in range(num_ranks) if len(shares[r]) < room), key=lambda r: (loads[r], r))
        shares[rank].append(list(group))
        loads[rank] += padded_tokens(group, costs)
    return shares
