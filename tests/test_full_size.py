"""The published models at full size on the meta device: no weights, but every shape, name and count.

The expected numbers are arithmetic on the published shapes, written out below; the configs are those on the hub.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_bases as tiny
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import WhisperFeatureExtractor

from graft.model.assemble import assemble
from graft.model.grafted import AudioGraftForConditionalGeneration
from graft.model.lora import DEFAULT_TARGETS, add_lora, check_targets, hits_per_tower, is_lora_name
from graft.model.trainable import count, describe, select_trainable
from graft.recipe import Lora, Recipe

NAIVE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VISION = {
    "depth": 32,
    "embed_dim": 1280,
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
}
SHAPES = {  # hidden, ffn, heads, key-value heads, rows of the embedding matrix, tied, all with 28 layers
    "7b": (3584, 18944, 28, 4, 152064, False),
    "2b": (1536, 8960, 12, 2, 151936, True),
}
TURBO = {
    "model_type": "whisper",
    "architectures": ["WhisperForConditionalGeneration"],
    "num_mel_bins": 128,
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "decoder_layers": 4,
    "decoder_attention_heads": 20,
    "decoder_ffn_dim": 5120,
    "max_source_positions": 1500,
    "vocab_size": 51866,
}


def qwen_config(size: str) -> dict[str, Any]:
    hidden, ffn, heads, kv_heads, rows, tied = SHAPES[size]
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **tiny.IDS,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": 28,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "vision_config": {**VISION, "hidden_size": hidden},
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``turbo``, ``7b`` and ``2b``: configs of the published models, the tiny tokenizer, no weights."""
    root = tmp_path_factory.mktemp("published")
    for size in SHAPES:
        (root / size).mkdir()
        (root / size / "config.json").write_text(json.dumps(qwen_config(size)))
        tiny.tokenizer().save_pretrained(root / size)
    (root / "turbo").mkdir()
    (root / "turbo" / "config.json").write_text(json.dumps(TURBO))
    WhisperFeatureExtractor(feature_size=128).save_pretrained(root / "turbo")
    return root


def recipe(bases: Path, size: str, **projector: Any) -> Recipe:
    folders = {"whisper": str(bases / "turbo"), "qwen2_vl": str(bases / size)}
    return Recipe(bases=folders, projector=projector)


def model(bases: Path, size: str, with_encoder: bool = True, **projector: Any) -> AudioGraftForConditionalGeneration:
    return assemble(recipe(bases, size, **projector), meta=True, with_encoder=with_encoder).model


@cache
def lora_parameters(size: str, r: int = 64) -> int:
    hidden, ffn, heads, kv_heads, _, _ = SHAPES[size]
    kv = hidden // heads * kv_heads
    sums = 2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + ffn)  # q, o; k, v; gate, up, down
    return 28 * r * sums


@pytest.mark.parametrize(("size", "expected"), [("7b", 161_480_704), ("2b", 73_859_072)])
def test_adapters_at_full_size(bases: Path, size: str, expected: int) -> None:
    """Row 5, ours: 28 layers x 7 linears x 2 tensors, none of them in Whisper or the vision tower."""
    graft = model(bases, size)
    assert len(add_lora(graft, Lora())) == 196
    adapters = {name: p for name, p in graft.named_parameters() if is_lora_name(name)}
    assert len(adapters) == 392 and all(name.startswith("model.language_model.layers.") for name in adapters)
    assert count(adapters.values()) == expected == lora_parameters(size)


def test_the_seeds_mistake_at_full_size(bases: Path) -> None:
    """Row 5, the seed's: PEFT takes a list of names in every tower, and a third of the adapters land in Whisper."""
    graft = model(bases, "7b")
    inject_adapter_in_model(LoraConfig(r=64, target_modules=NAIVE), graft)
    adapters = [name for name, _ in graft.named_parameters() if is_lora_name(name)]
    assert len(adapters) == 584 and sum("audio_tower" in name for name in adapters) == 192


def test_we_refuse_the_seeds_mistake_at_full_size(bases: Path) -> None:
    graft = model(bases, "7b")
    with pytest.raises(ValueError, match="must be one regular expression"):
        check_targets(graft, NAIVE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"matches 96 modules outside .*language model 196.*audio tower 96"):
        check_targets(graft, r".*\.(" + "|".join(NAIVE) + ")")
    with pytest.raises(ValueError, match="matches no module"):
        check_targets(graft, r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)")
    assert hits_per_tower(check_targets(graft, DEFAULT_TARGETS)) == "language model 196"


@pytest.mark.parametrize("stack_factor", [1, 4, 8])
@pytest.mark.parametrize("size", SHAPES)
def test_projector_at_full_size(bases: Path, size: str, stack_factor: int) -> None:
    hidden = SHAPES[size][0]
    graft = model(bases, size, with_encoder=False, stack_factor=stack_factor)
    matrices = stack_factor * 1280 * hidden + hidden * hidden
    assert count(graft.model.multi_modal_projector.parameters()) == matrices + 2 * hidden
    in_millions = {"7b": {1: 17.4, 4: 31.2, 8: 49.5}, "2b": {1: 4.3, 4: 10.2, 8: 18.1}}  # reference/performance.md 1.1
    assert round(matrices / 1e6, 1) == in_millions[size][stack_factor]


@pytest.mark.parametrize("size", SHAPES)
def test_trainable_set_at_full_size(bases: Path, size: str) -> None:
    """Row 9: what each stage hands to the optimiser, and what stays frozen in bf16."""
    hidden, _, _, _, rows, tied = SHAPES[size]
    graft = model(bases, size, with_encoder=False)
    projector = 4 * 1280 * hidden + hidden * hidden + 2 * hidden
    assert count(select_trainable(graft, 1).values()) == projector
    add_lora(graft, Lora())
    trained = select_trainable(graft, 2)
    assert count(trained.values()) == projector + lora_parameters(size) and len(trained) == 396
    assert {p.dtype for p in trained.values()} == {torch.float32}
    frozen = [p for p in graft.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16} and all(p.is_meta for p in graft.parameters())
    assert (graft.lm_head.weight is graft.get_input_embeddings().weight) == tied
    assert f"{projector + lora_parameters(size):,}" in describe(graft).splitlines()[-1]


@pytest.mark.parametrize("size", SHAPES)
def test_towers_at_full_size(bases: Path, size: str) -> None:
    hidden, ffn, heads, kv_heads, _, _ = SHAPES[size]
    kv = hidden // heads * kv_heads
    graft = model(bases, size)
    matrices = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn
    small = hidden + 2 * kv + 2 * hidden  # biases of q, k, v and two norms
    assert count(graft.model.language_model.layers.parameters()) == 28 * (matrices + small)
    layer = 4 * 1280**2 + 2 * 1280 * 5120 + 3 * 1280 + 5120 + 1280 + 4 * 1280  # k has no bias in Whisper
    convolutions = 3 * 128 * 1280 + 1280 + 3 * 1280 * 1280 + 1280
    assert count(graft.model.audio_tower.parameters()) == 32 * layer + convolutions + 1500 * 1280 + 2 * 1280
    assert graft.config.window.seconds == 30
