"""launch/train.py where rank 1 fails in a step, and leaving the process group waits as NCCL's does for the others."""

import runpy
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch
import torch.distributed as dist

from graft.ranks import Ranks
from graft.train.engine import Engine


def no_memory(*_: Any, **__: Any) -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory: the real reason")


if not Ranks.from_environment().is_first:
    Engine.backward = no_memory
    dist.destroy_process_group = lambda *_: time.sleep(1000)
runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
