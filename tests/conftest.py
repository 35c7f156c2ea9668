"""What tests share: a quiet offline CPU environment, and the real launcher in a subprocess with a time limit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Before torch is imported, and for every subprocess. One thread per process: xdist and ranks share the cores.
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",  # also beside a GPU: results are compared to the last digit, and two ranks need two GPUs
    "HF_HUB_OFFLINE": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

# A child must find its way by itself: no PYTHONPATH, and no rank of a launcher around pytest.
NOT_INHERITED = ("PYTHONPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    command: Sequence[str]
    returncode: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        words = " ".join(self.command)
        return (
            f"{words}\nexit code {self.returncode}\n--- stdout\n{_tail(self.stdout)}\n--- stderr\n{_tail(self.stderr)}"
        )


Command = Callable[..., Outcome]


def run_command(
    command: Sequence[str],
    *,
    timeout_s: float = 400,
    expect: int | None = 0,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Run ``command``; the test fails with its output unless it exits with ``expect`` (None: any code) in time."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=subprocess_environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        outcome = Outcome(command, -signal.SIGKILL, *process.communicate())
        pytest.fail(f"not done after {timeout_s} s: {outcome}", pytrace=False)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    outcome = Outcome(command, process.returncode, stdout, stderr)
    if expect is not None and outcome.returncode != expect:
        pytest.fail(f"expected exit code {expect}: {outcome}", pytrace=False)
    return outcome


def subprocess_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child: this interpreter's commands first on PATH (``deepspeed`` is one)."""
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    path = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)])
    return {**inherited, "PATH": path, **(extra or {})}


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def run_launcher() -> Command:
    """``run_launcher(script, *arguments, ranks=2, timeout_s=..., expect=0)``: the real ``deepspeed`` on CPU ranks."""

    def run(script: str | Path, *arguments: str | Path, ranks: int = 2, **options: object) -> Outcome:
        launcher = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())]
        return run_command([*launcher, str(script), *map(str, arguments)], **options)  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="session")
def run_python() -> Command:
    """``run_python(script, *arguments, timeout_s=..., expect=0)``: this interpreter, alone."""

    def run(script: str | Path, *arguments: str | Path, **options: object) -> Outcome:
        return run_command([sys.executable, str(script), *map(str, arguments)], **options)  # type: ignore[arg-type]

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, so that no worker is left alone with them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def _tail(text: str, num_lines: int = 60) -> str:
    lines = text.splitlines()
    left_out = [f"... {len(lines) - num_lines} lines before"] if len(lines) > num_lines else []
    return "\n".join(left_out + lines[-num_lines:])
