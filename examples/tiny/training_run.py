"""The loop that all pretrainings share: learning rate, update, progress lines with time left, checkpoint, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from muon import Muon

LOG_EVERY_S = 10.0
CHECKPOINT_EVERY_S = 120.0
MUON_TO_ADAM = 10.0  # Muon's learning rate for each of AdamW's: then both move a weight about as far
NOT_HIDDEN = ("embed", "head", "proj_out")  # parameters that stand at the model's ends are not for Muon

Losses = dict[str, torch.Tensor]
"""Scalars by name, weighted already: their sum is minimised."""


@dataclass
class TrainingRun:
    """One pretraining: what is trained, for how long, and where its checkpoint is."""

    model: nn.Module
    checkpoint: Path
    steps: int
    peak_lr: float
    warmup_steps: int
    report: Callable[[str], None]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = field(init=False)

    def __post_init__(self) -> None:
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        hidden = {name: weight for name, weight in trained.items() if is_hidden(name, weight)}
        others = [weight for name, weight in trained.items() if name not in hidden]
        adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01)
        self.optimizers = [(Muon(hidden.values(), lr=0.0), MUON_TO_ADAM), (adam, 1.0)]

    def train(self, losses_of: Callable[[int], Losses], after: Callable[[int], None] = lambda done: None) -> None:
        """Take every step that the checkpoint has not seen; ``after`` is called with the number of steps done."""
        first = self.resume()
        progress = Progress(first, self.steps, self.report)
        saved = time.monotonic()
        for step in range(first, self.steps):
            progress.add(step, self.update(losses_of(step), step))
            if time.monotonic() - saved > CHECKPOINT_EVERY_S:
                self.save(step + 1)
                saved = time.monotonic()
            after(step + 1)
        self.checkpoint.unlink(missing_ok=True)

    def update(self, losses: Losses, step: int) -> dict[str, float]:
        """One optimiser step; the losses as numbers."""
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, scale in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = scale * cosine_lr(step, self.steps, self.peak_lr, self.warmup_steps)
            optimizer.step()
        self.model.zero_grad()
        return {name: loss.item() for name, loss in losses.items()}

    def save(self, done: int) -> None:
        """Write weights, optimiser and position, whole or not at all."""
        partial = self.checkpoint.with_suffix(".partial")
        states = [optimizer.state_dict() for optimizer, _ in self.optimizers]
        torch.save({"step": done, "model": self.model.state_dict(), "optimizers": states}, partial)
        partial.replace(self.checkpoint)

    def resume(self) -> int:
        """The number of steps done, 0 where there is no checkpoint."""
        if not self.checkpoint.exists():
            return 0
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for (optimizer, _), stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.report(f"going on from step {state['step']} of {self.checkpoint}")
        return state["step"]


@dataclass
class Progress:
    """A line every ``LOG_EVERY_S``: step, mean losses since the last line, time left."""

    first: int
    steps: int
    report: Callable[[str], None]
    begin: float = field(default_factory=time.monotonic)
    logged: float = field(default_factory=time.monotonic)
    losses: dict[str, list[float]] = field(default_factory=dict)

    def add(self, step: int, losses: dict[str, float]) -> None:
        """Note the losses of a step and report when it is time."""
        for name, loss in losses.items():
            self.losses.setdefault(name, []).append(loss)
        now = time.monotonic()
        if now - self.logged < LOG_EVERY_S:
            return
        left = (now - self.begin) / (step + 1 - self.first) * (self.steps - step - 1)
        means = "  ".join(f"{name} {sum(values) / len(values):.3f}" for name, values in self.losses.items())
        self.report(f"step {step + 1}/{self.steps}  {means}  {left:.0f} s left")
        self.logged, self.losses = now, {}


def is_hidden(name: str, weight: torch.nn.Parameter) -> bool:
    """Whether a parameter is a matrix between two hidden layers, which Muon is for."""
    return weight.ndim == 2 and not any(part in name for part in NOT_HIDDEN)


def cosine_lr(step: int, steps: int, peak: float, warmup_steps: int) -> float:
    """Linear warm-up, then a cosine to a hundredth of ``peak``."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
