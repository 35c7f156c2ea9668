"""What two ranks see of each other; started by tests/test_ranks.py under the launcher."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from graft.ranks import AgreedValueError, share_cores, start, stop
from graft.train.guard import check_alike

folder = Path(sys.argv[-1])
os.environ.pop("OMP_NUM_THREADS", None)
torch.set_num_threads(7)
ranks = start(start_timeout_s=120)
seen = {
    "threads": torch.get_num_threads(),
    "sum": ranks.sum([ranks.rank + 1, 10 * (ranks.rank + 1)]),
    "gathered": ranks.gather(f"rank {ranks.rank}"),
    "differing": ranks.differing(f"version {ranks.rank}"),
}
os.environ["OMP_NUM_THREADS"] = "7"
torch.set_num_threads(7)
share_cores(ranks)
seen["threads_as_set"] = torch.get_num_threads()
try:
    ranks.agree(ValueError("bad audio") if ranks.rank == 1 else None)
except AgreedValueError as error:
    seen |= {"agreed": str(error), "kind": type(error).__name__}
shapes = {"projector.weight": [3, 4]}
check_alike({"versions": {"torch": "2.13.0"}, "trained": shapes}, ranks)  # alike: nothing happens
mine = {"versions": {"torch": f"2.{13 - ranks.rank}.0"}, "trained": shapes if ranks.is_first else {}}
try:
    check_alike(mine, ranks)
except AgreedValueError as error:
    seen["guard"] = str(error)
(folder / f"{ranks.rank}.json").write_text(json.dumps(seen))
stop()
