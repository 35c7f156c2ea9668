"""Stopping on request: a signal asks, the next step's end obeys, a checkpoint is saved.

A signal may come to one rank, to the launcher or to the whole job. A thread hears it, since Python's own handlers wait
until the main thread has left a kernel or a collective, which may be never. A launcher that has died asks too: its
ranks would go on without anyone to see their end.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # launcher, Ctrl-C, Slurm's --signal=USR1@120
ONE_REQUEST_S = 2.0  # the whole job is signalled and the launcher passes it on: several signals, one request
POLL_S = 1.0
UNDER_A_LAUNCHER = "CROSS_RANK"  # DeepSpeed's launcher sets it for the ranks that it starts


class StopRequest:
    """Whether this process was asked to stop.

    Before :meth:`gently` there is nothing to save and a signal ends the process at once. Afterwards the first request
    sets ``asked``, and a second one, seconds later, ends the process at once.
    """

    def __init__(self, exit_code: int) -> None:
        """``exit_code`` is the process's when it ends before there is something to save. Main thread only."""
        self.asked = False
        self._exit_code, self._is_gentle, self._asked_at = exit_code, False, 0.0
        self._launchers = _launchers()
        self._ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)  # the number goes down the pipe
        threading.Thread(target=self._listen, name="stop request", daemon=True).start()

    def gently(self) -> None:
        """From now on there is something to save."""
        self._is_gentle = True

    def ask(self) -> None:
        """Ask this process to stop, as a first signal would."""
        if not self.asked:
            self.asked, self._asked_at = True, time.monotonic()

    def _listen(self) -> None:
        while True:
            ready, _, _ = select.select([self._ear], [], [], POLL_S)
            if ready:
                self._hear(os.read(self._ear, 1)[0])
            elif not self.asked and self._is_orphan():
                self._hear(signal.SIGTERM)

    def _is_orphan(self) -> bool:
        """Whether a launcher is gone: one that was there in the beginning, or one that died even before that."""
        if not self._launchers:
            return UNDER_A_LAUNCHER in os.environ
        return self._launchers != _ancestors(len(self._launchers))

    def _hear(self, number: int) -> None:
        if number not in SIGNALS:
            return
        if not self._is_gentle:
            os._exit(self._exit_code)
        if self.asked and time.monotonic() - self._asked_at > ONE_REQUEST_S:
            os._exit(128 + number)
        self.ask()


def _launchers() -> list[int]:
    """Process ids of the DeepSpeed launchers above this process, the nearest first."""
    ancestors = _ancestors(2)
    return [pid for i, pid in enumerate(ancestors) if all(map(_is_launcher, ancestors[: i + 1]))]


def _ancestors(count: int) -> list[int]:
    """Parent, its parent, and so on; fewer where ``/proc`` does not tell."""
    found: list[int] = []
    pid = os.getppid()
    while len(found) < count:
        found.append(pid)
        try:  # "pid (name) state parent ...", and a name may hold anything
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            break
    return found[:count]


def _is_launcher(pid: int) -> bool:
    try:
        return b"deepspeed" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
