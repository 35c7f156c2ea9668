"""Who keeps the others waiting: every rank tells where it is, and a silent one is named before a collective gives up.

A collective that waits for a rank says nothing until it times out, and then names nobody. Here each rank's pulse goes
through the store in which the ranks met, beside the collectives. Rank 0 listens to all others and they to rank 0. The
same way a request to stop reaches every rank, also those that are in the middle of an evaluation.

A rank that no longer answers at all ends the run: where packets are lost and no connection is closed, not every
collective of gloo keeps its timeout.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist

from graft.command import FAULT
from graft.ranks import Ranks, of_this_attempt
from graft.train.stopping import StopRequest

LOG = logging.getLogger(__name__)
BEATS_IN_PATIENCE = 10
MOST_BETWEEN_BEATS_S = 2.0  # also how long a request to stop is on its way
STOP_KEY = "graft/stop"
Trouble = Literal["silent", "still"]  # does not answer at all; answers, and gets no further


@dataclass
class Heart:
    """Where a rank is: at work, or in a collective and waiting for the others."""

    place: str = "starting"
    is_waiting: bool = False
    moves: int = 0

    def works(self, place: str) -> None:
        """Say what this rank does now."""
        self.place, self.is_waiting = place, False
        self.moves += 1

    def waits(self, place: str) -> None:
        """Say that this rank has done its part and waits for the others'."""
        self.place, self.is_waiting = place, True
        self.moves += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this rank waits for the others; behind, it goes on with what it was at."""
        before, self.is_waiting = self.is_waiting, True
        try:
            yield
        finally:
            self.is_waiting = before
            self.moves += 1


@dataclass
class Pulse:
    """What was last heard of a rank, and since when that has not changed (``time.monotonic``)."""

    host: str
    place: str
    is_waiting: bool
    beat: int
    moves: int
    beat_since: float
    moves_since: float

    def is_gone(self, now: float, timeout_s: float) -> bool:
        """Whether this rank has not answered for as long as a collective may take."""
        return now - self.beat_since > timeout_s

    def trouble(self, now: float, patience_s: float, somebody_waits: bool) -> Trouble | None:
        """What is wrong with this rank, if anything; long work that nobody waits for is not wrong."""
        if now - self.beat_since > patience_s:
            return "silent"
        if now - self.moves_since > patience_s and somebody_waits and not self.is_waiting:
            return "still"
        return None

    def in_words(self, trouble: Trouble, now: float) -> str:
        """What is said behind the rank's number."""
        if trouble == "silent":
            return (
                f"on {self.host} has not answered for {now - self.beat_since:.0f} s: it is stopped, or its node is "
                f"gone. It was last at '{self.place}'"
            )
        return f"on {self.host} has been at '{self.place}' for {now - self.moves_since:.0f} s; the others wait for it"


class Heartbeat:
    """Two threads beside a training: one talks to the store, one looks at what was heard. A context manager.

    The talking one may be stuck with a store that no longer answers; the looking one then says so.
    """

    def __init__(self, ranks: Ranks, stop: StopRequest, patience_s: float, timeout_s: float) -> None:
        """After ``patience_s`` a silent rank is named, after ``timeout_s`` this process ends for it.

        ``self.ranks`` are ``ranks`` whose collectives tell that this rank waits: use those.
        """
        self.heart, self.stop = Heart(), stop
        self.ranks = replace(ranks, waiting=self.heart.waiting)
        self.patience_s, self.timeout_s = patience_s, timeout_s
        self.pulses: dict[int, Pulse] = {}
        self._told: dict[int, Trouble | None] = {}
        self._interval_s = min(patience_s / BEATS_IN_PATIENCE, MOST_BETWEEN_BEATS_S)
        self._beats, self._ended = 0, threading.Event()

    def __enter__(self) -> Heartbeat:
        if self.ranks.world_size > 1:
            for work in (self._talk, self._look):
                threading.Thread(target=work, name=f"heartbeat {work.__name__}", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _talk(self) -> None:
        while not self._ended.wait(self._interval_s):
            try:
                self._talk_to(_own_connection(self.patience_s))
            except (dist.DistError, RuntimeError):  # lost, and sought again; where rank 0 has ended nobody minds
                continue

    def _talk_to(self, store: dist.Store) -> None:
        while not self._ended.wait(self._interval_s):
            self._beats += 1
            store.set(_key(self.ranks.rank), self._said(self._beats))
            self._pass_on_stop(store)
            for rank in self._watched():
                if store.check([_key(rank)]):
                    self._hear(rank, json.loads(store.get(_key(rank))))

    def _watched(self) -> list[int]:
        """The ranks whose pulse this one listens to."""
        return list(range(1, self.ranks.world_size)) if self.ranks.is_first else [0]

    def _said(self, beat: int) -> str:
        heart = self.heart
        return json.dumps(
            {
                "host": socket.gethostname(),
                "place": heart.place,
                "is_waiting": heart.is_waiting,
                "beat": beat,
                "moves": heart.moves,
            }
        )

    def _pass_on_stop(self, store: dist.Store) -> None:
        if self.stop.asked:
            store.set(STOP_KEY, "")
        elif store.check([STOP_KEY]):
            self.stop.ask()

    def _hear(self, rank: int, said: dict[str, Any]) -> None:
        now, before = time.monotonic(), self.pulses.get(rank)
        beat_since = before.beat_since if before and before.beat == said["beat"] else now
        moves_since = before.moves_since if before and before.moves == said["moves"] else now
        self.pulses[rank] = Pulse(**said, beat_since=beat_since, moves_since=moves_since)

    def _look(self) -> None:
        while not self._ended.wait(self._interval_s):
            now = time.monotonic()
            for rank, pulse in list(self.pulses.items()):
                self._tell_of(rank, pulse, now)
                if pulse.is_gone(now, self.timeout_s):
                    self._tell(f"rank {rank} did not come back within {self.timeout_s:g} s: this run ends")
                    os._exit(FAULT)

    def _tell_of(self, rank: int, pulse: Pulse, now: float) -> None:
        """Say it when a rank's trouble begins, turns into another, or is over."""
        somebody_waits = self.heart.is_waiting or any(each.is_waiting for each in list(self.pulses.values()))
        trouble = pulse.trouble(now, self.patience_s, somebody_waits)
        if trouble != self._told.get(rank):
            self._tell(f"rank {rank} {pulse.in_words(trouble, now) if trouble else 'goes on'}")
        self._told[rank] = trouble

    def _tell(self, what: str) -> None:
        if self.ranks.rank <= 1:  # of rank 0's silence one is enough to tell
            LOG.error("%s", what)


def _own_connection(timeout_s: float) -> dist.Store:
    """Another connection to the store in which the ranks met: the main thread's may be busy waiting."""
    host, port, timeout = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=timeout_s)
    return of_this_attempt(dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout))


def _key(rank: int) -> str:
    return f"graft/pulse/{rank}"
