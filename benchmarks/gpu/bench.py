"""What the benchmarks of one GPU share: the machine, rounds that wait for it, sizes, and figures from rounds.

Nothing waits for the GPU inside of what is timed but what the timed code itself waits for; each turn ends when the GPU
is done. CPU seconds say little here, so a ratio is published where the best and the middle round of each side tell the
same.
"""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from benchmarks import harness
from benchmarks.harness import Figure, Round, Spent
from benchmarks.shapes import SEVEN_B, SMALL, SMALL_ENCODER, TURBO, TWO_B, EncoderShape, Shape

Size = TypeVar("Size")
NUM_ROUNDS, SMALL_ROUNDS = 5, 1
PROBE_ROWS = 16_384  # positions of a micro-batch


@dataclass(frozen=True)
class Bench:
    """Where and how large: on a GPU at full size, or, to try the benchmark out, on a CPU at next to none."""

    device: torch.device
    small: bool

    def size(self, full: Size, small: Size) -> Size:
        """One of two."""
        return small if self.small else full

    @property
    def seven_b(self) -> Shape:
        """Qwen2-VL-7B."""
        return self.size(SEVEN_B, SMALL)

    @property
    def two_b(self) -> Shape:
        """Qwen2-VL-2B."""
        return self.size(TWO_B, replace(SMALL, tied=True))

    @property
    def turbo(self) -> EncoderShape:
        """The encoder of Whisper large-v3-turbo."""
        return self.size(TURBO, SMALL_ENCODER)

    def rounds(self, sides: Mapping[str, Callable[[], Any]], shape: Shape) -> list[Round]:
        """Sides in turns, after one turn each that does not count, beside GEMMs at the shapes of a layer."""
        for side in sides.values():
            side()
        waited = {name: lambda side=side: self.wait_for(side) for name, side in sides.items()}
        return harness.rounds(waited, self.probe(shape), self.size(NUM_ROUNDS, SMALL_ROUNDS))

    def wait_for(self, call: Callable[[], Any]) -> None:
        """Call, until the GPU is done."""
        call()
        harness.synchronise(self.device)

    def probe(self, shape: Shape) -> Callable[[], Spent]:
        """GEMM at the shapes of a layer, GFLOP/s."""
        rows = self.size(PROBE_ROWS, 64)
        return harness.gemm_probe(shape.layer_shapes, torch.bfloat16, rows, self.device)


def speed(taken: Sequence[Round], side: str, amount: float) -> float:
    """``amount`` a second, in the middle round."""
    return amount / harness.median([r.spent[side].wall for r in taken])


def share_of_gemm(taken: Sequence[Round], side: str, flop: float) -> float:
    """FLOP that were needed a second, over those of the GEMM beside them; the middle round."""
    return harness.median([flop / r.spent[side].wall / (1e9 * r.probe.wall) for r in taken])


def ratio(taken: Sequence[Round], slower: str, faster: str, weight: float = 1.0) -> tuple[float, bool, dict[str, Any]]:
    """(``slower`` / ``faster`` x weight of the middle rounds, whether the best rounds tell the same, the facts)."""
    slow, fast = ([r.spent[side].wall for r in taken] for side in (slower, faster))
    middle, best = (weight * kind(slow) / kind(fast) for kind in (harness.median, min))
    agree = harness.publishable(middle, best, len(taken))
    return middle, agree, {"middle round": middle, "best round": best, "rounds": len(taken)}


def rate(
    name: str, taken: Sequence[Round], side: str, amount: float, unit: str, what: str, target: str = "", **facts: Any
) -> Figure:
    """A figure of speed, not published where the middle round is far from the best."""
    seconds = [r.spent[side].wall for r in taken]
    steady = harness.publishable(harness.median(seconds), min(seconds), len(taken))
    facts = {"best round": amount / min(seconds), "rounds": len(taken), **facts}
    return Figure(name, speed(taken, side, amount), unit, what, target, steady, facts)


def free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def largest(fits: Callable[[int], bool], least: int, most: int, precision: float = 0.03) -> int:
    """The largest number between ``least`` and ``most`` that fits, to within ``precision``; 0 if none does."""
    if not fits(least):
        return 0
    low, high = least, least
    while high < most:  # doubled until it is too large
        high = min(2 * low, most)
        if not fits(high):
            break
        low = high
    while low < high and high - low > max(1, precision * low):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fits_memory(call: Callable[[], Any]) -> bool:
    """Whether a call runs without the GPU's memory running out."""
    try:
        call()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        free()


def machine(device: torch.device) -> dict[str, Any]:
    """The GPU and what drives it."""
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[device.index or 0]
    except FileNotFoundError:
        told = ""
    driver, _, power = told.partition(", ")
    about = torch.cuda.get_device_properties(device)
    return {
        "gpu": about.name,
        "memory": f"{about.total_memory / 2**30:.0f} GiB",
        "driver": driver or "unknown",
        "power limit": power or "unknown",
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
    }
