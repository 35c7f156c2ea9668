"""Where two trees differ, by dotted keys."""

from graft.differences import differences, there_and_here

ONE, OTHER = {"a": 1, "b": {"c": 2, "e": "x"}}, {"b": {"c": 3, "e": "x"}, "d": "y"}


def test_differences() -> None:
    assert list(differences(ONE, OTHER)) == [("a", 1, None), ("b.c", 2, 3), ("d", None, "y")]
    assert not list(differences(ONE, ONE))


def test_there_and_here() -> None:
    assert there_and_here(ONE, OTHER) == ["a: 1 there, None here", "b.c: 2 there, 3 here", "d: None there, 'y' here"]
