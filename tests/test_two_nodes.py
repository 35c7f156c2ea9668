"""Two nodes by the real multi-node launcher: network namespaces, sshd, pdsh, a hostfile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, Command, Outcome, free_port, run_command, subprocess_environment

SCRIPT = ROOT / "launch" / "two_nodes.sh"
SUM = ROOT / "tests" / "programs" / "sum_over_ranks.py"


@pytest.fixture(scope="module", autouse=True)
def machine_can() -> None:
    """Skips, with the script's own sentence, where the machine forbids namespaces or lacks a tool."""
    outcome = run_command([str(SCRIPT), "--check"], expect=None)
    if outcome.returncode != 0:
        pytest.skip(outcome.stderr.strip())


def two_nodes(*arguments: str | Path, **options: object) -> Outcome:
    """The script with a port of its own, quietly."""
    launcher = [str(SCRIPT), "--master_port", str(free_port())]
    return run_command([*launcher, *map(str, arguments)], **options)  # type: ignore[arg-type]


def interfaces() -> set[str]:
    """Network interfaces of the machine itself."""
    return set(os.listdir("/sys/class/net"))


def test_ranks_of_two_nodes_meet(tmp_path: Path) -> None:
    before = interfaces()
    two_nodes(SUM, tmp_path / "seen.json", env={"SLOTS": "2"})
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen == {"total": 1111, "hosts": ["node1", "node1", "node2", "node2"], "slots": "2"}
    assert interfaces() == before


def test_exit_code_is_passed_on(tmp_path: Path) -> None:
    """The second node's rank fails, alone."""
    two_nodes(SUM, tmp_path / "seen.json", "7", expect=7)


def test_the_users_deepspeed_env_is_left_alone(tmp_path: Path) -> None:
    """A broken ``.deepspeed_env`` in the current folder is neither read nor changed."""
    (tmp_path / ".deepspeed_env").write_text("\n")
    two_nodes(SUM, tmp_path / "seen.json", cwd=tmp_path)
    assert (tmp_path / ".deepspeed_env").read_text() == "\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_stopped(number: signal.Signals, tmp_path: Path) -> None:
    """Ranks, sshd and interfaces go with the script, however it goes."""
    mark = tmp_path / "rank.py"
    mark.write_text("import pathlib, sys, time\npathlib.Path(sys.argv[-1]).touch()\ntime.sleep(600)\n")
    before = interfaces()
    process = subprocess.Popen(
        [SCRIPT, "--master_port", str(free_port()), mark, tmp_path / "started"],
        env=subprocess_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: (tmp_path / "started").exists(), timeout_s=120)
        process.send_signal(number)
        process.wait(timeout=60)
        assert process.returncode != 0
        wait_until(lambda: not processes_with(str(mark)), timeout_s=20)
        wait_until(lambda: interfaces() == before, timeout_s=20)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None


def processes_with(word: str) -> list[str]:
    """Command lines of the machine's processes, in all namespaces, that hold ``word``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if word in line:
            found.append(line)
    return found


def wait_until(condition: object, timeout_s: float) -> None:
    """Poll ``condition`` until it holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"still not so after {timeout_s} s"
        time.sleep(0.2)


def read_jsonl(path: Path) -> list[dict]:
    """All lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
