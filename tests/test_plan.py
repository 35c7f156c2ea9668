"""The plan of steps and its shares: complete, even, the same for any number of ranks."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import chain

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graft.data.plan import (
    Part,
    Plan,
    _mix,
    check_budget,
    cut_step,
    evaluation_share,
    num_steps_per_epoch,
    padded_tokens,
    permuted,
    rank_share,
)
from graft.ranks import Ranks

BUDGET = 97
COSTS = st.lists(st.integers(1, BUDGET), min_size=1, max_size=150)


def ranks(rank: int, world_size: int) -> Ranks:
    return Ranks(rank=rank, world_size=world_size, local_rank=0)


def shares(
    step: list[int], costs: list[int], world_size: int, budget: int = BUDGET, micro_batches: int = 8
) -> list[list[list[int]]]:
    groups = cut_step(step, costs, micro_batches, budget)
    numbers = [rank_share(groups, costs, ranks(rank, world_size)) for rank in range(world_size)]
    assert sorted(chain.from_iterable(numbers)) == list(range(len(groups)))
    return [[groups[number] for number in share] for share in numbers]


@settings(deadline=None)
@given(COSTS, st.integers(0, 2**31), st.integers(0, 9), st.integers(1, 40), st.integers(1, 9))
@example(costs=[1] * 9, seed=1, epoch=0, size=4, pool=2)
def test_every_utterance_exactly_once_an_epoch(costs: list[int], seed: int, epoch: int, size: int, pool: int) -> None:
    steps = Plan(costs, seed=seed, global_batch_size=size, shuffle_pool=pool).epoch(epoch)
    assert sorted(chain.from_iterable(steps)) == list(range(len(costs)))
    sizes = {len(step) for step in steps}
    assert max(sizes) <= size and max(sizes) - min(sizes) <= 1
    assert len(steps) == num_steps_per_epoch(len(costs), size)


@settings(deadline=None)
@given(COSTS, st.integers(1, 8), st.integers(1, 20), st.integers(BUDGET, 400))
@example(costs=[1] * 10 + [3], world_size=5, micro_batches=11, budget=97)  # the dear one's rank must take a second
def test_shares_are_the_step(costs: list[int], world_size: int, micro_batches: int, budget: int) -> None:
    step = random.Random(5).sample(range(len(costs)), len(costs))
    groups = cut_step(step, costs, micro_batches, budget)
    assert sorted(chain.from_iterable(groups)) == sorted(step)
    assert all(padded_tokens(group, costs) <= budget for group in groups)
    if len(groups) < world_size:
        with pytest.raises(ValueError, match=f"{len(groups)} micro-batches cannot be shared by {world_size} ranks"):
            shares(step, costs, world_size, budget, micro_batches)
        return
    counts = {len(share) for share in shares(step, costs, world_size, budget, micro_batches)}
    assert min(counts) >= 1 and max(counts) - min(counts) <= 1


@settings(deadline=None)
@given(COSTS, st.integers(1, 20), st.integers(BUDGET, 400))
def test_a_step_has_its_number_of_micro_batches(costs: list[int], micro_batches: int, budget: int) -> None:
    """A multiple of what is asked for, or one for each utterance."""
    groups = cut_step(range(len(costs)), costs, micro_batches, budget)
    assert all(groups), "a micro-batch without utterances"
    assert len(groups) % micro_batches == 0 or len(groups) == len(costs)
    if sum(costs) * 4 < budget * micro_batches and len(costs) >= micro_batches:
        assert len(groups) == micro_batches


def speech_costs(count: int, seed: int = 3) -> list[int]:
    """Lengths as of read speech: 12 s on average, 12.5 audio tokens a second, and 40 tokens of text and prompt."""
    chance = random.Random(seed)
    return [40 + int(12.5 * min(30.0, max(1.0, chance.lognormvariate(2.4, 0.45)))) for _ in range(count)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_carry_equal_loads_and_little_padding(world_size: int) -> None:
    costs = speech_costs(5000)
    plan = Plan(costs, seed=1, global_batch_size=64, shuffle_pool=64, micro_batch_tokens=4096)
    real = padded = waited = 0
    for number in range(plan.steps_per_epoch):
        loads = [
            sum(padded_tokens(group, costs) for group in share)
            for share in shares(plan.step(number)[1], costs, world_size, 4096, world_size)
        ]
        real += sum(costs[i] for i in plan.step(number)[1])
        padded += sum(loads)
        waited += max(loads) * world_size
    assert 1 - real / padded < 0.02, "padding"
    assert 1 - padded / waited < 0.04, "ranks that wait for the slowest"


def test_bucketing_is_what_saves_the_padding() -> None:
    """Without pools the same shares waste several times as much: the test above can fail."""
    costs = speech_costs(5000)

    def padding(pool: int) -> float:
        plan = Plan(costs, seed=1, global_batch_size=64, shuffle_pool=pool)
        groups = [g for n in range(plan.steps_per_epoch) for g in cut_step(plan.step(n)[1], costs, 1, 4096)]
        return 1 - sum(costs) / sum(padded_tokens(g, costs) for g in groups)

    assert padding(1) > 3 * padding(64)


def test_a_hand_made_share() -> None:
    """Costs 9 | 5, 5 | 4, 2 | 1 within a budget of 10 take 9, 10, 8 and 1 positions: 10 + 1 here, 9 + 8 there."""
    costs = [1, 5, 9, 2, 5, 4]
    assert shares([0, 1, 2, 3, 4, 5], costs, 2, 10, 2) == [[[1, 4], [0]], [[2], [5, 3]]]


def test_more_micro_batches_than_ranks_can_fill_evenly() -> None:
    """Three utterances that fill a micro-batch each, two ranks: one of them takes two."""
    assert shares([2, 0, 1], [10, 10, 10], 2, 10, 2) == [[[0], [2]], [[1]]]


def test_an_utterance_above_the_budget_is_named() -> None:
    with pytest.raises(ValueError, match=r"micro_batch_tokens = 10: long \(11 tokens\), longer \(17 tokens\)") as error:
        check_budget([3, 11, 17, 10], 10, ["short", "long", "longer", "just"])
    assert "Raise micro_batch_tokens to 17" in str(error.value)
    with pytest.raises(ValueError, match=r"utterance 2 \(11 tokens\)"):
        cut_step([1, 2], [1, 1, 11], 1, 10)
    with pytest.raises(ValueError, match=r"b \(7 tokens\)"):
        Plan([5, 7], seed=1, global_batch_size=2, shuffle_pool=1, micro_batch_tokens=6, names=["a", "b"])
    with pytest.raises(ValueError, match="and 3 more"):
        check_budget([9] * 13, 8, [str(i) for i in range(13)])


def test_no_utterances() -> None:
    with pytest.raises(ValueError, match="no utterances"):
        Plan([], seed=1, global_batch_size=2, shuffle_pool=1)


def test_a_plan_can_be_entered_anywhere() -> None:
    costs = speech_costs(103)
    settings = {"seed": 7, "global_batch_size": 10, "shuffle_pool": 3}
    whole = Plan(costs, **settings)
    told = [whole.step(number) for number in range(35)]
    assert [epoch for epoch, _ in told] == [0] * 11 + [1] * 11 + [2] * 11 + [3] * 2
    for number in (34, 0, 12, 11, 33):
        assert Plan(costs, **settings).step(number) == told[number]
    for epoch in range(3):
        assert sorted(i for e, step in told if e == epoch for i in step) == list(range(103))


def test_epochs_and_seeds_differ() -> None:
    costs = [1] * 50
    plans = {
        str(Plan(costs, seed=seed, global_batch_size=50, shuffle_pool=1).epoch(epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(plans) == 9


def test_steps_for_ever() -> None:
    """One set of weight 1: a run that is resumed with a later version must go on as it began."""
    plan = Plan([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], seed=7, global_batch_size=4, shuffle_pool=2)
    assert [plan.step(number) for number in (0, 1, 2, 3, 1000)] == [
        (0, [2, 4, 8, 5]),
        (0, [3, 0, 9]),
        (0, [1, 6, 10, 7]),
        (1, [1, 3, 9]),
        (333, [3, 1, 6]),
    ]
    assert plan.uses(3) == (1, [(1, 0), (3, 0), (9, 0)])


WEIGHTS = st.sampled_from([1, 0.5, 0.1, 0.3, 2, 1.5, 3]) | st.floats(0.01, 4).map(lambda weight: round(weight, 3))
PARTS = st.lists(st.builds(Part, st.integers(1, 40), WEIGHTS), min_size=1, max_size=4)


def mixture(parts: Sequence[Part], seed: int = 3, size: int = 8, pool: int = 4) -> Plan:
    costs = speech_costs(sum(part.size for part in parts))
    return Plan(costs, seed=seed, global_batch_size=size, shuffle_pool=pool, parts=parts)


def counts_of(uses: Sequence[tuple[int, int]], parts: Sequence[Part]) -> list[list[int]]:
    """For each part, how often each of its utterances is used."""
    counted = Counter(utterance for utterance, _ in uses)
    assert set(counted) <= set(range(sum(part.size for part in parts)))
    firsts = [sum(part.size for part in parts[:number]) for number in range(len(parts))]
    return [[counted[first + i] for i in range(part.size)] for first, part in zip(firsts, parts, strict=True)]


@settings(deadline=None, max_examples=40)
@given(PARTS, st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 9))
def test_an_epoch_makes_weight_passes_over_each_set(
    parts: list[Part], first: int, epochs: int, seed: int, size: int, pool: int
) -> None:
    """In every epoch, and over any epochs in a row, no utterance of a set is used more than once oftener than another.

    Every use of an epoch stands in exactly one of its steps, and the steps are of equal sizes.
    """
    plan, together = mixture(parts, seed, size, pool), []
    for epoch in range(first, first + epochs):
        steps = [plan.uses(epoch * plan.steps_per_epoch + position) for position in range(plan.steps_per_epoch)]
        assert {number for number, _ in steps} == {epoch}
        sizes = {len(uses) for _, uses in steps}
        assert 1 <= min(sizes) and max(sizes) <= size and max(sizes) - min(sizes) <= 1
        uses = [use for _, of_step in steps for use in of_step]
        assert len(set(uses)) == len(uses), "a pass comes twice for an utterance"
        for part, counts in zip(parts, counts_of(uses, parts), strict=True):
            assert sum(counts) == math.ceil(Fraction(str(part.weight)) * part.size)
            assert math.floor(part.weight) <= min(counts) and max(counts) <= math.ceil(part.weight)
        together += uses
        for counts in counts_of(together, parts):
            assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("weight", "epochs", "expected"), [(1, 3, 3), (2, 2, 4), (0.5, 2, 1), (0.5, 6, 3), (0.1, 10, 1), (1.3, 10, 13)]
)
@pytest.mark.parametrize("first", [0, 7])
def test_weights_that_come_out_even(weight: float, epochs: int, expected: int, first: int) -> None:
    """30 utterances beside 7 others: after so many epochs, wherever one begins, each has been used so often."""
    plan = mixture([Part(7), Part(30, weight)])
    used = Counter(chain.from_iterable(i for epoch in range(first, first + epochs) for i in plan.epoch(epoch)))
    assert [used[i] for i in range(37)] == [epochs] * 7 + [expected] * 30


def test_a_weight_is_the_number_that_is_written() -> None:
    """In binary, 0.07 x 100 is a little more than 7. Parts of an utterance count as one, so every set is heard."""
    assert 0.07 * 100 > 7 and Part(100, 0.07).num_uses == 7
    assert [Part(5, weight).num_uses for weight in (1, 0.5, 0.001, 2.1)] == [5, 3, 1, 11]


def test_the_half_of_a_set_is_drawn_from_all_of_it() -> None:
    """Neither the first half of the manifest nor every other line; another seed draws another half."""
    halves = [set(chain.from_iterable(mixture([Part(1000, 0.5)], seed).epoch(0))) for seed in (1, 2)]
    for half in halves:
        assert len(half) == 500
        assert abs(sum(half) / 500 - 499.5) < 5 * 1000 / (12 * 1000) ** 0.5  # 5 sigma of 500 out of 1000
        assert abs(sum(i % 2 for i in half) - 250) < 5 * 8
    assert 200 < len(halves[0] & halves[1]) < 300


def test_sets_are_mixed_in_every_step() -> None:
    """Two uses of 1000 utterances among 4000 others: each step of 60 holds 20 of them, give or take chance."""
    plan = mixture([Part(4000), Part(1000, 2)], size=60, pool=16)
    held = [sum(i >= 4000 for i in step) for step in plan.epoch(0)]
    sigma = (60 * 1 / 3 * 2 / 3) ** 0.5
    assert sum(held) == 2000 and max(abs(count - 20) for count in held) < 5 * sigma
    assert 0.7 * sigma < np.std(held) < 1.3 * sigma


@settings(deadline=None, max_examples=30)
@given(PARTS, st.integers(0, 10**7))
def test_a_mixture_is_entered_anywhere(parts: list[Part], number: int) -> None:
    plan = mixture(parts)
    for earlier in range(max(0, number - 2), number):
        plan.uses(earlier)
    assert plan.uses(number) == mixture(parts).uses(number)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, BUDGET), min_size=2, max_size=150),
    WEIGHTS,
    st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**31)),
    st.integers(1, 20),
    st.integers(BUDGET, 400),
    st.integers(1, 8),
    st.integers(0, 10**6),
)
def test_any_world_takes_the_same_steps(
    costs: list[int],
    weight: float,
    plan_of: tuple[int, int, int],
    micro_batches: int,
    budget: int,
    world_size: int,
    resumed_at: int,
) -> None:
    """Ranks that know nothing of each other, begun at any step, together take the step that one rank alone takes.

    Every micro-batch, to the order of its utterances, is exactly one rank's; no rank is idle.
    """
    parts = [Part(len(costs) // 2), Part(len(costs) - len(costs) // 2, weight)]

    def micro_batches_of(rank: int, world_size: int, number: int) -> list[tuple[int, list[int]]]:
        size, pool, seed = plan_of
        plan = Plan(costs, seed=seed, global_batch_size=size, shuffle_pool=pool, parts=parts)
        groups = cut_step(plan.step(number)[1], costs, micro_batches, budget)
        return [(n, groups[n]) for n in rank_share(groups, costs, ranks(rank, world_size))]

    for number in (resumed_at, resumed_at + 1):
        alone = micro_batches_of(0, 1, number)
        if len(alone) < world_size:
            continue
        dealt = [micro_batches_of(rank, world_size, number) for rank in range(world_size)]
        assert all(dealt)
        assert sorted(chain.from_iterable(dealt)) == sorted(alone)


def permutation(size: int, key: Sequence[int]) -> list[int]:
    return permuted(np.arange(size), size, key).tolist()


@settings(deadline=None)
@given(st.integers(0, 300), st.lists(st.integers(0, 2**40), max_size=3))
def test_permutation(size: int, key: list[int]) -> None:
    assert sorted(permutation(size, key)) == list(range(size))


@settings(deadline=None)
@given(st.integers(1, 2**40), st.lists(st.integers(0, 2**40), min_size=1, max_size=3), st.data())
def test_a_permutation_is_read_at_any_position(size: int, key: list[int], data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    values = permuted(np.array(positions), size, key).tolist()
    assert len(set(values)) == len(values) and 0 <= min(values) <= max(values) < size
    assert permuted(np.array(positions[-1:]), size, key).tolist() == values[-1:]


def test_permutation_for_ever() -> None:
    """A run that is resumed with a later NumPy must go on as it began: these numbers may never change."""
    assert permutation(10, (1, 2, 3)) == [2, 0, 1, 8, 4, 6, 5, 3, 9, 7]
    assert int(_mix(np.array([0], np.uint64))[0]) == 0xE220A8397B1DCDAF  # SplitMix64's first number from seed 0


@pytest.mark.parametrize("size", [2, 3, 5, 17])
def test_permutation_is_even(size: int) -> None:
    """Each value lands on each place, and each pair of neighbours comes, about equally often over many keys."""
    places, neighbours, keys = np.zeros((size, size)), np.zeros((size, size)), 400 * size
    for key in range(keys):
        values = permutation(size, (key, 1))
        places[np.arange(size), values] += 1
        neighbours[values[:-1], values[1:]] += 1
    assert (abs(places - 400) < 5.5 * 400**0.5).all()  # standard deviation below 20
    expected = keys * (size - 1) / (size * (size - 1))
    assert (abs(neighbours[~np.eye(size, dtype=bool)] - expected) < 5.5 * expected**0.5).all()


def test_a_long_permutation_has_no_drift() -> None:
    """Neighbours in a permutation of 10,000 are as far from each other as chance has it: 10,000 / 3 on average."""
    values = np.array(permutation(10_000, (4,)))
    assert abs(np.abs(np.diff(values)).mean() / (10_000 / 3) - 1) < 0.03
    assert abs(np.corrcoef(np.arange(10_000), values)[0, 1]) < 0.04


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 8))
def test_evaluation_shares_are_the_set(count: int, world_size: int) -> None:
    dealt = [evaluation_share(count, ranks(rank, world_size)) for rank in range(world_size)]
    assert sorted(chain.from_iterable(dealt)) == list(range(count))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
