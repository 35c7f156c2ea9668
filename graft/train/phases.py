"""Where the time of a training goes: a phase names itself to a profiler and leaves a mark in time at its end.

On a CPU a mark is the clock. On a GPU it is an event on the stream where the step runs: what the host has handed over
is not yet done, and asking would make it wait. Events are read at logged steps, where the loss is waited for anyway.

What lies between two marks belongs to the phase of the later one, so that the phases add up to the whole time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

READ = "read"  # until every rank has its micro-batches of the step
FORWARD, BACKWARD = "forward", "backward"  # the loss makes its gradient in forward: graft/model/loss.py
REDUCE = "reduce"  # of the gradients: waiting for the slowest rank, then adding up
UPDATE = "update"  # is every gradient finite? Clip, optimiser step, gather the weights
AGREE = "agree"  # on whether to stop
WRITE = "write"  # to the console and to TensorBoard
SAVE, EVALUATE = "save", "evaluate"
PROFILE = "profile"  # writing a trace; no part of what a training takes
PHASES = (READ, FORWARD, BACKWARD, REDUCE, UPDATE, AGREE, WRITE, SAVE, EVALUATE)
PREFIX = "graft::"  # of the names that a profiler sees

Mark = float | torch.cuda.Event


class Phases:
    """Seconds of each phase on this rank; ``with phases(FORWARD): ...`` around what belongs to it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._last, self._marks = self._now(), []
        self.spent_s: Counter[str] = Counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Give the time from the mark before to the end of this block to ``phase``."""
        with record_function(PREFIX + phase):
            yield
        self.mark(phase)

    def mark(self, phase: str) -> None:
        """Give the time from the mark before until now to ``phase``."""
        self._marks.append((phase, self._now()))

    def read(self) -> None:
        """Bring ``spent_s`` up to the last mark. On a GPU this waits for it."""
        if self._on_gpu and self._marks:
            self._marks[-1][1].synchronize()
        for phase, mark in self._marks:
            self.spent_s[phase] += _seconds(self._last, mark)
            self._last = mark
        self._marks.clear()

    def _now(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(before: Mark, after: Mark) -> float:
    if isinstance(before, float):
        return after - before
    return before.elapsed_time(after) / 1000
