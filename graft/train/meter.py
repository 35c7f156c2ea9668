"""What happened since the last logged step, added up over ranks and divided once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from graft.data.collate import Batch
from graft.data.progress import clock
from graft.lengths import ENCODER_FRAMES_PER_SECOND
from graft.ranks import Ranks
from graft.train.step import StepResult

# Dense bf16 peaks of the makers' data sheets, FLOP/s, by a part of the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


@dataclass
class StepMeter:
    """Counts of the steps since :meth:`scalars` was last called, on this rank.

    flops_per_token: forward and backward of one position, for the model FLOP utilisation; 0 leaves it out.
    """

    ranks: Ranks
    device: torch.device
    flops_per_token: float = 0.0
    _started: float = field(default_factory=time.perf_counter)
    _losses: list[torch.Tensor] = field(default_factory=list)
    _counts: list[float] = field(default_factory=lambda: [0.0] * 3)
    _waited_s: float = 0.0

    def add(self, result: StepResult, micro_batches: Sequence[Batch], waited_s: float) -> None:
        """Count one step; nothing here waits for the device."""
        self._losses.append(result.loss_share)
        frames = sum(batch.num_frames for batch in micro_batches)
        positions = sum(batch.num_positions for batch in micro_batches)
        padding = sum(batch.num_padding for batch in micro_batches)
        for i, count in enumerate((frames, positions - padding, padding)):
            self._counts[i] += count
        self._waited_s += waited_s

    def scalars(self, result: StepResult, learning_rate: float) -> dict[str, float]:
        """Tags and values of the interval, the same on every rank; the counts begin anew."""
        num_steps, loss = len(self._losses), float(torch.stack(self._losses).sum())
        elapsed = time.perf_counter() - self._started
        loss, frames, tokens, padding, waited = self.ranks.sum([loss, *self._counts, self._waited_s])
        scalars = {
            "train/loss": loss / num_steps,
            "train/lr": learning_rate,
            "train/grad_norm": result.grad_norm,
            "train/audio_seconds_per_second": frames / ENCODER_FRAMES_PER_SECOND / elapsed,
            "train/tokens_per_second": tokens / elapsed,
            "train/padding": padding / max(1.0, tokens + padding),
            "train/data_wait": waited / self.ranks.world_size / elapsed,
        }
        peak = _peak_flops(self.device) * self.ranks.world_size
        if peak and self.flops_per_token:
            scalars["train/mfu"] = tokens * self.flops_per_token / elapsed / peak
        self._restart()
        return scalars

    def _restart(self) -> None:
        self._started, self._losses, self._counts, self._waited_s = time.perf_counter(), [], [0.0] * 3, 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Do not count the time inside: it goes into an evaluation or a checkpoint."""
        paused = time.perf_counter()
        yield
        self._started += time.perf_counter() - paused


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
    return (
        f"step {step:>6}/{last_step}  loss {scalars['train/loss']:7.4f}  lr {scalars['train/lr']:.2e}  "
        f"norm {scalars['train/grad_norm']:7.3f}  {scalars['train/audio_seconds_per_second']:7.0f} audio-s/s  "
        f"padding {scalars['train/padding']:5.1%}  wait {scalars['train/data_wait']:5.1%}  {left} left"
    )


def flops_per_token(model: nn.Module) -> float:
    """Forward and backward of one position through frozen linear layers: 2 + 2 FLOP per weight.

    No weight gradients are made for what is frozen, hence 4N and not the usual 6N (arXiv 2001.08361); attention, some
    percent at these lengths, and the logits, made at label positions only, are left out.
    """
    layers = model.model.language_model.layers
    return 4.0 * sum(weight.numel() for weight in layers.parameters() if weight.ndim == 2)


def _peak_flops(device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), 0.0)
