"""Every phase of the shipped default, shortened: the real launcher, a model that learns to listen, and a summary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, Command

from corpus import few_utterances

SHORT = [
    "stage1.max_steps=100",
    "stage1.alignment_steps=85",
    "stage1.warmup_steps=10",
    "stage2.max_steps=15",
    "stage2.warmup_steps=5",
    "evaluation.every=100",
    "evaluation.max_utterances=10",
]


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
