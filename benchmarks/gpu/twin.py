"""The twin of a published figure: NeMo AutoModel's LoRA on Qwen2.5-7B, whose language model is Qwen2-VL-7B's in shape.

NVIDIA-NeMo/Automodel, docs/performance-summary at 36044ad3d, recipe qwen2_5_7b_peft_benchmark: rank 16, two rows of
4,096 tokens of text, loss at every position, no activation checkpointing, one H100: 14,110 tokens a second. Another
machine than this one; an H200 computes as fast as an H100.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.gpu.bench import Bench, rate, share_of_gemm
from benchmarks.gpu.steps import compiled_copy, graft, lean
from benchmarks.harness import Figure
from benchmarks.ours import Ours
from graft.model.lora import add_lora
from graft.recipe import Lora

ROWS, LENGTH, R = 2, 4096, 16
PUBLISHED = 14_110.0


@dataclass(frozen=True)
class TextBatch:
    """A micro-batch without audio, for ``train_step``: rows (B, T) that are learnt at every position."""

    input_ids: torch.Tensor

    @property
    def ids(self) -> tuple[str, ...]:
        """Of the rows."""
        return tuple(f"row {number}" for number in range(len(self.input_ids)))

    @property
    def num_label_tokens(self) -> int:
        """Every position but the last of a row predicts one."""
        return self.input_ids.numel() - len(self.input_ids)

    def to(self, device: torch.device) -> TextBatch:
        """The same on a device."""
        return TextBatch(self.input_ids.to(device, non_blocking=True))

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """By the names of the model's ``forward``."""
        return {"input_ids": self.input_ids, "labels": self.input_ids}


def report(bench: Bench) -> Iterator[Figure]:
    """Tokens a second, eager and compiled."""
    shape, length, r = bench.seven_b, bench.size(LENGTH, 64), bench.size(R, 4)
    base = graft(bench, shape)
    add_lora(base, Lora(r=r, alpha=2 * r))
    batch = TextBatch(torch.randint(3, shape.pad_token, (ROWS, length), generator=torch.Generator().manual_seed(1)))
    compiled = Ours(compiled_copy(bench, base), 2, [batch])
    sides = {"ours": Ours(lean(base), 2, [batch]), "ours compiled": compiled}
    taken = bench.rounds({kind: side.step for kind, side in sides.items()}, shape)
    tokens, flop = ROWS * length, ROWS * shape.row_flop(length, length, r)
    for kind, name, target in (("ours", "nemo_twin", ">= 17600"), ("ours compiled", "nemo_twin.compiled", "")):
        facts = {"NeMo on an H100, published": PUBLISHED, "share of GEMM": share_of_gemm(taken, kind, flop)}
        facts["engine"] = sides[kind].engine_name
        what = f"tokens a second, {ROWS} x {length:,} of text, LoRA of rank {r}, loss at every position, {kind}"
        yield rate(name, taken, kind, tokens, "tokens/s", what, target, **facts)
