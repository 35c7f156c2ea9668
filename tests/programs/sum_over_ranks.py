"""Sums one number over the ranks that DeepSpeed's launcher started, and writes what every rank saw to a JSON file.

deepspeed [--hostfile H] tests/programs/sum_over_ranks.py OUTPUT.json [EXIT_CODE_OF_THE_LAST_RANK]
"""

import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> int:
    """Each rank adds 10 ** rank, so that the digits of the sum say who took part."""
    output, *exit_code = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    total = torch.tensor([10**rank])
    dist.all_reduce(total)
    hosts: list[str | None] = [None] * world_size
    dist.all_gather_object(hosts, socket.gethostname())
    if rank == 0:
        seen = {"total": int(total), "hosts": hosts, "slots": os.environ["LOCAL_SIZE"]}
        Path(output).write_text(json.dumps(seen))
    dist.destroy_process_group()
    return int(exit_code[0]) if exit_code and rank == world_size - 1 else 0


if __name__ == "__main__":
    sys.exit(main())
