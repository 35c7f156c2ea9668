"""Shapes of the models that are timed, and the arithmetic that their training cannot do without.

A multiply-add is two FLOP. A frozen matrix costs a position two in the forward pass and two in the backward pass (the
gradient of its input; it has none itself), an adapter's matrix two more for its own. Recomputation is not counted: it
is work, not need.

T: positions of a row    L: label positions    F: encoder frames    H: hidden size    r: rank of the adapters
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Qwen2-VL language model and the size of the encoder frames that are grafted onto it."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    mrope_section: tuple[int, int, int]
    frame_size: int
    tied: bool = False

    @property
    def layer_shapes(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's matrices: q, o, k, v, gate, up, down."""
        kv = self.hidden // self.heads * self.kv_heads
        square, narrow = [(self.hidden, self.hidden)] * 2, [(self.hidden, kv)] * 2
        return square + narrow + [(self.hidden, self.ffn)] * 2 + [(self.ffn, self.hidden)]

    @property
    def layer_parameters(self) -> int:
        """Of all layers' matrices."""
        return self.layers * sum(n * m for n, m in self.layer_shapes)

    @property
    def head_parameters(self) -> int:
        """Of the output matrix."""
        return self.hidden * self.vocab

    @property
    def audio_token(self) -> int:
        """The placeholder's id."""
        return self.vocab - 1

    @property
    def pad_token(self) -> int:
        """The id of padding."""
        return self.vocab - 2

    def lora_parameters(self, r: int) -> int:
        """Of adapters on all seven matrices of every layer."""
        return self.layers * r * sum(n + m for n, m in self.layer_shapes)

    def row_flop(self, positions: int, labels: int, r: int = 0) -> float:
        """Forward and backward of one row of ``positions``, ``labels`` of them with logits; causal attention halved."""
        matrices = 4.0 * self.layer_parameters + 6.0 * self.lora_parameters(r)
        attention = 3 * 4 * (positions / 2) * self.hidden * self.layers  # scores and values; twice that in backward
        return positions * (matrices + attention) + 4.0 * self.head_parameters * labels

    def text_config(self) -> dict[str, Any]:
        """Settings of the language model, in transformers' names."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": list(self.mrope_section)},
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 0,
        }


@dataclass(frozen=True)
class EncoderShape:
    """A Whisper encoder."""

    width: int
    layers: int
    heads: int
    ffn: int
    num_mel_bins: int

    def flop(self, frames: int) -> float:
        """Forward of one window of ``frames``: both convolutions, of width 3, the matrices, attention to all frames."""
        convolutions = 2 * 2 * frames * self.num_mel_bins * 3 * self.width + 2 * frames * self.width * 3 * self.width
        matrices = self.layers * (4 * self.width**2 + 2 * self.width * self.ffn)
        return convolutions + 2.0 * matrices * frames + 4.0 * frames**2 * self.width * self.layers

    def whisper_config(self) -> dict[str, int]:
        """Settings in transformers' names; of the decoder, which is not used, there is one layer."""
        return {
            "d_model": self.width,
            "encoder_layers": self.layers,
            "encoder_attention_heads": self.heads,
            "encoder_ffn_dim": self.ffn,
            "decoder_layers": 1,
            "decoder_attention_heads": self.heads,
            "decoder_ffn_dim": self.ffn,
            "num_mel_bins": self.num_mel_bins,
        }


# Qwen/Qwen2-VL-7B-Instruct and -2B-Instruct with frames of openai/whisper-large-v3-turbo, from their config.json.
SEVEN_B = Shape(3584, 28, 28, 4, 18944, 152064, (16, 24, 24), 1280)
TWO_B = Shape(1536, 28, 12, 2, 8960, 151936, (16, 24, 24), 1280, tied=True)
# The 7B at an eighth of its width, its vocabulary scaled too; see benchmarks/mini.py.
MINI = Shape(448, 7, 7, 1, 2368, 4752, (8, 12, 12), 160)
SMALL = Shape(64, 2, 1, 1, 128, 256, (8, 12, 12), 16)  # for trying a benchmark out

TURBO = EncoderShape(1280, 32, 20, 5120, 128)
WHISPER_TINY = EncoderShape(384, 4, 6, 1536, 80)
SMALL_ENCODER = EncoderShape(64, 2, 2, 128, 80)
