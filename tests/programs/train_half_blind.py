"""launch/train.py where rank 1 does not see the run's checkpoints, as through a stale cache of a network disk."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from graft.ranks import Ranks
from graft.train import checkpoint, claim

if not Ranks.from_environment().is_first:
    checkpoint.checkpoint_steps = claim.checkpoint_steps = lambda run_dir: []
runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
