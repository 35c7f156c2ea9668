"""The plan of steps and its shares: complete, even, the same for any number of ranks."""

from __future__ import annotations

import random
from itertools import chain

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graft.data.plan import (
    Plan,
    _mix,
    check_budget,
    evaluation_share,
    num_steps_per_epoch,
    padded_tokens,
    permutation,
    plan_epoch,
    rank_share,
)
from graft.ranks import Ranks

BUDGET = 97
COSTS = st.lists(st.integers(1, BUDGET), min_size=1, max_size=150)


def ranks(rank: int, world_size: int) -> Ranks:
    return Ranks(rank=rank, world_size=world_size, local_rank=0)


def shares(step: list[int], costs: list[int], world_size: int, budget: int = BUDGET) -> list[list[list[int]]]:
    return [rank_share(step, costs, ranks(rank, world_size), budget) for rank in range(world_size)]


@settings(deadline=None)
@given(COSTS, st.integers(0, 2**31), st.integers(0, 9), st.integers(1, 40), st.integers(1, 9))
@example(costs=[1] * 9, seed=1, epoch=0, size=4, pool=2)
def test_every_utterance_exactly_once_an_epoch(costs: list[int], seed: int, epoch: int, size: int, pool: int) -> None:
    steps = plan_epoch(costs, seed=seed, epoch=epoch, global_batch_size=size, shuffle_pool=pool)
    assert sorted(chain.from_iterable(steps)) == list(range(len(costs)))
    sizes = {len(step) for step in steps}
    assert max(sizes) <= size and max(sizes) - min(sizes) <= 1
    assert len(steps) == num_steps_per_epoch(len(costs), size)


@settings(deadline=None)
@given(COSTS, st.integers(1, 8), st.integers(BUDGET, 400))
def test_shares_are_the_step(costs: list[int], world_size: int, budget: int) -> None:
    step = random.Random(5).sample(range(len(costs)), len(costs))
    if len(step) < world_size:
        with pytest.raises(ValueError, match=f"{len(step)} utterances cannot be shared by {world_size} ranks"):
            shares(step, costs, world_size, budget)
        return
    dealt = shares(step, costs, world_size, budget)
    assert sorted(i for share in dealt for group in share for i in group) == sorted(step)
    for share in dealt:
        assert share and all(share), "a rank or a micro-batch without utterances"
        assert all(padded_tokens(group, costs) <= budget for group in share)
    counts = {len(share) for share in dealt}
    assert max(counts) - min(counts) <= 1


@settings(deadline=None)
@given(st.lists(st.integers(1, BUDGET), min_size=32, max_size=150), st.integers(1, 8))
def test_ranks_take_equally_many_micro_batches_where_there_is_enough(costs: list[int], world_size: int) -> None:
    dealt = shares(list(range(len(costs))), costs, world_size)
    num_groups = sum(len(share) for share in dealt)
    if -(-num_groups // world_size) * world_size <= len(costs):
        assert len({len(share) for share in dealt}) == 1


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
            for share in shares(plan.step(number)[1], costs, world_size, 4096)
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
        groups = [g for n in range(plan.steps_per_epoch) for g in rank_share(plan.step(n)[1], costs, Ranks(), 4096)]
        return 1 - sum(costs) / sum(padded_tokens(g, costs) for g in groups)

    assert padding(1) > 3 * padding(64)


def test_a_hand_made_share() -> None:
    """Costs 9 | 5, 5 | 4, 2 | 1 within a budget of 10 take 9, 10, 8 and 1 positions: 10 + 1 here, 9 + 8 there."""
    costs = [1, 5, 9, 2, 5, 4]
    assert shares([0, 1, 2, 3, 4, 5], costs, 2, 10) == [[[1, 4], [0]], [[2], [5, 3]]]


def test_more_micro_batches_than_ranks_can_fill_evenly() -> None:
    """Three utterances that fill a micro-batch each, two ranks: one of them takes two."""
    assert shares([2, 0, 1], [10, 10, 10], 2, 10) == [[[0], [2]], [[1]]]


def test_an_utterance_above_the_budget_is_named() -> None:
    with pytest.raises(ValueError, match=r"micro_batch_tokens = 10: long \(11 tokens\), longer \(17 tokens\)") as error:
        check_budget([3, 11, 17, 10], 10, ["short", "long", "longer", "just"])
    assert "Raise micro_batch_tokens to 17" in str(error.value)
    with pytest.raises(ValueError, match=r"utterance 2 \(11 tokens\)"):
        rank_share([1, 2], [1, 1, 11], Ranks(), 10)
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
        str(plan_epoch(costs, seed=seed, epoch=epoch, global_batch_size=50, shuffle_pool=1))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(plans) == 9


@settings(deadline=None)
@given(st.integers(0, 200), st.lists(st.integers(0, 2**40), max_size=3))
def test_permutation(size: int, key: list[int]) -> None:
    assert sorted(permutation(size, key).tolist()) == list(range(size))


def test_permutation_for_ever() -> None:
    """A run that is resumed with a later NumPy must go on as it began: these numbers may never change."""
    assert permutation(10, (1, 2, 3)).tolist() == [7, 0, 4, 1, 8, 2, 5, 6, 3, 9]
    assert int(_mix(np.array([0], np.uint64))[0]) == 0xE220A8397B1DCDAF  # SplitMix64's first number from seed 0


def test_permutation_is_even() -> None:
    """Each of 5 values lands on each of 5 places about equally often over many keys."""
    counts = [[0] * 5 for _ in range(5)]
    for key in range(2000):
        for place, value in enumerate(permutation(5, (key, 1)).tolist()):
            counts[place][value] += 1
    assert all(320 < count < 480 for row in counts for count in row)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 8))
def test_evaluation_shares_are_the_set(count: int, world_size: int) -> None:
    dealt = [evaluation_share(count, ranks(rank, world_size)) for rank in range(world_size)]
    assert sorted(chain.from_iterable(dealt)) == list(range(count))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
