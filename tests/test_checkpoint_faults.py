"""Saving a checkpoint with every single file operation broken: there is always a whole one to go on from."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from shim import build_shim, run_under

from graft.run_dir import FILES_FILE, STATE_FILE, digest, step_folder, whole_folder
from graft.train.checkpoint import newest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]
MEMORY = Path("/dev/shm")  # a file system that needs not wait for a disk, where there is one


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """What ``programs/checkpoint_faults.py`` saw: each operation of a save, and what came of breaking it."""
    folder = tmp_path_factory.mktemp("faults")
    shim = build_shim(folder)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else folder) as scratch:
        run_under(shim, "checkpoint_faults.py", scratch, folder / "report.json", timeout_s=280)
    yield json.loads((folder / "report.json").read_text())


def commit(seen: dict) -> int:
    """Number of the operation that puts the new checkpoint in place."""
    (number,) = [
        number
        for number, (kind, path, _) in enumerate(seen["operations"], start=1)
        if kind == "rename" and path.endswith("checkpoints/step-00000005")
    ]
    return number


def test_every_byte_is_written_before_the_eyes_of_the_shim(seen: dict) -> None:
    """Also those that safetensors writes, in Rust and under other names: so no operation is left out below."""
    written = [int(size) for kind, _, size in seen["operations"] if kind == "write"]
    assert sorted(written) == sorted(seen["sizes"].values())
    assert len(seen["sizes"]) == 7 and len(seen["operations"]) > 50


def test_killed_at_any_operation(seen: dict) -> None:
    """The old one until the new one is in place, the new one from then on; the program has compared every byte."""
    outcomes = [outcome for _, outcome, _ in seen["killed before"]]
    old = commit(seen)
    assert outcomes == ["old"] * old + ["new"] * (len(seen["operations"]) - old)


def test_killed_with_half_of_a_file_written(seen: dict) -> None:
    assert [outcome for _, outcome, _ in seen["killed in the middle of a write"]] == ["old"] * len(seen["sizes"])


def test_the_disk_is_full(seen: dict) -> None:
    """Told with the path and what to do; the program has seen that no half is left and that the next save works."""
    found = seen["disk full from here on"]
    assert len(found) > 2 * len(seen["sizes"])
    for number, outcome, told in found:
        assert outcome == "old", f"operation {number}: {seen['operations'][number - 1]}"
        assert "checkpoints/step-00000005 could not be written: " in told and "No space left on device" in told
        assert told.endswith("start the same command again to go on from the newest")


def test_a_single_operation_fails(seen: dict) -> None:
    """An error of the disk is told, unless all it hinders is that something old is removed."""
    for number, outcome, told in seen["fails once"]:
        kind, path, size = seen["operations"][number - 1]
        again = kind == "mkdir" and [kind, path, size] in seen["operations"][: number - 1]  # it is there already
        hinders = kind != "remove" and not path.endswith("/.step-00000003.old") and not again
        assert ("could not be written" in told and "nput/output error" in told) == hinders, (kind, path, told)
        assert outcome == "new" or (hinders and number <= commit(seen)), (kind, path, outcome)


def test_nothing_is_put_in_place_before_it_is_on_the_disk(seen: dict) -> None:
    """A power cut keeps what was forced to disk: every file, every folder after its last entry, then the new name."""
    operations, end = seen["operations"], commit(seen) - 1
    inside = [(kind, path) for kind, path, _ in operations[:end] if "/.step-00000005.tmp" in path]
    forced = {path: at for at, (kind, path) in enumerate(inside) if kind == "fsync"}
    root = next(path for kind, path in inside if kind == "mkdir")
    folders = {path for kind, path in inside if kind == "mkdir"}
    for name in seen["sizes"]:
        written = f"{root}/{name}" if name != FILES_FILE else f"{root}/.{FILES_FILE}.tmp"
        assert written in forced, f"{name} is not forced to disk"
    for folder in folders:
        last = max(
            at for at, (kind, path) in enumerate(inside) if kind != "fsync" and Path(path).parent == Path(folder)
        )
        assert last < forced[folder], f"{folder} is not forced to disk after its last entry"
    kind, path, _ = operations[end + 1]
    assert (kind, Path(path)) == ("fsync", Path(root).parent)


def test_others_may_read_it(seen: dict) -> None:
    """safetensors gives its files to their owner alone; a colleague who evaluates the run is another user."""
    assert seen["modes"] == ["0o644"]


def test_a_disk_that_cannot_be_read_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Reading a process's memory at 0 fails like a bad sector does, with EIO."""
    for step in (2, 4):
        with whole_folder(step_folder(tmp_path, step)) as folder:
            (folder / STATE_FILE).write_text(json.dumps({"stage": 1}))
    bad = step_folder(tmp_path, 4) / "weights"
    bad.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="nput/output error"):
        digest(bad)
    (step_folder(tmp_path, 4) / FILES_FILE).write_text(json.dumps({"weights": "0" * 64}))
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path, 1) == step_folder(tmp_path, 2)
    assert "nput/output error" in caplog.text
