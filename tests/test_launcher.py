"""Commands under the real single-node launcher: where they can be started from, how they end, what they say."""

from __future__ import annotations

import json
import time
from pathlib import Path

from conftest import ROOT, Command, free_port, run_command

SUM = ROOT / "tests" / "programs" / "sum_over_ranks.py"
TRAIN = ROOT / "launch" / "train.py"
RECIPE = ROOT / "recipes" / "tiny.yaml"


def test_ranks_meet(run_launcher: Command, tmp_path: Path) -> None:
    run_launcher(SUM, tmp_path / "seen.json", ranks=3, cwd=tmp_path)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["total"] == 111 and seen["slots"] == "3" and len(set(seen["hosts"])) == 1


def test_a_failing_rank_fails_the_command(run_launcher: Command, tmp_path: Path) -> None:
    """The last of two ranks, so that the first one's success does not hide it."""
    run_launcher(SUM, tmp_path / "seen.json", "5", expect=5)


def test_help_under_the_launcher_from_another_folder(run_launcher: Command, tmp_path: Path) -> None:
    """The launcher adds --local_rank, sets no PYTHONPATH and puts the script's folder first."""
    outcome = run_launcher(TRAIN, "--help", ranks=1, cwd=tmp_path)
    assert "usage:" in outcome.stdout


def test_a_users_mistake_is_one_clear_line(run_launcher: Command, tmp_path: Path) -> None:
    """Exit code 2 through the launcher, the nearest valid key, no traceback, not once per rank."""
    words = [RECIPE, "--stage", "1", "stage1.learning_rat=1e-4", f"run.dir={tmp_path / 'run'}"]
    outcome = run_launcher(TRAIN, *words, expect=2)
    said = outcome.stdout + outcome.stderr
    assert "stage1.learning_rat: unknown key; did you mean 'learning_rate'?" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_other_number_of_ranks_than_the_recipe_asks_for(run_launcher: Command, tmp_path: Path) -> None:
    """What a mistyped hostfile comes to: deepspeed warns and starts here alone."""
    words = [RECIPE, "--stage", "1", "run.ranks=4", f"run.dir={tmp_path / 'run'}"]
    outcome = run_launcher(TRAIN, *words, expect=2)
    assert "the recipe asks for 4 ranks (run.ranks) and 2 were started" in outcome.stderr


def test_hostfile_names_more_ranks_than_started(tmp_path: Path) -> None:
    """Two nodes in the hostfile, one of them started: an error that says so, not ten minutes of silence."""
    (tmp_path / "hosts").write_text("localhost slots=1\nelsewhere slots=1\n")
    launcher = ["deepspeed", "--hostfile", str(tmp_path / "hosts"), "--no_ssh", "--node_rank", "0"]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    words = [str(TRAIN), str(RECIPE), "--stage", "1", "run.start_timeout_s=3", f"run.dir={tmp_path / 'run'}"]
    started = time.monotonic()
    outcome = run_command([*launcher, *words], expect=2, timeout_s=200)
    assert "1 of 2 ranks came within 3 s" in outcome.stderr
    assert "missing: rank 1" in outcome.stderr
    assert time.monotonic() - started < 150
