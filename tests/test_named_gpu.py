"""On a GPU in name only (programs/named_gpu.py): the CPU's results, no two devices meet, and the host seldom waits.

What no test here can see is a kernel of a GPU: those tests skip themselves where there is none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parent / "programs" / "on_a_named_gpu.py"
STEPS = ["stage 1, linear", "stage 1, mlp", "stage 1, swiglu", "stage 1, conv", "stage 1, aligning", "stage 2"]
OTHERS = ["greedy", "joint", "joint, longer", "full windows", "trimmed windows", "picture", "saved"]
BF16 = ["stage 1, bf16", "stage 1, aligning, bf16", "stage 2, bf16", "joint, bf16", "full windows, bf16"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """In a process of its own: torch then has a device that other tests must not see."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path_factory.mktemp("bases"))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_mistakes_are_seen(told: dict[str, Any]) -> None:
    seen = told["mistakes"]
    assert "takes tensors of two devices" in seen.pop("two devices")
    assert seen.pop("nothing") == ""
    assert len(seen) == 7 and all(seen.values()), seen


@pytest.mark.parametrize("name", STEPS + OTHERS)
def test_results_are_the_cpus(told: dict[str, Any], name: str) -> None:
    """Of attention torch has another kernel there: the last digits of fp32 differ. Texts and files are the same."""
    assert told[name]["off"] < 1e-5


def test_autocast_is_cudas(told: dict[str, Any]) -> None:
    """The CPU's would leave root and sum in bf16."""
    assert told["casts"] == ["bfloat16", "float32", "float32", "float32", "bfloat16"]


@pytest.mark.parametrize("name", BF16)
def test_in_bf16_results_are_near_the_cpus(told: dict[str, Any], name: str) -> None:
    """Of gradients, loss and norm; autocast rounds in other places there."""
    assert told[name]["off"] < 0.05


@pytest.mark.parametrize("name", [*STEPS, *BF16[:3]])
def test_in_a_step_the_host_never_waits(told: dict[str, Any], name: str) -> None:
    """Until the reduction, which is DeepSpeed's, and not here. CTC's own reading of lengths is inside of a kernel."""
    assert told[name]["waits"] == []


@pytest.mark.parametrize(("name", "windows"), [("full windows", 1), ("full windows, bf16", 1), ("trimmed windows", 2)])
def test_an_encoder_waits_once_for_each_window(told: dict[str, Any], name: str, windows: int) -> None:
    """For its frames; waveforms go there, and mels are made, without waiting."""
    waits = told[name]["waits"]
    assert len(waits) == windows and all("_to_copy.default to the host: encoder.py" in wait for wait in waits)


def test_for_a_word_the_host_waits_twice_and_not_for_ours(told: dict[str, Any]) -> None:
    """transformers looks whether a mask is needed, and whether all replies have ended."""
    short, long = (told[name]["waits"] for name in ("joint", "joint, longer"))
    more = [wait for wait in set(long) for _ in range(long.count(wait) - short.count(wait))]
    assert len(more) == 2 * 6 and not any("joint.py" in wait or "transcribe.py" in wait for wait in more)
