"""The processor: placeholders become as many tokens as the audio gives, and a prompt is what Qwen2-VL was taught."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_bases as tiny
import torch
from jinja2 import Environment
from PIL import Image
from transformers import AutoProcessor

from graft import lengths
from graft.lengths import WindowExceeded
from graft.model.assemble import assemble
from graft.model.config import AUDIO_END, AUDIO_PAD, AUDIO_START
from graft.model.processor import CHAT_TEMPLATE, AudioGraftProcessor, expand_placeholders

# As published with Qwen2-VL-Instruct (its optional picture numbers left out).
QWEN2_VL_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return tiny.whisper_folder(folder / "w"), tiny.qwen2_vl_folder(folder / "q")


@pytest.fixture(scope="module")
def processor(folders: tuple[Path, Path]) -> AudioGraftProcessor:
    return assemble(tiny.recipe(*folders), meta=True).processor


def waveform(num_samples: int) -> np.ndarray:
    return (np.random.default_rng(num_samples).standard_normal(num_samples) * 0.1).astype(np.float32)


def picture(width: int = 56, height: int = 84) -> Image.Image:
    return Image.fromarray(np.random.default_rng(9).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_text_and_images_are_written_as_qwen2_vl_writes_them(add_generation_prompt: bool) -> None:
    conversation = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What is\nthis? "}, {"type": "video"}],
        },
        {"role": "assistant", "content": " a <b>cat</b>\n"},
        {"role": "user", "content": "  why?\n\n"},
    ]
    for messages in (conversation, [{"role": "system", "content": "Be brief."}, *conversation]):
        ours, theirs = (
            Environment(trim_blocks=True, lstrip_blocks=True)
            .from_string(template)
            .render(messages=messages, add_generation_prompt=add_generation_prompt)
            for template in (CHAT_TEMPLATE, QWEN2_VL_TEMPLATE)
        )
        assert ours == theirs


def test_audio_stands_between_its_markers(processor: AudioGraftProcessor) -> None:
    messages = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Well?"}]}]
    rendered = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{AUDIO_START}{AUDIO_PAD}{AUDIO_END}Well?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_placeholders_by_hand() -> None:
    assert expand_placeholders(["a#b#", "#"], "#", [2, 1, 3]) == ["a##b#", "###"]
    assert expand_placeholders(["plain"], "#", []) == ["plain"]
    with pytest.raises(ValueError, match="hold 2 #, but 1 were given"):
        expand_placeholders(["##"], "#", [1])


@pytest.mark.parametrize("num_samples", [1, 319, 1_281, 15_999, 16_000])
def test_as_many_placeholders_as_tokens(processor: AudioGraftProcessor, num_samples: int) -> None:
    inputs = processor(text=f"x{AUDIO_PAD}y", audio=waveform(num_samples))
    tokens = lengths.audio_tokens(lengths.encoder_frames(num_samples), 4)
    assert inputs["input_ids"].tolist() == [[ord("x") - 33, *[processor.audio_token_id] * tokens, ord("y") - 33]]
    assert inputs["audio_feature_lengths"].tolist() == [lengths.encoder_frames(num_samples)]
    assert inputs["input_features"].shape == (1, 16, 100)


def test_rows_of_unequal_audio_are_padded_on_the_asked_side(processor: AudioGraftProcessor) -> None:
    texts, audio = [AUDIO_PAD, f"{AUDIO_PAD}b"], [waveform(4_000), waveform(1_000)]  # 4 tokens, 1 + 1 tokens
    left, right = (processor(text=texts, audio=audio, padding_side=side) for side in ("left", "right"))
    assert left["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert right["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert torch.equal(left["input_ids"][1, 2:], right["input_ids"][1, :2])


def test_audio_counts_as_text_and_images_do_not(processor: AudioGraftProcessor) -> None:
    """Qwen2-VL's position code knows text (0) and images (1); transformers would mark audio 3, a KeyError there."""
    text = f"{AUDIO_PAD}<|image_pad|>z"
    inputs = processor(text=text, audio=waveform(2_560), images=picture())
    assert inputs["mm_token_type_ids"].tolist() == [[0, 0] + [1] * 6 + [0]]
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 4]] and inputs["pixel_values"].shape == (24, 3 * 2 * 14 * 14)


def test_images_of_a_base_without_image_settings(folders: tuple[Path, Path], tmp_path: Path) -> None:
    blind = tiny.qwen2_vl_folder(tmp_path / "q", images=False)
    processor = assemble(tiny.recipe(folders[0], blind), meta=True).processor
    with pytest.raises(ValueError, match="takes no images"):
        processor(text="<|image_pad|>", images=picture())


def test_image_settings_in_the_new_files_place(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """transformers 5 writes them into processor_config.json, with sizes under other names."""
    qwen = tiny.qwen2_vl_folder(tmp_path / "q", images=False)
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
    settings = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "size": size}
    nested = {"image_processor": {**settings, "image_processor_type": "Qwen2VLImageProcessor"}}
    (qwen / "processor_config.json").write_text(json.dumps(nested))
    processors = [assemble(tiny.recipe(folders[0], folder), meta=True).processor for folder in (qwen, folders[1])]
    new, old = (p(text="<|image_pad|>", images=picture(300, 500))["pixel_values"] for p in processors)
    assert torch.equal(new, old)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text": AUDIO_PAD}, "hold 1 <.audio_pad.>, but 0 were given"),
        ({"text": "no audio here", "audio": waveform(500)}, "hold 0 <.audio_pad.>, but 1 were given"),
        ({"text": AUDIO_PAD, "audio": waveform(500), "sampling_rate": 8_000}, "8000 Hz, 16000 was expected"),
        ({"text": AUDIO_PAD, "audio": [np.zeros((2, 500), np.float32)]}, "audio 0 has shape"),
        ({"text": AUDIO_PAD, "audio": np.zeros(0, np.float32)}, "audio 0 has shape"),
        ({"text": AUDIO_PAD, "audio": []}, "no audio was given"),
    ],
)
def test_what_does_not_fit_is_refused(processor: AudioGraftProcessor, inputs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(**inputs)


def long_processor(folders: tuple[Path, Path], policy: str) -> AudioGraftProcessor:
    return assemble(tiny.recipe(*folders, audio={"long_audio": policy}), meta=True).processor


def test_long_audio_is_refused_joined_or_cut_as_asked(folders: tuple[Path, Path]) -> None:
    long = waveform(35_001)  # two windows of 16,000 and 3,001 samples: 110 frames
    with pytest.raises(WindowExceeded, match=r"audio 1 is 35001 samples .* holds 16000"):
        long_processor(folders, "reject")(text=AUDIO_PAD * 2, audio=[waveform(99), long])
    joined = long_processor(folders, "join")(text=AUDIO_PAD * 2, audio=[waveform(99), long])
    assert joined["audio_feature_lengths"].tolist() == [1, 110] and len(joined["input_features"]) == 1 + 3
    assert joined["input_ids"].shape == (1, 1 + 28)
    cut = long_processor(folders, "truncate")(text=AUDIO_PAD, audio=long)
    assert cut["audio_feature_lengths"].tolist() == [50] and cut["input_ids"].shape == (1, 13)


def test_transcription_request(processor: AudioGraftProcessor) -> None:
    audio = [waveform(1_280), torch.from_numpy(waveform(2_561))]
    inputs = processor.apply_transcription_request(audio, prompt=["Write it down.", "And this."])
    rows = processor.batch_decode(inputs["input_ids"])
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    end = "<|im_end|>\n<|im_start|>assistant\n"
    assert rows[0].endswith(f"{system}{AUDIO_START}{AUDIO_PAD}{AUDIO_END}Write it down.{end}")
    assert rows[1].endswith(f"{system}{AUDIO_START}{AUDIO_PAD * 3}{AUDIO_END}And this.{end}")
    default = processor.apply_transcription_request(audio[0])
    assert "Transcribe the speech." in processor.batch_decode(default["input_ids"])[0]
    with pytest.raises(ValueError, match="3 prompts for 2 audios"):
        processor.apply_transcription_request(audio, prompt=["a", "b", "c"])


def test_chat_template_with_the_audio_in_the_messages(processor: AudioGraftProcessor) -> None:
    """The Hugging Face way: everything in the messages, one call."""
    content = [{"type": "audio", "audio": waveform(1_300)}, {"type": "text", "text": "Well?"}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = processor(text=text, audio=waveform(1_300))
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_markers_are_whole_tokens_that_decoding_can_skip(processor: AudioGraftProcessor) -> None:
    ids = processor.tokenizer(f"a{AUDIO_START}{AUDIO_PAD}{AUDIO_END}b")["input_ids"]
    assert ids[1:-1] == [processor.audio_start_token_id, processor.audio_token_id, processor.audio_end_token_id]
    assert ids[1:-1] == [tiny.NUM_TOKENS, tiny.NUM_TOKENS + 1, tiny.NUM_TOKENS + 2]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == "ab"


def test_round_trip_through_a_folder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tiny.recipe(
        *folders,
        projector={"stack_factor": 7},
        audio={"long_audio": "join"},
        prompt={"system": "Listen.", "instruction": "Schreib's auf."},
    )
    processor = assemble(recipe, meta=True).processor
    processor.save_pretrained(tmp_path)
    read = AutoProcessor.from_pretrained(tmp_path)
    assert type(read) is AudioGraftProcessor
    audio = [waveform(17_000), waveform(700)]
    one, other = (p.apply_transcription_request(audio) for p in (processor, read))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    images = [p(text="<|image_pad|>", images=picture())["pixel_values"] for p in (processor, read)]
    assert torch.equal(*images)
