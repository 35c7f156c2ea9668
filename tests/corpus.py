"""A few utterances of the committed corpus as the data of a recipe, for tests that go the whole way."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import ROOT

from graft.run_dir import step_folder

RECIPE = ROOT / "recipes" / "tiny.yaml"
ALIGNED = 2  # steps of stage 1
CORPUS = ROOT / "examples" / "tiny" / "corpus"


def few_utterances(folder: Path, **sizes: int) -> list[str]:
    """Write manifests of the first ``sizes`` utterances per split; the overrides that make them the recipe's data."""
    words = []
    for split, size in sizes.items():
        lines = [json.loads(line) for line in (CORPUS / f"{split}.jsonl").read_text().splitlines()[:size]]
        lines = [{**line, "audio_filepath": str(CORPUS / line["audio_filepath"])} for line in lines]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        words.append(f"data.manifests.{split}={folder / split}.jsonl")
    words.append(f"stage1.alignment_steps={ALIGNED}")
    return [*words, f"data.shards={folder / 'sets'}", "data.samples_per_shard=16"]


def logged(run_dir: Path, tag: str) -> dict[int, float]:
    """The figure of each step that logged one."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[tag] for line in lines if tag in line}


def losses(run_dir: Path) -> dict[int, float]:
    return logged(run_dir, "train/loss")


def utterances(run_dir: Path) -> dict[int, list[str]]:
    """The utterances of each step, sorted."""
    lines = map(json.loads, (run_dir / "utterances.jsonl").read_text().splitlines())
    return {line["step"]: sorted(line["ids"]) for line in lines}


def assert_same_checkpoint(run_dir: Path, straight: Path, step: int) -> None:
    """Weights and moments, to the last bit."""
    for name in ("projector.safetensors", "optimizer.safetensors"):
        ours, theirs = (step_folder(folder, step) / name for folder in (run_dir, straight))
        assert ours.read_bytes() == theirs.read_bytes(), f"{name} of step {step} differs"
