"""Two pretrained models and a recipe in, one graft with its processor out; and the trained weights' files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, Qwen2VLConfig
from transformers import Qwen2VLForConditionalGeneration as Qwen2VL
from transformers.utils.hub import cached_file

from graft.differences import there_and_here
from graft.model.bases import load_config, reading, refuse_missing
from graft.model.config import AUDIO_END, AUDIO_PAD, AUDIO_START, AudioGraftConfig
from graft.model.encoder import load_audio_config, load_encoder, load_feature_extractor
from graft.model.grafted import AudioGraftForConditionalGeneration
from graft.model.lora import copy_into, has_lora, load_adapter, merge_lora, save_adapter
from graft.model.processor import AudioGraftProcessor
from graft.recipe import Recipe

KEY = "bases.qwen2_vl"  # of the recipe
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PROJECTOR_FILE = "projector.safetensors"
PROJECTOR_SETTINGS_FILE = "projector.json"
ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True)
class Assembled:
    """A graft ready to train or to run, and what turns words and sound into its inputs."""

    model: AudioGraftForConditionalGeneration
    processor: AudioGraftProcessor
    config: AudioGraftConfig


def assemble(
    recipe: Recipe, *, with_encoder: bool = False, device: str | torch.device = "cpu", meta: bool = False
) -> Assembled:
    """Load the bases, add the projector (fresh, fp32, seeded) and the audio tokens; everything frozen.

    Args:
        with_encoder: hold Whisper's encoder as ``model.audio_tower``; training on features does not need it.
        meta: shapes only, no weights read: for counting parameters of any size of model.

    Raises:
        ValueError: if a base is not in stock format, lacks weights, or has no room for the audio tokens.
    """
    dtype = DTYPES[recipe.run.precision]
    load_config(KEY, recipe.bases.qwen2_vl, Qwen2VLConfig)  # first: it says best what is wrong with a folder
    tokenizer = load_tokenizer(recipe.bases.qwen2_vl)
    if with_encoder and recipe.audio.window != "full":
        raise ValueError(
            f"audio.window is '{recipe.audio.window}', and a model that holds its encoder hears full windows: encode "
            "with SpeechEncoder and hand the model audio_features, or train with audio.window=full"
        )
    config = build_config(recipe, tokenizer, has_audio_tower=with_encoder)
    processor = build_processor(recipe, tokenizer, config)
    with torch.device("meta"):
        model = AudioGraftForConditionalGeneration._from_config(config, dtype=dtype)
    if not meta:
        _fill(model, recipe, dtype, device)
    model.model.multi_modal_projector.float()
    return Assembled(model.eval().requires_grad_(False), processor, model.config)


def load_tokenizer(base: str) -> PreTrainedTokenizerBase:
    """Qwen2-VL's tokenizer with the three audio tokens behind its own."""
    with reading(KEY, base):
        tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AUDIO_START, AUDIO_PAD, AUDIO_END], special_tokens=True)  # those it has keep their ids
    return tokenizer


def build_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, has_audio_tower: bool) -> AudioGraftConfig:
    """The graft's config from those of its bases.

    Raises:
        ValueError: if a base is another kind of model, or the embedding matrix has no rows for the audio tokens.
    """
    base = recipe.bases.qwen2_vl
    text = load_config(KEY, base, Qwen2VLConfig)
    start, pad, end = tokenizer.convert_tokens_to_ids([AUDIO_START, AUDIO_PAD, AUDIO_END])
    rows = text.text_config.vocab_size
    if max(start, pad, end) >= rows:
        raise ValueError(
            f"{KEY}: {base}: the embedding matrix has {rows} rows and the tokenizer fills "
            f"{len(tokenizer) - 3}, which leaves no room for {AUDIO_START}, {AUDIO_PAD} and {AUDIO_END}; "
            "Qwen2-VL as published has room for hundreds"
        )
    fields = {name: value for name, value in text.to_dict().items() if name not in ("model_type", "architectures")}
    return AudioGraftConfig(
        **fields,
        audio_config=load_audio_config(recipe.bases.whisper).to_dict(),
        has_audio_tower=has_audio_tower,
        projector_kind=recipe.projector.kind,
        stack_factor=recipe.projector.stack_factor,
        projector_hidden_size=recipe.projector.hidden_size,
        audio_token_id=pad,
        audio_start_token_id=start,
        audio_end_token_id=end,
    )


def build_processor(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: AudioGraftConfig
) -> AudioGraftProcessor:
    """The processor that fits ``config``."""
    return AudioGraftProcessor(
        load_feature_extractor(recipe.bases.whisper),
        tokenizer,
        stack_factor=config.stack_factor,
        window_frames=config.window.num_frames,
        system_prompt=recipe.prompt.system,
        default_transcription_prompt=recipe.prompt.instruction,
        long_audio=recipe.audio.long_audio,
        vision=_image_settings(recipe.bases.qwen2_vl),
    )


def load_qwen2_vl(base: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> Qwen2VL:
    """Stock Qwen2-VL, old or new file layout, read straight onto ``device``.

    Raises:
        ValueError: if ``base`` lacks any of its weights: transformers would leave them random with a mere warning.
    """
    with reading(KEY, base):
        model, info = Qwen2VL.from_pretrained(base, dtype=dtype, output_loading_info=True, device_map={"": device})
    refuse_missing(KEY, base, info["missing_keys"])
    return model


def save_trained(folder: str | Path, model: AudioGraftForConditionalGeneration) -> None:
    """Write what was trained: ``projector.safetensors``, its settings, and ``adapter/`` if there are adapters."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    projector = model.model.multi_modal_projector
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in projector.state_dict().items()}
    save_file(tensors, folder / PROJECTOR_FILE, metadata={"format": "pt"})
    settings = json.dumps(model.config.projector_settings(), indent=2) + "\n"
    (folder / PROJECTOR_SETTINGS_FILE).write_text(settings)
    if has_lora(model):
        save_adapter(model, folder / ADAPTER_FOLDER)


def load_trained(folder: str | Path, model: AudioGraftForConditionalGeneration) -> None:
    """Read what :func:`save_trained` wrote into an assembled model; adapters are injected if the folder has them.

    Raises:
        ValueError: if the folder holds no projector, one of other settings, or tensors that do not fit.
    """
    folder = Path(folder)
    if not (folder / PROJECTOR_FILE).is_file():
        raise ValueError(f"{folder} holds no {PROJECTOR_FILE}: a folder written by save_trained() was expected")
    there, here = json.loads((folder / PROJECTOR_SETTINGS_FILE).read_text()), model.config.projector_settings()
    told = there_and_here(there, here)
    if told:
        raise ValueError(f"the projector of {folder} is not the model's: {'; '.join(told)}")
    parameters = dict(model.model.multi_modal_projector.named_parameters())
    copy_into(parameters, load_file(folder / PROJECTOR_FILE), str(folder / PROJECTOR_FILE))
    if (folder / ADAPTER_FOLDER).is_dir():
        load_adapter(model, folder / ADAPTER_FOLDER)


def export(folder: str | Path, assembled: Assembled) -> None:
    """Write a plain Hugging Face folder that the Auto classes read: adapters merged, one precision, the audio tower in.

    This changes ``assembled.model``: it is for the end of a training.

    Raises:
        ValueError: if the model was assembled without its audio tower.
    """
    model = assembled.model
    if model.model.audio_tower is None:
        raise ValueError("an exported model hears by itself: assemble it with with_encoder=True")
    merge_lora(model)
    model.to(model.model.language_model.dtype)
    model.save_pretrained(folder)
    assembled.processor.save_pretrained(folder)


def _fill(
    model: AudioGraftForConditionalGeneration, recipe: Recipe, dtype: torch.dtype, device: str | torch.device
) -> None:
    """Put real weights into a model made on the meta device."""
    base = load_qwen2_vl(recipe.bases.qwen2_vl, dtype, device)
    model.model.visual, model.model.language_model = base.model.visual, base.model.language_model
    model.lm_head = base.lm_head
    model.generation_config = _greedy(base.generation_config, recipe.evaluation.max_new_tokens)
    embeddings = model.get_input_embeddings().weight
    _copy_marker_rows(embeddings, model.config)
    if model.config.has_audio_tower:
        model.model.audio_tower = load_encoder(recipe.bases.whisper, dtype, device)
    projector: nn.Module = model.model.multi_modal_projector.to_empty(device=device).float()
    generator = torch.Generator().manual_seed(recipe.run.seed)
    projector.initialise(embeddings.float().std().item(), generator)


def _greedy(base: GenerationConfig, max_new_tokens: int) -> GenerationConfig:
    """Greedy, and long enough: transformers alone would stop after 20 tokens, and Qwen2-VL's own settings sample."""
    ids = {name: getattr(base, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(**ids, do_sample=False, max_new_tokens=max_new_tokens)


@torch.no_grad()
def _copy_marker_rows(embeddings: torch.Tensor, config: AudioGraftConfig) -> None:
    """``<|audio_start|>`` and ``<|audio_end|>`` begin, and stay, as what vision's markers mean to the model.

    They are frozen like all other rows. Done in memory at every assembly; no base file is touched.
    """
    embeddings[config.audio_start_token_id] = embeddings[config.vision_start_token_id]
    embeddings[config.audio_end_token_id] = embeddings[config.vision_end_token_id]


def _image_settings(base: str) -> dict[str, Any] | None:
    """Qwen2-VL's image settings, or None where the base has none."""
    settings = _read_json(base, "preprocessor_config.json") or _read_json(base, "processor_config.json")
    settings = (settings or {}).get("image_processor", settings)  # transformers 5 nests them in one file
    if not settings or "patch_size" not in settings:
        return None
    internal = ("image_processor_type", "processor_class", "feature_extractor_type")
    return {name: value for name, value in settings.items() if name not in internal}


def _read_json(base: str, name: str) -> dict[str, Any] | None:
    path = cached_file(base, name, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else None
