"""Nobody waits for the GPU in a training step's forward and backward: their every operation is known without values.

Fake tensors have shapes and no values: whatever would read one on the host (``item``, ``nonzero``, a mask as an index,
``if tensor``) fails. On a GPU each of these waits until everything before it is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny_bases as tiny
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graft.data.collate import Batch, collate_generation, collate_training
from graft.data.loader import FeatureSample
from graft.data.prompt import PromptTemplate
from graft.model.assemble import Assembled, assemble
from graft.model.grafted import find_label_positions, find_line_positions
from graft.model.lean import save_less
from graft.model.lora import add_lora
from graft.model.trainable import select_trainable
from tests.test_prompt import INSTRUCTION, SYSTEM

READS = {"nonzero", "_local_scalar_dense", "masked_select", "item", "equal", "is_nonzero", "unique", "_unique2"}
NEEDS_A_VALUE = (DataDependentOutputException, DynamicOutputShapeException)


class Reads(TorchDispatchMode):
    """Notes what makes the host read a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in tree_leaves(args[1:])
        )
        if name in READS or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def graft(tmp_path_factory: pytest.TempPathFactory) -> Assembled:
    """Stage 2 as launch/train.py builds it."""
    folder = tmp_path_factory.mktemp("bases")
    recipe = tiny.recipe(tiny.whisper_folder(folder / "w"), tiny.qwen2_vl_folder(folder / "q"))
    assembled = assemble(recipe)
    add_lora(assembled.model, recipe.lora)
    select_trainable(assembled.model, 2)
    save_less(assembled.model.model.language_model)
    assembled.model.train()
    return assembled


SAMPLES = [FeatureSample("long", "abcde", torch.ones(41, 24).bfloat16()), FeatureSample("b", "x", torch.ones(3, 24))]


@pytest.fixture(scope="module")
def batch(graft: Assembled) -> Batch:
    return collate_training(SAMPLES, PromptTemplate.from_processor(graft.processor, SYSTEM, INSTRUCTION))


def told_to_look(batch: Batch) -> dict[str, Any]:
    """What a direct caller gives: the mask, and not what stands where."""
    told = {"audio_places", "audio_tokens", "label_positions", "line_positions"}
    inputs = {name: value for name, value in batch.model_inputs().items() if name not in told}
    return inputs | {"attention_mask": batch.attention_mask}


def test_the_collator_says_what_the_model_would_find(batch: Batch) -> None:
    assert batch.num_shared > 0 and batch.num_padding > 0, "nothing to leave out, so this proves nothing"
    assert torch.equal(batch.label_positions, find_label_positions(batch.labels))
    found = find_line_positions(batch.labels, batch.num_shared, batch.attention_mask)
    assert torch.equal(batch.line_positions, found)


def loss_of(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(**inputs, num_items_in_batch=7, use_cache=False).loss


def test_nothing_is_read_in_forward_and_backward(graft: Assembled, batch: Batch) -> None:
    reads = Reads()
    with reads:
        loss_of(graft.model, batch.model_inputs()).backward()
    assert reads.seen == []
    with reads:
        loss_of(graft.model, told_to_look(batch))
    assert {"nonzero", "_local_scalar_dense"} <= set(reads.seen), "the count counts nothing"
    graft.model.zero_grad()


def without_values(model: torch.nn.Module, inputs: dict[str, Any]) -> FakeTensor:
    """The loss, with its backward pass, by tensors that have no values."""
    with FakeTensorMode() as mode:
        weights = {name: mode.from_tensor(p) for name, p in [*model.named_parameters(), *model.named_buffers()]}
        given = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
        named = {f"model.{name}": weight for name, weight in weights.items()}
        loss = torch.func.functional_call(Loss(model), named, (given,))
        loss.backward()
        return loss


class Loss(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        return loss_of(self.model, inputs)


def test_no_value_is_needed(graft: Assembled, batch: Batch) -> None:
    """By no operation at all, whatever its name."""
    assert without_values(graft.model, batch.model_inputs()).shape == ()
    with pytest.raises(NEEDS_A_VALUE):
        without_values(graft.model, told_to_look(batch))


def test_it_is_the_same_loss_and_gradient(graft: Assembled, batch: Batch) -> None:
    """To the last bit, whether the model is told or looks for itself."""
    found = []
    for inputs in (batch.model_inputs(), told_to_look(batch)):
        graft.model.zero_grad()
        loss = loss_of(graft.model, inputs)
        loss.backward()
        gradients = [p.grad for p in graft.model.parameters() if p.requires_grad]
        found.append([loss.detach(), *gradients])
    assert all(torch.equal(told, looked) for told, looked in zip(*found, strict=True))
    assert any(gradient.any() for gradient in found[0][1:])


def test_a_wrong_number_of_places_is_refused(graft: Assembled, batch: Batch) -> None:
    with pytest.raises((RuntimeError, IndexError)):
        loss_of(graft.model, replace(batch, audio_places=batch.audio_places[1:]).model_inputs())


class Copies(TorchDispatchMode):
    """Whether each copy to another device lets the host go on."""

    def __init__(self) -> None:
        super().__init__()
        self.non_blocking: list[bool] = []

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "_to_copy":
            self.non_blocking.append((kwargs or {}).get("non_blocking", False))
        return func(*args, **(kwargs or {}))


def test_batches_are_copied_in_the_background(batch: Batch) -> None:
    with Copies() as copies:
        moved = batch.to("meta")
    assert copies.non_blocking == [True] * 9
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 9 and all(tensor.device.type == "meta" for tensor in tensors)


def test_batches_for_a_gpu_are_page_locked(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locked memory cannot be had without a GPU: who asks for it is noted in its place."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor)
    batch.pin_memory()
    assert len(pinned) == 9


def test_generation_looks_for_itself(graft: Assembled) -> None:
    template = PromptTemplate.from_processor(graft.processor, SYSTEM, INSTRUCTION)
    inputs = collate_generation(SAMPLES, template).model_inputs()
    assert set(inputs) == {"input_ids", "attention_mask", "audio_features", "audio_feature_lengths"}
    assert graft.model.generate(**inputs, max_new_tokens=2).shape[0] == 2
