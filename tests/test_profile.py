"""Traces of a few steps: whole files that others can read, and a table whose shares are of the time."""

from __future__ import annotations

import gzip
import json
import logging
import re
import time
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from graft.ranks import Ranks
from graft.train.phases import BACKWARD, FORWARD, READ, Phases
from graft.train.profile import ACTIVE, WAIT, WARMUP, StepProfile, kind_of, told

ALL = WAIT + WARMUP + ACTIVE


def train(profiled: StepProfile, num_steps: int) -> None:
    phases, weight = Phases(torch.device("cpu")), torch.ones(200, 200, requires_grad=True)
    with profiled:
        for step in range(1, num_steps + 1):
            with phases(READ):
                time.sleep(0.02)
            with phases(FORWARD):
                loss = (weight @ weight).sum()
            with phases(BACKWARD):
                loss.backward()
            profiled.step(step)


def test_a_trace_of_a_few_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Chrome's format, which Perfetto reads; its name is what TensorBoard's plugin looks for."""
    caplog.set_level(logging.INFO)
    train(StepProfile(tmp_path, Ranks(), torch.device("cpu")), ALL + 2)
    (file,) = (tmp_path / "profile").iterdir()
    assert re.fullmatch(r"^(.*?)(\.\d+)?\.pt\.trace\.json(?:\.gz)?$", file.name)[1] == "rank-0"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    assert names.count("graft::forward") == ACTIVE and "aten::mm" in names
    assert sum(name.startswith("ProfilerStep#") for name in names) == ACTIVE
    assert f"profile of the steps to {ALL} in {file}" in caplog.text and "aten::mm" in caplog.text


def test_steps_of_another_kind_are_passed_over(tmp_path: Path) -> None:
    train(StepProfile(tmp_path, Ranks(), torch.device("cpu"), passed_over=2), ALL + 3)
    assert [file.name for file in (tmp_path / "profile").iterdir()] == [f"rank-0.{ALL + 2}.pt.trace.json.gz"]


def test_each_rank_has_its_file(tmp_path: Path) -> None:
    for rank in range(2):
        ranks = Ranks(rank=rank, world_size=1, local_rank=0)
        train(StepProfile(tmp_path, ranks, torch.device("cpu")), ALL)
    assert {file.name[:7] for file in (tmp_path / "profile").iterdir()} == {"rank-0.", "rank-1."}


def test_a_run_that_is_too_short_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(StepProfile(tmp_path, Ranks(), torch.device("cpu")), WAIT)
    assert f"no step was profiled: that takes {WAIT + WARMUP + 1} steps" in caplog.text
    assert not (tmp_path / "profile").exists()


def test_a_shorter_trace_is_better_than_none(tmp_path: Path) -> None:
    train(StepProfile(tmp_path, Ranks(), torch.device("cpu")), WAIT + WARMUP + 1)
    assert len(list((tmp_path / "profile").iterdir())) == 1


def test_a_training_that_fails_waits_for_nobody(tmp_path: Path) -> None:
    """Where this rank fails in a profiled step, the others do not come to agree on its file."""
    profiled = StepProfile(tmp_path, Ranks(), torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), profiled:
        for step in range(1, WAIT + WARMUP + 2):
            profiled.step(step)
        raise ZeroDivisionError
    assert not (tmp_path / "profile").exists()


def test_shares_are_of_the_time() -> None:
    """Half a second of waiting for data in one step, and little else: the kinds add up to the whole."""
    left = torch.ones(300, 300)
    with profile(activities=[ProfilerActivity.CPU]) as seen, record_function("ProfilerStep#7"):
        with record_function("graft::read"):
            time.sleep(0.5)
        with record_function("graft::forward"):
            for _ in range(5):
                torch.mm(left, left)
            left.exp()
    text = told(seen.key_averages(), on_gpu=False)
    shares = {kind: int(share) for kind, share in re.findall(r"([\w ]+?) (\d+)%", text.splitlines()[0].split(": ")[1])}
    shares = {kind.strip(): share for kind, share in shares.items()}
    assert shares["data wait"] >= 50 and shares["product"] < 50 and 97 <= sum(shares.values()) <= 103
    assert text.splitlines()[1].endswith("graft::read"), "the dearest is told first"


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mm", "product"),
        ("aten::addmm", "product"),
        ("aten::_conv_depthwise2d", "product"),
        ("aten::mkldnn_convolution", "product"),
        ("aten::convolution_backward", "product"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_scaled_dot_product_efficient_attention", "attention"),
        ("c10d::allreduce_", "communication"),
        ("nccl:all_reduce", "communication"),
        ("gloo:all_reduce", "communication"),
        ("graft::reduce", "communication"),
        ("graft::read", "data wait"),
        ("graft::forward", "Python"),
        ("ProfilerStep#12", "Python"),
        ("aten::mul", "elementwise"),
        ("aten::copy_", "elementwise"),
        ("aten::silu_backward", "elementwise"),
    ],
)
def test_kinds_of_operators(operator: str, kind: str) -> None:
    assert kind_of(operator) == kind
