"""The tiny Whisper in stock Hugging Face format: its tokenizer, extractor, configuration and files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

WINDOW_S = 4
FRAMES_A_SECOND = 50  # encoder frames
MAX_TARGET_POSITIONS = 64
START, NO_TIMESTAMPS, END = "<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"
SPECIAL_TOKENS = [
    END, START, "<|en|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>",
    NO_TIMESTAMPS,
]  # fmt: skip


def make_tokenizer(texts: Iterable[str], num_pieces: int = 1_200) -> WhisperTokenizer:
    """A byte-level BPE learned on ``texts``, Whisper's special tokens behind it as in the real English-only one.

    It stops below ``num_pieces`` where nothing is left to merge: every word of the small vocabulary is then one token.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(map(spoken, texts), trainers.BpeTrainer(vocab_size=num_pieces, initial_alphabet=alphabet))
    model = json.loads(bpe.to_str())["model"]
    tokenizer = WhisperTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS[1:]})
    tokenizer.set_prefix_tokens()  # the start tokens are known only now
    return tokenizer


def spoken(text: str) -> str:
    """``text`` as Whisper writes it: with a space in front, so that a word is the same token wherever it stands."""
    return f" {text}"


def make_extractor() -> WhisperFeatureExtractor:
    """Whisper's own log-mel at 80 bins over the tiny window."""
    return WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW_S)


def make_config(tokenizer: WhisperTokenizer) -> WhisperConfig:
    """Four encoder and two decoder layers, 192 wide; ids of special tokens from the tokenizer."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=80,
        d_model=192,
        encoder_layers=4,
        encoder_attention_heads=4,
        encoder_ffn_dim=768,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=768,
        max_source_positions=WINDOW_S * FRAMES_A_SECOND,
        max_target_positions=MAX_TARGET_POSITIONS,
        dropout=0.0,
        bos_token_id=ids[END],
        eos_token_id=ids[END],
        pad_token_id=ids[END],
        decoder_start_token_id=ids[START],
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def make_generation_config(tokenizer: WhisperTokenizer) -> GenerationConfig:
    """Greedy English transcription without time stamps, so that ``generate(input_features)`` needs no arguments."""
    end, start = tokenizer.convert_tokens_to_ids([END, START])
    return GenerationConfig(
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids(NO_TIMESTAMPS),
        is_multilingual=False,
        return_timestamps=False,
        max_length=MAX_TARGET_POSITIONS,
        do_sample=False,
        num_beams=1,
    )


def save_base(model: WhisperForConditionalGeneration, tokenizer: WhisperTokenizer, folder: Path) -> None:
    """Write the stock folder, weights in bf16, with the extractor and the tokenizer beside them."""
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    stored = WhisperForConditionalGeneration(model.config).to(torch.bfloat16)
    stored.load_state_dict(state)
    stored.generation_config = make_generation_config(tokenizer)
    stored.save_pretrained(folder)
    make_extractor().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_base(folder: Path) -> tuple[WhisperForConditionalGeneration, WhisperTokenizer]:
    """Read a stock folder in fp32; weights that the file lacks are an error."""
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no Whisper: make it first, with examples/tiny/pretrain_whisper.py")
    model, info = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{folder} lacks the weights {sorted(info['missing_keys'])}: it is not a whole Whisper")
    return model, WhisperTokenizer.from_pretrained(folder)
