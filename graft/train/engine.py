"""The DeepSpeed engine, reduced to what training needs. The only file that imports deepspeed.

Four decisions, each measured with DeepSpeed 0.19.8 on two ranks:

- Trained weights are fp32 (they are their own masters), frozen ones keep the recipe's precision. With ``bf16.enabled``
  alone, 63 gradients of 0.001 after one of 1 are all lost; this way none is.
- The forward pass runs under the autocast of DeepSpeed's ``torch_autocast`` section. One opened around the engine it
  turns off, with a warning, but only where torch speaks of CUDA: on CPUs nobody would notice. No module is on the list
  of those whose gradients travel in bf16.
- ``coalesce_grad_reduction`` around a step's micro-batches: one reduction per step, not one per micro-batch.
- The scaling is ours. Ranks are averaged by ZeRO, so a loss is multiplied by ``world_size`` and divided by the label
  tokens of the whole step (see ``graft/train/step.py``).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from graft.ranks import Ranks, on_gpu, start
from graft.recipe import Precision, Stage

OWNED_BY_THE_RECIPE = {
    "train_batch_size": "stage1.global_batch_size",
    "train_micro_batch_size_per_gpu": "stage1.micro_batch_tokens",
    "gradient_accumulation_steps": "stage1.global_batch_size and stage1.micro_batch_tokens",
    "gradient_clipping": "stage1.max_grad_norm",
    "optimizer": "stage1.learning_rate, betas, eps, weight_decay",
    "scheduler": "stage1.warmup_steps, max_steps, min_lr_ratio",
    "bf16": "run.precision",
    "fp16": "run.precision",
    "torch_autocast": "run.precision",
    "data_types": "run.precision",
}
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim.AdamW's names


class Engine:
    """A model under ZeRO whose gradients are reduced once per optimiser step.

    Args:
        model: trained parameters in fp32 and requiring gradients; all others frozen.
        learning_rates: peak learning rate of each trained parameter, by name; groups are made of equal ones.
        settings: the stage's optimiser settings.
        ds_config: what :func:`resolve_ds_config` returned.
        ranks: this process among all.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rates: Mapping[str, float],
        settings: Stage,
        ds_config: dict[str, Any],
        ranks: Ranks,
    ) -> None:
        import deepspeed

        if not on_gpu():  # an operator for inference alone, a minute of C++ compiler at the first start
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.ranks = ranks
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert set(self.trained) == set(learning_rates), "what trains and what has a learning rate differ"
        assert all(p.dtype == torch.float32 for p in self.trained.values()), "trained parameters must be fp32"
        groups = _groups(self.trained, learning_rates)
        self._peaks = [group["lr"] for group in groups]
        adam = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=model, optimizer=adam, config=ds_config)
        _let_all_groups_time_out_alike()
        self._create_moments()

    @property
    def model(self) -> nn.Module:
        """The model itself, for evaluation."""
        return self._engine.module

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        return torch.device(self._engine.device)

    def __call__(self, **inputs: Any) -> Any:
        """The model's forward pass, in the precision that the configuration asks for."""
        return self._engine(**inputs)

    @contextlib.contextmanager
    def one_reduction(self) -> Iterator[None]:
        """All backward passes inside are added up locally and reduced over the ranks once, at the end."""
        with self._engine.coalesce_grad_reduction():
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``."""
        self._engine.backward(loss)

    def step(self, share_of_peak: float) -> tuple[Tensor | float, bool]:
        """Clip and update; gradients are cleared.

        Whether all gradients are finite is agreed on in one small collective and read on the host, which waits here
        for a GPU; the norm is read by whoever needs it.

        Returns:
            The gradient norm before clipping, and whether the update was made: a gradient that is not finite on
            any rank skips it on all of them.
        """
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * share_of_peak
        self._engine.step()
        return self._engine.get_global_grad_norm(), self._engine.was_step_applied()

    def optimizer_state(self) -> dict[str, Tensor]:
        """Adam's moments of every trained parameter, whole, named ``<moment>/<parameter>``. Every rank must call."""
        from deepspeed.utils import safe_get_full_optimizer_state

        return {
            key: safe_get_full_optimizer_state(self.trained[name], moment).cpu()
            for key in self.optimizer_state_keys()
            for moment, _, name in [key.partition("/")]
        }

    def optimizer_state_keys(self) -> list[str]:
        """Names of :meth:`optimizer_state`."""
        return [f"{moment}/{name}" for name in self.trained for moment in MOMENTS]

    def load_optimizer_state(self, state: Mapping[str, Tensor], num_updates: int) -> None:
        """Set Adam's moments and update count; each rank takes its own partition, whatever their number."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for partition in self._optimizer.single_partition_of_fp32_groups:
            self._optimizer.optimizer.state[partition]["step"].fill_(num_updates)
        for key in self.optimizer_state_keys():
            moment, _, name = key.partition("/")
            parameter = self.trained[name]
            safe_set_full_optimizer_state(parameter, state[key].to(parameter.device, torch.float32), moment)

    def _create_moments(self) -> None:
        # AdamW makes its state at the first update. A resumed run needs it before; and ZeRO, left to itself, links
        # the state to the parameters after the first *group's* update, so that a second group's is never found.
        for partition in self._optimizer.single_partition_of_fp32_groups:
            self._optimizer.optimizer.state[partition] = {
                "step": torch.tensor(0.0),
                **{moment: torch.zeros_like(partition) for moment in MOMENTS},
            }
        self._optimizer._lazy_init_hp_params_optimizer_state()

    def close(self) -> None:
        """Free the engine's buffers."""
        self._engine.destroy()


def start_process_group(timeout_s: float, start_timeout_s: float) -> Ranks:
    """Join the other ranks of a training run: gradients by NCCL between GPUs, by gloo between CPUs.

    Raises:
        ValueError: when ranks do not come within ``start_timeout_s``, or this one has no GPU of its own.
    """
    if not on_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares a warning on every rank
        return start(timeout_s=timeout_s, start_timeout_s=start_timeout_s, even_alone=True)
    torch.cuda.set_device(Ranks.from_environment().device())
    # Counts and texts go through the CPU's backend: they must not wait for the GPU.
    backend = "cpu:gloo,cuda:nccl"
    return start(backend=backend, timeout_s=timeout_s, start_timeout_s=start_timeout_s, even_alone=True)


def resolve_ds_config(path: str | Path, settings: Stage, precision: Precision) -> dict[str, Any]:
    """Read a DeepSpeed JSON and add what the recipe owns; ``precision`` is that of the forward pass.

    Raises:
        ValueError: if the file is missing, is not JSON, or sets what the recipe owns.
    """
    config = _read_json(Path(path))
    twice = [f"'{key}' (the recipe's {owner})" for key, owner in OWNED_BY_THE_RECIPE.items() if key in config]
    if twice:
        raise ValueError(f"{path} sets {', '.join(twice)}. Take it out there: a number has one owner, the recipe.")
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2):
        raise ValueError(f"{path} asks for ZeRO stage {stage!r}, expected 1 or 2: frozen weights are not partitioned")
    return {
        **config,
        "train_micro_batch_size_per_gpu": 1,  # a formality: batches are ours, DeepSpeed only needs a number
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "steps_per_print": 1_000_000_000,  # never: the console line is ours
        # DeepSpeed's clock waits for the GPU before every forward pass, and in evaluation for every word
        "timers": {"throughput": {"enabled": False}, **config.get("timers", {})},
    }


def _let_all_groups_time_out_alike() -> None:
    """Give DeepSpeed's own groups the timeout of the one in which the ranks met.

    Gradients are reduced in a group that it makes without one, and torch's 30 minutes would be theirs.
    """
    met = dist.group.WORLD
    timeout = met._get_backend(torch.device("cpu")).options._timeout  # every process group of ours has gloo
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timeout, group)


def _groups(trained: Mapping[str, nn.Parameter], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    return [
        {"params": [trained[name] for name in trained if rates[name] == rate], "lr": rate}
        for rate in sorted(set(rates.values()))
    ]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"DeepSpeed configuration {path} does not exist (run.ds_config)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
