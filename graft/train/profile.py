"""A few steps under torch's profiler: a trace of every rank to look at, and a short table of what is dear.

    <run_dir>/profile/rank-0.12.pt.trace.json.gz      rank 0, of the steps that end with step 12

https://ui.perfetto.dev opens such a file, and TensorBoard with torch-tb-profiler finds it below ``--logdir``. The
numbers of a training do not change under the profiler; its speed does a little, in those steps.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from graft.ranks import Ranks
from graft.train.phases import AGREE, PREFIX, READ, REDUCE

LOG = logging.getLogger(__name__)
WAIT, WARMUP, ACTIVE = 2, 1, 3  # steps: the first are like no other, the profiler's own first ones neither
MOST_TOLD = 10
STEP = "ProfilerStep"  # torch's name for what lies between two calls of step()
# Operators by name; the first that fits counts. All other operators are elementwise, copies and sums.
KINDS = {
    "data wait": re.compile(f"{PREFIX}{READ}$"),
    "communication": re.compile(rf"{PREFIX}({REDUCE}|{AGREE})$|^(c10d|nccl|gloo)\b|record_param_comms"),
    "Python": re.compile(f"^({PREFIX}|{STEP})"),
    "attention": re.compile(r"attention|flash|fmha"),
    "product": re.compile(
        r"(::|^)_?(addmm|mm|bmm|baddbmm|matmul|linear|mkldnn_linear|dot)\b|gemm|conv(olution|_depthwise)"
    ),
}
ELEMENTWISE = "elementwise"
SHOWN = ("product", "attention", ELEMENTWISE, "communication", "data wait", "Python")


class Profile:
    """Profiles nothing."""

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, step: int) -> None:
        """Optimiser step number ``step`` is done."""


class StepProfile(Profile):
    """Writes a trace of this rank into ``run_dir`` once, a few steps after the start; rank 0 logs a table of it.

    The first ``passed_over`` steps are not looked at: they are of another kind than those that follow.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, device: torch.device, passed_over: int = 0) -> None:
        self._folder, self._ranks, self._on_gpu = run_dir / "profile", ranks, device.type == "cuda"
        self._step, self._written, self._failed = 0, False, False
        self._passed_over = self._to_pass_over = passed_over
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])],
            schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
            on_trace_ready=self._ready,
            acc_events=True,
        )

    def __enter__(self) -> Profile:
        self._profile.start()
        return self

    def __exit__(self, fault: type[BaseException] | None, *_: object) -> None:
        self._failed = fault is not None
        self._profile.stop()
        if not self._written and not self._failed:
            needed = self._passed_over + WAIT + WARMUP + 1
            LOG.warning("no step was profiled: that takes %d steps after the start", needed)

    def step(self, step: int) -> None:
        """Optimiser step number ``step`` is done. Every rank must call: they write at the same step."""
        self._step = step
        if self._to_pass_over:
            self._to_pass_over -= 1
        else:
            self._profile.step()

    def _ready(self, done: profile) -> None:
        if not self._failed:  # else other ranks may not come
            self._ranks.together(lambda: self._write(done))
            self._written = True

    def _write(self, done: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank-{self._ranks.rank}.{self._step}.pt.trace.json.gz"
        partly = path.with_name(f".{path.name}")  # the ending is the profiler's sign to compress
        done.export_chrome_trace(str(partly))
        partly.replace(path)
        if self._ranks.is_first:
            LOG.info("profile of the steps to %d in %s\n%s", self._step, path, told(done.key_averages(), self._on_gpu))


def told(averages: Sequence[Any], on_gpu: bool) -> str:
    """The shares of the time by kind of work, and the dearest operators, as a few lines.

    Args:
        averages: ``torch.profiler.profile.key_averages()``.
        on_gpu: count the device's time. What then is missing from the whole is the device waiting for the host.
    """
    operators = [one for one in averages if one.device_type == DeviceType.CPU]  # they carry their kernels' time
    steps = [one for one in operators if one.key.startswith(STEP)]
    num_steps, whole_us = sum(one.count for one in steps), sum(one.cpu_time_total for one in steps)
    spent_us = {one.key: one.self_device_time_total if on_gpu else one.self_cpu_time_total for one in operators}
    if on_gpu:  # the wait for data is the host's
        spent_us |= {one.key: one.cpu_time_total for one in operators if kind_of(one.key) == "data wait"}
    shares: Counter[str] = Counter()
    for name, us in spent_us.items():
        shares[kind_of(name)] += us / whole_us
    lines = [
        f"{whole_us / num_steps / 1000:.1f} ms a step: " + ", ".join(f"{kind} {shares[kind]:.0%}" for kind in SHOWN)
    ]
    calls = {one.key: one.count / num_steps for one in operators}
    for name in sorted((n for n in spent_us if not n.startswith(STEP)), key=spent_us.get, reverse=True)[:MOST_TOLD]:
        us = spent_us[name]
        lines.append(f"{us / whole_us:6.1%} {us / num_steps / 1000:9.2f} ms {calls[name]:7.0f} x  {name}")
    return "\n".join(lines)


def kind_of(operator: str) -> str:
    """The kind of work that an operator or range of this name does."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(operator)), ELEMENTWISE)
