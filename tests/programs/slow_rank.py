"""Rank 1 takes long over parts that rank 0 has done, then both take long; started by tests/test_heartbeat.py.

Nobody tells the heartbeat who waits: it learns that from the collective at the end of each part.
"""

import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from graft.ranks import start, stop
from graft.train.heartbeat import Heartbeat
from graft.train.stopping import StopRequest

PATIENCE_S, LONG_S = 2.0, 5.0

logging.basicConfig(format="%(message)s", stream=sys.stdout)
with Heartbeat(start(start_timeout_s=120), StopRequest(exit_code=75), PATIENCE_S, timeout_s=60) as heartbeat:
    ranks, heart = heartbeat.ranks, heartbeat.heart
    for place, collective in (
        ("sum", lambda: ranks.sum([1.0])),
        ("gather", lambda: ranks.gather(1)),
        ("barrier", ranks.barrier),
    ):
        heart.works(f"before the {place}")
        time.sleep(0 if ranks.is_first else LONG_S)
        collective()
    heart.works("as long as the other")
    time.sleep(LONG_S)
    ranks.barrier()
stop()
