"""Where the time goes: the phases add up to all of it, a profiler sees them, and they cost next to nothing."""

import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from graft.train.phases import FORWARD, PHASES, PREFIX, READ, SAVE, Phases


def test_phases_add_up_to_the_whole_time() -> None:
    """What is done between two phases counts for the later one."""
    began = time.perf_counter()
    phases = Phases(torch.device("cpu"))
    with phases(READ):
        time.sleep(0.1)
    for _ in range(2):
        time.sleep(0.05)
        with phases(FORWARD):
            time.sleep(0.1)
    whole = time.perf_counter() - began
    assert phases.spent_s == {}, "nothing is read before it is asked for"
    phases.read()
    assert sum(phases.spent_s.values()) == pytest.approx(whole, abs=0.02)
    assert phases.spent_s[READ] >= 0.1 and phases.spent_s[FORWARD] >= 0.3 and phases.spent_s[SAVE] == 0


def test_reading_twice_counts_once() -> None:
    phases = Phases(torch.device("cpu"))
    with phases(SAVE):
        time.sleep(0.05)
    phases.read()
    once = phases.spent_s[SAVE]
    phases.read()
    assert phases.spent_s[SAVE] == once
    phases.mark(SAVE)
    phases.read()
    assert phases.spent_s[SAVE] > once


def test_a_phase_that_fails_is_not_counted() -> None:
    phases = Phases(torch.device("cpu"))
    with pytest.raises(ValueError), phases(SAVE):
        raise ValueError
    phases.read()
    assert phases.spent_s[SAVE] == 0


def test_a_profiler_sees_the_names() -> None:
    phases = Phases(torch.device("cpu"))
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for phase in PHASES:
            with phases(phase):
                torch.ones(2).sum()
    assert {PREFIX + phase for phase in PHASES} <= {one.key for one in seen.key_averages()}


def test_they_cost_next_to_nothing() -> None:
    """Without a profiler: the quickest of a hundred rounds, as others work on this machine too."""
    phases, rounds = Phases(torch.device("cpu")), []
    for _ in range(100):
        start = time.perf_counter()
        for _ in range(20):
            with phases(FORWARD):
                pass
        rounds.append((time.perf_counter() - start) / 20)
    assert min(rounds) < 200e-6
