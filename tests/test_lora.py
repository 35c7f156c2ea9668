"""LoRA stands on the language model and on nothing else, and its files are PEFT's."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_bases as tiny
import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import nn
from transformers import Qwen2VLForConditionalGeneration

from graft.model.assemble import assemble, load_qwen2_vl
from graft.model.grafted import AudioGraftForConditionalGeneration
from graft.model.lora import (
    DEFAULT_TARGETS,
    add_lora,
    check_targets,
    enable_lora,
    has_lora,
    hits_per_tower,
    is_lora_name,
    load_adapter,
    merge_lora,
    save_adapter,
)
from graft.recipe import Lora, Recipe

NAIVE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEED_REGEX = r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
PROMPT = torch.tensor([[3, 141, 59, 26, 5, 35]])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("bases")
    return tiny.recipe(tiny.whisper_folder(folder / "w"), tiny.qwen2_vl_folder(folder / "q"))


@pytest.fixture
def model(recipe: Recipe) -> AudioGraftForConditionalGeneration:
    return assemble(recipe, with_encoder=True).model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROMPT).logits


def disturb(model: nn.Module) -> None:
    """Give the adapters values: fresh ones add nothing."""
    generator = torch.Generator().manual_seed(8)
    for name, parameter in model.named_parameters():
        if is_lora_name(name):
            parameter.data.normal_(std=0.3, generator=generator)


def test_default_targets_are_the_seven_layers_of_each_block(model: AudioGraftForConditionalGeneration) -> None:
    names = check_targets(model, DEFAULT_TARGETS)
    assert len(names) == 2 * 7 and all(name.startswith("model.language_model.layers.") for name in names)
    assert DEFAULT_TARGETS == Lora().target_modules


def test_default_targets_fit_the_old_layout_too() -> None:
    """Transformers 4 had ``model.layers`` where 5 has ``model.language_model.layers``."""

    def block() -> nn.Module:
        attention = nn.ModuleDict({f"{x}_proj": nn.Linear(2, 2) for x in "qkvo"})
        return nn.ModuleDict({"self_attn": attention, "mlp": nn.ModuleDict({"gate_proj": nn.Linear(2, 2)})})

    old = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([block(), block()])})})
    old["visual"] = nn.ModuleDict({"layers": nn.ModuleList([block()])})
    assert len(check_targets(old, DEFAULT_TARGETS)) == 2 * 5


def test_a_list_of_names_is_refused(model: AudioGraftForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="one regular expression, not .*a list of layer names matches .* Whisper's"):
        check_targets(model, NAIVE)  # type: ignore[arg-type]


def test_a_suffix_pattern_is_refused_with_names_and_counts(model: AudioGraftForConditionalGeneration) -> None:
    with pytest.raises(ValueError) as caught:
        check_targets(model, r".*\.(" + "|".join(NAIVE) + ")")
    message = str(caught.value)
    assert "matches 6 modules outside the language model" in message
    assert "language model 14" in message and "audio tower 6" in message
    assert "model.audio_tower.layers.0.self_attn.k_proj" in message


@pytest.mark.parametrize(
    ("pattern", "hit"),
    [
        (r"model\.visual\.blocks\.0\.attn\.qkv", "vision tower 1"),
        (r"model\.multi_modal_projector\.linear_1", "projector 1"),
        (r"lm_head", "rest 1"),
        (r".*", "audio tower"),
    ],
)
def test_anything_outside_the_language_model_is_refused(
    model: AudioGraftForConditionalGeneration, pattern: str, hit: str
) -> None:
    with pytest.raises(ValueError, match=f"outside the language model .*{hit}"):
        check_targets(model, pattern)


@pytest.mark.parametrize("pattern", [SEED_REGEX, r"q_proj", r"language_model\.layers\.0\.mlp\.up_proj", ""])
def test_matching_nothing_is_refused(model: AudioGraftForConditionalGeneration, pattern: str) -> None:
    """The seed's own pattern is among them: on today's module names it finds nothing."""
    with pytest.raises(ValueError, match=r"matches no module.*such as 'model\.language_model\.layers\.0"):
        add_lora(model, Lora(target_modules=pattern))
    assert not has_lora(model)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "not a regular expression"), (r"model\.language_model\.layers\.\d+\.mlp", "not linear")],
)
def test_bad_patterns(model: AudioGraftForConditionalGeneration, pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_targets(model, pattern)


def test_hits_per_tower_counts() -> None:
    names = ["model.language_model.layers.0.mlp.up_proj", "model.audio_tower.layers.0.fc1", "model.audio_tower.conv1"]
    assert hits_per_tower(names) == "language model 1, audio tower 2"


def test_fresh_adapters_change_nothing(model: AudioGraftForConditionalGeneration, recipe: Recipe) -> None:
    before = logits(model)
    names = add_lora(model, recipe.lora)
    assert len(names) == 14 and torch.equal(logits(model), before)
    adapters = [p for name, p in model.named_parameters() if is_lora_name(name)]
    assert len(adapters) == 28 and {p.dtype for p in adapters} == {torch.float32}


def test_the_seed_alone_decides_the_adapters(recipe: Recipe) -> None:
    """Ranks make them apart: whatever a process has drawn before must not matter. A spreads as PEFT's does."""

    def made(seed: int, drawn_before: int) -> dict[str, torch.Tensor]:
        model = assemble(recipe).model
        torch.manual_seed(drawn_before)
        add_lora(model, recipe.lora, seed=seed)
        return {name: p for name, p in model.named_parameters() if is_lora_name(name)}

    one, same, other = made(5, 1), made(5, 2), made(6, 1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(torch.equal(one[name], other[name]) == ("lora_B" in name) for name in one)
    down = one["model.language_model.layers.1.mlp.down_proj.lora_A.default.weight"]
    bound = 80**-0.5
    assert 0.9 * bound < down.abs().max() <= bound and abs(down.std() / (bound / 3**0.5) - 1) < 0.1


def test_injecting_leaves_who_trains_alone(model: AudioGraftForConditionalGeneration, recipe: Recipe) -> None:
    """PEFT would freeze the projector."""
    model.model.multi_modal_projector.requires_grad_(True)
    add_lora(model, recipe.lora)
    assert all(p.requires_grad for p in model.model.multi_modal_projector.parameters())
    assert type(model) is AudioGraftForConditionalGeneration


def test_switched_off_the_base_is_back(model: AudioGraftForConditionalGeneration, recipe: Recipe) -> None:
    before = logits(model)
    add_lora(model, recipe.lora)
    disturb(model)
    changed = logits(model)
    assert (changed - before).abs().max() > 0.01
    enable_lora(model, False)
    assert torch.equal(logits(model), before)
    enable_lora(model, True)
    assert torch.equal(logits(model), changed)


def test_the_adapter_loads_into_stock_qwen2_vl(
    model: AudioGraftForConditionalGeneration, recipe: Recipe, tmp_path: Path
) -> None:
    add_lora(model, recipe.lora)
    disturb(model)
    save_adapter(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    stock = Qwen2VLForConditionalGeneration.from_pretrained(recipe.bases.qwen2_vl, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(stock, tmp_path).eval()
    text = [
        i
        for i in range(tiny.VOCAB_ROWS)
        if i not in (model.config.audio_start_token_id, model.config.audio_end_token_id)
    ]
    assert torch.equal(logits(adapted)[..., text], logits(model)[..., text])


def test_adapters_written_by_peft_load_here(
    recipe: Recipe, model: AudioGraftForConditionalGeneration, tmp_path: Path
) -> None:
    add_lora(model, recipe.lora)
    disturb(model)
    save_adapter(model, tmp_path / "ours")
    stock = load_qwen2_vl(recipe.bases.qwen2_vl, torch.float32)
    PeftModel.from_pretrained(stock, tmp_path / "ours").save_pretrained(tmp_path / "peft")
    again = assemble(recipe).model
    load_adapter(again, tmp_path / "peft")
    assert torch.equal(logits(again), logits(model))


def test_an_adapter_of_another_rank_is_refused(
    model: AudioGraftForConditionalGeneration, recipe: Recipe, tmp_path: Path
) -> None:
    add_lora(model, recipe.lora)
    save_adapter(model, tmp_path)
    other = assemble(recipe).model
    add_lora(other, Lora(r=3))
    with pytest.raises(ValueError, match=r"q_proj\.lora_A\.default\.weight is \(4, 48\), the model's is \(3, 48\)"):
        load_adapter(other, tmp_path)
    partial = assemble(recipe).model
    add_lora(partial, Lora(r=4, target_modules=r"model\.language_model\.layers\.0\.mlp\.up_proj"))
    with pytest.raises(ValueError, match="lacks 0 tensors .* has 26 that the model has not"):
        load_adapter(partial, tmp_path)


def test_merging_leaves_a_plain_model(model: AudioGraftForConditionalGeneration, recipe: Recipe) -> None:
    names = set(model.state_dict())
    add_lora(model, recipe.lora)
    disturb(model)
    before = logits(model)
    merge_lora(model)
    assert not has_lora(model) and set(model.state_dict()) == names
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_a_fused_layer_is_pefts(tmp_path: Path, precision: str, tolerance: float) -> None:
    """Output and gradients of q_proj, which has a bias, in the base's precision with adapters in fp32."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    folders = tiny.whisper_folder(tmp_path / "w"), tiny.qwen2_vl_folder(tmp_path / "q", dtype=dtype)
    model = assemble(tiny.recipe(*folders, run={"precision": precision})).model
    add_lora(model, Lora(r=4, alpha=12))
    disturb(model)
    layer = model.model.language_model.layers[0].self_attn.q_proj
    layer.get_base_layer().bias.data.normal_()
    found = []
    for forward in (layer.forward, lambda x: Linear.forward(layer, x)):
        x = torch.randn(2, 5, 48, dtype=dtype, generator=torch.Generator().manual_seed(3)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            y = forward(x)
        pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        found.append([y, *torch.autograd.grad(y.float().square().sum(), (x, *pair))])
    assert type(found[0][0].grad_fn).__name__ != type(found[1][0].grad_fn).__name__, "the two ways are one"
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


def test_dropout_is_pefts_own(model: AudioGraftForConditionalGeneration) -> None:
    """In training a dropped input differs from draw to draw; in evaluation nothing is dropped."""
    add_lora(model, Lora(r=4, dropout=0.5))
    disturb(model)
    layer, x = model.model.language_model.layers[0].self_attn.q_proj, torch.ones(1, 3, 48)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_autocast_keeps_no_copy_of_layer_inputs(tmp_path: Path) -> None:
    """PEFT's own cast makes one for the backward pass in each layer, though q, k and v share their input."""
    whisper, qwen = tiny.whisper_folder(tmp_path / "w"), tiny.qwen2_vl_folder(tmp_path / "q", dtype=torch.bfloat16)
    model = assemble(tiny.recipe(whisper, qwen, run={"precision": "bf16"})).model
    add_lora(model, Lora(r=4))
    layer, kept = model.model.language_model.layers[0].mlp.down_proj, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    inputs = torch.randn(5, 80, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        output = layer(inputs)
    assert output.dtype == torch.bfloat16
    assert {tensor.data_ptr() for tensor in kept if tensor.shape == inputs.shape} == {inputs.data_ptr()}
    assert layer(inputs).dtype == torch.bfloat16, "without autocast the mix of bf16 and fp32 runs too"
