"""Less kept and less computed, and the same loss and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_bases as tiny
import torch
from torch.nn import functional as F
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm, apply_rotary_pos_emb

from graft.model.assemble import assemble
from graft.model.grafted import AudioGraftForConditionalGeneration, unless_padded_behind
from graft.model.lean import Line, _Gated, _Normed, _Turned, save_less
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
    """Loss and gradients, and the bytes of what was kept for them; positions by hand keep the rows apart."""
    ids, positions = torch.arange(7, 7 + B * T).view(B, T), torch.arange(T).expand(3, B, T)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_has_the_bits_of_the_stock_one(dtype: torch.dtype) -> None:
    stock = Qwen2VLRMSNorm(48, eps=1e-3).to(dtype).requires_grad_(False)
    stock.weight.copy_(torch.randn(48))
    hidden = 3 * torch.randn(5, 7, 48).to(dtype)
    assert torch.equal(_Normed.apply(hidden, stock.weight, 1e-3), stock(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_turn_is_the_stock_rotary_embedding(dtype: torch.dtype) -> None:
    heads, angles = torch.randn(2, 5, 3, 8).to(dtype), torch.randn(2, 5, 4).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected, _ = apply_rotary_pos_emb(heads, heads, cos, sin, unsqueeze_dim=2)
    turned = _Turned.apply(heads, cos.unsqueeze(2), sin.unsqueeze(2))
    step = 2 * torch.finfo(dtype).eps  # stock rounds once more
    torch.testing.assert_close(turned, expected, rtol=step, atol=step * heads.abs().max().item())


def test_gradients_by_hand_are_those_of_the_function() -> None:
    """In float64, against differences."""
    hidden = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: _Normed.apply(x, weight, 1e-3), hidden)
    angles = torch.randn(3, 4, dtype=torch.float64).repeat(1, 2)
    assert torch.autograd.gradcheck(lambda x: _Turned.apply(x, angles.cos(), angles.sin()), hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_gate_have_the_bits_of_the_stock_ones(dtype: torch.dtype) -> None:
    gate, up = (torch.randn(3, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    grad = torch.randn(3, 8, dtype=dtype)
    expected = torch.autograd.grad(F.silu(gate) * up, (gate, up), grad)
    found = torch.autograd.grad(_Gated.apply(gate.clone(), up.clone()), (gate, up), grad)
    assert all(map(torch.equal, found, expected))


def test_traced_the_gradients_of_a_gate_are_the_same() -> None:
    """As ``run.compile`` does with a layer: what is overwritten is then overwritten in the traced graph."""
    gate, up = (torch.randn(3, 8, requires_grad=True) for _ in range(2))

    def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return _Gated.apply(2 * gate, 3 * up).square().sum()

    traced = torch.compile(gated, dynamic=True, backend="aot_eager")
    for found, expected in zip(*(torch.autograd.grad(f(gate, up), (gate, up)) for f in (traced, gated)), strict=True):
        torch.testing.assert_close(found, expected)


def test_going_back_twice_through_what_was_overwritten_is_refused() -> None:
    gate, up = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    gated = _Gated.apply(gate.clone(), up.clone()).sum()
    gated.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gated.backward()


@pytest.fixture
def padded() -> dict[str, torch.Tensor]:
    """Two rows that begin with the same three ids, 4 and 2 labels, the second row padded with two."""
    ids, mask = torch.arange(7, 7 + B * T).view(B, T), torch.ones(B, T, dtype=torch.int64)
    ids[1, :3], mask[1, -2:] = ids[0, :3], 0
    labels = torch.full_like(ids, -100)
    labels[0, -4:], labels[1, 4:6] = ids[0, -4:], ids[1, 4:6]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: AudioGraftForConditionalGeneration) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize(("num_shared", "computed"), [(0, 11 + 9), (3, 11 + 6)])
def test_on_a_line_less_is_computed_and_the_gradients_are_the_same(
    tmp_path: Path, padded: dict[str, torch.Tensor], num_shared: int, computed: int
) -> None:
    model = trained(tmp_path, "fp32", lean=True)
    by_hand = model(**padded, position_ids=torch.arange(T).expand(3, B, T), use_cache=False)
    by_hand.loss.backward()
    expected, seen = gradients(model), []
    for layer in model.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    output = model(**padded, num_shared=num_shared, use_cache=False)
    output.loss.backward()
    assert seen == [computed] * (len(model.model.language_model.layers) - 1) + [4 + 2]
    torch.testing.assert_close(output.loss, by_hand.loss, rtol=1e-6, atol=0)
    for mine, theirs in zip(gradients(model), expected, strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


def test_in_training_the_same_loss_without_logits(tmp_path: Path, padded: dict[str, torch.Tensor]) -> None:
    model = trained(tmp_path, "fp32", lean=True)
    output, plain = model(**padded), model.eval()(**padded)
    assert output.logits is None and plain.logits.shape == (4 + 2, tiny.VOCAB_ROWS)
    torch.testing.assert_close(output.loss, plain.loss, rtol=1e-6, atol=0)
    output.loss.backward()
    ours = gradients(model)
    plain.loss.backward()
    for mine, theirs in zip(ours, gradients(model), strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_head_that_learns_has_its_logits_made(tmp_path: Path, padded: dict[str, torch.Tensor]) -> None:
    model = trained(tmp_path, "fp32", lean=True)
    model.lm_head.weight.requires_grad_(True)
    output = model(**padded)
    output.loss.backward()
    assert output.logits is not None and model.lm_head.weight.grad.any()


def test_what_is_not_plain_training_keeps_its_rows(tmp_path: Path, padded: dict[str, torch.Tensor]) -> None:
    """A mask with padding in front, a cache, positions by hand: rows cannot share their beginning."""
    model, widths = trained(tmp_path, "fp32", lean=True), []
    model.model.language_model.layers[0].register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape))
    in_front = {**padded, "attention_mask": padded["attention_mask"].flip(1)}
    for inputs, cache in ((in_front, False), (padded, True)):
        assert torch.isfinite(model(**inputs, num_shared=3, use_cache=cache).loss)
    assert [tuple(shape[:2]) for shape in widths] == [(B, T), (B, T)]


def test_a_mask_is_dropped_only_where_padding_stands_behind() -> None:
    behind = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert unless_padded_behind(behind) is None and unless_padded_behind(None) is None
    for kept in (behind.flip(1), torch.tensor([[1, 0, 1]]), torch.ones(1, 1, 3, 3)):
        assert unless_padded_behind(kept) is kept


PAD = 0


def test_rows_become_a_line_and_rows_again() -> None:
    """Three rows that share two positions; the second is padded with two, the third with one."""
    rows = torch.tensor([[1, 2, 3, 4, 9], [1, 2, 5, PAD, PAD], [1, 2, 7, 8, PAD]])
    kept = torch.tensor([0, 1, 2, 3, 4, 7, 12, 13])
    line = Line.of(rows.shape, num_shared=2, kept=kept, predicts=torch.tensor([2, 7, 13]))
    assert line.join(rows).tolist() == [[1, 2, 3, 4, 9, 5, 7, 8]]
    real = rows != PAD
    assert torch.equal(line.part(line.join(rows))[real], rows[real])
    assert line.pick(line.join(rows)).tolist() == [[3, 5, 8]]


def test_rows_without_padding_that_share_nothing_are_not_copied() -> None:
    rows = torch.arange(8).view(2, 4)
    line = Line.of(rows.shape, num_shared=0, kept=torch.arange(8), predicts=torch.tensor([3, 6]))
    assert line.join(rows).data_ptr() == line.part(line.join(rows)).data_ptr() == rows.data_ptr()
    assert line.part(line.join(rows)).shape == rows.shape and line.pick(line.join(rows)).tolist() == [[3, 6]]
    alone = Line.of(rows[:1].shape, num_shared=2, kept=torch.arange(4), predicts=torch.tensor([3]))
    assert alone.join(rows[:1]).data_ptr() == rows.data_ptr(), "one row shares with none"


@pytest.mark.parametrize("num_shared", [0, 2])
def test_gradients_of_a_line_are_those_of_autograd(num_shared: int) -> None:
    """In float64, against differences; padding gives none and has none."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    kept = mask.bool()
    kept[1:, :num_shared] = False
    kept = kept.flatten().nonzero().flatten()
    line = Line.of(mask.shape, num_shared, kept, predicts=kept[-1:])
    rows = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(line.join, rows)
    joined = torch.randn(1, len(kept), 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: line.part(values) * mask[..., None], joined)
    line.part(joined).sum().backward()
    assert joined.grad[0, 0, 0] == (3 if num_shared else 1), "what rows share has the gradients of all of them"


def test_names_and_weights_stay(tmp_path: Path) -> None:
    model = trained(tmp_path, "fp32", lean=False)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    save_less(model.model.language_model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[7, 8]])).logits.shape == (1, 2, tiny.VOCAB_ROWS)
