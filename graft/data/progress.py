"""How far a long command has come: a bar on a terminal, a plain line every few seconds in a log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.progress import BarColumn, Progress, TextColumn

LOG = logging.getLogger("graft.progress")
FIRST_S, LAST_S = 5.0, 60.0  # between two lines of a log: at the start, and after twenty minutes

Item = TypeVar("Item")


class Meter:
    """Counts ``done`` of ``total`` in some unit and tells speed and time left; use as a context manager."""

    def __init__(self, label: str, total: float, unit: str, *, quiet: bool = False) -> None:
        """``quiet`` is for ranks that do not speak."""
        self.label, self.total, self.unit, self.quiet = label, total, unit, quiet
        self.done, self.speed = 0.0, ""
        self._started = self._told = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Meter:
        self._started = self._told = time.monotonic()
        if not self.quiet and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), transient=True
            )
            self._task = self._bar.add_task(self.label, total=self.total, note="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def set(self, done: float, speed: str = "") -> None:
        """Say how much is done by now; ``speed`` is said in place of units per second."""
        self.done, self.speed = done, speed
        if self._bar:
            self._bar.update(self._task, completed=done, note=self.note())
        elif not self.quiet and time.monotonic() - self._told >= min(max(FIRST_S, self.elapsed / 20), LAST_S):
            self._told = time.monotonic()
            LOG.info("%s: %s", self.label, self.note())

    def advance(self, amount: float = 1) -> None:
        """Say that ``amount`` more is done."""
        self.set(self.done + amount)

    @property
    def elapsed(self) -> float:
        """Seconds since the start, never 0."""
        return max(time.monotonic() - self._started, 1e-9)

    def note(self) -> str:
        """``done/total unit, speed, time left``."""
        rate = self.done / self.elapsed
        left = f", {clock((self.total - self.done) / rate)} left" if 0 < self.done < self.total else ""
        return f"{self.done:,.0f} of {self.total:,.0f} {self.unit}, {self.speed or f'{rate:,.1f}/s'}{left}"


def track(items: Sequence[Item], label: str, unit: str = "utterances") -> Iterator[Item]:
    """``items``, with a :class:`Meter` that counts them."""
    with Meter(label, len(items), unit) as meter:
        for item in items:
            yield item
            meter.advance()


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
