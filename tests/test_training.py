"""Training through the real launcher: the same run on any number of ranks, stopped, killed and resumed."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from background import TRAIN, Training
from conftest import ROOT, Command
from safetensors.torch import load_file

from corpus import RECIPE, few_utterances, logged, losses, utterances
from graft.command import STOPPED
from graft.recipe import load_recipe
from graft.run_dir import checkpoint_steps, step_folder
from graft.train.loop import MAX_SKIPPED

PRECOMPUTE = ROOT / "shards" / "precompute.py"
NUM_STEPS = 6
QUICK = [
    f"stage1.max_steps={NUM_STEPS}",
    "stage1.warmup_steps=2",
    "stage1.global_batch_size=7",
    "stage1.micro_batches=6",
    # A projector begins where it is steep, with gradients of norm 100 to 300: at the recipe's rate a digit rounded
    # otherwise is soon another loss. At this one the loss still falls by a quarter in six steps.
    "stage1.learning_rate=2e-5",
    "stage2.max_steps=3",
    "stage2.warmup_steps=1",
    "stage2.global_batch_size=7",
    "run.seed=20261130",  # a date, as seeds often are
    "run.log_every=1",
    "run.log_utterances=true",
    "run.checkpoint_every=2",
    "evaluation.every=100",
    "evaluation.max_utterances=3",
    "evaluation.max_new_tokens=4",
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, run_python: Command) -> list[str]:
    """The command line's end: a small data set, its shards made, and quick stages."""
    settings = few_utterances(tmp_path_factory.mktemp("data"), train=37, valid=5)
    manifests = [word for word in settings if ".test=" not in word]
    run_python(PRECOMPUTE, RECIPE, *manifests, "--split", "train", "--split", "valid", timeout_s=400)
    return [*settings, *QUICK]


@pytest.fixture(scope="module")
def straight(words: list[str], run_launcher: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 in one go on two ranks."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    run_launcher(TRAIN, RECIPE, "--stage", "1", *words, f"run.dir={run_dir}", timeout_s=400)
    assert list(losses(run_dir)) == list(range(1, NUM_STEPS + 1))
    return run_dir


def weights(run_dir: Path, step: int = NUM_STEPS) -> dict[str, torch.Tensor]:
    return load_file(step_folder(run_dir, step) / "projector.safetensors")


def assert_same_run(run_dir: Path, other: Path) -> None:
    """The same losses, utterances and weights, to the last bit."""
    assert losses(run_dir) == losses(other) and utterances(run_dir) == utterances(other)
    ours, theirs = weights(run_dir), weights(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_utterance_once_an_epoch(straight: Path) -> None:
    """37 utterances in steps of at most 7: six steps are an epoch."""
    ids = [each for step in utterances(straight).values() for each in step]
    assert len(ids) == 37 and len(set(ids)) == 37


def test_one_rank_takes_the_same_steps_as_two(
    words: list[str], straight: Path, run_python: Command, tmp_path: Path
) -> None:
    """Without a launcher too. Sums in another order differ in the last digits, no more."""
    run_python(TRAIN, RECIPE, "--stage", "1", *words, f"run.dir={tmp_path / 'run'}", timeout_s=400)
    assert_same_to_rounding(tmp_path / "run", straight)


def test_a_profile_changes_nothing(words: list[str], straight: Path, run_launcher: Command, tmp_path: Path) -> None:
    """The same bits with ``--profile``; a trace of each rank, a table, and at the end what bound the run."""
    run_dir = tmp_path / "run"
    line = [TRAIN, RECIPE, "--stage", "1", *words, "--profile", f"run.dir={run_dir}"]
    told = run_launcher(*line, timeout_s=400).stdout
    assert_same_run(run_dir, straight)
    for rank in range(2):
        trace = json.loads(gzip.decompress((run_dir / "profile" / f"rank-{rank}.6.pt.trace.json.gz").read_bytes()))
        names = {event["name"] for event in trace["traceEvents"]}
        assert {f"graft::{name}" for name in ("read", "forward", "backward", "reduce", "update", "agree")} <= names
    shares = re.search(r"ms a step: product (\d+)%, attention \d+%, elementwise \d+%, communication \d+%", told)
    assert shares and int(shares[1]) > 0
    assert re.search(r"MFU is a share of \S+ TFLOP/s a rank: the CPU, best product", told)
    assert re.search(
        r"bound by [\w ]+: \d+% of the time in forward and backward \(MFU \d\.\d+\), .* for other ranks", told
    )
    assert len(re.findall(r"tok/s .* mfu +\d+\.\d%", told)) == NUM_STEPS


def test_four_ranks_take_the_same_steps_as_two(
    words: list[str], straight: Path, run_launcher: Command, tmp_path: Path
) -> None:
    run_launcher(TRAIN, RECIPE, "--stage", "1", *words, f"run.dir={tmp_path / 'run'}", ranks=4, timeout_s=400)
    assert_same_to_rounding(tmp_path / "run", straight)


def test_stopped_and_resumed_on_another_number_of_ranks(
    words: list[str], straight: Path, run_launcher: Command, tmp_path: Path
) -> None:
    """One rank, then two, four, and one again."""
    run_dir = tmp_path / "run"
    for ranks, steps in ((1, 1), (2, 2), (4, 2), (1, None)):
        more = [f"run.stop_after={steps}"] if steps else []
        line = [TRAIN, RECIPE, "--stage", "1", *words, *more, f"run.dir={run_dir}"]
        run_launcher(*line, ranks=ranks, expect=75 if more else 0, timeout_s=400)
    assert_same_to_rounding(run_dir, straight)


def assert_same_to_rounding(run_dir: Path, other: Path) -> None:
    """The utterances of every step, the losses, the first gradient, and the final weights.

    The first gradient has only its sums in another order. The weights are 1e-7 of their norm apart.
    """
    assert utterances(run_dir) == utterances(other)
    assert losses(run_dir) == pytest.approx(losses(other), rel=1e-4)
    assert logged(run_dir, "train/grad_norm")[1] == pytest.approx(logged(other, "train/grad_norm")[1], rel=1e-6)
    ours, theirs = weights(run_dir), weights(other)
    apart = {name: ((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs}
    assert max(apart.values()) < 1e-6, apart


def test_a_sound_that_cannot_be_heard_stops_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in its set's rejects; that it is one of the few to listen to in TensorBoard is chance."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script changes it
    spec = importlib.util.spec_from_file_location("launch_train", TRAIN)
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    few_utterances(tmp_path, valid=4)
    lines = [json.loads(line) for line in (tmp_path / "valid.jsonl").read_text().splitlines()]
    lines[0]["audio_filepath"] = str(tmp_path / "cut.ogg")
    (tmp_path / "cut.ogg").write_bytes(b"OggS")
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    heard: list[str] = []
    tracker = SimpleNamespace(audio=lambda step, tag, waveform, rate: heard.append(tag))
    command.play(tracker, load_recipe(RECIPE, [f"data.manifests.valid={tmp_path / 'valid.jsonl'}"]))
    assert heard == [f"valid/{line['id']}" for line in lines[1:3]]


def test_all_ranks_go_on_from_where_the_first_one_stands(
    words: list[str], straight: Path, run_launcher: Command, tmp_path: Path
) -> None:
    """One that sees the folder as it was would take other steps, at another learning rate, and nobody would notice."""
    line = [RECIPE, "--stage", "1", *words, f"run.dir={tmp_path / 'run'}"]
    run_launcher(TRAIN, *line, "run.stop_after=4", expect=STOPPED, timeout_s=400)
    run_launcher(ROOT / "tests" / "programs" / "train_half_blind.py", *line, timeout_s=400)
    assert_same_run(tmp_path / "run", straight)


def test_other_data_are_refused_at_resume(
    words: list[str], straight: Path, run_launcher: Command, run_python: Command, tmp_path: Path
) -> None:
    """The same command, after lines were taken out of the manifest and the set was made anew."""
    run_dir = shutil.copytree(straight, tmp_path / "run")
    manifest = Path(next(word for word in words if word.startswith("data.manifests.train=")).partition("=")[2])
    lines = manifest.read_text().splitlines(keepends=True)
    shards = f"data.shards={tmp_path / 'sets'}"
    manifest.write_text("".join(lines[2:]))
    try:
        run_python(PRECOMPUTE, RECIPE, *words, shards, "--split", "train", timeout_s=400)
    finally:
        manifest.write_text("".join(lines))
    more = [f"run.dir={run_dir}", "stage1.max_steps=8", shards]
    outcome = run_launcher(TRAIN, RECIPE, "--stage", "1", *words, *more, expect=2, timeout_s=400)
    assert "utterances: ['37 of 37'] there, ['35 of 35'] here" in outcome.stderr


def test_the_error_of_one_rank_is_told(words: list[str], run_launcher: Command, tmp_path: Path) -> None:
    """NCCL waits for the other ranks before it lets go: an error must not wait for that."""
    started = time.monotonic()
    line = [RECIPE, "--stage", "1", *words, f"run.dir={tmp_path / 'run'}"]
    outcome = run_launcher(ROOT / "tests" / "programs" / "fault_on_a_gpu.py", *line, expect=1, timeout_s=300)
    assert "CUDA out of memory: the real reason" in outcome.stderr
    assert time.monotonic() - started < 200


def test_a_finished_stage_has_nothing_left_to_do(straight: Path, words: list[str], run_launcher: Command) -> None:
    """What was logged since, by whichever stage, stays."""
    names = ("metrics.jsonl", "recipe.yaml", "run.json")
    before = [(straight / name).read_bytes() for name in names]
    more = [f"run.dir={straight}", "evaluation.max_new_tokens=7"]
    outcome = run_launcher(TRAIN, RECIPE, "--stage", "1", *words, *more, timeout_s=400)
    assert "nothing is left to do" in outcome.stdout
    assert [(straight / name).read_bytes() for name in names] == before


@pytest.mark.faults
def test_one_rank_is_killed_then_the_same_command_again(
    words: list[str], straight: Path, run_launcher: Command, tmp_path: Path
) -> None:
    """The launcher fails. Resumed, the run is the straight one."""
    run_dir = tmp_path / "run"
    training = Training(words, run_dir)
    try:
        training.wait_for(r"saved \S+step-00000002")
        pids = training.ranks()
        assert len(pids) == 2
        os.kill(pids[1], signal.SIGKILL)
        assert training.wait() != 0
    finally:
        training.end()
    run_launcher(TRAIN, RECIPE, "--stage", "1", *words, f"run.dir={run_dir}", timeout_s=400)
    assert_same_run(run_dir, straight)


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


@pytest.mark.faults
def test_a_damaged_checkpoint_is_passed_over(
    words: list[str], straight: Path, run_launcher: Command, tmp_path: Path
) -> None:
    """The newest one that is whole wins; where none is, nothing begins afresh in silence."""
    run_dir = shutil.copytree(straight, tmp_path / "run")
    line = [TRAIN, RECIPE, "--stage", "1", *words, f"run.dir={run_dir}"]
    damage(step_folder(run_dir, NUM_STEPS) / "optimizer.safetensors")
    outcome = run_launcher(*line, timeout_s=400)
    assert "optimizer.safetensors is damaged" in outcome.stdout
    assert f"resumed at step {NUM_STEPS - 2}" in outcome.stdout
    assert_same_run(run_dir, straight)
    for step in checkpoint_steps(run_dir):
        damage(step_folder(run_dir, step) / "projector.safetensors")
    outcome = run_launcher(*line, expect=2, timeout_s=400)
    assert "no checkpoint of stage 1" in outcome.stderr and "projector.safetensors is damaged" in outcome.stderr


def test_another_runs_folder_is_refused(words: list[str], straight: Path, run_launcher: Command) -> None:
    line = [TRAIN, RECIPE, "--stage", "1", *words, f"run.dir={straight}", "stage1.learning_rate=0.5"]
    outcome = run_launcher(*line, expect=2, timeout_s=400)
    assert "holds another run" in outcome.stderr
    assert "stage1.learning_rate: 2e-05 there, 0.5 here" in outcome.stderr


def test_gradients_that_stay_infinite_end_the_run(words: list[str], run_launcher: Command, tmp_path: Path) -> None:
    """The first update of such a size makes weights of which no other step can come."""
    line = [TRAIN, RECIPE, "--stage", "1", *words, f"run.dir={tmp_path / 'run'}", "stage1.learning_rate=1e30"]
    outcome = run_launcher(*line, expect=1, timeout_s=400)
    assert outcome.stdout.count("skipped: its gradient is not finite on some rank") == MAX_SKIPPED == 5
    assert re.search(r"5 steps in a row without a finite gradient; the last: \('train-", outcome.stderr)


def test_stage_2_without_stage_1(words: list[str], run_launcher: Command, tmp_path: Path) -> None:
    outcome = run_launcher(
        TRAIN, RECIPE, "--stage", "2", *words, f"run.dir={tmp_path / 'run'}", expect=2, timeout_s=400
    )
    assert "run --stage 1 first" in outcome.stderr


def test_stage_2_starts_from_stage_1_and_says_so(
    words: list[str], straight: Path, run_launcher: Command, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(straight, tmp_path / "run")
    outcome = run_launcher(TRAIN, RECIPE, "--stage", "2", *words, f"run.dir={run_dir}", timeout_s=400)
    assert f"starting from the projector of {step_folder(run_dir, NUM_STEPS)}" in outcome.stdout
    assert list(losses(run_dir)) == list(range(1, NUM_STEPS + 4))  # one curve over both stages
    last = step_folder(run_dir, NUM_STEPS + 3)
    assert (last / "adapter" / "adapter_model.safetensors").is_file()
    assert any(not torch.equal(weights(run_dir)[name], tensor) for name, tensor in weights(run_dir, 9).items())

    line = [TRAIN, RECIPE, "--stage", "2", "--from", last, *words, f"run.dir={tmp_path / 'another'}"]
    outcome = run_launcher(*line, "lora.alpha=8", expect=2, timeout_s=400)
    assert f"starting from the projector and adapters of {last}" in outcome.stdout
    assert "lora.alpha: 64 there, 8 here" in outcome.stderr


def test_dropout_does_not_depend_on_the_number_of_ranks(
    words: list[str], straight: Path, run_launcher: Command, run_python: Command, tmp_path: Path
) -> None:
    """Stage 2 with much dropout, on two ranks and on one: what is dropped follows the micro-batch."""
    run_dirs = [shutil.copytree(straight, tmp_path / name) for name in ("two", "one")]
    for run, run_dir in zip((run_launcher, run_python), run_dirs, strict=True):
        run(TRAIN, RECIPE, "--stage", "2", *words, "lora.dropout=0.5", f"run.dir={run_dir}", timeout_s=400)
    two, one = map(losses, run_dirs)
    assert len(one) == NUM_STEPS + 3 and one == pytest.approx(two, rel=1e-4)


def test_online_features_give_the_same_losses(
    words: list[str], straight: Path, run_launcher: Command, tmp_path: Path
) -> None:
    """A frozen replica on each rank makes the frames that the shards hold."""
    line = [TRAIN, RECIPE, "--stage", "1", *words, f"run.dir={tmp_path / 'run'}", "data.features=online"]
    run_launcher(*line, timeout_s=600)
    assert utterances(tmp_path / "run") == utterances(straight)
    assert losses(tmp_path / "run") == pytest.approx(losses(straight), rel=1e-4)


def test_shards_of_another_encoder_are_refused(words: list[str], run_launcher: Command, tmp_path: Path) -> None:
    """One weight of the encoder differs by one bit; every rank stops before the first step."""
    base = shutil.copytree(ROOT / "examples" / "tiny" / "whisper", tmp_path / "whisper")
    flip_a_weight(base / "model.safetensors", "model.encoder.layers.0.fc1.weight")
    line = [TRAIN, RECIPE, "--stage", "1", *words, f"run.dir={tmp_path / 'run'}", f"bases.whisper={base}"]
    outcome = run_launcher(*line, expect=2, timeout_s=400)
    assert "was made by another encoder" in outcome.stderr
    assert not checkpoint_steps(tmp_path / "run")


def flip_a_weight(file: Path, name: str) -> None:
    """Change the lowest bit of the first number of a tensor."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors[name].view(torch.uint8).view(-1)[0] ^= 1
    save_file(tensors, file, metadata=metadata)
