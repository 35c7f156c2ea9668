"""Bytes that a rank sends in one optimiser step under ZeRO-2, counted at torch's collectives on two real ranks.

    deepspeed --module benchmarks.zero2 REPORT.json        the program of one rank; report() starts it

The least is a reduce-scatter of gradients and an all-gather of weights: 2 (n - 1) / n times the trained parameters. A
collective counts as what its best algorithm sends from each of n ranks, on average; so figures do not depend on gloo.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks import harness, mini
from benchmarks.harness import Figure
from graft.model.lora import add_lora
from graft.model.trainable import select_trainable
from graft.recipe import Lora, Stage
from graft.train.engine import Engine, resolve_ds_config, start_process_group
from graft.train.step import train_step

NUM_RANKS, ACCUMULATIONS, R = 2, (1, 4), 8
# Times its argument's bytes, what each of n ranks sends on average.
SENT = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "reduce": lambda n: (n - 1) / n,
    "broadcast": lambda n: (n - 1) / n,
    "reduce_scatter_tensor": lambda n: (n - 1) / n,  # of its input
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_gather_into_tensor": lambda n: (n - 1) / n,  # of its output
    "all_gather": lambda n: (n - 1) / n,
    "all_to_all_single": lambda n: (n - 1) / n,
}


def report() -> Iterator[Figure]:
    """Stage 2 with one micro-batch a rank and with four."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seen.json"
        launcher = ["deepspeed", "--num_gpus", str(NUM_RANKS), "--master_port", str(free_port())]
        launcher += ["--module", "benchmarks.zero2", str(path)]
        done = subprocess.run(launcher, cwd=harness.ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(launcher)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        seen = json.loads(path.read_text())
    least = 2 * (NUM_RANKS - 1) / NUM_RANKS * seen["trained_bytes"]
    for accumulation in ACCUMULATIONS:
        calls = seen["calls"][str(accumulation)]
        value = sum(count["bytes"] for count in calls.values()) / least
        facts = {"MB": value * least / 1e6, "trained MB": seen["trained_bytes"] / 1e6}
        facts |= {name: f"{count['calls']} calls" for name, count in calls.items()}
        what = f"bytes sent a step and rank / the least, {NUM_RANKS} ranks, {accumulation} micro-batches each"
        yield Figure(f"zero2.bytes.accumulation{accumulation}", value, "x", what, "<= 1.02", facts=facts)


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment() -> dict[str, str]:
    """Two ranks on CPUs, one thread each; this interpreter's commands first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def count_collectives(world_size: int) -> dict[str, dict[str, float]]:
    """Calls and bytes sent by each of torch's collectives from now on; DeepSpeed must not have been started before."""
    calls: dict[str, dict[str, float]] = {}

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            size = max(_bytes(argument) for argument in (*args, *kwargs.values()))  # input or output: the whole
            count = calls.setdefault(name, {"calls": 0, "bytes": 0.0})
            count["calls"] += 1
            count["bytes"] += size * SENT[name](world_size)
            return original(*args, **kwargs)

        return call

    for name in SENT:
        counted = counting(name, getattr(dist, name))
        setattr(dist, name, counted)
        setattr(dist.distributed_c10d, name, counted)  # where coalesced calls come by
    return calls


def _bytes(argument: Any) -> int:
    """Of a tensor or of the tensors in a list."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(argument) if isinstance(leaf, Tensor))


def main(path: Path) -> None:
    """One rank: steps of stage 2 on short clips, the second of each kind counted."""
    ranks = start_process_group(timeout_s=300, start_timeout_s=120)
    calls = count_collectives(ranks.world_size)
    model, settings = mini.graft(4, torch.float32), Stage()
    add_lora(model, Lora(r=R))
    trained = select_trainable(model, 2)
    config = resolve_ds_config(harness.ROOT / "ds_configs" / "zero2.json", settings, "fp32")
    engine = Engine(model, dict.fromkeys(trained, 1e-6), settings, config, ranks)
    batch, seen = mini.batch([0], [20], stack_factor=4), {}
    for accumulation in ACCUMULATIONS:
        for _ in range(2):  # the first step makes buffers
            calls.clear()
            train_step(engine, [batch] * accumulation, range(accumulation), 60 * accumulation, 1.0)
        seen[accumulation] = dict(calls)
    if ranks.is_first:
        trained_bytes = sum(p.numel() * p.element_size() for p in trained.values())
        path.write_text(json.dumps({"trained_bytes": trained_bytes, "calls": seen}))
    engine.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
