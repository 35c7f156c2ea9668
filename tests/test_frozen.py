"""What is frozen stays bit-equal to the files it came from, through both stages, with the encoder's replica at work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ROOT, Command

from corpus import RECIPE, few_utterances

PROGRAM = ROOT / "tests" / "programs" / "train_and_compare.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bit_equal_after_both_stages(precision: str, run_python: Command, tmp_path: Path) -> None:
    """Encoder, vision tower and language model; the two marker rows, copied at assembly, are the only exception."""
    report = tmp_path / "report.pt"
    words = few_utterances(tmp_path, train=9, valid=3)
    run_python(
        PROGRAM, RECIPE, report, f"run.dir={tmp_path / 'run'}", f"run.precision={precision}", *words, timeout_s=600
    )
    seen = torch.load(report, weights_only=True)
    assert seen["trained_moved"] == {"projector": True, "lora": True}
    assert seen["differing"] == [], f"changed by training: {seen['differing']}"
    # Tensors: 15 and 12 a layer, 7 and 2 beside the layers; the vision tower has two blocks.
    assert seen["compared"]["audio_tower"] == 4 * 15 + 7 and seen["compared"]["language_model"] == 4 * 12 + 2
    assert seen["compared"]["visual"] > 20
    assert seen["differing_rows"] == seen["marker_rows"]
