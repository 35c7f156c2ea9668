"""What the guard compares before the first step; two real ranks that differ are in test_ranks.py."""

from graft.ranks import Ranks
from graft.train.guard import check_alike, digest


def test_alone_is_alike() -> None:
    check_alike({"versions": {"torch": "2.13.0"}}, Ranks())


def test_digest_knows_the_order() -> None:
    assert digest(["a", "b"]) == digest(iter(["a", "b"])) != digest(["b", "a"])
    assert digest(["ab"]) != digest(["a", "b"])
