"""Who am I among the processes, and sums over all of them.

A :class:`Ranks` is a value that is passed to whoever needs it: no other module asks the environment, so a test
can play any rank in one process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class AgreedValueError(ValueError):
    """The user's fault, known to every rank: one of them is enough to tell it."""


@dataclass(frozen=True)
class Ranks:
    """One process among ``world_size``; ``local_rank`` counts within its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read what the ``deepspeed`` launcher, ``torchrun`` or Slurm's ``srun`` has set; alone without them."""
        return cls(
            rank=_environment_int("RANK", "SLURM_PROCID", default=0),
            world_size=_environment_int("WORLD_SIZE", "SLURM_NTASKS", default=1),
            local_rank=_environment_int("LOCAL_RANK", "SLURM_LOCALID", default=0),
        )

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def device(self) -> torch.device:
        """This rank's GPU, or the CPU where there is none."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {self.local_rank} has no GPU: this machine shows {torch.cuda.device_count()}. "
                "Start no more ranks per machine than it has GPUs (--num_gpus, or slots= in the hostfile)."
            )
        return torch.device("cuda", self.local_rank)

    def sum(self, values: Sequence[float]) -> list[float]:
        """``values`` added up over all ranks, in double precision."""
        if self.world_size == 1:
            return [float(value) for value in values]
        total = torch.tensor(list(values), dtype=torch.float64)  # on the CPU: counts do not wait for a GPU
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of each rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank when any rank holds an ``error``, so that none is left waiting for the others.

        Raises:
            AgreedValueError: if the first failing rank's error is a ValueError (the user's fault).
            RuntimeError: otherwise.
        """
        failures = [(rank, *told) for rank, told in enumerate(self.gather(_told(error))) if told]
        if not failures:
            return
        rank, is_users, text = failures[0]
        where = f" (rank {rank} of {self.world_size})" if self.world_size > 1 else ""
        raise (AgreedValueError if is_users else RuntimeError)(text + where) from error

    def differing(self, value: str) -> list[int]:
        """Ranks whose ``value`` is not that of rank 0."""
        values = self.gather(value)
        return [rank for rank, other in enumerate(values) if other != values[0]]


def start(timeout_s: float = 1800.0) -> Ranks:
    """Join the other processes, if there are any, for a program that needs no training engine."""
    ranks = Ranks.from_environment()
    if ranks.world_size > 1 and not dist.is_initialized():
        os.environ.setdefault("RANK", str(ranks.rank))
        os.environ.setdefault("WORLD_SIZE", str(ranks.world_size))
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    return ranks


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _told(error: Exception | None) -> tuple[bool, str] | None:
    if error is None:
        return None
    is_users = isinstance(error, ValueError)
    return is_users, str(error) if is_users else f"{type(error).__name__}: {error}"


def _environment_int(*names: str, default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)

