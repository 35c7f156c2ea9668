"""What we claim about speed on one GPU, measured there, with random weights of the true shapes.

    python -m benchmarks.gpu                    # all, each in a process of its own; about 20 minutes on an H200
    python -m benchmarks.gpu step1.7b enc.full  # some
    python -m benchmarks.gpu --small            # all, tiny and on the CPU: does the code run? Nothing is kept

Each writes benchmarks/results/gpu.<name>.json, and ``python -m benchmarks report`` puts them on the page. DeepSpeed is
used where it is installed; no extension is compiled. BENCH_COMMIT names the commit where there is no git history.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks import harness
from benchmarks.gpu import alignment, bench, ceiling, encoding, feeding, memory, steps, twin
from benchmarks.gpu.bench import Bench
from benchmarks.harness import Figure

BENCHMARKS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "ceiling": ceiling.report,
    "step1.7b": lambda where: steps.stage_1(where, "7b"),
    "step2.7b": lambda where: steps.stage_2(where, "7b"),
    "nemo_twin": twin.report,
    "step1.2b": lambda where: steps.stage_1(where, "2b"),
    "step2.2b": lambda where: steps.stage_2(where, "2b"),
    "align.7b": alignment.report,
    "enc.full": encoding.full,
    "enc.trimmed": encoding.trimmed,
    "mem": memory.report,
    "feed": feeding.waiting,
    "recipe": feeding.recipe,
}


def main(names: list[str], small: bool) -> int:
    """Run the named benchmarks, or all; the last exit code that is not 0."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        return refuse(f"no benchmark {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}")
    if not small and not torch.cuda.is_available():
        return refuse("no GPU is seen here: run this on a machine with one, or try it out with --small")
    if not small and len(names) != 1:
        return max(alone(name) for name in names or BENCHMARKS)
    for name in names or BENCHMARKS:
        run(name, small)
    return 0


def alone(name: str) -> int:
    """One benchmark in a process of its own: none finds what another has left on the GPU, or dies with it."""
    return subprocess.run([sys.executable, "-m", "benchmarks.gpu", name], cwd=harness.ROOT).returncode


def run(name: str, small: bool) -> None:
    """One benchmark: its figures on the terminal as they come, and, of a GPU, in its file."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # micro-batches of many sizes
    if small:
        os.environ["DS_ACCELERATOR"] = "cpu"
    where = Bench(torch.device("cpu") if small else torch.device("cuda", 0), small)
    figures, started = [], time.perf_counter()
    for figure in BENCHMARKS[name](where):
        figures.append(replace(figure, target="") if small else figure)
        print(figures[-1], flush=True)
    print(f"── {name}: {time.perf_counter() - started:.0f} s{', small: nothing is kept' if small else ''}", flush=True)
    if not small:
        harness.write(f"gpu.{name}", harness.commit(), figures, on=bench.machine(where.device))


def refuse(what: str) -> int:
    """The user's mistake."""
    print(f"error: {what}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--small", action="store_true", help="tiny, on the CPU, nothing is kept")
    given = parser.parse_args()
    sys.exit(main(given.names, given.small))
