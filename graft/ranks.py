"""Who am I among the processes, and sums over all of them.

A :class:`Ranks` is a value that is passed to whoever needs it: no other module asks the environment, so a test
can play any rank in one process.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")

# The user's fault: a value, or a path that is not what it was taken for. Other system errors are the machine's.
USERS_FAULTS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


# Rank, number of ranks and rank on this machine, as a launcher names them in the environment. A batch script or shell
# of Slurm's is no step of srun: it has not the second.
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # deepspeed, torchrun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # deepspeed --launcher openmpi
    SLURM,
)


class AgreedValueError(ValueError):
    """The user's fault, known to every rank: one of them is enough to tell it."""


@dataclass(frozen=True)
class Ranks:
    """One process among ``world_size``; ``local_rank`` counts within its machine.

    ``waiting`` surrounds every collective: whoever tells the others what this rank does learns that it waits for them.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    waiting: Callable[[], AbstractContextManager] = field(default=nullcontext, compare=False, repr=False, kw_only=True)

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read what one of :data:`LAUNCHERS` has set; alone without them."""
        names = next((names for names in LAUNCHERS if all(name in os.environ for name in names)), None)
        if names is None:
            return cls()
        rank, world_size, local_rank = (int(os.environ[name]) for name in names)
        if names is SLURM and on_gpu() and torch.cuda.device_count() == 1:
            local_rank = 0  # --gpus-per-task and the like: each task sees its own GPU alone
        return cls(rank, world_size, local_rank)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def device(self) -> torch.device:
        """This rank's GPU, or the CPU where there is none."""
        if not on_gpu():
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {self.local_rank} has no GPU: this machine shows {torch.cuda.device_count()}. "
                "Start no more ranks per machine than it has GPUs (--num_gpus, slots= in the hostfile, or Slurm's "
                "--ntasks-per-node)."
            )
        return torch.device("cuda", self.local_rank)

    def sum(self, values: Sequence[float]) -> list[float]:
        """``values`` added up over all ranks, in double precision."""
        if self.world_size == 1:
            return [float(value) for value in values]
        total = torch.tensor(list(values), dtype=torch.float64)  # on the CPU: counts do not wait for a GPU
        with self.waiting():
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of each rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.waiting():
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            with self.waiting():
                dist.barrier()

    def together(self, work: Callable[[], Result]) -> Result:
        """The result of ``work``; if it fails on any rank it fails on all, so that none waits for one that is gone.

        Raises:
            AgreedValueError, RuntimeError: as :meth:`agree`.
        """
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:  # whatever it is, the others must hear of it
            error = caught
        self.agree(error)
        return result

    def by_first(self, work: Callable[[], Result]) -> Result | None:
        """``work`` on rank 0 alone, None on the others; every rank must call, and fails when it fails."""
        return self.together(lambda: work() if self.is_first else None)

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank when any rank holds an ``error``, so that none is left waiting for the others.

        Raises:
            AgreedValueError: if the first failing rank's error is the user's fault.
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


def on_gpu() -> bool:
    """Whether ranks compute on GPUs: they do where there are any, unless DeepSpeed's ``DS_ACCELERATOR`` says cpu."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def start(
    *, backend: str = "gloo", timeout_s: float = 1800.0, start_timeout_s: float = 300.0, even_alone: bool = False
) -> Ranks:
    """Join the other processes, and share the cores with those on this machine.

    Args:
        timeout_s: a collective that waits longer than this ends the program instead of hanging it.
        start_timeout_s: how long to wait for the other ranks to come.
        even_alone: make a process group for a single process too.

    Raises:
        ValueError: when some do not come, with their numbers.
    """
    ranks = Ranks.from_environment()
    if dist.is_initialized() or (ranks.world_size == 1 and not even_alone):
        return ranks
    store = _meet(ranks, timedelta(seconds=start_timeout_s))
    store.set_timeout(timedelta(seconds=timeout_s))
    dist.init_process_group(
        backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timedelta(seconds=timeout_s)
    )
    share_cores(ranks)
    return ranks


def share_cores(ranks: Ranks) -> None:
    """Give this rank its share of the machine's cores, unless ``OMP_NUM_THREADS`` has given it some.

    Torch takes all of them for each rank, and where ranks compute on the CPU their threads then wait for one another
    within every operation: four for two cores made a step of the tiny recipe three times as long.
    """
    hosts = ranks.gather(socket.gethostname())
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(fair_share(torch.get_num_threads(), hosts, ranks.rank))


def fair_share(cores: int, hosts: Sequence[str], rank: int) -> int:
    """How many of a machine's ``cores`` a rank gets, at least one; ``hosts`` names the machine of every rank."""
    return max(1, cores // hosts.count(hosts[rank]))


def _meet(ranks: Ranks, patience: timedelta) -> dist.Store:
    """A store in which every rank has said that it is there."""
    host = os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.setdefault("MASTER_PORT", "0" if ranks.world_size == 1 else "29500"))
    for name, number in zip(LAUNCHERS[0], (ranks.rank, ranks.world_size, ranks.local_rank), strict=True):
        os.environ.setdefault(name, str(number))  # torch and deepspeed look for these
    try:
        store = of_this_attempt(
            dist.TCPStore(host, port, is_master=ranks.is_first, timeout=patience, wait_for_workers=False)
        )
        store.set(f"came/{ranks.rank}", "")
        names = [f"came/{rank}" for rank in range(ranks.world_size)]
        store.wait(names, patience)
    except dist.DistStoreError as error:
        raise ValueError(
            f"{_who_came(ranks, store if ranks.is_first else None, patience)}: is every node started?"
        ) from error
    except dist.DistNetworkError as error:
        raise ValueError(f"rank {ranks.rank} cannot reach rank 0 at {host}:{port}: {error}") from error
    return store


def of_this_attempt(store: dist.Store) -> dist.Store:
    """``store`` without what an earlier attempt left in it: torchrun keeps its own when it starts ranks again."""
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _who_came(ranks: Ranks, store: dist.Store | None, patience: timedelta) -> str:
    if store is None:
        return f"not all of {ranks.world_size} ranks came within {patience.total_seconds():g} s"
    missing = [str(rank) for rank in range(ranks.world_size) if not store.check([f"came/{rank}"])]
    return (
        f"{ranks.world_size - len(missing)} of {ranks.world_size} ranks came within {patience.total_seconds():g} s; "
        f"missing: rank {', '.join(missing)}"
    )


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _told(error: Exception | None) -> tuple[bool, str] | None:
    if error is None:
        return None
    is_users = isinstance(error, USERS_FAULTS)
    return is_users, str(error) if is_users else f"{type(error).__name__}: {error}"
