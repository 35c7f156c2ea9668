"""Every phase of the shipped default, shortened: the real launcher, a model that learns to listen, and a summary."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, Command

from corpus import few_utterances
from graft.recipe import load_recipe

SHORT = [
    "stage1.max_steps=100",
    "stage1.alignment_steps=85",
    "stage1.warmup_steps=10",
    "stage2.max_steps=15",
    "stage2.warmup_steps=5",
    "evaluation.every=100",
    "evaluation.max_utterances=10",
]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """launch/quickstart.py as a module."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script changes it
    spec = importlib.util.spec_from_file_location("launch_quickstart", ROOT / "launch" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("gpus", "micro_batches", "ranks"), [(0, 2, 2), (1, 2, 1), (8, 2, 2), (8, 16, 8), (0, 1, 1)])
def test_ranks_are_no_more_than_micro_batches(
    command: ModuleType, gpus: int, micro_batches: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine of eight GPUs runs the shipped recipe, which has two."""
    monkeypatch.setattr(command, "on_gpu", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    settings = [f"{stage}.micro_batches={micro_batches}" for stage in ("stage1", "stage2")]
    assert command.number_of_ranks(load_recipe(ROOT / "recipes" / "tiny.yaml", settings)) == ranks


@pytest.mark.parametrize(
    ("visible", "words"), [("2, 3,5", "--include localhost:2,3"), ("", "--num_gpus 2"), ("GPU-6a1b", None)]
)
def test_the_gpus_that_are_ours(
    command: ModuleType, visible: str, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --num_gpus the launcher ignores CUDA_VISIBLE_DEVICES, and takes GPU 0, which may be someone else's."""
    monkeypatch.setattr(command, "on_gpu", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if words:
        assert " ".join(command.which_gpus(2)) == words
    else:
        with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES is GPU-6a1b"):
            command.which_gpus(2)


def test_a_run_is_scored_as_asked_now(command: ModuleType) -> None:
    """Of a run that is trained already, its recipe.yaml says how it was trained, and no more."""
    overrides = ["run.dir=runs/mine", "evaluation.alignment_weight=0"]
    recipe = load_recipe(ROOT / "recipes" / "tiny.yaml", overrides)
    *_, evaluation = command.phases(recipe, Namespace(recipe="recipes/tiny.yaml", overrides=overrides), 2)
    assert evaluation.name == "evaluate" and evaluation.words[-2:] == overrides
    assert evaluation.words[1:3] == ["--checkpoint", "runs/mine"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quickstart_from_any_folder(run_python: Command, tmp_path: Path) -> None:
    """WER falls far below what one gets without listening, within a minute of training on 400 utterances."""
    words = few_utterances(tmp_path, train=400, valid=10, test=20)
    outcome = run_python(
        ROOT / "launch" / "quickstart.py",
        ROOT / "recipes" / "tiny.yaml",
        *words,
        *SHORT,
        f"run.dir={tmp_path / 'run'}",
        cwd=tmp_path,
        timeout_s=1100,
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["seconds"]) == {"precompute", "verify", "stage 1", "stage 2", "evaluate"}
    assert 0 <= summary["wer_encoder_base"] < 0.3 and 0 <= summary["cer"] <= summary["wer"]
    assert summary["wer"] < 0.5 < summary["wer_swapped"]
    assert summary["evaluation"]["num_utterances"] == 20 and summary["ranks"] == 2
    assert "WER, graft" in outcome.stdout and "[INFO]" not in outcome.stdout and "Traceback" not in outcome.stdout
