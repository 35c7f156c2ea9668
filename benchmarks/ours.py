"""Our own side of a comparison: what ``launch/train.py`` runs, ``train_step`` on the DeepSpeed engine, one rank.

Where DeepSpeed is not installed the same step runs on :class:`PlainEngine`, and figures say so: one rank reduces
nothing, so what is left out is DeepSpeed's own work.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness, mini
from graft.data.collate import Batch
from graft.model.grafted import AudioGraftForConditionalGeneration
from graft.model.trainable import select_trainable
from graft.ranks import Ranks
from graft.recipe import Precision, Stage
from graft.train.engine import Engine, resolve_ds_config, start_process_group
from graft.train.step import train_step

ENGINES = {True: "DeepSpeed ZeRO-2", False: "a plain loop, without DeepSpeed"}
PRECISIONS: dict[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float32: "fp32"}


class PlainEngine:
    """The engine's part of a step on one device, by torch alone: AdamW, clipping, skipped where not finite."""

    def __init__(self, model: nn.Module, rate: float, settings: Stage, precision: Precision) -> None:
        self.model, self.settings, self.ranks, self.precision = model, settings, Ranks(), precision
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.device, self._peak = self.trained[0].device, rate
        self.adam = torch.optim.AdamW(
            self.trained, rate, settings.betas, settings.eps, weight_decay=settings.weight_decay
        )

    def __call__(self, **inputs: Any) -> Any:
        """The model's forward pass, under autocast for bf16."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(**inputs)

    @contextlib.contextmanager
    def one_reduction(self) -> Iterator[None]:
        """There is nobody to reduce with."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``."""
        loss.backward()

    def step(self, share_of_peak: float) -> tuple[float, bool]:
        """Clip and update; the gradient norm, and whether the update was made."""
        self.adam.param_groups[0]["lr"] = self._peak * share_of_peak
        norm = float(nn.utils.clip_grad_norm_(self.trained, self.settings.max_grad_norm))
        applied = norm < float("inf")  # not so for a NaN
        if applied:
            self.adam.step()
        self.adam.zero_grad()
        return norm, applied

    def close(self) -> None:
        """Let gradients and moments go."""
        self.adam.zero_grad()
        self.adam.state.clear()


class Ours:
    """Our step of a stage over given micro-batches; the model's adapters are there already in stage 2."""

    def __init__(
        self,
        model: AudioGraftForConditionalGeneration,
        stage: int,
        batches: Sequence[Batch],
        plain: bool = not importlib.util.find_spec("deepspeed"),
    ) -> None:
        self.model, self.batches, self.engine_name = model, batches, ENGINES[not plain]
        self.precision = PRECISIONS[model.dtype]
        self.num_clips, self.num_labels = mini.clips_and_labels(batches)
        trained, settings = select_trainable(model, stage), Stage()
        self.projector = model.model.multi_modal_projector
        if plain:
            self.engine: Any = PlainEngine(model, mini.RATE, settings, self.precision)
            return
        ranks = start_process_group(timeout_s=600, start_timeout_s=60)
        config = resolve_ds_config(harness.ROOT / "ds_configs" / "zero2.json", settings, self.precision)
        self.engine = Engine(model, dict.fromkeys(trained, mini.RATE), settings, config, ranks)

    def step(self) -> None:
        """One optimiser step."""
        self.step_on(self.batches, self.num_labels)

    def step_on(self, batches: Sequence[Batch], num_labels: int) -> None:
        """One optimiser step over other micro-batches."""
        train_step(self.engine, batches, range(len(batches)), num_labels, 1.0)

    def loss(self, batch: Batch) -> Tensor:
        """A micro-batch's share of the step's loss."""
        batch, device = batch.to(self.model.device), self.model.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(**batch.model_inputs(), num_items_in_batch=self.num_labels, use_cache=False).loss


@torch.no_grad()
def fill_lora_b(model: nn.Module) -> None:
    """Fresh adapters add nothing: let them count before two models are compared."""
    chance = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=chance) * 0.02)
