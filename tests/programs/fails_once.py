"""Two ranks that meet; at the first of torchrun's attempts one of them fails. Started by tests/test_ranks.py."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from graft.ranks import start

ranks = start(start_timeout_s=60, timeout_s=60)
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
total = ranks.sum([ranks.rank + 1])
(Path(sys.argv[1]) / f"attempt {attempt}, rank {ranks.rank}").write_text(str(total))
ranks.barrier()
if attempt == 0 and ranks.rank == 1:
    sys.exit(3)
ranks.barrier()
