"""Which utterances make which step, and which rank takes which of them: functions of numbers, nothing else.

The plan of an epoch follows from (costs, weights, seed, epoch, global batch size, pool); the number of ranks does not
enter. A step is shared out afterwards. So any number of ranks takes the same steps, and a run is resumed at any step,
on another number of ranks too, from one number. Nothing is kept of an epoch: a step is worked out from its number in
milliseconds, of a hundred utterances or of a hundred million.

cost: padded positions an utterance takes in a forward pass (audio tokens, prompt, text)
use: one appearance of an utterance in an epoch; where it has several, they are told apart by their pass, from 0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from graft.ranks import Ranks

SHUFFLE_UTTERANCES, SHUFFLE_STEPS, SHUFFLE_RING = 1, 2, 3  # what a permutation is for: each purpose its own
FEISTEL_ROUNDS = 8
MOST_NAMED = 10


def num_steps_per_epoch(num_uses: int, global_batch_size: int) -> int:
    """Steps that hold all uses of an epoch."""
    if num_uses < 1:
        raise ValueError("no utterances to train on: the set is empty")
    return -(-num_uses // global_batch_size)


def cut_step(step: Sequence[int], costs: Sequence[int], micro_batches: int, micro_batch_tokens: int) -> list[list[int]]:
    """The micro-batches of a step, dearest first: ``micro_batches`` of them, whoever computes them.

    There are twice, three times as many where so many would exceed ``micro_batch_tokens`` padded positions, and one
    for each utterance where there are fewer utterances. The dearest is as cheap as it can be.

    Raises:
        ValueError: an utterance alone exceeds the budget.
    """
    check_budget([costs[i] for i in step], micro_batch_tokens, [f"utterance {i}" for i in step])
    ranked = sorted(step, key=lambda i: (-costs[i], i))
    groups = _equal_groups(ranked, costs, micro_batches, micro_batch_tokens)
    return sorted(groups, key=lambda group: (-padded_tokens(group, costs), group[0]))


def rank_share(micro_batches: Sequence[Sequence[int]], costs: Sequence[int], ranks: Ranks) -> list[int]:
    """The numbers of this rank's micro-batches of a step.

    Every micro-batch is one rank's, every rank has one, their counts differ by at most one, and all ranks get about
    the same number of positions.

    Raises:
        ValueError: fewer micro-batches than ranks.
    """
    if len(micro_batches) < ranks.world_size:
        raise ValueError(
            f"a step of {len(micro_batches)} micro-batches cannot be shared by {ranks.world_size} ranks: raise "
            f"micro_batches and global_batch_size to {ranks.world_size} or more, give more data, or use fewer ranks"
        )
    each, spare = divmod(len(micro_batches), ranks.world_size)  # ``spare`` ranks take one more
    shares: list[list[int]] = [[] for _ in range(ranks.world_size)]
    loads = [0] * ranks.world_size
    for number, group in enumerate(micro_batches):  # dearest first, to the least loaded rank that has room
        room = each + (spare > 0)
        rank = min((r for r in range(ranks.world_size) if len(shares[r]) < room), key=lambda r: (loads[r], r))
        shares[rank].append(number)
        loads[rank] += padded_tokens(group, costs)
        spare -= len(shares[rank]) > each
    return shares[ranks.rank]


def evaluation_share(num_utterances: int, ranks: Ranks) -> list[int]:
    """This rank's utterances of a finite set, each on exactly one rank; a rank may have one fewer, or none."""
    return list(range(ranks.rank, num_utterances, ranks.world_size))


def check_budget(costs: Sequence[int], micro_batch_tokens: int, names: Sequence[str] | None = None) -> None:
    """Refuse utterances that alone exceed the budget of a micro-batch.

    Raises:
        ValueError: names them, with their costs.
    """
    over = np.flatnonzero(np.asarray(costs) > micro_batch_tokens).tolist()
    if over:
        told = ", ".join(f"{names[i] if names else f'utterance {i}'} ({costs[i]} tokens)" for i in over[:MOST_NAMED])
        more = f" and {len(over) - MOST_NAMED} more" if len(over) > MOST_NAMED else ""
        raise ValueError(
            f"longer than micro_batch_tokens = {micro_batch_tokens}: {told}{more}. "
            f"Raise micro_batch_tokens to {max(costs[i] for i in over)} or take them out of the manifest."
        )


def padded_tokens(group: Sequence[int], costs: Sequence[int]) -> int:
    """Positions of a micro-batch, padding included."""
    return max(costs[i] for i in group) * len(group)


@dataclass(frozen=True)
class Part:
    """A set within a mixture: ``size`` utterances, of which an epoch makes ``weight`` passes.

    The utterances stand on a ring in an order drawn once, and each epoch goes on where the last one has stopped. So
    over any number of epochs no utterance of a set is used more than once oftener than another.
    """

    size: int
    weight: float = 1.0

    @property
    def num_uses(self) -> int:
        """Uses in every epoch: ``weight * size``, rounded up."""
        return math.ceil(Fraction(str(self.weight)) * self.size)  # 0.1 as it is written, not as binary rounds it

    def uses(self, numbers: np.ndarray, epoch: int, key: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(utterances, passes) of the uses ``numbers``, from 0 to ``num_uses - 1``, of an epoch."""
        passes, utterances = np.divmod(numbers, self.size)
        begun = passes == self.num_uses // self.size  # the pass that is not whole; whole ones need no order
        places = (utterances[begun] + epoch * self.num_uses % self.size) % self.size
        utterances[begun] = permuted(places, self.size, key)
        return utterances, passes


class Plan:
    """The endless sequence of steps of a training run: ``step(n)`` for any n, at once.

    An epoch has ``ceil(U / global_batch_size)`` steps for its U uses: every utterance exactly once, or as the weights
    of several ``parts`` have it. The uses are permuted, every ``shuffle_pool`` steps' worth of them is sorted by cost
    and cut into steps of similar cost, and the steps are permuted. The sizes of steps differ by at most one, so the
    last step of an epoch is a step like the others. With a weight above 1, an utterance may come twice in a step.
    """

    def __init__(
        self,
        costs: Sequence[int],
        *,
        seed: int,
        global_batch_size: int,
        shuffle_pool: int,
        micro_batch_tokens: int | None = None,
        names: Sequence[str] | None = None,
        parts: Sequence[Part] | None = None,
    ) -> None:
        """Plan for utterances of these ``costs``.

        Args:
            names: the utterances' ids, for the error when one exceeds ``micro_batch_tokens``.
            parts: the sets that ``costs`` are of, one after the other; None: one set, of weight 1.

        Raises:
            ValueError: there is no utterance, or one that exceeds ``micro_batch_tokens``.
        """
        if micro_batch_tokens is not None:
            check_budget(costs, micro_batch_tokens, names)
        self.costs, self.seed = np.asarray(costs), seed
        self.shuffle_pool = shuffle_pool
        self.parts = tuple(parts or [Part(len(costs))])
        in_parts = sum(part.size for part in self.parts)
        assert in_parts == len(costs), f"{len(costs)} costs for parts of {in_parts} utterances"
        self.uses_per_epoch = sum(part.num_uses for part in self.parts)
        self.steps_per_epoch = num_steps_per_epoch(self.uses_per_epoch, global_batch_size)

    def step(self, number: int) -> tuple[int, list[int]]:
        """(epoch, utterance indices) of step ``number``, from 0."""
        epoch, uses = self.uses(number)
        return epoch, [utterance for utterance, _ in uses]

    def uses(self, number: int) -> tuple[int, list[tuple[int, int]]]:
        """(epoch, uses) of step ``number``, from 0; each use is (utterance index, pass), once in its epoch."""
        epoch, position = divmod(number, self.steps_per_epoch)
        place = int(permuted(np.array([position]), self.steps_per_epoch, (self.seed, epoch, SHUFFLE_STEPS))[0])
        first = place // self.shuffle_pool * self.shuffle_pool
        start = self._bound(first)
        pool = np.arange(start, self._bound(min(first + self.shuffle_pool, self.steps_per_epoch)))
        members = permuted(pool, self.uses_per_epoch, (self.seed, epoch, SHUFFLE_UTTERANCES))
        utterances, passes = self._from_parts(members, epoch)
        by_cost = np.argsort(self.costs[utterances], kind="stable")
        chosen = by_cost[self._bound(place) - start : self._bound(place + 1) - start]
        return epoch, list(zip(utterances[chosen].tolist(), passes[chosen].tolist(), strict=True))

    def epoch(self, number: int) -> list[list[int]]:
        """All steps of epoch ``number``."""
        first = number * self.steps_per_epoch
        return [self.step(first + position)[1] for position in range(self.steps_per_epoch)]

    def _bound(self, place: int) -> int:
        """How many uses come before step ``place`` of the epoch, before the steps are permuted."""
        return place * self.uses_per_epoch // self.steps_per_epoch

    def _from_parts(self, members: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(utterances, passes) of uses numbered through all parts."""
        utterances, passes = np.empty_like(members), np.empty_like(members)
        first_use = first_utterance = 0
        for number, part in enumerate(self.parts):
            inside = (members >= first_use) & (members < first_use + part.num_uses)
            local, passes[inside] = part.uses(members[inside] - first_use, epoch, (self.seed, number, SHUFFLE_RING))
            utterances[inside] = local + first_utterance
            first_use, first_utterance = first_use + part.num_uses, first_utterance + part.size
        return utterances, passes


def permuted(positions: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """What stands at ``positions`` of a permutation of ``range(size)`` that depends on ``key`` alone, for ever.

    No table is made. The numbers below the next power of four are enciphered by a Feistel network (Luby, Rackoff 1988)
    with SplitMix64 (Steele, Lea, Flood 2014) as its round function, and what falls outside of ``range(size)`` is
    enciphered again until it is inside (Black, Rogaway 2002). NumPy's own generators may change (NEP 19), so a run
    that is resumed cannot rest on them.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    state = _state(key)
    values = np.asarray(positions).astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _encipher(values[outside], half_bits, state)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _encipher(values: np.ndarray, half_bits: int, state: np.uint64) -> np.ndarray:
    """A bijection of the numbers of ``2 * half_bits`` bits."""
    bits, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = values >> bits, values & mask
    for round_key in _mix(np.arange(FEISTEL_ROUNDS, dtype=np.uint64) + state):
        left, right = right, left ^ (_mix(right + round_key) & mask)
    return left << bits | right


def _state(key: Sequence[int]) -> np.uint64:
    """Where the round keys of ``key`` begin."""
    state = np.uint64(0)
    for number in key:
        state = _mix(np.array([number], np.uint64) + state)[0]
    return state


def _mix(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _equal_groups(ranked: Sequence[int], costs: Sequence[int], unit: int, budget: int) -> list[list[int]]:
    """Cut utterances, dearest first, into micro-batches: a multiple of ``unit`` of them, the dearest one cheap."""
    fewest = len(_cut(ranked, costs, budget))
    wanted = min(-(-fewest // unit) * unit, len(ranked))
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
