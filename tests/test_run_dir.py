"""Checkpoints are whole or absent, and a path without one is an error."""

import json
from pathlib import Path

import pytest

from graft.run_dir import (
    best_steps,
    check_encoder,
    checkpoint_steps,
    find_checkpoint,
    run_of,
    step_folder,
    verify_checkpoint,
    whole_folder,
    write_whole,
)


def make(run_dir: Path, step: int) -> Path:
    with whole_folder(step_folder(run_dir, step)) as folder:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights").write_bytes(b"w" * step)
        (folder / "state.json").write_text("{}")
    return step_folder(run_dir, step)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    make(tmp_path, 3)
    with pytest.raises(OSError, match="disk full"), whole_folder(step_folder(tmp_path, 5)) as folder:
        (folder / "weights").write_bytes(b"half")
        raise OSError("disk full")
    assert checkpoint_steps(tmp_path) == [3]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003"]


def test_a_checkpoint_knows_its_encoder(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"encoder_fingerprint": "a" * 64}))
    check_encoder(tmp_path, "a" * 64)
    with pytest.raises(ValueError, match=r"another encoder \(fingerprint aaaaaaaaaaaa, .* has bbbbbbbbbbbb\)"):
        check_encoder(tmp_path, "b" * 64)


def test_what_a_kill_leaves_does_not_count(tmp_path: Path) -> None:
    """Killed while writing: the temporary folder stays, or a folder that has not its list of files."""
    make(tmp_path, 3)
    (tmp_path / "checkpoints" / ".step-00000007.tmp").mkdir()
    (tmp_path / "checkpoints" / "step-00000009").mkdir()
    assert checkpoint_steps(tmp_path) == [3]
    assert find_checkpoint(tmp_path) == step_folder(tmp_path, 3)


def test_the_best_by_wer_else_the_newest(tmp_path: Path) -> None:
    for step in (3, 5, 11):
        make(tmp_path, step)
    assert find_checkpoint(tmp_path) == step_folder(tmp_path, 11)
    evaluated(tmp_path, {1: {3: 0.25, 4: 0.01}, 2: {5: 0.125, 11: 0.5}})
    assert best_steps(tmp_path) == {1: 3, 2: 5}  # the checkpoint of step 4 is gone
    assert find_checkpoint(tmp_path) == step_folder(tmp_path, 5)
    evaluated(tmp_path, {1: {3: 0.25}, 2: {11: 0.5}})
    assert find_checkpoint(tmp_path) == step_folder(tmp_path, 3)  # the second stage made it worse
    evaluated(tmp_path, {1: {3: 0.25}, 2: {11: 0.25}})
    assert find_checkpoint(tmp_path) == step_folder(tmp_path, 11)  # of equals the later stage's
    assert find_checkpoint(step_folder(tmp_path, 3)) == step_folder(tmp_path, 3)


def evaluated(run_dir: Path, wers: dict[int, dict[int, float]]) -> None:
    write_whole(run_dir / "checkpoints" / "evaluations.json", json.dumps(wers))


def test_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no whole checkpoint: looked for"):
        find_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        find_checkpoint(tmp_path / "nowhere")


def test_a_checkpoint_is_named_from_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "run", 5)
    for inside, name in ((folder, "."), (folder.parent, folder.name), (tmp_path, f"run/checkpoints/{folder.name}")):
        monkeypatch.chdir(inside)
        assert run_of(Path(name)) == tmp_path / "run"


@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_damage_is_found_and_named(tmp_path: Path, damage: str) -> None:
    folder = make(tmp_path, 5)
    verify_checkpoint(folder)
    file = folder / "adapter" / "weights"
    if damage == "lose":
        file.unlink()
    else:
        file.write_bytes(b"wwxww" if damage == "flip" else b"wwww")
    with pytest.raises(ValueError, match="weights"):
        verify_checkpoint(folder)
