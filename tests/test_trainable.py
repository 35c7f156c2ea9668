"""The trainable set is exactly the projector, then exactly projector and adapters: fp32, named, in a fixed order."""

from __future__ import annotations

import pytest
import tiny_bases as tiny
import torch

from graft.model.assemble import assemble
from graft.model.grafted import AudioGraftForConditionalGeneration
from graft.model.lora import add_lora
from graft.model.trainable import check_trainable, describe, select_trainable
from graft.recipe import Recipe

PROJECTOR = [f"model.multi_modal_projector.linear_{n}.{part}" for n in (1, 2) for part in ("weight", "bias")]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("bases")
    whisper, qwen = tiny.whisper_folder(folder / "w"), tiny.qwen2_vl_folder(folder / "q", dtype=torch.bfloat16)
    return tiny.recipe(whisper, qwen, run={"precision": "bf16"})


@pytest.fixture
def model(recipe: Recipe) -> AudioGraftForConditionalGeneration:
    return assemble(recipe, with_encoder=True).model


def training(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_nothing_trains_at_first(model: AudioGraftForConditionalGeneration) -> None:
    assert training(model) == set()


def test_stage_1_is_the_projector(model: AudioGraftForConditionalGeneration, recipe: Recipe) -> None:
    add_lora(model, recipe.lora)  # present, but not of this stage
    chosen = select_trainable(model, 1)
    assert list(chosen) == PROJECTOR and training(model) == set(PROJECTOR)


def test_stage_2_adds_the_adapters(model: AudioGraftForConditionalGeneration, recipe: Recipe) -> None:
    add_lora(model, recipe.lora)
    chosen = select_trainable(model, 2)
    assert training(model) == set(chosen)
    assert set(chosen) - set(PROJECTOR) == {
        f"model.language_model.layers.{layer}.{linear}.lora_{side}.default.weight"
        for layer in range(2)
        for linear in (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
        for side in "AB"
    }
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in chosen.items())


def test_trained_weights_are_fp32_and_frozen_ones_are_not(
    model: AudioGraftForConditionalGeneration, recipe: Recipe
) -> None:
    add_lora(model, recipe.lora)
    model.to(torch.bfloat16)  # as a model read from one folder would be
    chosen = select_trainable(model, 2)
    assert {parameter.dtype for parameter in chosen.values()} == {torch.float32}
    frozen = [parameter for name, parameter in model.named_parameters() if name not in chosen]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}


def test_names_and_order_are_the_same_in_every_process(recipe: Recipe) -> None:
    lists = []
    for _ in range(2):
        model = assemble(recipe).model
        add_lora(model, recipe.lora)
        lists.append(list(select_trainable(model, 2)))
    assert lists[0] == lists[1]


def test_stage_2_without_adapters_is_an_error(model: AudioGraftForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="the model has none"):
        select_trainable(model, 2)


@pytest.mark.parametrize("stage", [0, 3])
def test_there_are_two_stages(model: AudioGraftForConditionalGeneration, stage: int) -> None:
    with pytest.raises(ValueError, match=f"stage {stage}: there are stages 1"):
        select_trainable(model, stage)


@pytest.mark.parametrize("tower", ["audio_tower.conv1", "visual.merger.ln_q", "language_model.norm"])
def test_a_tower_that_trains_is_caught(model: AudioGraftForConditionalGeneration, tower: str) -> None:
    chosen = select_trainable(model, 1)
    parameter = model.model.get_submodule(tower).weight
    parameter.requires_grad_(True)
    with pytest.raises(AssertionError, match=tower):
        check_trainable(model, chosen)
    with pytest.raises(AssertionError, match=tower):  # nor may it be among the chosen
        check_trainable(model, {**chosen, f"model.{tower}.weight": parameter})


def test_the_table(model: AudioGraftForConditionalGeneration, recipe: Recipe) -> None:
    add_lora(model, recipe.lora)
    select_trainable(model, 2)
    rows = {line.split("  ")[0]: line.split()[-4:] for line in describe(model).splitlines()[1:-1]}
    projector = 96 * 48 + 48 + 48 * 48 + 48
    lora = 2 * 4 * ((48 + 48) * 2 + (48 + 24) * 2 + (48 + 80) * 3)
    assert rows["projector"] == [f"{projector:,}", f"{projector:,}", "4", "float32"]
    assert rows["LoRA adapters"] == [f"{lora:,}", f"{lora:,}", "28", "float32"]
    assert rows["audio tower"][1:] == rows["vision tower"][1:] == ["0", "0", "bfloat16"]
    assert describe(model).splitlines()[-1].split()[2] == f"{projector + lora:,}"
