"""Assembling: the bases' weights bit for bit, in either file layout, or an error; and trained weights come back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import tiny_bases as tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration, WhisperModel

from graft.model.assemble import assemble, load_trained, save_trained
from graft.model.grafted import AudioGraftForConditionalGeneration
from graft.model.lora import add_lora
from graft.model.trainable import select_trainable
from graft.recipe import Recipe

MARKERS = {tiny.NUM_TOKENS: "vision_start_token_id", tiny.NUM_TOKENS + 2: "vision_end_token_id"}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.whisper_folder(tmp_path_factory.mktemp("whisper"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def recipe(whisper: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    qwen = tiny.qwen2_vl_folder(tmp_path_factory.mktemp("qwen"), dtype=torch.bfloat16)
    return tiny.recipe(whisper, qwen, run={"precision": "bf16"})


def digests(folder: str) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(folder).iterdir()}


def differences_from_the_files(model: AudioGraftForConditionalGeneration, recipe: Recipe) -> dict[str, list[int]]:
    """Every frozen tensor against its file: name -> rows that differ by a bit. Asserts that none was forgotten."""
    qwen = load_file(Path(recipe.bases.qwen2_vl) / "model.safetensors")
    whisper = load_file(Path(recipe.bases.whisper) / "model.safetensors")
    expected = {
        name.replace("visual.", "model.visual.", 1) if name.startswith("visual.") else _nested(name): tensor
        for name, tensor in qwen.items()
    }
    expected |= {
        name.replace("model.encoder.", "model.audio_tower."): tensor
        for name, tensor in whisper.items()
        if name.startswith("model.encoder.")
    }
    held = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if "lora_" not in name and "multi_modal_projector" not in name
    }
    assert held.keys() == expected.keys()
    changed = {name: (held[name] != expected[name].to(held[name].dtype)) for name in held}
    return {
        name: rows.flatten(1).any(1).nonzero().flatten().tolist() if rows.ndim > 1 else [0]
        for name, rows in changed.items()
        if rows.any()
    }


def _nested(name: str) -> str:
    flat = name.startswith("model.") and not name.startswith(("model.language_model.", "model.visual."))
    return name.replace("model.", "model.language_model.", 1) if flat else name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["v4", "v5"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_every_frozen_weight_is_that_of_its_file(
    whisper: Path, tmp_path: Path, layout: str, tied: bool, precision: str
) -> None:
    qwen = tiny.qwen2_vl_folder(tmp_path / "q", layout=layout, tied=tied, dtype=torch.bfloat16)
    recipe = tiny.recipe(whisper, qwen, run={"precision": precision})
    model = assemble(recipe, with_encoder=True).model
    changed = differences_from_the_files(model, recipe)
    assert changed == {"model.language_model.embed_tokens.weight": sorted(MARKERS)}, "the two marker rows, nothing else"
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert {str(p.dtype) for p in model.model.visual.parameters()} == {
        {"bf16": "torch.bfloat16", "fp32": "torch.float32"}[precision]
    }
    assert {p.dtype for p in model.model.multi_modal_projector.parameters()} == {torch.float32}


def test_training_changes_no_frozen_bit(recipe: Recipe) -> None:
    """Row 4, with an optimiser that moves everything it is given by a lot."""
    before = digests(recipe.bases.qwen2_vl) | digests(recipe.bases.whisper)
    model = assemble(recipe, with_encoder=True).model
    for stage in (1, 2):
        if stage == 2:
            add_lora(model, recipe.lora)
        parameters = select_trainable(model, stage)
        optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, weight_decay=0.5)
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch(model)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(parameter.isfinite().all() for parameter in parameters.values())
    assert differences_from_the_files(model, recipe) == {"model.language_model.embed_tokens.weight": sorted(MARKERS)}
    assert digests(recipe.bases.qwen2_vl) | digests(recipe.bases.whisper) == before


def batch(model: AudioGraftForConditionalGeneration) -> dict[str, torch.Tensor]:
    config = model.config
    row = [config.audio_start_token_id, *[config.audio_token_id] * 3, config.audio_end_token_id, 7, 8, 9]
    labels = [-100] * 5 + [7, 8, 9]
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.tensor([row]),
        "labels": torch.tensor([labels]),
        "audio_features": torch.randn(1, 11, 24, generator=generator).bfloat16(),
        "audio_feature_lengths": torch.tensor([11]),
    }


def test_marker_rows_are_those_of_the_vision_markers(recipe: Recipe) -> None:
    assembled = assemble(recipe)
    rows, ids = assembled.model.get_input_embeddings().weight, tiny.IDS
    for row, source in MARKERS.items():
        assert torch.equal(rows[row], rows[ids[source]])
    config = assembled.config
    assert (config.audio_start_token_id, config.audio_token_id, config.audio_end_token_id) == (270, 271, 272)
    assert rows.shape[0] == tiny.VOCAB_ROWS, "nothing was resized"


def test_no_room_for_the_audio_tokens(whisper: Path, tmp_path: Path) -> None:
    full = tiny.qwen2_vl_folder(tmp_path / "q", rows=tiny.NUM_TOKENS + 2)
    with pytest.raises(ValueError, match=r"has 272 rows and the tokenizer fills 270, which leaves no room"):
        assemble(tiny.recipe(whisper, full))


def test_a_base_that_already_has_the_tokens_keeps_their_ids(whisper: Path, tmp_path: Path) -> None:
    qwen = tiny.qwen2_vl_folder(tmp_path / "q")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|other|>", "<|audio_end|>", "<|audio_start|>", "<|audio_pad|>"], special_tokens=True)
    tokenizer.save_pretrained(qwen)
    config = assemble(tiny.recipe(whisper, qwen)).config
    assert (config.audio_start_token_id, config.audio_token_id, config.audio_end_token_id) == (272, 273, 271)


@pytest.mark.parametrize(
    "name", ["visual.blocks.1.attn.qkv.bias", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
)
def test_missing_weights_are_an_error_that_names_them(whisper: Path, tmp_path: Path, name: str) -> None:
    qwen = tiny.qwen2_vl_folder(tmp_path / "q")
    weights = load_file(qwen / "model.safetensors")
    del weights[name]
    save_file(weights, qwen / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 weights: model\.\S*{name.split('.', 1)[1]}"):
        assemble(tiny.recipe(whisper, qwen))


def test_a_missing_lm_head_is_noticed_where_it_is_not_tied(whisper: Path, tmp_path: Path) -> None:
    qwen = tiny.qwen2_vl_folder(tmp_path / "q", tied=False)
    weights = load_file(qwen / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, qwen / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights: lm_head.weight"):
        assemble(tiny.recipe(whisper, qwen))


def test_bases_of_another_kind_are_refused(recipe: Recipe) -> None:
    swapped = tiny.recipe(Path(recipe.bases.qwen2_vl), Path(recipe.bases.whisper))
    with pytest.raises(ValueError, match="bases.qwen2_vl: .* holds a 'whisper', a 'qwen2_vl' was expected"):
        assemble(swapped)
    with pytest.raises(ValueError, match="bases.whisper: .* holds a 'qwen2_vl', a 'whisper' was expected"):
        assemble(tiny.recipe(Path(recipe.bases.qwen2_vl), Path(recipe.bases.qwen2_vl)))


def test_a_base_that_does_not_exist(whisper: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bases.qwen2_vl: .*nowhere"):
        assemble(tiny.recipe(whisper, tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="bases.whisper: .*nowhere"):
        assemble(tiny.recipe(tmp_path / "nowhere", tiny.qwen2_vl_folder(tmp_path / "q")))


def test_an_encoder_alone_is_a_base_too(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    stock = WhisperModel.from_pretrained(recipe.bases.whisper, dtype=torch.bfloat16)
    stock.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_bytes(
        (Path(recipe.bases.whisper) / "preprocessor_config.json").read_bytes()
    )
    one = assemble(recipe, with_encoder=True).model.model.audio_tower.state_dict()
    other = assemble(
        tiny.recipe(folder, Path(recipe.bases.qwen2_vl), run={"precision": "bf16"}), with_encoder=True
    ).model.model.audio_tower.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_seed_decides_the_projector(recipe: Recipe) -> None:
    def projector(seed: int) -> torch.Tensor:
        seeded = tiny.recipe(Path(recipe.bases.whisper), Path(recipe.bases.qwen2_vl), run={"seed": seed})
        return assemble(seeded).model.model.multi_modal_projector.linear_1.weight

    assert torch.equal(projector(3), projector(3)) and not torch.equal(projector(3), projector(4))


def test_first_audio_embeddings_are_as_large_as_words(recipe: Recipe) -> None:
    model = assemble(recipe).model
    embeds = model.model.project(torch.randn(2, 200, 24), torch.tensor([200, 200]))
    words = model.get_input_embeddings().weight.float()
    assert 0.8 < (embeds.std() / words.std()).item() < 1.25


def test_trained_weights_come_back(recipe: Recipe, tmp_path: Path) -> None:
    model = assemble(recipe).model
    save_trained(tmp_path / "stage1", model)
    assert {file.name for file in (tmp_path / "stage1").iterdir()} == {"projector.safetensors", "projector.json"}
    add_lora(model, recipe.lora)
    trained = select_trainable(model, 2)
    for parameter in trained.values():
        torch.nn.init.normal_(parameter)
    save_trained(tmp_path / "stage2", model)
    again = assemble(recipe).model
    load_trained(tmp_path / "stage2", again)
    parameters = dict(again.named_parameters())
    assert all(torch.equal(parameters[name], parameter) for name, parameter in trained.items())
    settings = json.loads((tmp_path / "stage2" / "projector.json").read_text())
    assert settings["kind"] == "mlp" and settings["stack_factor"] == 4


def test_trained_weights_that_do_not_fit(recipe: Recipe, tmp_path: Path) -> None:
    save_trained(tmp_path, assemble(recipe).model)
    bases = Path(recipe.bases.whisper), Path(recipe.bases.qwen2_vl)
    with pytest.raises(ValueError, match="stack_factor: 4 there, 3 here"):
        load_trained(tmp_path, assemble(tiny.recipe(*bases, projector={"stack_factor": 3})).model)
    with pytest.raises(ValueError, match="kind: 'mlp' there, 'swiglu' here"):
        load_trained(tmp_path, assemble(tiny.recipe(*bases, projector={"kind": "swiglu"})).model)
    save_file({"linear_1.weight": torch.zeros(48, 96)}, tmp_path / "projector.safetensors")
    with pytest.raises(ValueError, match=r"projector.safetensors does not fit the model: it lacks 3 tensors"):
        load_trained(tmp_path, assemble(recipe).model)
    with pytest.raises(ValueError, match="holds no projector.safetensors"):
        load_trained(tmp_path / "nothing", assemble(recipe).model)


def test_meta_reads_no_weights(recipe: Recipe, tmp_path: Path) -> None:
    qwen = tiny.qwen2_vl_folder(tmp_path / "q")
    (qwen / "model.safetensors").unlink()
    model = assemble(tiny.recipe(Path(recipe.bases.whisper), qwen), meta=True, with_encoder=True).model
    real = assemble(recipe, with_encoder=True).model
    assert {p.device.type for p in model.parameters()} == {"meta"}
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (model, real)]
    assert shapes[0] == shapes[1]


def test_stock_qwen2_vl_still_reads_the_base(recipe: Recipe) -> None:
    """The fixture is what it claims to be: a folder that stock transformers loads whole."""
    _, info = Qwen2VLForConditionalGeneration.from_pretrained(recipe.bases.qwen2_vl, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
