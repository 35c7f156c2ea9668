"""The engine's numerics on two real ranks, and what a DeepSpeed JSON may say."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Command

from graft.recipe import Stage
from graft.train.engine import OWNED_BY_THE_RECIPE, resolve_ds_config


@pytest.fixture(scope="module", params=["zero2.json", "zero2_offload.json"])
def seen(request: pytest.FixtureRequest, run_launcher: Command, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What rank 0 of ``programs/engine_numerics.py`` wrote, under each shipped configuration."""
    report = tmp_path_factory.mktemp("engine") / "seen.json"
    run_launcher(ROOT / "tests" / "programs" / "engine_numerics.py", ROOT / "ds_configs" / request.param, report)
    return json.loads(report.read_text())


def test_no_small_gradient_is_lost(seen: dict) -> None:
    """One gradient of 1 and 63 of 0.001 on each of 2 + 3 weights: added up in fp32, about 1.063, none is lost."""
    total = torch.tensor(1.0)
    for _ in range(63):
        total += 0.001
    assert total.item() == pytest.approx(1.063, rel=63 * 6e-8)  # fp32 rounds each addition
    assert seen["small_gradients"] == pytest.approx(5**0.5 * total.item(), rel=1e-6)


def test_ranks_with_different_micro_batches_add_up(seen: dict) -> None:
    """Rank 0 gives 2 and rank 1 gives 3 + 4; ZeRO averages, so the norm is sqrt(5) * 9 / 2."""
    assert seen["uneven"] == pytest.approx(5**0.5 * 4.5, rel=1e-6)


def test_one_reduction_per_step(seen: dict) -> None:
    """Five small weights share a bucket: one collective for it, however many micro-batches were added up."""
    assert seen["reductions"] == {"1 micro-batch": 1, "8 micro-batches": 1}


def test_nothing_is_read_before_the_update(seen: dict) -> None:
    """On a GPU each reading waits. DeepSpeed's are in the update, at one point and as many whatever was added up.

    Offloading copies the reduced gradients to the host before it, and reads the norm of each of the two weights.
    """
    (made_1, updated_1), (made_8, updated_8) = seen["reads"].values()
    assert made_1 == made_8 == (2 if seen["offload"] else 0)
    assert 0 < updated_1 == updated_8 <= (9 if seen["offload"] else 8), seen["reads"]  # as DeepSpeed 0.19.8 does


def test_no_clock_waits_for_the_device(seen: dict) -> None:
    assert seen["waits"] == 0


def test_deepspeeds_groups_time_out_as_ours_does(seen: dict) -> None:
    """It makes some of its own, and reduces gradients in one of them."""
    assert len(seen["timeouts"]) > 1 and set(seen["timeouts"]) == {60.0}


def test_learning_rates_are_the_groups_own(seen: dict) -> None:
    """Adam's first update has the size of the learning rate: half of 0.1 for one, half of 0.01 for the other."""
    assert seen["first_update"] == pytest.approx([0.05, 0.005], rel=1e-4)


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(seen: dict) -> None:
    """Weights and moments stay as they are."""
    assert seen["not_finite"] == {"applied": False, "moved": 0.0}


def test_moments_come_back_whole(seen: dict) -> None:
    """Saved, loaded into a fresh engine, stepped once: the same weights to the last bit as without the detour."""
    assert seen["resumed_equal"] and seen["moments_nonzero"]


def test_bf16_reaches_the_forward_pass(seen: dict) -> None:
    """On a GPU too, where DeepSpeed turns off an autocast around the engine; gradients stay fp32 in every way."""
    assert seen["precisions"] == {"fp32": ["float32", "float32"], "bf16": ["bfloat16", "float32"]}


@pytest.mark.parametrize("key", OWNED_BY_THE_RECIPE)
def test_a_number_has_one_owner(key: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({key: 1, "zero_optimization": {"stage": 2}}))
    with pytest.raises(ValueError, match=f"sets '{key}' .*one owner, the recipe"):
        resolve_ds_config(path, Stage(), "fp32")


@pytest.mark.parametrize(
    ("text", "told"),
    [("{", "is not JSON"), ("{}", "ZeRO stage None"), ('{"zero_optimization": {"stage": 3}}', "ZeRO stage 3")],
)
def test_odd_files(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        resolve_ds_config(path, Stage(), "fp32")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        resolve_ds_config(tmp_path / "none.json", Stage(), "fp32")


def test_clipping_is_the_recipes() -> None:
    config = resolve_ds_config(ROOT / "ds_configs" / "zero2.json", Stage(max_grad_norm=0.7), "fp32")
    assert config["gradient_clipping"] == 0.7 and config["gradient_accumulation_steps"] == 1
