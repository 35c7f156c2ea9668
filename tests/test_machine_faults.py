"""Faults of the machine around a training: no memory, another clock, a disk that is read-only or full."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Command
from shim import build_shim, run_under

from graft.ranks import AgreedValueError, Ranks
from graft.recipe import Recipe
from graft.run_dir import STATE_FILE, step_folder, whole_folder
from graft.train.checkpoint import Position
from graft.train.claim import beginning, claim

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]
PROGRAMS = ROOT / "tests" / "programs"
MEMORY = Path("/dev/shm")  # a file system that needs not wait for a disk, where there is one
NEW_MOUNTS = 0x00020000  # CLONE_NEWNS of unshare(2)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is heeded by Linux alone")
def test_no_memory_is_a_fault_of_the_machine(run_python: Command) -> None:
    outcome = run_python(PROGRAMS / "out_of_memory.py", expect=1, timeout_s=120)
    assert outcome.stdout.splitlines() == ["item of 7 bytes"] * 2
    assert "MemoryError" in outcome.stderr.splitlines()[-1]


def test_neither_hash_seed_nor_clock_nor_time_zone_changes_anything(run_python: Command, tmp_path: Path) -> None:
    seen = []
    for number, (hash_seed, zone, error_s) in enumerate((("1", "UTC0", "0"), ("2", "XXX-13", "-1e9"))):
        env = {"PYTHONHASHSEED": hash_seed, "TZ": zone}
        outcome = run_python(PROGRAMS / "digests.py", tmp_path / str(number), error_s, env=env, timeout_s=200)
        seen.append(json.loads(outcome.stdout.splitlines()[-1]))
    differing = {name for name in seen[0] if seen[0][name] != seen[1][name]}
    assert differing == {"hash of a word", "local time", "year"}, "these must differ, or nothing was tried"
    assert len(seen[0]["shards"]) == 3 + 3 + 3  # tars, their parts, lists and index


def settings() -> Recipe:
    return Recipe(bases={"whisper": "w", "qwen2_vl": "q"})


def test_a_run_dir_that_cannot_be_is_told_before_anything_begins(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AgreedValueError, match=r"run\.dir=.*file/run cannot be written: .*name another run\.dir"):
        Ranks().by_first(lambda: claim(tmp_path / "file" / "run", settings(), 1, {}))


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="a read-only mount needs Linux and root")
def test_a_read_only_file_system(tmp_path: Path) -> None:
    """In a child with mounts of its own. Permission bits would not do: root writes whatever they say."""
    (tmp_path / "disk").mkdir()
    pid = os.fork()
    if pid == 0:
        told = "no mounts here"
        try:
            if ctypes.CDLL(None).unshare(NEW_MOUNTS) == 0:
                disk = str(tmp_path / "disk")
                for words in (["--make-rprivate", "/"], ["--bind", disk, disk], ["-o", "remount,ro,bind", disk]):
                    subprocess.run(["mount", *words], check=True)
                told = "nothing"
                claim(tmp_path / "disk" / "run", settings(), 1, {})
        except ValueError as error:
            told = str(error)
        finally:
            (tmp_path / "told").write_text(told)
            os._exit(0)
    os.waitpid(pid, 0)
    told = (tmp_path / "told").read_text()
    if told == "no mounts here":
        pytest.skip("this machine lets nobody mount, a container perhaps")
    assert "run.dir=" in told and "cannot be written: [Errno 30] Read-only file system" in told


def test_whole_checkpoints_without_a_list_of_scores_are_found(tmp_path: Path) -> None:
    """The list of the best is a convenience: lost, the newest checkpoint is what the next stage begins with."""
    for step in (3, 6):
        with whole_folder(step_folder(tmp_path, step)) as folder:
            state = {"stage": 1, "step": step, "first_step": 0, "num_updates": step, "max_steps": 6}
            (folder / STATE_FILE).write_text(json.dumps(state))
    assert beginning(tmp_path, 2, None) == (Position(stage=2, step=6, first_step=6), step_folder(tmp_path, 6))
    position, checkpoint = beginning(tmp_path, 1, None)
    assert (position.step, checkpoint) == (6, step_folder(tmp_path, 6))


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """What ``programs/writer_faults.py`` saw. It compares what is left with the whole, and writes once more."""
    folder = tmp_path_factory.mktemp("writers")
    shim = build_shim(folder)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else folder) as scratch:
        words = [scratch, folder / "report.json", "scores", "settings", "metrics", "shards"]
        run_under(shim, "writer_faults.py", *words, timeout_s=280)
    yield json.loads((folder / "report.json").read_text())


WRITERS = {"scores": 10, "settings": 20, "metrics": 20, "shards": 30}  # and operations there are at least


@pytest.mark.parametrize("writer", WRITERS)
def test_a_writer_killed_at_any_operation(writers: dict, writer: str) -> None:
    """The old or the new, never a part; threads may make an operation more or less, so some come through."""
    seen = [*writers[writer]["killed before"], *writers[writer]["killed in the middle of a write"]]
    assert len(seen) > WRITERS[writer]
    assert sum(one["killed"] for one in seen) > 0.8 * len(seen)
    assert {one["outcome"] for one in seen} == {"old", "new"}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_writer_on_a_full_disk(writers: dict, writer: str) -> None:
    """The word is the system's, with the file's name; no temporary file is left to take up room."""
    seen = writers[writer]["disk full from here on"]
    told = [one for one in seen if one["told"]]
    assert len(told) > 0.8 * len(seen)
    for one in told:
        assert "No space left on device: " in one["told"] and "/target" in one["told"], one
        assert one["left"] == [], one
