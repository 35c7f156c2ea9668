"""Ranks that would train different things are found before the first step."""

import copy

import pytest

from graft.ranks import AgreedValueError, Ranks
from graft.train.guard import check_alike, differences, digest

WHAT = {"versions": {"torch": "2.13.0"}, "inputs": {"utterances": 7}, "trained": {"projector.weight": [3, 4]}}


class ThreeRanks(Ranks):
    """Rank 0 of three, whose others say ``others``."""

    others: tuple[dict, dict]

    def gather(self, value: dict) -> list[dict]:
        return [value, *self.others]


def test_alike() -> None:
    check_alike(WHAT, Ranks())
    ranks = ThreeRanks(world_size=3)
    object.__setattr__(ranks, "others", (WHAT, copy.deepcopy(WHAT)))
    check_alike(WHAT, ranks)


def test_a_difference_names_rank_and_field() -> None:
    other = copy.deepcopy(WHAT)
    other["versions"]["torch"] = "2.12.0"
    del other["trained"]["projector.weight"]
    ranks = ThreeRanks(world_size=3)
    object.__setattr__(ranks, "others", (WHAT, other))
    with pytest.raises(AgreedValueError) as error:
        check_alike(WHAT, ranks)
    assert "rank 2: versions.torch is '2.12.0', on rank 0 '2.13.0'" in str(error.value)
    assert "rank 2: trained.projector.weight is None, on rank 0 [3, 4]" in str(error.value)
    assert "rank 1" not in str(error.value)


def test_differences() -> None:
    assert list(differences({"a": 1, "b": {"c": 2}}, {"b": {"c": 3}, "d": 4})) == [
        ("a", 1, None),
        ("b.c", 2, 3),
        ("d", None, 4),
    ]


def test_digest_knows_the_order() -> None:
    assert digest(["a", "b"]) == digest(iter(["a", "b"])) != digest(["b", "a"])
    assert digest(["ab"]) != digest(["a", "b"])
