"""What we claim about speed and waste, measured here and now: ``make bench``.

    python -m benchmarks            # all, each in a process of its own, then the report
    python -m benchmarks padding    # one
    python -m benchmarks report     # docs/performance.md from the results that are there

Each writes benchmarks/results/<name>.json. Counts are exact on any machine. Times are taken in turns with what they
are compared with, in one process, and only their ratio is told: machines differ, and are noisy. What one GPU does at
full size is another command's matter: ``python -m benchmarks.gpu``.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

from benchmarks import harness, report

BENCHMARKS = ("padding", "saved", "losses", "zero2", "steps", "encoding", "planning", "reading", "online", "e2e")
PAGE = "report"


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all of them and the report; the last exit code that is not 0."""
    unknown = [name for name in names if name not in (*BENCHMARKS, PAGE)]
    if unknown:
        there = ", ".join((*BENCHMARKS, PAGE))
        print(f"error: no benchmark {', '.join(unknown)}; there are: {there}", file=sys.stderr)
        return 2
    if len(names) != 1:
        return max(alone(name) for name in names or (*BENCHMARKS, PAGE))
    print(f"── {names[0]}", flush=True)
    if names[0] == PAGE:
        print(report.write_page().relative_to(harness.ROOT))
    else:
        run(names[0])
    return 0


def alone(name: str) -> int:
    """One benchmark in a process of its own: none finds the memory, the threads or the ranks of another."""
    return subprocess.run([sys.executable, "-m", "benchmarks", name], cwd=harness.ROOT).returncode


def run(name: str) -> None:
    """One benchmark: its figures on the terminal as they come, and in its file."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # also beside a GPU: these are the CPU's figures
    figures, at = [], harness.commit()
    for figure in importlib.import_module(f"benchmarks.{name}").report():
        print(figure, flush=True)
        figures.append(figure)
    harness.write(name, at, figures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
