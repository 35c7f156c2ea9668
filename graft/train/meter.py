"""What happened since the last logged step, added up over ranks and divided once; and what bound the whole run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from graft.data.collate import Batch
from graft.data.progress import clock
from graft.lengths import ENCODER_FRAMES_PER_SECOND
from graft.ranks import Ranks
from graft.train import phases as ph
from graft.train.phases import Phases
from graft.train.step import StepResult
from graft.train.utilisation import ModelFlops, Peak

NOTABLE = 0.1  # share of the time from which on a hint is worth its line


@dataclass
class StepMeter:
    """Counts of the steps since :meth:`scalars` was last called, on this rank.

    flops, peak: what the model needs and what this rank's device could do; None leaves out the utilisation.
    """

    ranks: Ranks
    device: torch.device
    flops: ModelFlops | None = None
    peak: Peak | None = None
    phases: Phases = field(init=False)
    _started: float = field(default_factory=time.perf_counter)
    _losses: list[torch.Tensor] = field(default_factory=list)
    _counts: list[float] = field(default_factory=lambda: [0.0] * 4)
    _waited_s: float = 0.0
    _run_flop: float = 0.0

    def __post_init__(self) -> None:
        self.phases = Phases(self.device)

    def add(self, result: StepResult, micro_batches: Sequence[Batch], waited_s: float) -> None:
        """Count one step; nothing here waits for the device."""
        self._losses.append(result.loss_share)
        frames = sum(batch.num_frames for batch in micro_batches)
        positions = sum(batch.num_positions for batch in micro_batches)
        padding = sum(batch.num_padding for batch in micro_batches)
        flop = self.flops.of(micro_batches) if self.flops else 0.0
        for i, count in enumerate((frames, positions - padding, padding, flop)):
            self._counts[i] += count
        self._waited_s += waited_s
        self._run_flop += flop

    def scalars(self, result: StepResult, learning_rate: float) -> dict[str, float]:
        """Tags and values of the interval, the same on every rank; the counts begin anew."""
        num_steps, loss = len(self._losses), float(torch.stack(self._losses).sum())
        elapsed = time.perf_counter() - self._started
        self.phases.read()  # the loss was waited for: this costs no more than the update behind it
        peak = self.peak.flops if self.peak else 0.0
        sums = self.ranks.sum([loss, *self._counts, self._waited_s, peak])
        loss, frames, tokens, padding, flop, waited, peak = sums
        scalars = {
            "train/loss": loss / num_steps,
            "train/lr": learning_rate,
            "train/grad_norm": float(result.grad_norm),
            "train/audio_seconds_per_second": frames / ENCODER_FRAMES_PER_SECOND / elapsed,
            "train/tokens_per_second": tokens / elapsed,
            "train/padding": padding / max(1.0, tokens + padding),
            "train/data_wait": waited / self.ranks.world_size / elapsed,
        }
        if peak and flop:
            scalars["train/mfu"] = flop / elapsed / peak
        self._restart()
        return scalars

    def _restart(self) -> None:
        self._started, self._losses, self._counts, self._waited_s = time.perf_counter(), [], [0.0] * 4, 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Do not count the time inside: it goes into an evaluation or a checkpoint."""
        paused = time.perf_counter()
        yield
        self._started += time.perf_counter() - paused

    def verdict(self) -> str:
        """What bound the run so far, in one line, the same on every rank. Every rank must call."""
        self.phases.read()
        peak = self.peak.flops if self.peak else 0.0
        mine = [self.phases.spent_s[phase] for phase in ph.PHASES]
        *spent, flop, peak = self.ranks.sum([*mine, self._run_flop, peak])
        spent_s = dict(zip(ph.PHASES, (seconds / self.ranks.world_size for seconds in spent), strict=True))
        training_s = sum(spent_s.values()) - spent_s[ph.SAVE] - spent_s[ph.EVALUATE]
        mfu = flop / training_s / peak if peak and training_s else None
        return what_bound(spent_s, self.ranks.world_size, mfu)


def what_bound(spent_s: Mapping[str, float], world_size: int, mfu: float | None) -> str:
    """One line from the seconds of each of ``PHASES``, a mean over the ranks.

    What is waited for in READ is the slowest rank's data, in REDUCE the slowest rank's computing.
    """
    total = max(sum(spent_s[phase] for phase in ph.PHASES), 1e-9)

    def share(*phases: str) -> float:
        return sum(spent_s[phase] for phase in phases) / total

    between = (ph.REDUCE, ph.AGREE)  # nobody to wait for where there is one rank
    computing, data = share(ph.FORWARD, ph.BACKWARD), share(ph.READ)
    others = share(*between) if world_size > 1 else 0.0
    pauses = share(ph.SAVE, ph.EVALUATE)
    updating = share(ph.UPDATE, *([] if world_size > 1 else between))
    bounds = {"computing": computing, "data": data, "other ranks": others, "saving and evaluating": pauses}
    bounds["updating"] = updating
    told = f"bound by {max(bounds, key=bounds.get)}: {computing:.0%} of the time in forward and backward"
    told += f" (MFU {mfu:.2f})" if mfu is not None else ""
    told += f", {data:.0%} waiting for data, "
    told += f"{others:.0%} for other ranks, " if world_size > 1 else ""
    told += f"{updating:.0%} updating, {pauses:.0%} saving and evaluating"
    return "; ".join([told, *(HINTS[what] for what, part in bounds.items() if what in HINTS and part >= NOTABLE)])


HINTS = {
    "data": "raise data.prefetch, or move the shards to a faster disk",
    "other ranks": "raise global_batch_size and micro_batch_tokens, so that a step is longer than its reduction, and "
    "see with --profile whether one rank is slow",
    "saving and evaluating": "raise run.checkpoint_every and evaluation.every, or lower evaluation.max_utterances",
}


@dataclass
class Clock:
    """Time left, from the steps of this start only."""

    first_step: int
    last_step: int
    _started: float = field(default_factory=time.perf_counter)

    def left(self, step: int) -> str:
        """``12:34`` at the pace so far."""
        per_step = (time.perf_counter() - self._started) / max(1, step - self.first_step)
        return clock(per_step * (self.last_step - step))


def console_line(step: int, last_step: int, scalars: dict[str, float], left: str) -> str:
    """One aligned line for people."""
    mfu = f"mfu {scalars['train/mfu']:5.1%}  " if "train/mfu" in scalars else ""
    return (
        f"step {step:>6}/{last_step}  loss {scalars['train/loss']:7.4f}  lr {scalars['train/lr']:.2e}  "
        f"norm {scalars['train/grad_norm']:7.3f}  {scalars['train/audio_seconds_per_second']:7.0f} audio-s/s  "
        f"{scalars['train/tokens_per_second']:7.0f} tok/s  padding {scalars['train/padding']:5.1%}  "
        f"wait {scalars['train/data_wait']:5.1%}  {mfu}{left} left"
    )
