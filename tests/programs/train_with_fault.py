"""launch/train.py with one fault in it: POINT:NUMBER:RANK:DELAY_MS, then the words of launch/train.py.

At the NUMBER-th time that RANK comes to POINT a timer starts. It kills the process after DELAY_MS, wherever it is then.
"""

import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from graft.evaluation import evaluate
from graft.ranks import Ranks
from graft.train.checkpoint import Checkpoints
from graft.train.engine import Engine
from graft.train.feed import Feed

POINTS: dict[str, tuple[Any, str]] = {
    "forward": (Engine, "__call__"),
    "backward": (Engine, "backward"),
    "step": (Engine, "step"),
    "save": (Checkpoints, "_write"),
    "evaluation": (evaluate, "transcribe"),
    "loader": (Feed, "read"),
}


def arm(point: str, number: int, delay_s: float) -> None:
    """Make the ``number``-th call of ``point`` the last."""
    place, name = POINTS[point]
    original: Callable[..., Any] = getattr(place, name)
    calls = iter(range(1, number + 1))

    def counted(*arguments: Any, **named: Any) -> Any:
        if next(calls, 0) == number:
            threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return original(*arguments, **named)

    setattr(place, name, counted)


point, number, rank, delay_ms = sys.argv[next(i for i, word in enumerate(sys.argv) if word.count(":") == 3)].split(":")
sys.argv = [word for word in sys.argv if word.count(":") != 3]
if int(rank) == Ranks.from_environment().rank:
    arm(point, int(number), int(delay_ms) / 1000)
runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
