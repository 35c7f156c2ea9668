"""When a rank is complained of; real ranks that are halted are in test_stopping.py."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT, Command

from graft.ranks import Ranks
from graft.train.heartbeat import Heart, Heartbeat, Pulse
from graft.train.stopping import _ancestors, _launchers


def pulse(is_waiting: bool = False, beat_since: float = 0.0, moves_since: float = 0.0) -> Pulse:
    return Pulse("node2", "reading step 7", is_waiting, beat=3, moves=9, beat_since=beat_since, moves_since=moves_since)


@pytest.mark.parametrize(
    "seen, says",
    [
        (pulse(beat_since=95, moves_since=95), None),
        (pulse(beat_since=89, moves_since=89), "on node2 has not answered for 11 s"),
        (pulse(beat_since=99, moves_since=89), "has been at 'reading step 7' for 11 s; the others wait"),
        (pulse(is_waiting=True, beat_since=99, moves_since=0), None),  # it has done its part
        (pulse(is_waiting=True, beat_since=80, moves_since=80), "has not answered for 20 s"),
    ],
)
def test_complaints(seen: Pulse, says: str | None) -> None:
    """With a patience of 10 s, at 100 s."""
    trouble = seen.trouble(now=100, patience_s=10, somebody_waits=True)
    assert trouble is None if says is None else says in seen.in_words(trouble, now=100)


@pytest.mark.parametrize("who_waits", ["nobody", "rank 0", "rank 2"])
def test_long_work_is_no_trouble_while_nobody_waits(who_waits: str, caplog: pytest.LogCaptureFixture) -> None:
    """As at the start, where all ranks read a large model."""
    heartbeat = Heartbeat(Ranks(0, 3), stop=None, patience_s=10, timeout_s=600)  # type: ignore[arg-type]
    if who_waits == "rank 0":
        heartbeat.heart.waits("model read")
    heartbeat.pulses = {1: pulse(beat_since=99), 2: pulse(is_waiting=who_waits == "rank 2", beat_since=99)}
    for rank, seen in heartbeat.pulses.items():
        heartbeat._tell_of(rank, seen, 100)
    told = [message.split(" on ")[0] for message in caplog.messages]
    assert told == {"nobody": [], "rank 0": ["rank 1", "rank 2"], "rank 2": ["rank 1"]}[who_waits]


def test_a_slow_rank_that_falls_silent_is_told_anew(caplog: pytest.LogCaptureFixture) -> None:
    heartbeat = Heartbeat(Ranks(0, 2), stop=None, patience_s=10, timeout_s=600)  # type: ignore[arg-type]
    heartbeat.heart.waits("step 7 read")
    for now, seen in (
        (100, pulse(beat_since=99, moves_since=95)),
        (106, pulse(beat_since=105, moves_since=95)),
        (107, pulse(beat_since=105, moves_since=95)),
        (116, pulse(beat_since=105, moves_since=95)),
        (117, pulse(beat_since=116, moves_since=116)),
    ):
        heartbeat._tell_of(1, seen, now)
    told = caplog.messages
    assert len(told) == 3, told
    assert "has been at 'reading step 7' for 11 s" in told[0] and "has not answered for 11 s" in told[1]
    assert told[2] == "rank 1 goes on"


def test_gone_is_who_does_not_answer_and_not_who_is_slow() -> None:
    assert pulse(beat_since=29).is_gone(now=60, timeout_s=30)
    assert not pulse(beat_since=59, moves_since=0).is_gone(now=60, timeout_s=30)


def test_what_is_heard_is_new_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """A beat is a sign of life, a move is progress."""
    times = iter([10.0, 20.0, 30.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    heartbeat = Heartbeat(Ranks(0, 2), stop=None, patience_s=60, timeout_s=600)  # type: ignore[arg-type]
    for beat, moves in ((1, 5), (2, 5), (2, 6)):
        said = {"host": "node2", "place": "x", "is_waiting": False, "beat": beat, "moves": moves}
        heartbeat._hear(1, said)
    assert (heartbeat.pulses[1].beat_since, heartbeat.pulses[1].moves_since) == (20.0, 30.0)


def test_a_heart_counts_its_moves() -> None:
    heart = Heart()
    heart.works("reading")
    heart.waits("read")
    assert (heart.place, heart.is_waiting, heart.moves) == ("read", True, 2)


def test_a_rank_waits_inside_of_a_collective() -> None:
    """And goes on with what it was at, a move further."""
    heartbeat = Heartbeat(Ranks(1, 2), stop=None, patience_s=60, timeout_s=600)  # type: ignore[arg-type]
    heart, seen = heartbeat.heart, []
    heart.works("reading")
    with heartbeat.ranks.waiting():
        seen.append((heart.place, heart.is_waiting, heart.moves))
    seen.append((heart.place, heart.is_waiting, heart.moves))
    assert seen == [("reading", True, 1), ("reading", False, 2)] and heartbeat.ranks == Ranks(1, 2)


@pytest.mark.slow
def test_a_rank_that_keeps_others_waiting_is_named_and_no_other(run_launcher: Command) -> None:
    """Two real ranks: one waits for the other in every kind of collective, then both take as long and nobody waits."""
    outcome = run_launcher(ROOT / "tests" / "programs" / "slow_rank.py", timeout_s=120)
    told = [line for line in outcome.stdout.splitlines() if " has been at " in line or "goes on" in line]
    places = [re.sub(r" on \S+ has been at '(.+)' for \d+ s; the others wait for it", r": \1", line) for line in told]
    expected = [[f"rank 1: before the {name}", "rank 1 goes on"] for name in ("sum", "gather", "barrier")]
    assert places == [line for lines in expected for line in lines]


def test_alone_there_is_no_launcher() -> None:
    """Nothing above pytest is DeepSpeed's: whoever ends a shell does not end a training."""
    assert len(_ancestors(2)) == 2 and _launchers() == []
