"""Text, waveforms and images in, model inputs out: placeholders expanded to the number of audio and image tokens.

S: samples at 16 kHz    F: encoder frames    A: audio tokens    N: audios    W: encoder windows
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from graft import lengths
from graft.lengths import Window
from graft.model.config import AUDIO_END, AUDIO_PAD, AUDIO_START, AudioGraftConfig
from graft.model.mels import LogMels

IMAGE_PAD = "<|image_pad|>"
LONG_AUDIO_POLICIES = ("reject", "join", "truncate")

# Qwen2-VL-Instruct's own template (ChatML, default system turn), with audio beside images and videos.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for content in message['content'] -%}
{%- if content['type'] == 'image' or 'image' in content or 'image_url' in content -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif content['type'] == 'video' or 'video' in content -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif content['type'] == 'audio' or 'audio' in content or 'audio_url' in content -%}
{{- '<|audio_start|><|audio_pad|><|audio_end|>' -}}
{%- elif 'text' in content -%}
{{- content['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def known_to_auto_processor(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Class decorator: ``AutoProcessor`` finds the graft's once this file is imported."""
    AutoProcessor.register(AudioGraftConfig, processor_class, exist_ok=True)
    return processor_class


@known_to_auto_processor
class AudioGraftProcessor(ProcessorMixin):
    """Tokenizer, Whisper's mel extractor and, where the base has one, Qwen2-VL's image processor.

    Args:
        feature_extractor: Whisper's, unchanged.
        tokenizer: Qwen2-VL's with the three audio tokens.
        stack_factor: encoder frames per audio token, as in the model's config.
        window_frames: encoder frames of the window, as in the model's config.
        system_prompt: the system turn of :meth:`apply_transcription_request`.
        default_transcription_prompt: its instruction.
        long_audio: what happens to audio beyond the window: ``reject`` (error), ``join`` consecutive windows, or
            ``truncate``.
        vision: settings of the image processor; None: images are refused. It is made at the first image, and in
            its PIL form, which does not need torchvision.
    """

    def __init__(
        self,
        feature_extractor: Any,
        tokenizer: Any,
        chat_template: str | None = None,
        stack_factor: int = 4,
        window_frames: int = 1500,
        system_prompt: str = "You are a helpful assistant.",
        default_transcription_prompt: str = "Transcribe the speech.",
        long_audio: str = "reject",
        vision: dict[str, Any] | None = None,
    ):
        if long_audio not in LONG_AUDIO_POLICIES:
            raise ValueError(f"long_audio is '{long_audio}'; there are {', '.join(LONG_AUDIO_POLICIES)}")
        self.stack_factor = stack_factor
        self.window_frames = window_frames
        self.system_prompt = system_prompt
        self.default_transcription_prompt = default_transcription_prompt
        self.long_audio = long_audio
        self.vision = vision
        self.audio_token = AUDIO_PAD
        self.image_token = IMAGE_PAD
        self.audio_token_id, self.audio_start_token_id, self.audio_end_token_id = tokenizer.convert_tokens_to_ids(
            [AUDIO_PAD, AUDIO_START, AUDIO_END]
        )
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        self._image_processor = None
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    @property
    def window(self) -> Window:
        """What the encoder takes at once."""
        return Window(self.window_frames)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        audio: np.ndarray | torch.Tensor | Sequence[np.ndarray | torch.Tensor] | None = None,
        images: Any = None,
        padding_side: str = "left",
        sampling_rate: int = lengths.SAMPLE_RATE,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prompts with one ``<|audio_pad|>`` per waveform and one ``<|image_pad|>`` per image, in order.

        Args:
            audio: one or several mono waveforms (S_i,) float32 at 16 kHz.
            padding_side: left for generating, right for training.

        Returns:
            ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` (B, T); with audio ``input_features``
            (W, n_mels, 2F) and ``audio_feature_lengths`` (N,); with images ``pixel_values``, ``image_grid_thw``.

        Raises:
            WindowExceeded: under ``reject``, if a waveform is longer than the encoder's window.
            ValueError: for another sampling rate, or if placeholders and audios or images are not as many.
        """
        del kwargs  # of apply_chat_template, which passes what every processor might want
        if sampling_rate != lengths.SAMPLE_RATE:
            raise ValueError(f"audio is at {sampling_rate} Hz, {lengths.SAMPLE_RATE} was expected: resample it first")
        texts = [text] if isinstance(text, str) else list(text or [])
        data: dict[str, torch.Tensor] = {}
        counts: dict[str, list[int]] = {AUDIO_PAD: [], IMAGE_PAD: []}
        if audio is not None:
            audio_data, counts[AUDIO_PAD] = self._audio_inputs(audio)
            data |= audio_data
        if images is not None:
            image_data, counts[IMAGE_PAD] = self._image_inputs(images)
            data |= image_data
        if texts:
            for token, numbers in counts.items():
                texts = expand_placeholders(texts, token, numbers)
            data |= self._text_inputs(texts, padding_side)
        return BatchFeature(data)

    def apply_transcription_request(
        self, audio: Any, prompt: str | Sequence[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Inputs that ask for the transcript of each waveform, one prompt per row.

        ``prompt`` is one instruction for all or one each; None: ``default_transcription_prompt``.
        """
        waveforms = _waveforms(audio)
        prompts = [prompt] * len(waveforms) if prompt is None or isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(waveforms):
            raise ValueError(f"{len(prompts)} prompts for {len(waveforms)} audios: one for all or one each")
        texts = [self._transcription_prompt(words or self.default_transcription_prompt) for words in prompts]
        return self(text=texts, audio=waveforms, **kwargs)

    def num_audio_tokens(self, num_samples: int) -> int:
        """Audio tokens of a waveform of ``num_samples``."""
        return lengths.audio_tokens(lengths.encoder_frames(num_samples), self.stack_factor)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """What :meth:`__call__` can return."""
        names = ["input_ids", "attention_mask", "mm_token_type_ids", "input_features", "audio_feature_lengths"]
        return names + (["pixel_values", "image_grid_thw"] if self.vision is not None else [])

    def _transcription_prompt(self, words: str) -> str:
        messages = [
            {"role": "system", "content": self.system_prompt},
            {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": words}]},
        ]
        return self.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _audio_inputs(self, audio: Any) -> tuple[dict[str, torch.Tensor], list[int]]:
        waveforms = [self._fit(waveform, index) for index, waveform in enumerate(_waveforms(audio))]
        size = self.window.num_samples
        windows = [waveform[start : start + size] for waveform in waveforms for start in range(0, len(waveform), size)]
        inputs = {
            "input_features": LogMels(self.feature_extractor, self.window)(windows),
            "audio_feature_lengths": torch.tensor([lengths.encoder_frames(len(waveform)) for waveform in waveforms]),
        }
        return inputs, [self.num_audio_tokens(len(waveform)) for waveform in waveforms]

    def _fit(self, waveform: np.ndarray, index: int) -> np.ndarray:
        if waveform.ndim != 1 or len(waveform) == 0:
            raise ValueError(f"audio {index} has shape {waveform.shape}: a mono waveform with samples is expected")
        if self.long_audio == "truncate":
            return waveform[: self.window.num_samples]
        if self.long_audio == "reject":
            self.window.check(len(waveform), f"audio {index}")
        return waveform

    def _image_inputs(self, images: Any) -> tuple[dict[str, torch.Tensor], list[int]]:
        if self.vision is None:
            raise ValueError("the base Qwen2-VL came without preprocessor_config.json: this processor takes no images")
        inputs = self._vision()(images=images, return_tensors="pt")
        merged = inputs["image_grid_thw"].prod(-1) // self._vision().merge_size ** 2
        return {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}, merged.tolist()

    def _vision(self) -> Any:
        if self._image_processor is None:
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

            self._image_processor = Qwen2VLImageProcessorPil(**self.vision)
        return self._image_processor

    def _text_inputs(self, texts: list[str], padding_side: str) -> dict[str, torch.Tensor]:
        tokens = self.tokenizer(texts, padding=True, padding_side=padding_side, return_tensors="pt")
        # 1 marks image tokens, for M-RoPE. Audio counts as text: Qwen2-VL knows no third kind.
        types = (tokens["input_ids"] == self.image_token_id).long()
        return {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "mm_token_type_ids": types,
        }


def expand_placeholders(texts: Sequence[str], token: str, counts: Sequence[int]) -> list[str]:
    """Repeat the i-th ``token`` of all texts ``counts[i]`` times.

    Raises:
        ValueError: if there are not as many of them as counts.
    """
    found = sum(text.count(token) for text in texts)
    if found != len(counts):
        raise ValueError(f"the texts hold {found} {token}, but {len(counts)} were given: one each, in order")
    remaining = iter(counts)
    expanded = []
    for text in texts:
        first, *others = text.split(token)
        expanded.append(first + "".join(token * next(remaining) + other for other in others))
    return expanded


def _waveforms(audio: Any) -> list[np.ndarray]:
    """One waveform or several, NumPy or torch -> a list of float32 arrays."""
    alone = isinstance(audio, (np.ndarray, torch.Tensor)) and audio.ndim == 1
    audio = [audio] if alone else list(audio)
    if not audio:
        raise ValueError("no audio was given: at least one waveform is expected")
    return [np.asarray(waveform, dtype=np.float32) for waveform in audio]
