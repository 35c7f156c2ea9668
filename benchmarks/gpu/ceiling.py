"""What the GPU can do: products at the shapes of a layer, and copies. The divisors of everything else."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import harness
from benchmarks.gpu.bench import Bench, rate, speed
from benchmarks.harness import Figure

RANK = 64  # of the adapters
REPEATS = 20


def report(bench: Bench) -> Iterator[Figure]:
    """Each distinct shape, then a copy."""
    shape = bench.seven_b
    rows, repeats = bench.size(16_384, 64), bench.size(REPEATS, 1)
    sizes = [*dict.fromkeys(shape.layer_shapes), (shape.hidden, RANK), (RANK, shape.hidden)]
    sides = {f"{n} x {m}": product(bench, rows, n, m, repeats) for n, m in sizes}
    elements = bench.size(2**31, 2**20)  # bf16: 4 GiB, many times any cache
    source = torch.ones(elements, dtype=torch.bfloat16, device=bench.device)
    target = torch.empty_like(source)
    sides["copy"] = lambda: [target.copy_(source) for _ in range(repeats)]
    taken = bench.rounds(sides, shape)
    for n, m in sizes:
        what = f"{rows:,} rows x ({n:,}, {m:,}), bf16, random numbers"
        teraflop = 2e-12 * rows * n * m * repeats
        yield rate(f"ceiling.gemm.{n}x{m}", taken, f"{n} x {m}", teraflop, "TFLOP/s", what)
    layer = harness.median([r.probe.wall for r in taken]) / 1e3
    yield Figure("ceiling.layer", layer, "TFLOP/s", f"the seven products of a layer, {rows:,} rows, bf16")
    moved = 2 * source.nbytes * repeats
    yield Figure("ceiling.copy", speed(taken, "copy", moved / 1e12), "TB/s", "copy on the GPU, read and written")


def product(bench: Bench, rows: int, n: int, m: int, repeats: int):  # noqa: ANN201
    """A call that multiplies random numbers ``repeats`` times."""
    x = torch.randn(rows, n, dtype=torch.bfloat16, device=bench.device)
    w = torch.randn(m, n, dtype=torch.bfloat16, device=bench.device)

    def call() -> None:
        for _ in range(repeats):
            torch.nn.functional.linear(x, w)

    return call
