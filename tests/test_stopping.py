"""Asked to stop, stuck or orphaned: what a training does then, by the real launcher on two ranks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from background import TRAIN, Training
from conftest import ROOT, Command

from corpus import RECIPE, assert_same_checkpoint, few_utterances, losses, utterances
from graft.command import STOPPED
from graft.run_dir import checkpoint_steps
from graft.train.stopping import ONE_REQUEST_S

PRECOMPUTE = ROOT / "shards" / "precompute.py"
NUM_STEPS, PATIENCE_S = 12, 2
QUICK = [
    f"stage1.max_steps={NUM_STEPS}",
    "stage1.warmup_steps=2",
    "stage1.global_batch_size=6",
    "run.log_every=1",
    "run.log_utterances=true",
    "run.checkpoint_every=100",
    f"run.patience_s={PATIENCE_S}",
    "evaluation.every=4",
    "evaluation.batch_size=1",
    "evaluation.max_new_tokens=4",
]

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, run_python: Command) -> list[str]:
    """The command line's end: a small data set, its shards made, a quick stage with an evaluation in the middle."""
    settings = few_utterances(tmp_path_factory.mktemp("data"), train=30, valid=10)
    run_python(PRECOMPUTE, RECIPE, *settings, "--split", "train", "--split", "valid", timeout_s=400)
    return [*settings, *QUICK]


@pytest.fixture(scope="module")
def straight(words: list[str], run_launcher: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage in one go, every checkpoint kept."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    keep = ["run.checkpoint_every=1", "run.keep_checkpoints=100"]
    run_launcher(TRAIN, RECIPE, "--stage", "1", *words, *keep, f"run.dir={run_dir}", timeout_s=400)
    return run_dir


@pytest.fixture
def start(words: list[str], tmp_path: Path) -> Iterator[Callable[..., Training]]:
    """``start(*more words)``: a training that does not outlive its test."""
    started: list[Training] = []

    def run(*more: str) -> Training:
        started.append(Training([*words, *more], tmp_path / f"run{len(started)}"))
        return started[-1]

    yield run
    for training in started:
        training.end()


def test_the_launcher_is_asked_in_the_middle_of_an_evaluation(
    start: Callable[..., Training], words: list[str], straight: Path, run_launcher: Command
) -> None:
    """The step before it is saved; the evaluation is left, and made first thing when the same command goes on."""
    training = start()
    training.wait_for(r"saved \S+step-00000004")
    asked = time.monotonic()
    os.kill(training.launcher(), signal.SIGTERM)
    assert training.wait() != 0 and time.monotonic() - asked < 25
    assert checkpoint_steps(training.run_dir) == [4]
    assert "evaluation at step 4" not in training.log.read_text()
    run_launcher(TRAIN, RECIPE, "--stage", "1", *words, f"run.dir={training.run_dir}", timeout_s=400)
    assert losses(training.run_dir) == losses(straight) and utterances(training.run_dir) == utterances(straight)
    assert_same_checkpoint(training.run_dir, straight, NUM_STEPS)


@pytest.mark.parametrize("whom", ["one rank", "the deepspeed command", "the whole job", "the launcher, killed"])
def test_ranks_save_and_leave(whom: str, start: Callable[..., Training], straight: Path) -> None:
    """One rank tells the other. A signal to the command never reaches them, and a killed launcher sends none."""
    training = start()
    training.wait_for(r"step +2/")
    asked = time.monotonic()
    if whom == "one rank":
        os.kill(training.ranks()[1], signal.SIGTERM)
    elif whom == "the deepspeed command":
        os.kill(training.process.pid, signal.SIGTERM)
    elif whom == "the whole job":
        os.killpg(training.process.pid, signal.SIGTERM)
    else:
        os.kill(training.launcher(), signal.SIGKILL)
    code = training.wait()
    assert time.monotonic() - asked < 25
    if whom == "one rank":  # the command may say anything where it or its launcher is ended itself
        assert code == STOPPED, training.log.read_text()[-3000:]
    steps = checkpoint_steps(training.run_dir)
    assert steps and 2 <= steps[-1] < NUM_STEPS, training.log.read_text()[-3000:]
    assert_same_checkpoint(training.run_dir, straight, steps[-1])


def test_asked_twice_it_ends_at_once(start: Callable[..., Training]) -> None:
    """The first request waits for a step that does not end: the other rank stands still."""
    training = start()
    training.wait_for(r"step +1/")
    rank, other = training.ranks()
    os.kill(other, signal.SIGSTOP)
    os.kill(rank, signal.SIGTERM)
    time.sleep(ONE_REQUEST_S + 1)
    assert rank in training.ranks()
    os.kill(rank, signal.SIGTERM)
    deadline = time.monotonic() + 3
    while rank in training.ranks():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_asked_before_there_is_anything_to_save(start: Callable[..., Training]) -> None:
    training = start()
    training.wait_for("stage 1, starting fresh")
    asked = time.monotonic()
    os.kill(training.ranks()[1], signal.SIGTERM)
    assert training.wait() != 0 and time.monotonic() - asked < 25
    assert not checkpoint_steps(training.run_dir)


def test_the_launcher_dies_before_its_ranks_have_seen_it(start: Callable[..., Training]) -> None:
    """They are importing still, and find themselves orphans: nobody would see how they end."""
    training = start()
    while len(training.ranks()) < 2:
        assert training.process.poll() is None, training.log.read_text()[-3000:]
        time.sleep(0.02)
    os.kill(training.launcher(), signal.SIGKILL)
    training.wait()
    assert not checkpoint_steps(training.run_dir)


def test_a_silent_rank_is_named_and_may_come_back(start: Callable[..., Training], straight: Path) -> None:
    """A rank stands still for longer than the patience: it is named; it goes on, and so does the run."""
    training = start()
    training.wait_for(r"step +1/")
    rank = training.ranks()[1]
    os.kill(rank, signal.SIGSTOP)
    training.wait_for(r"rank 1 on \S+ has not answered for \d+ s: it is stopped", timeout_s=PATIENCE_S * 10)
    os.kill(rank, signal.SIGCONT)
    assert training.wait() == 0
    assert "rank 1 goes on" in training.log.read_text()
    assert losses(training.run_dir) == losses(straight)


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_never_comes_back_ends_the_run(number: int, start: Callable[..., Training]) -> None:
    """Rank 0 too, which holds the store: rank 1 then speaks."""
    training = start("run.timeout_s=12")
    training.wait_for(r"step +1/")
    stuck = training.ranks()[number]
    os.kill(stuck, signal.SIGSTOP)
    training.wait_for(rf"rank {number} on \S+ has not answered for \d+ s: it is stopped", timeout_s=PATIENCE_S * 10)
    assert training.wait(timeout_s=120) != 0
