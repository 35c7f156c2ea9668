"""Building ``programs/fault_at_syscall.c`` and running programs under it: real calls of the C library that go wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Outcome, run_command

SOURCE = ROOT / "tests" / "programs" / "fault_at_syscall.c"
COUNT, KILL_BEFORE, KILL_MIDDLE, DISK_FULL, EIO_ONCE = range(5)  # its faults


def build_shim(folder: Path) -> Path:
    """The shim as a library; the test is skipped where it cannot be made."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("faults of single system calls need Linux and a C compiler (cc, gcc or clang)")
    library = folder / "fault_at_syscall.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl", "-lpthread"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return library


def run_under(shim: Path, program: str, *arguments: str | Path, **options: object) -> Outcome:
    """``tests/programs/<program>`` with the shim before the C library."""
    script = ROOT / "tests" / "programs" / program
    env = {"LD_PRELOAD": str(shim)}
    return run_command([sys.executable, str(script), *map(str, arguments)], env=env, **options)  # type: ignore[arg-type]
