"""A training that is killed a hundred times, and one that is disturbed for half an hour: both end as if nothing was.

These take long and are no part of ``make test``: ``make faults`` runs them. GRAFT_KILLS and GRAFT_SOAK_MINUTES make
them shorter or longer.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from random import Random

import pytest
from background import TRAIN, Training
from conftest import ROOT, Command

from corpus import RECIPE, assert_same_checkpoint, few_utterances, losses, utterances
from graft.run_dir import checkpoint_steps, step_folder
from graft.train.checkpoint import newest

PRECOMPUTE = ROOT / "shards" / "precompute.py"
WITH_FAULT = ROOT / "tests" / "programs" / "train_with_fault.py"
KILLS, SOAK_MINUTES = int(os.environ.get("GRAFT_KILLS", 100)), float(os.environ.get("GRAFT_SOAK_MINUTES", 30))
# Where to kill: at one of how many visits, and at most how many milliseconds after it.
POINTS = {
    "forward": (6, 40),
    "backward": (6, 40),
    "step": (6, 12),
    "save": (3, 40),
    "evaluation": (1, 800),
    "loader": (9, 10),
}
KILL_STEPS, SAVE_EVERY, SOAK_SAVE_EVERY = 6 * KILLS, 2, 10
QUICK = [
    "stage1.micro_batches=2",
    "projector.hidden_size=64",
    "run.log_every=1",
    "run.log_utterances=true",
    "evaluation.max_utterances=2",
    "evaluation.max_new_tokens=2",
]
OFTEN = [
    f"stage1.max_steps={KILL_STEPS}",
    "stage1.global_batch_size=4",
    f"run.checkpoint_every={SAVE_EVERY}",
    "evaluation.every=8",
]
LONG = [
    "stage1.max_steps=1000000",  # on any machine it is still under way when the time is over
    "stage1.global_batch_size=24",
    f"run.checkpoint_every={SOAK_SAVE_EVERY}",
    "evaluation.every=50",
]

KEEP_ALL = "run.keep_checkpoints=1000000"

FAULTS = ["kill a rank", "kill the launcher", "ask a rank", "ask all", "halt a rank", "damage the newest checkpoint"]

pytestmark = [pytest.mark.soak, pytest.mark.timeout(4 * 3600)]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, run_launcher: Command) -> list[str]:
    """The command line's end: a small data set, its shards made, a stage that saves often."""
    settings = few_utterances(tmp_path_factory.mktemp("data"), train=40, valid=4)
    run_launcher(PRECOMPUTE, RECIPE, *settings, "--split", "train", "--split", "valid", timeout_s=400)
    return [*settings, *QUICK]


def test_kill_points(words: list[str], run_launcher: Command, tmp_path: Path) -> None:
    """Each kill leaves a checkpoint of the undisturbed run, and in the end its weights, losses and utterances."""
    words = [*words, *OFTEN]
    rng, run_dir, straight = Random(1), tmp_path / "run", tmp_path / "straight"
    line = [TRAIN, RECIPE, "--stage", "1", *words]
    run_launcher(*line, KEEP_ALL, f"run.dir={straight}", timeout_s=2 * 3600)
    killed = dict.fromkeys(POINTS, 0)
    while sum(killed.values()) < KILLS:
        point = rng.choice(list(POINTS))
        rank = 0 if point == "save" else rng.randrange(2)
        most_visits, longest_ms = POINTS[point]
        fault = f"{point}:{rng.randint(1, most_visits)}:{rank}:{rng.randint(0, longest_ms)}"
        training = Training(words, run_dir, [str(WITH_FAULT), fault])
        code = training.wait(timeout_s=600)
        assert code != 0, f"{fault} killed nobody:\n{training.log.read_text()[-3000:]}"
        killed[point] += 1
        found = newest(run_dir, 1)
        if found:
            assert_same_checkpoint(run_dir, straight, int(found.name.removeprefix("step-")))
        print(f"{sum(killed.values())} of {KILLS}: {fault}, left with {found and found.name}", flush=True)
    print(f"killed {killed}; at step {checkpoint_steps(run_dir)[-1]} of {KILL_STEPS}")
    run_launcher(*line, f"run.dir={run_dir}", timeout_s=2 * 3600)
    assert_same_checkpoint(run_dir, straight, KILL_STEPS)
    assert utterances(run_dir) == utterances(straight) and losses(run_dir) == losses(straight)


def disturb(training: Training, fault: str, rng: Random) -> None:
    """Do it; a process that has ended meanwhile is disturbed enough."""
    ranks = training.ranks()
    try:
        if fault == "kill a rank":
            os.kill(rng.choice(ranks), signal.SIGKILL)
        elif fault == "kill the launcher":
            os.kill(training.launcher(), signal.SIGKILL)
        elif fault == "ask a rank":
            os.kill(rng.choice(ranks), signal.SIGTERM)
        elif fault == "ask all":
            os.killpg(training.process.pid, signal.SIGTERM)
        elif fault == "halt a rank":
            halted = rng.choice(ranks)
            os.kill(halted, signal.SIGSTOP)
            time.sleep(rng.uniform(0.5, 3))
            os.kill(halted, signal.SIGCONT)
        else:
            damage(training.run_dir, rng)
    except (ProcessLookupError, IndexError, ValueError):
        return


def damage(run_dir: Path, rng: Random) -> None:
    """Flip a bit of the newest checkpoint; whoever goes on next must take the one before."""
    steps = checkpoint_steps(run_dir)
    if len(steps) < 2:
        return
    file = step_folder(run_dir, steps[-1]) / rng.choice(["projector.safetensors", "optimizer.safetensors"])
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def test_soak(words: list[str], tmp_path: Path) -> None:
    """A fault every 20 to 60 seconds, and the same command again whenever the run has ended.

    What it saves when it is left alone again is what an undisturbed run saves at that step.
    """
    words = [*words, *LONG]
    rng, run_dir, counts = Random(2), tmp_path / "run", {}
    training, until = Training(words, run_dir), time.monotonic() + 60 * SOAK_MINUTES
    while time.monotonic() < until:
        fault = rng.choice(FAULTS)
        training = keep_going(training, words, until=time.monotonic() + rng.uniform(20, 60))
        disturb(training, fault, rng)
        counts[fault] = counts.get(fault, 0) + 1
        print(f"{fault}; checkpoints {checkpoint_steps(run_dir)[-2:]}", flush=True)
    disturbed = last_in_turn(run_dir)
    while (last := last_in_turn(run_dir)) <= disturbed:
        training = keep_going(training, words, until=time.monotonic() + 1)
    training.end()
    print(f"faults: {counts}; {last} steps, the same now without any", flush=True)

    straight = Training([*words, KEEP_ALL], tmp_path / "straight")
    straight.wait_for(rf"saved \S+step-{last:08}", timeout_s=2 * 3600)
    straight.end()
    assert_same_checkpoint(run_dir, straight.run_dir, last)
    for logged in (utterances, losses):
        ours, theirs = (
            {step: of for step, of in logged(each).items() if step <= last} for each in (run_dir, straight.run_dir)
        )
        assert ours == theirs and len(ours) == last


def last_in_turn(run_dir: Path) -> int:
    """The last step saved because its turn had come, as in a run that nobody asked to stop; 0: none."""
    return max((step for step in checkpoint_steps(run_dir) if step % SOAK_SAVE_EVERY == 0), default=0)


def keep_going(training: Training, words: list[str], until: float) -> Training:
    """Start the same command again whenever it has ended, until then; the one that runs at last."""
    while time.monotonic() < until:
        if training.process.poll() is not None:
            training.wait()
            training = Training(words, training.run_dir)
        time.sleep(0.2)
    return training
