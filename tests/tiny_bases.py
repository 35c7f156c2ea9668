"""Random bases of a few thousand parameters in stock Hugging Face format, in the layouts found on the hub.

``qwen2_vl_folder(path, layout="v4"|"v5", ...)`` and ``whisper_folder(path, ...)`` write them. "v4" is what Qwen
published: a flat config and weights named ``model.layers...`` and ``visual...``; "v5" nests both.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from graft.recipe import Recipe

# The names and the order of Qwen2-VL's own special tokens.
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
NUM_TOKENS = 256 + len(SPECIAL_TOKENS)  # bytes, then the special ones
VOCAB_ROWS = 288  # more than the tokenizer fills, as in the published models
TEXT = {
    "vocab_size": VOCAB_ROWS,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 256,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "use_cache": True,
    "use_sliding_window": False,
}
VISION = {
    "depth": 2,
    "embed_dim": 32,
    "num_heads": 2,
    "mlp_ratio": 2,
    "hidden_size": TEXT["hidden_size"],
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
IDS = {
    "vision_start_token_id": 256 + SPECIAL_TOKENS.index("<|vision_start|>"),
    "vision_end_token_id": 256 + SPECIAL_TOKENS.index("<|vision_end|>"),
    "image_token_id": 256 + SPECIAL_TOKENS.index("<|image_pad|>"),
    "video_token_id": 256 + SPECIAL_TOKENS.index("<|video_pad|>"),
}
WINDOW_FRAMES = 50  # one second
WHISPER = {
    "vocab_size": 64,
    "num_mel_bins": 16,
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 40,
    "max_source_positions": WINDOW_FRAMES,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "begin_suppress_tokens": None,
}


def tokenizer() -> Qwen2Tokenizer:
    """Bytes and Qwen2-VL's special tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {token: index for index, token in enumerate([*bytes_to_unicode().values(), *SPECIAL_TOKENS])}
    made = Qwen2Tokenizer(vocab=vocab, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    ids = made.convert_tokens_to_ids(SPECIAL_TOKENS)
    assert ids == list(range(256, NUM_TOKENS)), ids
    return made


def qwen2_vl_folder(
    folder: Path,
    layout: str = "v4",
    dtype: torch.dtype = torch.float32,
    tied: bool = True,
    seed: int = 3,
    images: bool = True,
    rows: int = VOCAB_ROWS,
) -> Path:
    """Write a random Qwen2-VL; the same weights in both layouts."""
    folder.mkdir(parents=True, exist_ok=True)
    text = {**TEXT, "vocab_size": rows}
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=VISION, tie_word_embeddings=tied, **IDS)
    ).to(dtype)
    _spread(model)
    config = _flat_config(text, dtype, tied) if layout == "v4" else model.config.to_dict()
    _write(folder / "config.json", config)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    if layout == "v4":
        weights = {_v4_name(name): tensor for name, tensor in weights.items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    tokenizer().save_pretrained(folder)
    _write(folder / "generation_config.json", {"eos_token_id": 258, "pad_token_id": 256, "bos_token_id": 256})
    if images:
        _write(folder / "preprocessor_config.json", _image_settings())
    return folder


def whisper_folder(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 5, **overrides: Any) -> Path:
    """Write a random full Whisper with a window of one second."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(WhisperConfig(**{**WHISPER, **overrides})).to(dtype)
    _spread(model.model.encoder)
    model.save_pretrained(folder)
    seconds = model.config.max_source_positions // 50
    WhisperFeatureExtractor(feature_size=model.config.num_mel_bins, chunk_length=seconds).save_pretrained(folder)
    return folder


def recipe(whisper: Path, qwen2_vl: Path, **sections: Any) -> Recipe:
    """A recipe over two folders, fp32 unless it says otherwise."""
    sections = {"run": {"precision": "fp32"}, "lora": {"r": 4, "alpha": 8}, **sections}
    return Recipe(bases={"whisper": str(whisper), "qwen2_vl": str(qwen2_vl)}, **sections)


def _spread(model: torch.nn.Module) -> None:
    """Freshly made weights are so small that a model barely hears its input: make them count."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(4.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)


def _v4_name(name: str) -> str:
    return re.sub(r"^model\.visual\.", "visual.", name.replace("model.language_model.", "model."))


def _flat_config(text: dict[str, Any], dtype: torch.dtype, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **text,
        **IDS,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.41.2",
        "vision_config": {**VISION, "in_chans": 3, "spatial_patch_size": 14},
    }


def _image_settings() -> dict[str, Any]:
    return {
        "min_pixels": 28 * 28,
        "max_pixels": 28 * 28 * 16,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))
