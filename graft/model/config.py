"""Settings of the graft: those of Qwen2-VL, those of the Whisper encoder, and the bridge between them."""

# No "from __future__ import annotations" here: @strict reads the annotations as types, and strings escape its check.
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import Qwen2VLConfig, WhisperConfig
from transformers.configuration_utils import PreTrainedConfig

from graft.lengths import Window

FEATURE_DTYPE = torch.bfloat16  # of encoder frames, wherever they come from: shards and live encoder agree
AUDIO_START = "<|audio_start|>"
AUDIO_PAD = "<|audio_pad|>"  # the placeholder: one per audio token
AUDIO_END = "<|audio_end|>"


@strict
class AudioGraftConfig(Qwen2VLConfig):
    """Qwen2-VL's config plus ``audio_config`` (a ``WhisperConfig``; only the encoder's part counts) and the projector.

    ``has_audio_tower`` says whether the model holds the encoder. Training on precomputed features does not need it.
    """

    model_type = "audio_graft_qwen2_vl"
    sub_configs_defaults = {**Qwen2VLConfig.sub_configs_defaults, "audio_config": WhisperConfig}

    audio_config: dict | PreTrainedConfig | None = None
    has_audio_tower: bool = True
    projector_kind: str = "mlp"
    stack_factor: int = 4
    projector_hidden_size: int | None = None
    audio_token_id: int = 151658
    audio_start_token_id: int = 151657
    audio_end_token_id: int = 151659

    @property
    def window(self) -> Window:
        """What the encoder takes at once."""
        return Window(self.audio_config.max_source_positions)

    def projector_settings(self) -> dict[str, Any]:
        """Arguments of :func:`graft.model.projector.build_projector`."""
        return {
            "kind": self.projector_kind,
            "frame_size": self.audio_config.d_model,
            "stack_factor": self.stack_factor,
            "hidden_size": self.projector_hidden_size,
            "text_size": self.text_config.hidden_size,
        }
