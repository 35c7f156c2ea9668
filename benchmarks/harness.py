"""What benchmarks share: rounds in turns, a GEMM probe in each, the rule of agreement, and results as files.

A ratio of times is published only where wall clock and process CPU time tell the same over enough undisturbed rounds.
"""

from __future__ import annotations

import functools
import json
import operator
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "webdataset", "numpy")
FEWEST_ROUNDS = 5  # of a published ratio
NUM_ROUNDS = int(os.environ.get("BENCH_ROUNDS", FEWEST_ROUNDS))  # fewer are for trying out
QUIET = 0.7  # rounds whose probe is below this share of the best were disturbed and are dropped
AGREEMENT = 0.1  # wall and CPU ratios must be this close
CPU = torch.device("cpu")
T = TypeVar("T")
_SAY = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Figure:
    """One number. ``target`` is such as ``>= 22``; not ``published``: clocks disagree, or rounds are few."""

    name: str
    value: float
    unit: str
    what: str
    target: str = ""
    published: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if not self.target:
            return None
        sign, bound = self.target.split()
        return self.published and _SAY[sign](self.value, float(bound))

    def __str__(self) -> str:
        verdict = f"  (target {self.target}: {'met' if self.met else 'MISSED'})" if self.target else ""
        value = (
            f"{self.value:,.4g} {self.unit}".strip()
            if self.published
            else "NOT PUBLISHED: clocks disagree, or few rounds"
        )
        facts = "; ".join(f"{name} {short(fact)}" for name, fact in self.facts.items())
        return f"{self.name}  {value}{verdict}  {self.what}" + (f" [{facts}]" if facts else "")


@dataclass(frozen=True)
class Spent:
    """Seconds by the wall clock and seconds of CPU, over all threads."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Round:
    """One turn of every side, and the speed of the probe beside them in GFLOP/s (by wall and by CPU second)."""

    spent: Mapping[str, Spent]
    probe: Spent


def timed(call: Callable[[], Any]) -> Spent:
    """What one call takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def in_one_thread(call: Callable[[], T]) -> Callable[[], T]:
    """The same call with one thread."""

    def alone() -> T:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return call()
        finally:
            torch.set_num_threads(threads)

    return alone


def rounds(
    sides: Mapping[str, Callable[[], Any]], probe: Callable[[], Spent], num_rounds: int = NUM_ROUNDS
) -> list[Round]:
    """Every side once a round, each round beginning with another one, until enough were undisturbed; at most twice."""
    names, taken = list(sides), []
    for number in range(2 * num_rounds):
        turn = names[number % len(names) :] + names[: number % len(names)]
        speed = probe()
        taken.append(Round({name: timed(sides[name]) for name in turn}, speed))
        if len(undisturbed(taken)) == num_rounds:
            break
    return undisturbed(taken)


def undisturbed(taken: Sequence[Round]) -> list[Round]:
    """Rounds whose probe was not far below the best."""
    best = max(r.probe.wall for r in taken)
    return [r for r in taken if r.probe.wall >= QUIET * best]


def ratio(taken: Sequence[Round], slower: str, faster: str, weight: float = 1.0) -> tuple[float, bool, dict[str, Any]]:
    """(best time of ``slower`` / that of ``faster`` x weight, whether it may be published, the facts behind it)."""
    wall, cpu = (
        weight
        * min(getattr(r.spent[slower], clock) for r in taken)
        / min(getattr(r.spent[faster], clock) for r in taken)
        for clock in ("wall", "cpu")
    )
    return wall, publishable(wall, cpu, len(taken)), {"wall": wall, "cpu": cpu, "rounds": len(taken)}


def publishable(wall: float, cpu: float, num_rounds: int) -> bool:
    """Whether both clocks tell the same ratio, over enough rounds."""
    return num_rounds >= FEWEST_ROUNDS and abs(wall - cpu) <= AGREEMENT * min(wall, cpu)


def busiest(call: Callable[[], Any], most: int = 6) -> str:
    """The operations that take the largest shares of a call's time, by torch's profiler, without what they call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    spent = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in profile.key_averages()}
    largest = sorted(spent, key=spent.__getitem__, reverse=True)[:most]
    return ", ".join(f"{name} {spent[name] / sum(spent.values()):.0%}" for name in largest)


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gemm_probe(
    shapes: Sequence[tuple[int, int]], dtype: torch.dtype, rows: int = 1024, device: torch.device = CPU
) -> Callable[[], Spent]:
    """A probe: GFLOP/s of (``rows``, in) x (in, out) products over all ``shapes``, the best of three."""
    make = functools.partial(torch.randn, dtype=dtype, device=device)
    pairs = [(make(rows, n), make(m, n)) for n, m in shapes]
    gigaflop = 2e-9 * rows * sum(n * m for n, m in shapes)

    def products() -> None:
        for x, w in pairs:
            torch.nn.functional.linear(x, w)
        synchronise(device)

    def probe() -> Spent:
        spent = [timed(products) for _ in range(3)]
        return Spent(gigaflop / min(s.wall for s in spent), gigaflop / min(s.cpu for s in spent))

    return probe


@functools.cache
def fast_dtype() -> torch.dtype:
    """bf16 where this CPU multiplies faster in it than in fp32, else fp32."""
    speed = {dtype: gemm_probe([(448, 2368)], dtype, rows=256)().wall for dtype in (torch.bfloat16, torch.float32)}
    return max(speed, key=speed.__getitem__)


class WithoutProducts(TorchDispatchMode):
    """Matrix products of the right shape and of no value: what is counted does not depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            return left.new_zeros(left.shape[0], right.shape[1])
        return func(*args, **(kwargs or {}))


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def write(
    benchmark: str, at: str, figures: Sequence[Figure], folder: Path = RESULTS, on: Mapping[str, Any] | None = None
) -> Path:
    """One benchmark's figures with what they were measured on, ``at`` that commit; ``on`` None: this CPU."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"benchmark": benchmark, "commit": at, "versions": versions(), "machine": on or machine()}
    told = [{**asdict(figure), "met": figure.met} for figure in figures]
    path = folder / f"{benchmark}.json"
    path.write_text(json.dumps({**found, "figures": told}, indent=1) + "\n")
    return path


def commit() -> str:
    """The commit of the working tree, with a + if files differ from it; results and their report do not count.

    BENCH_COMMIT names it on a machine that has a copy of the tree without its history.
    """
    if named := os.environ.get("BENCH_COMMIT"):
        return named
    head = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs/performance.md")
    return head + ("+" if changed else "")


def versions() -> dict[str, str]:
    """Of Python and the packages that were timed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def machine() -> dict[str, Any]:
    """CPU, its vector instructions, cores and threads in use."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return {
        "cpu": model[1] if model else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "precision": str(fast_dtype()).removeprefix("torch."),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def short(fact: Any) -> str:
    """A fact in a few characters."""
    return f"{fact:,.4g}" if isinstance(fact, float) else str(fact)
