"""Bytes that a layer of the 7B keeps for the backward pass, counted at its true width; no clocks.

A forward pass under autocast, with a hook on everything that autograd saves; a storage counts once, a parameter not at
all. Taken with one and with two layers, at two lengths: the mixed difference is what one layer keeps for one position,
free of all that belongs to the model (embeddings, loss) or to the step (copies of adapters in bf16). What is saved does
not depend on values: weights stay uninitialised and matrix products are not computed, so the count takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from torch import nn

from benchmarks import mini, peers
from benchmarks.harness import Figure, WithoutProducts
from benchmarks.shapes import MINI, SEVEN_B
from graft.data.collate import Batch
from graft.model import attention
from graft.model.grafted import AudioGraftForConditionalGeneration
from graft.model.lean import save_less
from graft.model.lora import add_lora
from graft.model.trainable import select_trainable
from graft.recipe import Lora

R = 64  # of the adapters, as in the recipe
HIDDEN, FFN, KV = SEVEN_B.hidden, SEVEN_B.ffn, SEVEN_B.hidden // SEVEN_B.heads * SEVEN_B.kv_heads
# Numbers in bf16: both norms' inputs, q, k, v, the attention's output, gate and up. The rest follows from these.
STAGE_1 = 4 * HIDDEN + 2 * KV + 2 * FFN
# The adapters' inputs that are not among them, both norms' outputs and down's input; and what each A gives its B.
STAGE_2 = STAGE_1 + 2 * HIDDEN + FFN + 7 * R
FLOOR = {1: 2 * STAGE_1, 2: 2 * STAGE_2}
AUDIO_FRAMES = ((100, 96), (292, 288))  # of two clips, at both lengths: one row is padded
Forward = Callable[[Batch], torch.Tensor]


def report() -> Iterator[Figure]:
    """Each stage against the least possible, and stock Hugging Face beside it."""
    what = {1: "projector alone", 2: f"with LoRA, r {R}"}
    for stage in (1, 2):
        ours, theirs = (per_position(partial(make, stage)) for make in (our_forward, peer_forward))
        facts = {"bytes": ours, "least": float(FLOOR[stage]), "Hugging Face": theirs / FLOOR[stage]}
        yield Figure(
            f"count.saved_bytes.stage{stage}", ours / FLOOR[stage], "x",
            f"bytes saved per position of a layer / the least, {what[stage]}", "<= 1.10", facts=facts,
        )  # fmt: skip


def true_width(num_layers: int) -> AudioGraftForConditionalGeneration:
    """The graft on the 7B's language model, cut to some layers, its weights whatever the memory holds."""
    shape = replace(SEVEN_B, layers=num_layers, vocab=MINI.vocab, frame_size=MINI.frame_size)
    with torch.device("meta"):
        config = mini.config(4, shape)
        model = AudioGraftForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    return model.to_empty(device="cpu").requires_grad_(False).train()


def our_forward(stage: int, num_layers: int) -> tuple[nn.Module, Forward]:
    """Our model and its training forward."""
    model = true_width(num_layers)
    save_less(model.model.language_model)
    if stage == 2:
        add_lora(model, Lora(r=R))
    select_trainable(model, stage)
    return model, lambda batch: model(**batch.model_inputs(), use_cache=False).loss


def peer_forward(stage: int, num_layers: int) -> tuple[nn.Module, Forward]:
    """Stock Hugging Face, and in stage 2 PEFT with its own defaults and the seed's dropout."""
    lora = {"r": R, "lora_alpha": 2 * R, "lora_dropout": peers.SEED_DROPOUT} if stage == 2 else {}
    model = peers.stock(true_width(num_layers), checkpointing=False, **lora)
    return model, lambda batch: model(batch, batch.num_label_tokens)


def per_position(make: Callable[[int], tuple[nn.Module, Forward]]) -> float:
    """Bytes that one layer saves for one position."""
    batches = [mini.batch(range(len(frames)), frames, stack_factor=4) for frames in AUDIO_FRAMES]
    counts = []
    for num_layers in (1, 2):
        model, forward = make(num_layers)
        counts.append([sum(saved_bytes(model, forward, batch)) for batch in batches])
        del model, forward  # two true widths at a time would be much
    (one_short, one_long), (two_short, two_long) = counts
    short, long = (batch.num_positions for batch in batches)
    return ((two_long - one_long) - (two_short - one_short)) / (long - short)


def saved_bytes(model: nn.Module, forward: Forward, batch: Batch) -> list[int]:
    """Bytes of each storage that the graph of a forward pass holds, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held.setdefault(storage.data_ptr(), storage)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    as_on_a_gpu = patch.object(attention, "in_blocks", return_value=False)  # blocks keep less
    with hooks, torch.autocast("cpu", torch.bfloat16), WithoutProducts(), as_on_a_gpu:
        forward(batch)
    return [storage.nbytes() for storage in held.values()]
