"""Qwen2-VL that also hears: audio embeddings stand at ``<|audio_pad|>`` positions of the prompt.

B: rows of the batch    T: positions    N: audios in the batch, in the order of their placeholders (one per row in
training)    W: encoder windows, >= N    F: encoder frames    D: size of a frame    A: audio tokens, ceil(F / k)
H: hidden size    V: rows of the embedding matrix    L: label positions    P: placeholders

Where labels, placeholders and padding stand follows from the values of tensors, and to look at a value is to wait for a
GPU. Who knows beforehand (``graft/data/collate.py``) says so in ``label_positions``, ``audio_places``, ``audio_tokens``
and ``line_positions``, and leaves out a mask that only hides what stands behind: then nothing here waits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
    Qwen2VLForConditionalGeneration,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from graft import lengths
from graft.model.alignment import alignment_loss
from graft.model.config import FEATURE_DTYPE, AudioGraftConfig
from graft.model.lean import Line, runs_on_a_line
from graft.model.loss import frozen_head_loss, summed_cross_entropy
from graft.model.projector import build_projector

IGNORE_INDEX = -100
_AUDIO_INPUTS = ("input_features", "audio_features", "audio_feature_lengths")


class AudioGraftModel(Qwen2VLModel):
    """Vision tower, language model, projector and, if the config says so, the audio tower."""

    config: AudioGraftConfig
    input_modalities = ("image", "video", "audio", "text")

    def __init__(self, config: AudioGraftConfig):
        super().__init__(config)
        self.audio_tower = WhisperEncoder._from_config(config.audio_config) if config.has_audio_tower else None
        self.multi_modal_projector = build_projector(**config.projector_settings())
        self.post_init()

    def train(self, mode: bool = True) -> AudioGraftModel:
        """The audio tower never leaves evaluation mode: its frames are the same whatever trains beside it."""
        super().train(mode)
        if self.audio_tower is not None:
            self.audio_tower.eval()
        return self

    def get_audio_features(
        self, input_features: torch.Tensor, audio_feature_lengths: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode and project mels (W, n_mels, 2F), a full window each.

        ``audio_feature_lengths`` (N,) counts the encoder frames of each audio; None: every window is an audio of its
        own, full. An audio longer than the window takes consecutive windows.

        Returns:
            ``last_hidden_state`` (N, F', D): frames, zeros after each length; ``pooler_output`` (sum of A, H).
        """
        frames, frame_lengths = self.encode(input_features, audio_feature_lengths)
        audio_embeds = self.project(frames, frame_lengths)
        packed = audio_embeds[_valid(self.num_audio_tokens(frame_lengths), audio_embeds.shape[1])]
        return BaseModelOutputWithPooling(last_hidden_state=frames, pooler_output=packed)

    def encode(
        self, input_features: torch.Tensor, audio_feature_lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mels (W, n_mels, 2F) -> frames (N, F', D), lengths (N,). See :meth:`get_audio_features`.

        Raises:
            ValueError: without an audio tower, or if lengths and windows do not agree.
        """
        if self.audio_tower is None:
            raise ValueError(
                "the model was built without its audio tower and cannot take input_features: assemble it with "
                "with_encoder=True, or give it audio_features"
            )
        with torch.no_grad(), torch.autocast(input_features.device.type, enabled=False):
            mels = input_features.to(self.audio_tower.conv1.weight.dtype)
            frames = self.audio_tower(mels).last_hidden_state.to(FEATURE_DTYPE)
        if audio_feature_lengths is None:
            audio_feature_lengths = torch.full((len(frames),), frames.shape[1])
        return _join_windows(frames, audio_feature_lengths), audio_feature_lengths.to(frames.device)

    def num_audio_tokens(self, audio_feature_lengths: torch.Tensor) -> torch.Tensor:
        """Audio tokens of each audio, (N,)."""
        return lengths.audio_tokens(audio_feature_lengths, self.config.stack_factor)  # arithmetic: tensors do as well

    def project(self, audio_features: torch.Tensor, audio_feature_lengths: torch.Tensor) -> torch.Tensor:
        """(N, F, D) -> audio embeddings (N, A, H). What stands behind an audio's length does not count."""
        weight = next(self.multi_modal_projector.parameters())
        valid = _valid(audio_feature_lengths, audio_features.shape[1]).unsqueeze(-1)
        frames = audio_features.to(weight.dtype).masked_fill(~valid, 0.0)
        return self.multi_modal_projector(frames)

    def merge_audio(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor,
        audio_features: torch.Tensor,
        audio_feature_lengths: torch.Tensor | None,
        matched: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """``inputs_embeds`` (B, T, H) with the audio embeddings at their placeholders.

        ``matched``: which audio token stands where, (P,) flat positions, (P,) flat tokens; None: they are looked for.

        Raises:
            ValueError: if runs of placeholders and audios do not fit each other, in order. Of ``matched`` only the
                number can be checked without waiting for the device.
        """
        if audio_feature_lengths is None:
            audio_feature_lengths = torch.full((len(audio_features),), audio_features.shape[1])
        audio_feature_lengths = audio_feature_lengths.to(input_ids.device)
        num_tokens = self.num_audio_tokens(audio_feature_lengths)
        width = lengths.audio_tokens(audio_features.shape[1], self.config.stack_factor)
        places, tokens = matched or _match(input_ids == self.config.audio_token_id, num_tokens, width)
        audio_embeds = self.project(audio_features, audio_feature_lengths).to(inputs_embeds.dtype)
        packed = audio_embeds.flatten(0, 1).index_select(0, tokens)
        return inputs_embeds.flatten(0, 1).index_copy(0, places, packed).view_as(inputs_embeds)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
        audio_feature_lengths: torch.Tensor | None = None,
        audio_places: torch.Tensor | None = None,
        audio_tokens: torch.Tensor | None = None,
        line: Line | None = None,
        **kwargs: Any,
    ) -> Any:
        """Qwen2-VL's forward with audio: either ``input_features`` (mels) or ``audio_features`` (encoder frames).

        ``audio_places`` and ``audio_tokens``, both or neither: see :meth:`merge_audio`.
        With ``line`` the language model runs on it, and ``last_hidden_state`` is (1, L, H).

        Raises:
            ValueError: if both are given, or audio without ``input_ids``.
        """
        if input_features is not None:
            if audio_features is not None:
                raise ValueError("give input_features (mels) or audio_features (encoder frames), not both")
            audio_features, audio_feature_lengths = self.encode(input_features, audio_feature_lengths)
        if audio_features is not None:
            if input_ids is None:
                raise ValueError("audio needs input_ids: they say where its placeholders are")
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            matched = None if audio_places is None else (audio_places, audio_tokens)
            inputs_embeds = self.merge_audio(input_ids, inputs_embeds, audio_features, audio_feature_lengths, matched)
        if position_ids is None and (past_key_values is None or past_key_values.get_seq_length() == 0):
            self.rope_deltas = None  # an earlier generate() leaves its batch's offsets here: not ours
        if line is not None:
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            rows, width = inputs_embeds.shape[:2]
            positions = torch.arange(width, device=inputs_embeds.device).expand(rows, width)
            inputs_embeds, position_ids = line.join(inputs_embeds), line.join(positions)
            kwargs["line"], input_ids, attention_mask = line, None, None
        # input_ids go along with inputs_embeds: the parent finds images in them and computes M-RoPE positions from
        # them. Audio counts as text there (mm_token_type_ids 0): all three positions are equal.
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


def known_to_auto_classes(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Class decorator: the Auto classes find the graft's config and model once this file is imported."""
    AutoConfig.register(AudioGraftConfig.model_type, AudioGraftConfig, exist_ok=True)
    for auto_class in (AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq):
        auto_class.register(AudioGraftConfig, model_class, exist_ok=True)
    return model_class


@known_to_auto_classes
class AudioGraftForConditionalGeneration(Qwen2VLForConditionalGeneration):
    """Speech, images and text in, text out."""

    config_class = AudioGraftConfig
    config: AudioGraftConfig
    input_modalities = ("image", "video", "audio", "text")
    accepts_loss_kwargs = True  # Hugging Face's Trainer then passes num_items_in_batch

    def __init__(self, config: AudioGraftConfig):
        super(Qwen2VLForConditionalGeneration, self).__init__(config)  # not the parent's: it would build its own model
        self.model = AudioGraftModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        """The parent's, for a model that it can read back.

        Raises:
            ValueError: with adapters, whose names from_pretrained() would not find: the model would be random there.
        """
        if any(".base_layer." in name for name, _ in self.named_parameters()):
            raise ValueError("the model carries adapters: merge_lora() first, or keep them apart with save_trained()")
        return super().save_pretrained(save_directory, **kwargs)

    def get_audio_features(
        self, input_features: torch.Tensor, audio_feature_lengths: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See :meth:`AudioGraftModel.get_audio_features`."""
        return self.model.get_audio_features(input_features, audio_feature_lengths, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        input_features: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
        audio_feature_lengths: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        label_positions: torch.Tensor | None = None,
        line_positions: torch.Tensor | None = None,
        num_shared: int = 0,
        words: torch.Tensor | None = None,
        spoken: torch.Tensor | None = None,
        num_spoken: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple | CausalLMOutputWithPast:
        """As the parent's, with audio, and with the loss at label positions only.

        Args:
            audio_features: encoder frames (N, F, D); ``audio_feature_lengths`` (N,) counts the true ones.
            input_features: mels (W, n_mels, 2F) instead, for the audio tower.
            labels: (B, T), IGNORE_INDEX where nothing is to be learnt. Position t predicts label t + 1.
            num_items_in_batch: the loss is the sum over label positions divided by this; None: by their number.
            num_shared: the first positions that hold the same text in every row, no audio and no label: worked on once.
            label_positions: what :func:`find_label_positions` says of ``labels``, (L,); None: it is asked.
            line_positions: (N,), likewise what :func:`find_line_positions` says of ``attention_mask``.
            words: (K,) ids, the pause first. With them the language model does not run, and the loss is the sum of
                :func:`alignment_loss`, divided likewise; ``spoken`` (B, U) and ``num_spoken`` (B,) say what is said.
            kwargs: ``audio_places`` and ``audio_tokens`` of :meth:`AudioGraftModel.forward` among others.

        Returns:
            Without labels ``logits`` (B, T, V); with labels ``loss`` (fp32) and ``logits`` (L, V), or None in training
            with a frozen output matrix: there they are never made as a whole. Hidden states, if asked for, are then
            those of a :class:`Line` where the language model runs on one.
        """
        if words is not None:
            return self._align(audio_features, audio_feature_lengths, words, spoken, num_spoken, num_items_in_batch)
        by_hand = (position_ids, past_key_values, image_grid_thw, video_grid_thw)  # whoever gives these may need a mask
        plain = labels is not None and all(given is None for given in by_hand)
        real, attention_mask = attention_mask, unless_padded_behind(attention_mask) if plain else attention_mask
        inputs = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            input_features=input_features,
            audio_features=audio_features,
            audio_feature_lengths=audio_feature_lengths,
            **kwargs,
        )
        if labels is None:
            return super().forward(use_cache=use_cache, logits_to_keep=logits_to_keep, **inputs)
        # before the layers run: on a GPU finding them waits, and now nothing is under way
        predicts = find_label_positions(labels) if label_positions is None else label_positions
        on_a_line = plain and attention_mask is None and not use_cache and runs_on_a_line(self.model.language_model)
        line = _line(labels, num_shared, real, line_positions, predicts) if on_a_line else None
        outputs = self.model(use_cache=bool(use_cache), line=line, **inputs)
        hidden = outputs.last_hidden_state.flatten(0, 1)
        hidden = hidden if on_a_line else hidden.index_select(0, predicts)
        logits, loss = self._learn(hidden, labels.flatten().index_select(0, predicts + 1))
        return CausalLMOutputWithPast(
            loss=_shared_out(loss, num_items_in_batch, len(predicts)),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _align(
        self,
        audio_features: torch.Tensor,
        audio_feature_lengths: torch.Tensor,
        words: torch.Tensor,
        spoken: torch.Tensor,
        num_spoken: torch.Tensor,
        num_items_in_batch: int | torch.Tensor | None,
    ) -> CausalLMOutputWithPast:
        """The loss of alignment."""
        audio_embeds = self.model.project(audio_features, audio_feature_lengths)
        rows = self.get_input_embeddings()(words)
        num_tokens = self.model.num_audio_tokens(audio_feature_lengths)
        with torch.autocast(audio_embeds.device.type, enabled=False):
            loss = alignment_loss(audio_embeds, num_tokens, rows, spoken, num_spoken).sum()
        return CausalLMOutputWithPast(loss=_shared_out(loss, num_items_in_batch, len(spoken)))

    def _learn(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Logits (L, V), where they are made, and the summed loss of hidden states (L, H) and labels (L,)."""
        head = self.lm_head
        is_frozen = type(head) is nn.Linear and not head.weight.requires_grad  # and carries no adapter
        if is_frozen and self.training and torch.is_grad_enabled():
            return None, frozen_head_loss(hidden, head.weight, labels)
        logits = self.lm_head(hidden)
        return logits, summed_cross_entropy(logits, labels)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """The parent's; audio goes in with the prompt only, afterwards it is in the KV cache."""
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs.update(dict.fromkeys(_AUDIO_INPUTS))
        return super().prepare_inputs_for_generation(input_ids, *args, is_first_iteration=is_first_iteration, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """For beams and several samples per prompt: a row's audios are repeated together, as its placeholders are."""
        audio = {name: model_kwargs.pop(name, None) for name in _AUDIO_INPUTS}
        if expand_size > 1 and any(value is not None for value in audio.values()):
            audio = self._expand_audio(expand_size, input_ids, **audio)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **{name: value for name, value in audio.items() if value is not None}}

    def _expand_audio(
        self,
        expand_size: int,
        input_ids: torch.Tensor,
        input_features: torch.Tensor | None,
        audio_features: torch.Tensor | None,
        audio_feature_lengths: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        if input_features is not None:
            audio_features, audio_feature_lengths = self.model.encode(input_features, audio_feature_lengths)
        if audio_feature_lengths is None:
            audio_feature_lengths = torch.full(audio_features.shape[:1], audio_features.shape[1])
        num_tokens = self.model.num_audio_tokens(audio_feature_lengths)
        per_row = (input_ids == self.config.audio_token_id).sum(1).cumsum(0).to(num_tokens.device)
        row_of_audio = torch.searchsorted(per_row, num_tokens.cumsum(0) - num_tokens, right=True)
        order = [
            audio
            for row in range(len(input_ids))
            for _ in range(expand_size)
            for audio in (row_of_audio == row).nonzero().flatten().tolist()
        ]
        return {"audio_features": audio_features[order], "audio_feature_lengths": audio_feature_lengths[order]}


def _shared_out(loss: torch.Tensor, count: int | torch.Tensor | None, otherwise: int) -> torch.Tensor:
    """``loss`` divided by ``count``, where it is given, and never by less than 1."""
    count = otherwise if count is None else count
    return loss / max(count, 1) if isinstance(count, int) else loss / count.to(loss.device).clamp(min=1)


def find_label_positions(labels: torch.Tensor) -> torch.Tensor:
    """Indices (L,) into the flattened (B * T) positions whose *next* label is to be learnt. Waits for a GPU."""
    return _predicts(labels).flatten().nonzero().flatten()


def find_line_positions(
    labels: torch.Tensor, num_shared: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Indices (N,) into the flattened (B * T) positions of what a :class:`Line` holds. Waits for a GPU.

    All that is real or predicts a label, but of the first ``num_shared``, which rows have in common, the first row's.
    """
    real = torch.ones_like(labels) if attention_mask is None else attention_mask
    kept = real.bool() | _predicts(labels)
    kept[1:, :num_shared] = False
    return kept.flatten().nonzero().flatten()


def _line(
    labels: torch.Tensor,
    num_shared: int,
    attention_mask: torch.Tensor | None,
    line_positions: torch.Tensor | None,
    predicts: torch.Tensor,
) -> Line:
    if line_positions is None:
        line_positions = find_line_positions(labels, num_shared, attention_mask)
    return Line.of(labels.shape, num_shared, line_positions, predicts)


def _predicts(labels: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: whether the next label is learnt. The last position of a row predicts nothing."""
    return F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))


def unless_padded_behind(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """None for a mask (B, T) of ones and then zeros in each row, or the mask.

    Causal attention never looks at what stands behind. Without a mask it takes the faster kernel, whose keys and values
    are not repeated for every head. The host waits for a GPU here, as in :func:`find_label_positions`.
    """
    if attention_mask is None or attention_mask.ndim != 2 or (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        return attention_mask
    return None


def _valid(counts: torch.Tensor, width: int) -> torch.Tensor:
    """(N,) -> (N, width) bool: True for the first ``counts`` of each row."""
    return torch.arange(width, device=counts.device) < counts.unsqueeze(1)


def _join_windows(frames: torch.Tensor, frame_lengths: torch.Tensor) -> torch.Tensor:
    """Windows (W, F, D) -> audios (N, F', D), zeros after each length."""
    size, counts = frames.shape[1], frame_lengths.tolist()
    windows = [-(-count // size) for count in counts]
    if sum(windows) != len(frames):
        raise ValueError(
            f"input_features hold {len(frames)} windows of {size} frames, but audio_feature_lengths "
            f"{counts} need {sum(windows)}"
        )
    audios = [part.flatten(0, 1)[:count] for part, count in zip(frames.split(windows), counts, strict=True)]
    return nn.utils.rnn.pad_sequence(audios, batch_first=True)


def _match(is_audio: torch.Tensor, num_tokens: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which audio token stands where: indices into the flat (B * T) positions, and into the flat (N * A) tokens.

    The host waits for a GPU here. It is done before the layers run, when nothing is under way.
    """
    places = is_audio.flatten().nonzero().flatten()
    valid = _valid(num_tokens, width)
    tokens = valid.flatten().nonzero().flatten()
    if len(places) != len(tokens):
        raise ValueError(
            f"the prompts hold {len(places)} audio placeholders, the audio gives {len(tokens)} tokens "
            f"({num_tokens.tolist()} per audio): expand placeholders with graft.lengths.audio_tokens"
        )
    torn = (places.diff() != 1) & (tokens.div(width, rounding_mode="floor").diff() == 0)
    if torn.any():
        raise ValueError(
            f"runs of audio placeholders ({is_audio.sum(1).tolist()} per row) and audios ({num_tokens.tolist()} tokens "
            "each) do not fit: an audio would be torn apart. Audios must stand in the order of their placeholders"
        )
    return places, tokens
