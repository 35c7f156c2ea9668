"""Stopping on request: a signal asks, the next step's end obeys, a checkpoint is saved."""

from __future__ import annotations

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # launcher, Ctrl-C, Slurm's --signal=USR1@120


class StopRequest:
    """Whether this process was asked to stop. The second signal of a kind ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True
