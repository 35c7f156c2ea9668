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

from corpus import RECIPE, few_utterances, losses, utterances

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
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background jobs
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


SIZES = {"train": 37, "valid": 5, "test": 3}
NUM_STEPS = 7  # into the second epoch


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that make a few dozen utterances of the recipe's corpus the data."""
    return few_utterances(tmp_path_factory.mktemp("two-nodes"), **SIZES)


@pytest.fixture(scope="module")
def features(settings: list[str], run_python: Command) -> Path:
    """The sets of all splits, made by one rank."""
    run_python(ROOT / "shards" / "precompute.py", RECIPE, *settings, timeout_s=400)
    (folder,) = [word.removeprefix("data.shards=") for word in settings if word.startswith("data.shards=")]
    return Path(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_make_the_same_shards(settings: list[str], features: Path) -> None:
    """Bit by bit: an index holds the digests of its tars."""
    there = features.with_name("two-nodes")
    two_nodes(ROOT / "shards" / "precompute.py", RECIPE, *settings, f"data.shards={there}", timeout_s=400)
    for split in SIZES:
        made, expected = ((sets / split / "index.json").read_text() for sets in (there, features))
        assert json.loads(made) == json.loads(expected)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_train_as_one_does(
    settings: list[str], features: Path, run_launcher: Command, tmp_path: Path
) -> None:
    """One node with two ranks and two nodes with one: the same utterances in every step, losses equal to 1e-4."""
    words = [RECIPE, "--stage", "1", *settings, f"stage1.max_steps={NUM_STEPS}", "stage1.warmup_steps=2"]
    words += ["stage1.global_batch_size=8", "run.log_every=1", "run.log_utterances=true"]
    words += ["evaluation.max_new_tokens=4"]
    train = ROOT / "launch" / "train.py"
    run_launcher(train, *words, f"run.dir={tmp_path / 'one'}", ranks=2, timeout_s=400)
    across = two_nodes(train, *words, f"run.dir={tmp_path / 'two'}", timeout_s=400)
    assert "node1: " in across.stdout, "the first node said nothing"

    expected = losses(tmp_path / "one")
    assert list(expected) == list(range(1, NUM_STEPS + 1))
    assert losses(tmp_path / "two") == pytest.approx(expected, abs=1e-4)
    assert utterances(tmp_path / "two") == utterances(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_link_that_breaks(settings: list[str], features: Path, run_launcher: Command, tmp_path: Path) -> None:
    """No packet passes any more, and none says so: both nodes give up in time, and one node goes on alone."""
    words = [RECIPE, "--stage", "1", *settings, "stage1.max_steps=40", "stage1.global_batch_size=8", "run.log_every=1"]
    words += ["run.log_utterances=true", "run.checkpoint_every=1", "run.timeout_s=15", "run.patience_s=3"]
    words += ["evaluation.every=100", "evaluation.max_new_tokens=4"]
    train, run_dir, log = ROOT / "launch" / "train.py", tmp_path / "two", tmp_path / "log"
    line = [SCRIPT, "--master_port", str(free_port()), train, *words, f"run.dir={run_dir}"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(word) for word in line], env=subprocess_environment(), stdout=file, stderr=file, start_new_session=True
        )
    try:
        wait_until(lambda: "step      3/" in log.read_text(), timeout_s=300)
        second, *_ = launchers_with(f"run.dir={run_dir}", "--node_rank=1")
        subprocess.run(["nsenter", "-t", str(second), "-n", "ip", "link", "set", "eth0", "down"], check=True)
        assert process.wait(timeout=120) != 0
        wait_until(lambda: not processes_with(f"run.dir={run_dir}"), timeout_s=60)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert "rank 1 on node2" in log.read_text(), log.read_text()[-3000:]
    run_launcher(train, *words, f"run.dir={run_dir}", ranks=2, timeout_s=400)
    run_launcher(train, *words, f"run.dir={tmp_path / 'one'}", ranks=2, timeout_s=400)
    assert utterances(run_dir) == utterances(tmp_path / "one")
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


def launchers_with(word: str, launcher_word: str) -> list[int]:
    """Process ids of the launchers whose command line holds both words."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if {word.encode(), launcher_word.encode()} <= set(line) and b"-m" in line:
            found.append(int(folder.name))
    return found
