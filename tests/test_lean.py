"""What is made again in the backward pass is what was there: same loss, same gradients, less kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_bases as tiny
import torch

from graft.model.assemble import assemble
from graft.model.grafted import AudioGraftForConditionalGeneration
from graft.model.lean import save_less
from graft.model.lora import add_lora
from graft.model.trainable import select_trainable
from graft.recipe import Lora

B, T = 2, 11


def trained(folder: Path, precision: str, lean: bool) -> AudioGraftForConditionalGeneration:
    folders = [tiny.whisper_folder(folder / "w"), tiny.qwen2_vl_folder(folder / "q")]
    model = assemble(tiny.recipe(*folders, run={"precision": precision})).model
    add_lora(model, Lora(r=4))
    for name, parameter in select_trainable(model, 2).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    if lean:
        save_less(model.model.language_model)
    return model.train()


def step(model: AudioGraftForConditionalGeneration, precision: str) -> tuple[list[torch.Tensor], int]:
    """Loss and gradients, and the bytes of what was kept for them."""
    ids = torch.arange(7, 7 + B * T).view(B, T)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    size = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return [loss, *(p.grad for p in model.parameters() if p.grad is not None)], size


@pytest.mark.parametrize(("precision", "item"), [("fp32", 4), ("bf16", 2)])
def test_same_bits_and_less_kept(tmp_path: Path, precision: str, item: int) -> None:
    stock, much = step(trained(tmp_path / "stock", precision, lean=False), precision)
    lean, little = step(trained(tmp_path / "lean", precision, lean=True), precision)
    assert len(stock) == len(lean) == 1 + 2 * 7 * tiny.TEXT["num_hidden_layers"]  # the loss; A and B of seven linears
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(lean, stock, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in lean[1:])
    silu_of_gate = B * T * tiny.TEXT["intermediate_size"] * item * tiny.TEXT["num_hidden_layers"]
    assert much - little >= silu_of_gate


def test_names_and_weights_stay(tmp_path: Path) -> None:
    model = trained(tmp_path, "fp32", lean=False)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    save_less(model.model.language_model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[7, 8]])).logits.shape == (1, 2, tiny.VOCAB_ROWS)
