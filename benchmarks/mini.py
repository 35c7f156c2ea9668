"""What is trained: a random graft of any shape, and clips of speech as the real collator makes micro-batches of them.

CPU benchmarks train the miniature: Qwen2-VL-7B's proportions at an eighth of its width, on 64 clips. With the true
vocabulary a narrow model would be all loss, and whatever spares logits would look like a wonder: the vocabulary is
scaled too, so that the head keeps its 8.4 % of the layers' parameters.

B: clips    T: positions    F: encoder frames    D: size of a frame
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence

import torch
from torch import nn

from benchmarks.shapes import MINI, Shape
from benchmarks.words import AFTER, BEFORE, REPLY, template, transcript
from graft.data.collate import Batch, collate_training
from graft.data.loader import FeatureSample
from graft.data.plan import cut_step
from graft.lengths import audio_tokens, encoder_frames, num_samples
from graft.model.config import AudioGraftConfig
from graft.model.grafted import AudioGraftForConditionalGeneration
from graft.model.lean import save_less
from graft.model.lora import is_lora_name
from graft.model.projector import build_projector
from graft.recipe import Stage

NUM_CLIPS, MEAN_S, SIGMA, LONGEST_S = 64, 10.0, 0.6, 30.0
MICRO_BATCHES, MICRO_BATCH_TOKENS = Stage().micro_batches, 8_192  # as the recipes have them
R, RATE = 8, 1e-6  # of the adapters (64 at full width), and a rate so low that the model stays the same


def config(stack_factor: int, shape: Shape = MINI, projector_kind: str = "mlp") -> AudioGraftConfig:
    """Settings of a graft, its vision tower next to nothing."""
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": shape.hidden}
    return AudioGraftConfig(
        text_config=shape.text_config(),
        vision_config=vision,
        tie_word_embeddings=shape.tied,
        audio_config={"d_model": shape.frame_size, "encoder_attention_heads": 1},
        has_audio_tower=False,
        projector_kind=projector_kind,
        stack_factor=stack_factor,
        audio_token_id=shape.audio_token,
    )


def graft(
    stack_factor: int,
    dtype: torch.dtype,
    shape: Shape = MINI,
    seed: int = 1,
    device: str | torch.device = "cpu",
    lean: bool = True,
    projector_kind: str = "mlp",
) -> AudioGraftForConditionalGeneration:
    """A random graft, frozen, its projector in fp32; the same language model for every ``stack_factor``."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AudioGraftForConditionalGeneration._from_config(
            config(stack_factor, shape, projector_kind), dtype=dtype
        )
    _renew_projector(model, seed)
    if lean:
        save_less(model.model.language_model)
    return model.requires_grad_(False).train()


def shared_copy(module: nn.Module) -> nn.Module:
    """A copy of what trains in stage 2, projector and adapters; all else both hold."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    shared = [t for name, t in tensors if "multi_modal_projector" not in name and not is_lora_name(name)]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def restacked(
    model: AudioGraftForConditionalGeneration, stack_factor: int, seed: int = 1
) -> AudioGraftForConditionalGeneration:
    """The same language model behind a projector for another ``stack_factor``."""
    other = shared_copy(model)
    other.config.stack_factor = other.model.config.stack_factor = stack_factor
    with torch.device(model.device):
        other.model.multi_modal_projector = build_projector(**other.config.projector_settings())
    _renew_projector(other, seed)
    return other.requires_grad_(False)


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


def batch(
    clips: Sequence[int], frames: Sequence[int], stack_factor: int, shape: Shape = MINI, align: bool = False
) -> Batch:
    """Clips by their number, ``frames`` (B,) of each, as a micro-batch padded on the right."""
    samples = [_clip(clip, count, shape) for clip, count in zip(clips, frames, strict=True)]
    return collate_training(samples, template(shape, stack_factor), align)


def clips_and_labels(batches: Sequence[Batch]) -> tuple[int, int]:
    """Of a step."""
    return sum(len(batch.ids) for batch in batches), sum(batch.num_label_tokens for batch in batches)


def reply(clip: int, shape: Shape) -> str:
    """The transcript of a clip: random, without its end."""
    chance = torch.Generator().manual_seed(1000 + clip)
    return transcript(torch.randint(3, shape.pad_token, (REPLY - 1,), generator=chance).tolist())


def _clip(clip: int, frames: int, shape: Shape) -> FeatureSample:
    """Random frames (F, D) in bf16 and a random transcript, the same for every stacking and padding."""
    chance = torch.Generator().manual_seed(1000 + clip)
    features = torch.randn(frames, shape.frame_size, generator=chance).bfloat16()
    return FeatureSample(f"clip {clip}", reply(clip, shape), features)


def _renew_projector(model: AudioGraftForConditionalGeneration, seed: int) -> None:
    projector = model.model.multi_modal_projector.float()
    spread = model.get_input_embeddings().weight.float().std().item()
    projector.initialise(spread, torch.Generator().manual_seed(seed))
