"""Peers' forms of the same training, rebuilt from published recipes on stock Hugging Face code, in our own words.

*Hugging Face*: stock Qwen2-VL takes embeddings and labels, and computes logits and loss at every position.

*The seed* (github.com/kulsoom-abdullah/Qwen2-VL-Audio-Adapter, scripts 02 and 04): 1,500 audio tokens for every clip,
one for each frame of the padded 30 s window, in batches of clips as they come (8; 4 in stage 2); gradient
checkpointing; in stage 2 PEFT's fp32 adapters with dropout 0.05. Spared it here: the encoder in the loop, NF4 and the
``Trainer``. Its stage 1 sets no checkpointing, but would not have fitted the GPUs it names without: both are timed.

Both train under autocast where the frozen weights are bf16, as the ``Trainer`` does with ``bf16=True``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from benchmarks import mini
from benchmarks.shapes import MINI, Shape
from graft.data.collate import Batch
from graft.model.grafted import AudioGraftForConditionalGeneration
from graft.model.lora import DEFAULT_TARGETS, is_lora_name

SEED_FRAMES, SEED_BATCH = 1500, {1: 8, 2: 4}
SEED_DROPOUT = 0.05


class StockGraft(nn.Module):
    """Stock Qwen2-VL behind a two-layer projector of joined frames, as peers write it."""

    def __init__(self, qwen: nn.Module, projector: nn.Module, stack_factor: int, audio_token: int):
        super().__init__()
        self.qwen, self.stack_factor, self.audio_token = qwen, stack_factor, audio_token
        self.projector = projector.requires_grad_(True)

    def forward(self, batch: Batch, num_items_in_batch: int) -> torch.Tensor:
        """The loss of a micro-batch, a share of ``num_items_in_batch`` labels."""
        frames = batch.audio_features.to(self.projector.linear_1.weight.dtype)
        frames = nn.functional.pad(frames, (0, 0, 0, -frames.shape[1] % self.stack_factor))
        joined = frames.reshape(len(frames), -1, self.stack_factor * frames.shape[2])
        audio = self.projector.linear_2(nn.functional.gelu(self.projector.linear_1(joined)))
        counts = (batch.audio_feature_lengths + self.stack_factor - 1) // self.stack_factor
        audio = audio[torch.arange(audio.shape[1], device=audio.device) < counts[:, None]]
        embeds = self.qwen.get_input_embeddings()(batch.input_ids)
        places = (batch.input_ids == self.audio_token)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(places, audio.to(embeds.dtype))
        return self.qwen(
            inputs_embeds=embeds,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            num_items_in_batch=num_items_in_batch,
            use_cache=False,
        ).loss


class Peer:
    """A peer's step over micro-batches."""

    def __init__(self, model: StockGraft, batches: Sequence[Batch]) -> None:
        self.model, self.batches, self.projector = model, batches, model.projector
        self.num_clips, self.num_labels = mini.clips_and_labels(batches)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.in_bf16 = any(p.dtype == torch.bfloat16 for p in model.parameters())
        self.adam = torch.optim.AdamW(self.trained, lr=mini.RATE)

    def step(self) -> None:
        """One optimiser step."""
        for batch in self.batches:
            self.loss(batch).backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.adam.step()
        self.adam.zero_grad()

    def loss(self, batch: Batch) -> Tensor:
        """A micro-batch's share of the step's loss."""
        device = self.projector.linear_1.weight.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.in_bf16):
            return self.model(batch.to(device), self.num_labels)


def seed_form(
    graft: AudioGraftForConditionalGeneration,
    stage: int,
    shape: Shape = MINI,
    r: int = mini.R,
    checkpointing: bool = True,
) -> Peer:
    """The seed's own form of a stage, on the frozen weights of ``graft``."""
    lora = {"r": r, "lora_alpha": 2 * r, "lora_dropout": SEED_DROPOUT} if stage == 2 else {}
    return Peer(stock(mini.restacked(graft, 1), checkpointing, **lora), seed_batches(stage, shape))


def stock(graft: AudioGraftForConditionalGeneration, checkpointing: bool, **lora: Any) -> StockGraft:
    """Stock Qwen2-VL on the frozen weights of ``graft``, a copy of its projector; ``lora`` are PEFT's settings.

    ``in_fp32=False`` among them leaves the adapters in the precision of the frozen weights.
    """
    fields = graft.config.to_dict()
    parts = {name: fields[name] for name in ("text_config", "vision_config", "tie_word_embeddings")}
    with torch.device("meta"):
        qwen = Qwen2VLForConditionalGeneration._from_config(Qwen2VLConfig(**parts), dtype=graft.dtype)
    base = {name: p for name, p in graft.state_dict(keep_vars=True).items() if not is_lora_name(name)}
    tensors = {name.replace(".base_layer.", "."): p for name, p in base.items()}
    missing = qwen.load_state_dict(tensors, strict=False, assign=True).missing_keys
    assert not missing, f"stock Qwen2-VL lacks {missing[:3]}"
    qwen.requires_grad_(False)
    _share_buffers(graft, qwen)
    if lora:
        in_fp32 = lora.pop("in_fp32", True)  # PEFT's own default
        settings = LoraConfig(target_modules=DEFAULT_TARGETS, **lora)
        qwen = get_peft_model(qwen, settings, autocast_adapter_dtype=in_fp32)
    if checkpointing:
        qwen.gradient_checkpointing_enable()
    projector = copy.deepcopy(graft.model.multi_modal_projector)
    return StockGraft(qwen, projector, graft.config.stack_factor, graft.config.audio_token_id).train()


def copy_adapters(graft: nn.Module, peer: nn.Module) -> None:
    """Give the peer's adapters the values of ours."""
    ours = [p for name, p in graft.named_parameters() if is_lora_name(name)]
    theirs = [p for name, p in peer.named_parameters() if is_lora_name(name)]
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            other.copy_(mine)


def seed_batches(stage: int, shape: Shape = MINI) -> list[Batch]:
    """One micro-batch of the seed's: every clip costs it the same, so one of them tells its clips a second."""
    clips = range(SEED_BATCH[stage])
    return [mini.batch(clips, [SEED_FRAMES] * len(clips), stack_factor=1, shape=shape)]


def _share_buffers(source: nn.Module, target: nn.Module) -> None:
    """Rotary frequencies are in no state dict: those made on the meta device are replaced."""
    buffers = dict(source.named_buffers())
    for name, buffer in list(target.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(target.get_submodule(owner), leaf, buffers[name])
