"""The miniature that CPU benchmarks train: Qwen2-VL-7B's proportions at an eighth of its width, on 64 clips of speech.

With the true vocabulary a narrow model would be all loss, and whatever spares logits would look like a wonder: the
vocabulary is scaled too, so that the head keeps its 8.4 % of the layers' parameters.

B: clips    T: positions    F: encoder frames    D: size of a frame
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from graft.data.collate import Batch
from graft.data.plan import cut_step
from graft.data.prompt import IGNORE_INDEX
from graft.lengths import audio_tokens, encoder_frames, num_samples
from graft.model.config import AudioGraftConfig
from graft.model.grafted import AudioGraftForConditionalGeneration
from graft.model.lean import save_less

WIDTH, HEADS, KV_HEADS, FFN, LAYERS, VOCAB, FRAME_SIZE = 448, 7, 1, 2368, 7, 4752, 160
BEFORE, AFTER, REPLY = 20, 10, 30  # tokens of prompt, and of a transcript, which alone is learnt
AUDIO_TOKEN, PAD = VOCAB - 1, VOCAB - 2
NUM_CLIPS, MEAN_S, SIGMA, LONGEST_S = 64, 10.0, 0.6, 30.0
MICRO_BATCHES, MICRO_BATCH_TOKENS = 16, 8_192
R, RATE = 8, 1e-6  # of the adapters (64 at full width), and a rate so low that the model stays the same
LAYER_SHAPES = [(WIDTH, WIDTH)] * 2 + [(WIDTH, WIDTH // HEADS * KV_HEADS)] * 2 + [(WIDTH, FFN)] * 2 + [(FFN, WIDTH)]
_VISION = {"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": WIDTH}


def config(stack_factor: int, frame_size: int = FRAME_SIZE, **text: Any) -> AudioGraftConfig:
    """Settings of the miniature graft; ``text`` overrides those of its language model."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        **text,
    }
    return AudioGraftConfig(
        text_config=settings,
        vision_config={**_VISION, "hidden_size": settings["hidden_size"]},
        tie_word_embeddings=False,
        audio_config={"d_model": frame_size, "encoder_attention_heads": 1},
        has_audio_tower=False,
        stack_factor=stack_factor,
        audio_token_id=AUDIO_TOKEN,
    )


def graft(stack_factor: int, dtype: torch.dtype, seed: int = 1, **text: Any) -> AudioGraftForConditionalGeneration:
    """A random miniature, frozen, its projector in fp32; the same language model for every ``stack_factor``."""
    torch.manual_seed(seed)
    model = AudioGraftForConditionalGeneration._from_config(config(stack_factor, **text), dtype=dtype)
    projector = model.model.multi_modal_projector.float()
    projector.initialise(model.get_input_embeddings().weight.float().std().item(), torch.Generator().manual_seed(seed))
    save_less(model.model.language_model)
    return model.requires_grad_(False).train()


def clip_frames() -> list[int]:
    """Encoder frames of the 64 clips: log-normal seconds, as of spontaneous speech; the same list everywhere."""
    chance = random.Random(1)
    mu = math.log(MEAN_S) - SIGMA**2 / 2
    seconds = [min(chance.lognormvariate(mu, SIGMA), LONGEST_S) for _ in range(NUM_CLIPS)]
    return [encoder_frames(num_samples(s)) for s in seconds]


def num_positions(frames: int, stack_factor: int) -> int:
    """Positions that a clip takes."""
    return BEFORE + audio_tokens(frames, stack_factor) + AFTER + REPLY


def step_batches(stack_factor: int) -> list[Batch]:
    """The 64 clips as one step of ours: at true length, in the micro-batches that the plan's ``cut_step`` makes."""
    frames = clip_frames()
    costs = [num_positions(count, stack_factor) for count in frames]
    groups = cut_step(range(NUM_CLIPS), costs, MICRO_BATCHES, MICRO_BATCH_TOKENS)
    return [batch(group, [frames[i] for i in group], stack_factor) for group in groups]


def batch(clips: Sequence[int], frames: Sequence[int], stack_factor: int) -> Batch:
    """Clips by their number, ``frames`` (B,) of each, as a micro-batch padded on the right."""
    made = [_clip(clip, count) for clip, count in zip(clips, frames, strict=True)]
    features, words = [m[0] for m in made], [m[1] for m in made]
    rows = []
    for count, row in zip(frames, words, strict=True):
        audio = torch.full((audio_tokens(count, stack_factor),), AUDIO_TOKEN)
        rows.append(torch.cat([row[:BEFORE], audio, row[BEFORE:]]))
    ids = pad_sequence(rows, batch_first=True, padding_value=PAD)
    learnt = pad_sequence([torch.arange(len(row)) >= len(row) - REPLY for row in rows], batch_first=True)
    return Batch(
        ids=tuple(f"clip {clip}" for clip in clips),
        input_ids=ids,
        attention_mask=pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], batch_first=True),
        labels=ids.masked_fill(~learnt, IGNORE_INDEX),
        audio_features=pad_sequence(features, batch_first=True),
        audio_feature_lengths=torch.tensor(frames),
        num_shared=BEFORE,
    )


def _clip(clip: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames (F, D) in bf16, and the ids of prompt and reply: the same for every stacking and padding.

    All clips have one prompt, as utterances in training have.
    """
    chance = torch.Generator().manual_seed(1000 + clip)
    words = torch.randint(2, VOCAB - 2, (BEFORE + AFTER + REPLY,), generator=chance)
    words[: BEFORE + AFTER] = torch.arange(2, 2 + BEFORE + AFTER)
    return torch.randn(frames, FRAME_SIZE, generator=chance).bfloat16(), words
