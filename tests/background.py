"""A training in the background, by the real launcher: to be watched, signalled and killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT, free_port, subprocess_environment

from corpus import RECIPE

TRAIN = ROOT / "launch" / "train.py"


class Training:
    """A stage 1 in the background, what it has said so far, and its processes."""

    def __init__(self, words: list[str], run_dir: Path, script: list[str] | None = None) -> None:
        """``script`` stands in for ``launch/train.py``, with the words that come before the recipe."""
        self.run_dir, self.log = run_dir, run_dir.with_suffix(".log")
        launcher = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
        line = [*launcher, *(script or [str(TRAIN)]), str(RECIPE), "--stage", "1", *words, f"run.dir={run_dir}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                line, env=subprocess_environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def pids(self, wanted: Callable[[list[str]], bool]) -> list[int]:
        """Processes of this training whose command line is wanted, in the order in which they were started."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                line = (folder / "cmdline").read_bytes().decode().split("\0")
            except OSError:  # it has ended meanwhile
                continue
            if f"run.dir={self.run_dir}" in line and wanted(line):
                found.append(int(folder.name))
        return sorted(found)

    def ranks(self) -> list[int]:
        return self.pids(lambda line: any(word.startswith("--local_rank") for word in line))

    def launcher(self) -> int:
        """The process between the command and the ranks."""
        (found,) = self.pids(lambda line: "deepspeed.launcher.launch" in line)
        return found

    def wait_for(self, pattern: str, timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, self.log.read_text()):
            assert self.process.poll() is None, f"ended before it said {pattern!r}:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"did not say {pattern!r}:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.02)

    def end(self) -> None:
        """Kill whatever is left of it."""
        for pid in (self.process.pid, *self.pids(lambda line: True)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, timeout_s: float = 120) -> int:
        """The command's exit code; no rank is left."""
        code = self.process.wait(timeout_s)
        deadline = time.monotonic() + 40
        while self.ranks() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not self.ranks(), "ranks were left behind"
        return code
