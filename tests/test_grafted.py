"""The grafted model: stock Qwen2-VL without audio; with it, padding, batching and caching change no transcript."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bases as tiny
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq, AutoProcessor
from transformers import Qwen2VLForConditionalGeneration as Qwen2VL

from graft.model.assemble import Assembled, assemble, export, load_trained, save_trained
from graft.model.encoder import SpeechEncoder
from graft.model.grafted import AudioGraftForConditionalGeneration
from graft.model.lora import add_lora, enable_lora, is_lora_name, merge_lora
from graft.model.trainable import select_trainable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AUDIO = "<|audio_pad|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return tiny.whisper_folder(folder / "w"), tiny.qwen2_vl_folder(folder / "q")


@pytest.fixture(scope="module")
def graft(folders: tuple[Path, Path]) -> Assembled:
    assembled = assemble(tiny.recipe(*folders, audio={"long_audio": "join"}), with_encoder=True)
    with torch.no_grad():  # louder than at the start of training, so that a wrong audio is heard in every test
        assembled.model.model.multi_modal_projector.linear_2.weight.mul_(30.0)
    return assembled


def waveform(num_samples: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(num_samples) * 0.1).astype(np.float32)


def picture(width: int = 56, height: int = 84) -> Image.Image:
    return Image.fromarray(np.random.default_rng(9).integers(0, 255, (height, width, 3), dtype=np.uint8))


def logits(model: torch.nn.Module, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def generate(model: Any, inputs: Any, num_tokens: int = 7, **options: Any) -> list[list[int]]:
    options = {"do_sample": False, "max_new_tokens": num_tokens, "min_new_tokens": num_tokens, **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


def by_frames(model: AudioGraftForConditionalGeneration, inputs: Any) -> dict[str, torch.Tensor]:
    """The same inputs with encoder frames in place of mels, as training has them."""
    rest = {name: value for name, value in inputs.items() if name != "input_features"}
    frames, _ = model.model.encode(inputs["input_features"], inputs["audio_feature_lengths"])
    return {**rest, "audio_features": frames}


# --- it is Qwen2-VL


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["v4", "v5"])
def test_without_audio_it_is_stock_qwen2_vl_bit_for_bit(
    tmp_path: Path, layout: str, tied: bool, precision: str
) -> None:
    """Row 7: image and text, adapters present with values, switched off."""
    whisper = tiny.whisper_folder(tmp_path / "w")
    qwen = tiny.qwen2_vl_folder(tmp_path / "q", layout=layout, tied=tied, dtype=DTYPES[precision])
    recipe = tiny.recipe(whisper, qwen, run={"precision": precision})
    ours, processor = (assembled := assemble(recipe)).model, assembled.processor
    add_lora(ours, recipe.lora)
    for name, parameter in ours.named_parameters():
        if is_lora_name(name):
            torch.nn.init.normal_(parameter, std=0.3)
    stock = Qwen2VL.from_pretrained(qwen, dtype=DTYPES[precision]).eval()
    inputs = processor(text=[f"{IMAGE} What is this?", f"And {IMAGE}?"], images=[picture(), picture(112, 56)])
    expected = logits(stock, **inputs)
    assert not torch.equal(logits(ours, **inputs), expected)
    enable_lora(ours, False)
    actual = logits(ours, **inputs)
    markers = [ours.config.audio_start_token_id, ours.config.audio_end_token_id]
    if tied:  # the head shares the two rows that assembling copied: their logits are the vision markers'
        sources = [ours.config.vision_start_token_id, ours.config.vision_end_token_id]
        assert torch.equal(actual[..., markers], expected[..., sources])
        expected[..., markers] = actual[..., markers]
    assert torch.equal(actual, expected)
    assert generate(ours, inputs) == generate(stock, inputs)


# --- audio


def test_audio_is_heard_and_positions_are_those_of_text(graft: Assembled) -> None:
    """Audio embeddings stand exactly at their placeholders; a prompt with them is the same as one made by hand."""
    model, processor = graft.model, graft.processor
    inputs = by_frames(model, processor(text=f"Hear {AUDIO} now", audio=waveform(5_000)))
    placeholders = (inputs["input_ids"][0] == processor.audio_token_id).nonzero().flatten().tolist()
    assert placeholders == [5, 6, 7, 8]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        for token, position in enumerate(placeholders):  # 16 frames: exactly 4 tokens of 4 frames
            group = inputs["audio_features"][:, 4 * token : 4 * token + 4].float()
            embeds[:, position] = model.model.multi_modal_projector(group)[:, 0]
        positions = torch.arange(embeds.shape[1]).expand(3, 1, -1)
        by_hand = model.model.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state
    torch.testing.assert_close(logits(model, **inputs), model.lm_head(by_hand), rtol=0, atol=1e-5)
    silent = {**inputs, "audio_features": inputs["audio_features"] * 0}
    assert (logits(model, **inputs) - logits(model, **silent))[:, -1].abs().max() > 0.01


def test_mels_and_frames_give_the_same(graft: Assembled, folders: tuple[Path, Path]) -> None:
    """The encoder in the model, and features made beforehand by SpeechEncoder: one result, bit for bit."""
    waves = [waveform(16_000, 1), waveform(5_555, 2)]
    inputs = graft.processor.apply_transcription_request(waves)
    frames = SpeechEncoder(str(folders[0]), torch.float32).encode(waves)
    padded = torch.nn.utils.rnn.pad_sequence(frames, batch_first=True)
    stored = {name: value for name, value in inputs.items() if name != "input_features"}
    assert torch.equal(logits(graft.model, **inputs), logits(graft.model, **stored, audio_features=padded))


def test_what_stands_behind_an_audio_does_not_count(graft: Assembled) -> None:
    """Row 8's root: padding frames may hold anything, NaN included."""
    inputs = by_frames(
        graft.model, graft.processor(text=[AUDIO, AUDIO], audio=[waveform(9_000, 1), waveform(3_000, 2)])
    )
    expected = logits(graft.model, **inputs)
    frames = torch.nn.functional.pad(inputs["audio_features"], (0, 0, 0, 13), value=float("nan"))
    frames[1, 10:] = float("nan")
    assert torch.equal(logits(graft.model, **{**inputs, "audio_features": frames}), expected)


def test_a_batch_transcribes_as_each_alone(graft: Assembled) -> None:
    """Row 8: unequal audio, unequal prompts, padded on the left."""
    waves = [waveform(n, seed) for seed, n in enumerate([16_000, 800, 7_777, 24_001, 12_345])]
    prompts = ["Go.", "Write down what is said, please.", "Transcribe.", "x", "What?"]
    together = generate(graft.model, graft.processor.apply_transcription_request(waves, prompts), 12)
    alone = [
        generate(graft.model, graft.processor.apply_transcription_request(wave, prompt), 12)[0]
        for wave, prompt in zip(waves, prompts, strict=True)
    ]
    assert together == alone
    assert len({tuple(tokens) for tokens in alone}) >= 4, "a deaf model would pass, and show nothing"


@pytest.mark.parametrize("from_frames", [True, False])
def test_generating_is_repeated_argmax_and_hears_the_audio_once(
    graft: Assembled, monkeypatch: pytest.MonkeyPatch, from_frames: bool
) -> None:
    """The KV cache changes no token, and the audio goes through encoder and projector on the first step only."""
    inputs, calls = graft.processor.apply_transcription_request(waveform(9_999)), []
    if from_frames:
        inputs = by_frames(graft.model, inputs)
    by_hand = dict(inputs)
    for _ in range(6):
        best = logits(graft.model, **by_hand)[:, -1].argmax(-1, keepdim=True)
        by_hand["input_ids"] = torch.cat([by_hand["input_ids"], best], dim=1)
        for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            by_hand[name] = torch.nn.functional.pad(by_hand[name], (0, 1), value=fill)
    merge = graft.model.model.merge_audio
    monkeypatch.setattr(graft.model.model, "merge_audio", lambda *args: calls.append(1) or merge(*args))
    expected = by_hand["input_ids"][:, inputs["input_ids"].shape[1] :].tolist()
    assert generate(graft.model, inputs, 6) == expected and calls == [1]
    assert generate(graft.model, inputs, 6, use_cache=False) == expected and calls == [1] * 7


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_hear_their_own_row(graft: Assembled, options: dict[str, int]) -> None:
    """A row with two audios and one with one: each beam keeps those of its row."""
    texts, waves = [f"{AUDIO}{AUDIO}a", f"b{AUDIO}"], [waveform(4_000, 1), waveform(700, 2), waveform(21_000, 3)]
    together = generate(graft.model, graft.processor(text=texts, audio=waves), **options)
    alone = [
        row
        for text, audio in ((texts[0], waves[:2]), (texts[1], waves[2:]))
        for row in generate(graft.model, graft.processor(text=text, audio=audio), **options)
    ]
    assert together == alone


def test_several_audios_in_a_row_go_to_their_places(graft: Assembled) -> None:
    first, second = waveform(4_000, 1), waveform(2_000, 2)
    model, processor = graft.model, graft.processor
    both, swapped, again = (
        logits(model, **processor(text=text, audio=audio))[:, -1]
        for text, audio in (
            (f"{AUDIO} and {AUDIO}!", [first, second]),
            (f"{AUDIO} and {AUDIO}!", [second, first]),
            ([f"{AUDIO} and {AUDIO}!", f"{AUDIO} and {AUDIO}!"], [first, second, second, first]),
        )
    )
    assert (both - swapped).abs().max() > 0.01
    torch.testing.assert_close(again, torch.cat([both, swapped]), rtol=0, atol=1e-5)


def test_long_audio_is_its_windows_one_after_the_other(graft: Assembled) -> None:
    """Frames are joined before they are stacked: 50 + 50 + 7 frames are 27 tokens, not 13 + 13 + 2."""
    long = waveform(34_000)
    inputs = graft.processor(text=AUDIO, audio=long)
    frames, counts = graft.model.model.encode(inputs["input_features"], inputs["audio_feature_lengths"])
    parts = [graft.processor(text=AUDIO, audio=long[start : start + 16_000]) for start in (0, 16_000, 32_000)]
    expected = [graft.model.model.encode(p["input_features"], p["audio_feature_lengths"])[0][0] for p in parts]
    assert counts.tolist() == [107]  # three windows at once may be rounded to another bf16 than each by itself
    torch.testing.assert_close(frames[0], torch.cat(expected), rtol=2**-7, atol=1e-6)
    assert (inputs["input_ids"] == graft.processor.audio_token_id).sum() == 27
    assert torch.isfinite(logits(graft.model, **inputs)).all()


def test_get_audio_features_returns_the_embeddings_in_order(graft: Assembled) -> None:
    inputs = graft.processor(text=AUDIO * 2, audio=[waveform(1_000, 1), waveform(20_000, 2)])
    with torch.no_grad():
        out = graft.model.get_audio_features(inputs["input_features"], inputs["audio_feature_lengths"])
        embeds = graft.model.model.project(out.last_hidden_state, inputs["audio_feature_lengths"])
    assert out.last_hidden_state.shape == (2, 63, 24) and out.pooler_output.shape == (1 + 16, 48)
    assert torch.equal(out.pooler_output, torch.cat([embeds[0, :1], embeds[1, :16]]))


# --- audio and images together


def test_audio_and_images_share_a_prompt(graft: Assembled) -> None:
    model, processor = graft.model, graft.processor
    text, wave = f"{IMAGE} Look. {AUDIO} Listen.", waveform(6_000)
    inputs = processor(text=text, audio=wave, images=picture())
    base = logits(model, **inputs)[:, -1]
    other_image = processor(text=text, audio=wave, images=picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    other_audio = processor(text=text, audio=waveform(6_000, 5), images=picture())
    for changed in (other_image, other_audio):
        assert (logits(model, **changed)[:, -1] - base).abs().max() > 1e-3
    rows = processor(text=[text, f"{AUDIO}"], audio=[wave, waveform(800)], images=picture())
    assert generate(model, rows)[0] == generate(model, inputs)[0]


def test_audio_before_and_after_an_image_moves_positions_as_text_does(graft: Assembled) -> None:
    """M-RoPE: n audio tokens take n positions in all three parts, an image its grid."""
    inputs = graft.processor(text=f"{AUDIO}{IMAGE}{AUDIO}", audio=[waveform(2_500), waveform(100)], images=picture())
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
    positions, _ = graft.model.model.get_rope_index(**{name: inputs[name] for name in names})
    # 2 audio tokens, <|vision_start|>, an image of 3 x 2 merged patches, <|vision_end|>, 1 audio token
    assert positions[:, 0].tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
        [0, 1, 2, 3, 3, 4, 4, 5, 5, 6, 7],
        [0, 1, 2, 3, 4, 3, 4, 3, 4, 6, 7],
    ]


def test_an_earlier_generate_leaves_nothing_behind(graft: Assembled) -> None:
    """transformers keeps rope_deltas of the last batch in the model; cached steps by hand would take them up."""
    model, processor = graft.model, graft.processor
    audio = processor(text=f"Hm {AUDIO} so", audio=waveform(3_000))
    images = processor(text=[f"{IMAGE} a"] * 4, images=[picture()] * 4)

    def two_cached_steps() -> torch.Tensor:
        with torch.no_grad():
            first = model(**audio, use_cache=True)
            second = model(input_ids=torch.tensor([[17]]), past_key_values=first.past_key_values)
        return second.logits

    model.model.rope_deltas = None
    clean = two_cached_steps()
    generate(model, images)
    assert model.model.rope_deltas is not None and model.model.rope_deltas.abs().max() > 0
    assert torch.equal(two_cached_steps(), clean)
    longer = {name: torch.cat([audio[name], value], 1) for name, value in (("input_ids", torch.tensor([[17]])),)}
    whole = logits(
        model, **longer, input_features=audio["input_features"], audio_feature_lengths=audio["audio_feature_lengths"]
    )
    torch.testing.assert_close(clean[:, -1], whole[:, -1], rtol=0, atol=1e-5)


def test_right_padding_needs_no_mask(graft: Assembled) -> None:
    """Training may leave the mask out, which keeps the fast causal kernels: padding behind is never looked at."""
    texts, waves = [f"{AUDIO}Write.abcde", f"{AUDIO}xyz"], [waveform(5_000, 1), waveform(900, 2)]
    inputs = graft.processor(text=texts, audio=waves, padding_side="right")
    with_mask = logits(graft.model, **inputs)
    without = logits(graft.model, **{name: value for name, value in inputs.items() if name != "attention_mask"})
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(without[real], with_mask[real], rtol=0, atol=1e-5)


# --- the loss


@pytest.fixture(scope="module")
def labelled(graft: Assembled) -> dict[str, torch.Tensor]:
    """Two rows padded on the right, 5 and 3 labels, one of them at position 0, which nothing predicts."""
    texts, waves = [f"{AUDIO}Write.abcde", f"{AUDIO}xyz"], [waveform(5_000, 1), waveform(900, 2)]
    inputs = by_frames(graft.model, graft.processor(text=texts, audio=waves, padding_side="right"))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -5:] = inputs["input_ids"][0, -5:]
    labels[1, 1:4] = inputs["input_ids"][1, 1:4]
    labels[1, 0] = 3
    return {**inputs, "labels": labels}


def test_loss_is_that_of_full_logits(graft: Assembled, labelled: dict[str, torch.Tensor]) -> None:
    """Only 8 of the positions have logits computed; the loss is what stock Qwen2-VL's loss function gives."""
    with torch.no_grad():
        output = graft.model(**labelled)
        full = graft.model(**{name: value for name, value in labelled.items() if name != "labels"}).logits
    assert output.logits.shape == (8, tiny.VOCAB_ROWS)
    stock = graft.model.loss_function(logits=full, labels=labelled["labels"], vocab_size=tiny.VOCAB_ROWS)
    torch.testing.assert_close(output.loss, stock, rtol=1e-6, atol=0)
    assert output.loss.dtype == torch.float32 and output.past_key_values is None


def test_loss_is_divided_by_the_number_it_is_given(graft: Assembled, labelled: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        mean = graft.model(**labelled).loss
        for count in (31, torch.tensor(31), torch.tensor(31.0)):
            torch.testing.assert_close(graft.model(**labelled, num_items_in_batch=count).loss, mean * 8 / 31)


def test_a_batch_without_labels_gives_zero_and_a_gradient(graft: Assembled, labelled: dict[str, torch.Tensor]) -> None:
    """A rank whose share has nothing to learn must still take part in the reduction."""
    parameters = select_trainable(graft.model, 1)
    loss = graft.model(**{**labelled, "labels": torch.full_like(labelled["labels"], -100)}).loss
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in parameters.values())
    graft.model.zero_grad()


def test_gradients_reach_the_projector_and_nothing_else(graft: Assembled, labelled: dict[str, torch.Tensor]) -> None:
    parameters = select_trainable(graft.model, 1)
    graft.model(**labelled).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in parameters.values())
    assert {name for name, p in graft.model.named_parameters() if p.grad is not None} == set(parameters)
    graft.model.zero_grad()


def test_padding_rows_in_a_batch_add_nothing_to_the_loss(graft: Assembled, labelled: dict[str, torch.Tensor]) -> None:
    """Sum over a batch is the sum over its rows: accumulation and ranks may cut it anywhere."""
    with torch.no_grad():
        whole = graft.model(**labelled, num_items_in_batch=1).loss
        rows = [
            graft.model(**{name: value[row : row + 1] for name, value in labelled.items()}, num_items_in_batch=1).loss
            for row in range(2)
        ]
    torch.testing.assert_close(whole, rows[0] + rows[1], rtol=1e-5, atol=0)


def test_bf16_under_autocast_trains_fp32_masters(folders: tuple[Path, Path], labelled: dict[str, torch.Tensor]) -> None:
    recipe = tiny.recipe(*folders, run={"precision": "bf16"})
    model = assemble(recipe).model
    add_lora(model, recipe.lora)
    parameters = select_trainable(model, 2)
    optimizer, losses = torch.optim.Adam(parameters.values(), lr=1e-2), []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**labelled).loss
        loss.backward()
        assert loss.dtype == torch.float32
        assert {p.grad.dtype for p in parameters.values()} == {torch.float32}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


# --- what does not fit


def test_placeholders_and_audio_must_agree(graft: Assembled) -> None:
    inputs = graft.processor(text=f"a {AUDIO} b", audio=waveform(3_000))
    short = {**inputs, "audio_feature_lengths": torch.tensor([4])}
    with pytest.raises(ValueError, match=r"hold 3 audio placeholders, the audio gives 1 tokens \(\[1\] per audio\)"):
        graft.model(**short)
    with pytest.raises(ValueError, match="hold 2 windows of 50 frames, but audio_feature_lengths \\[10\\] need 1"):
        graft.model(**{**inputs, "input_features": inputs["input_features"].repeat(2, 1, 1)})


def test_audios_in_another_order_than_their_placeholders(graft: Assembled) -> None:
    """As many tokens as placeholders in all, but row 0 would end with the beginning of row 1's audio."""
    inputs = graft.processor(text=[f"a{AUDIO}", f"b{AUDIO}"], audio=[waveform(4_000), waveform(3_000)])
    swapped = {name: inputs[name].flip(0) for name in ("input_features", "audio_feature_lengths")}
    with pytest.raises(ValueError, match=r"\[4, 3\] per row\) and audios \(\[3, 4\] tokens each\) do not fit"):
        graft.model(**{**inputs, **swapped})


def test_calls_that_make_no_sense(graft: Assembled, folders: tuple[Path, Path]) -> None:
    inputs = graft.processor(text=AUDIO, audio=waveform(300))
    with pytest.raises(ValueError, match="not both"):
        graft.model(**inputs, audio_features=torch.zeros(1, 1, 24))
    embeds = graft.model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="audio needs input_ids"):
        graft.model(inputs_embeds=embeds, input_features=inputs["input_features"])
    with pytest.raises(ValueError, match="built without its audio tower"):
        assemble(tiny.recipe(*folders)).model(**inputs)


# --- files


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("auto", [AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq])
def test_round_trip_through_a_folder(folders: tuple[Path, Path], tmp_path: Path, tied: bool, auto: Any) -> None:
    """Both stages trained, adapters merged, saved, and read back by the Auto classes: every bit, no warning."""
    qwen = tiny.qwen2_vl_folder(tmp_path / "q", tied=tied)
    recipe = tiny.recipe(folders[0], qwen)
    model, processor = (assembled := assemble(recipe, with_encoder=True)).model, assembled.processor
    add_lora(model, recipe.lora)
    for parameter in select_trainable(model, 2).values():
        torch.nn.init.normal_(parameter, std=0.2)
    merge_lora(model)
    model.save_pretrained(tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")

    again, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(again) is AudioGraftForConditionalGeneration
    assert not any(info.values()), info
    state, read = model.state_dict(), again.state_dict()
    assert state.keys() == read.keys() and all(torch.equal(state[name], read[name]) for name in state)
    inputs = AutoProcessor.from_pretrained(tmp_path / "out").apply_transcription_request([waveform(5_000)])
    assert generate(again, inputs) == generate(model, processor.apply_transcription_request([waveform(5_000)]))


def test_an_exported_graft_transcribes_in_five_lines(tmp_path: Path) -> None:
    """bf16 bases, both stages: adapters merged, one precision, and the Auto classes read it back bit for bit."""
    whisper = tiny.whisper_folder(tmp_path / "w", dtype=torch.bfloat16)
    recipe = tiny.recipe(whisper, tiny.qwen2_vl_folder(tmp_path / "q", dtype=torch.bfloat16), run={"precision": "bf16"})
    assembled = assemble(recipe, with_encoder=True)
    add_lora(assembled.model, recipe.lora)
    for parameter in select_trainable(assembled.model, 2).values():
        torch.nn.init.normal_(parameter, std=0.2)
    export(tmp_path / "out", assembled)

    model, info = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = processor.apply_transcription_request(waveform(9_000))
    text = processor.batch_decode(model.generate(**inputs, max_new_tokens=5), skip_special_tokens=True)

    assert isinstance(text[0], str) and not any(info.values()), info
    state, read = assembled.model.state_dict(), model.state_dict()
    assert {tensor.dtype for tensor in read.values()} == {torch.bfloat16}
    assert state.keys() == read.keys() and all(torch.equal(state[name], read[name]) for name in state)
    assert model.generation_config.max_new_tokens == 256 and not model.generation_config.do_sample


def test_what_could_not_be_read_back_is_not_saved(folders: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tiny.recipe(*folders)
    assembled = assemble(recipe)
    with pytest.raises(ValueError, match="with_encoder=True"):
        export(tmp_path, assembled)
    add_lora(assembled.model, recipe.lora)
    with pytest.raises(ValueError, match="carries adapters"):
        assembled.model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_audio_tower_has_no_dropout_while_others_train(folders: tuple[Path, Path], tmp_path: Path) -> None:
    whisper = tiny.whisper_folder(tmp_path / "w", dropout=0.5, encoder_layerdrop=0.5)
    assembled = assemble(tiny.recipe(whisper, folders[1]), with_encoder=True)
    inputs = assembled.processor(text=AUDIO, audio=waveform(5_000))
    expected = logits(assembled.model.eval(), **inputs)
    assembled.model.train()
    assert assembled.model.model.language_model.training
    assert all(torch.equal(logits(assembled.model, **inputs), expected) for _ in range(3))


def test_round_trip_without_the_tower(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model = assemble(tiny.recipe(*folders)).model
    model.save_pretrained(tmp_path)
    again, info = AutoModelForMultimodalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert again.model.audio_tower is None and model.state_dict().keys() == again.state_dict().keys()


def test_trained_files_give_the_same_transcripts(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The other way to keep a graft: its bases, and projector and adapter beside them."""
    recipe = tiny.recipe(*folders)
    model, processor = (assembled := assemble(recipe, with_encoder=True)).model, assembled.processor
    add_lora(model, recipe.lora)
    for parameter in select_trainable(model, 2).values():
        torch.nn.init.normal_(parameter, std=0.2)
    save_trained(tmp_path, model)
    again = assemble(recipe, with_encoder=True).model
    load_trained(tmp_path, again)
    inputs = processor.apply_transcription_request([waveform(5_000, 1), waveform(900, 2)])
    assert torch.equal(logits(again, **inputs), logits(model, **inputs))
    assert generate(again, inputs) == generate(model, inputs)
