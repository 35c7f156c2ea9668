"""FLOP of a step: the formula against torch's own count of what is multiplied; peaks by name or by measuring."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_bases as tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from graft.data.collate import Batch, collate_training
from graft.data.loader import FeatureSample
from graft.data.prompt import PromptTemplate
from graft.model.assemble import assemble
from graft.model.lora import add_lora
from graft.model.projector import KINDS
from graft.model.trainable import select_trainable
from graft.train.utilisation import ModelFlops, data_sheet, measure, model_flops, peak_of
from tests.test_prompt import INSTRUCTION, SYSTEM


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return tiny.whisper_folder(folder / "w"), tiny.qwen2_vl_folder(folder / "q")


def flop_in_place(made: torch.Size, left: torch.Size, right: torch.Size, **_: object) -> int:
    """Of the adapters; torch does not count it by itself."""
    return 2 * left[0] * left[1] * right[1]


def flop_depthwise_backward(output: torch.Size, made: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    """Of both gradients; torch counts that of the weight as if each channel heard all others."""
    assert weight[1] == 1 and made == output
    return 2 * 2 * made.numel() * weight[2]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_is_what_is_multiplied(kind: str, stage: int, folders: tuple[Path, Path]) -> None:
    """Nothing is padded here. Attention by two products computes the half that causal attention does not need, too."""
    recipe = tiny.recipe(*folders, projector={"kind": kind, "hidden_size": 36})
    graft = assemble(recipe)
    if stage == 2:
        add_lora(graft.model, recipe.lora)
    select_trainable(graft.model, stage)
    graft.model.set_attn_implementation("eager")
    template = PromptTemplate.from_processor(graft.processor, SYSTEM, INSTRUCTION)
    samples = [FeatureSample(name, "abc", torch.ones(40, 24)) for name in "xy"]  # 40 frames: 10 audio tokens exactly
    batch = collate_training(samples, template)
    assert batch.num_padding == 0 and batch.num_audio_tokens == 20
    uncounted = {torch.ops.aten.addmm_: flop_in_place, torch.ops.aten.convolution_backward: flop_depthwise_backward}
    with FlopCounterMode(display=False, custom_mapping=uncounted) as counted:
        graft.model(**batch.model_inputs(), num_items_in_batch=1, use_cache=False).loss.backward()
    flops = model_flops(graft.model)
    other_half = flops.per_pair * batch.num_attended_pairs
    rotary = 2 * batch.num_positions * tiny.TEXT["hidden_size"] // tiny.TEXT["num_attention_heads"] // 2 * 3
    counted_flop = counted.get_total_flops()
    assert flops.of([batch]) + other_half == pytest.approx(counted_flop, abs=2 * rotary)
    assert rotary < 0.001 * counted_flop, "too rough to find a wrong term"


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_of_alignment(kind: str, folders: tuple[Path, Path]) -> None:
    """Nothing is padded here either. The language model does not run; words are compared with audio tokens."""
    graft = assemble(tiny.recipe(*folders, projector={"kind": kind, "hidden_size": 36}))
    select_trainable(graft.model, 1)
    template = PromptTemplate.from_processor(graft.processor, SYSTEM, INSTRUCTION)
    samples = [FeatureSample(text, text, torch.ones(40, 24)) for text in ("abc", "da")]
    batch = collate_training(samples, template, align=True)
    uncounted = {torch.ops.aten.convolution_backward: flop_depthwise_backward}
    with FlopCounterMode(display=False, custom_mapping=uncounted) as counted:
        graft.model(**batch.model_inputs(), num_items_in_batch=1, use_cache=False).loss.backward()
    assert model_flops(graft.model).of([batch]) == counted.get_total_flops()


def test_of_a_step_by_hand() -> None:
    """Rows of 4 and 2 real positions, 3 labels that something predicts are 3 of 3, 2 audio tokens."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    ids = torch.tensor([[5, 6, 7, 8], [5, 9, 0, 0]])
    labels = torch.where(torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]]).bool(), ids, -100)
    places = torch.tensor([0, 4])
    batch = Batch(("a", "b"), ids, mask, labels, torch.zeros(2, 1, 3), torch.ones(2, dtype=torch.int64), places, places)
    flops = ModelFlops(per_token=1e6, per_pair=1e3, per_label=1.0, per_audio_token=0.01, per_comparison=1e9)
    assert flops.of([batch, batch]) == pytest.approx(2 * (6e6 + 10e3 + 3 + 0.02))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_data_sheets_by_whole_words(name: str, peak: float | None) -> None:
    assert data_sheet(name) == peak


def test_an_unknown_device_is_measured_and_said_so() -> None:
    """And nothing of what is random in training has moved."""
    before = torch.random.get_rng_state()
    peak = peak_of(torch.device("cpu"), "fp32")
    assert peak.flops > 1e8 and "the CPU, best product of 1024 x 1024 in fp32" in peak.source
    assert torch.equal(torch.random.get_rng_state(), before)
    assert measure(torch.device("cpu"), "bf16", 64) > 0
