"""The graft's config: its parts have their types, survive a file, and answer for the window and the projector."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_bases import IDS, TEXT, VISION, WHISPER
from transformers import AutoConfig, WhisperConfig

from graft.model.config import AudioGraftConfig
from graft.model.grafted import AudioGraftForConditionalGeneration


@pytest.fixture
def config() -> AudioGraftConfig:
    return AudioGraftConfig(
        text_config=TEXT,
        vision_config=VISION,
        audio_config=WHISPER,
        **IDS,
        tie_word_embeddings=True,
        has_audio_tower=False,
        projector_kind="swiglu",
        stack_factor=7,
        projector_hidden_size=34,
        audio_token_id=271,
    )


def test_parts_have_their_types(config: AudioGraftConfig) -> None:
    assert isinstance(config.audio_config, WhisperConfig)
    assert config.text_config.hidden_size == 48 and config.vision_config.depth == 2
    assert config.window.num_frames == 50 and config.window.num_samples == 16_000


def test_projector_settings_come_from_both_bases(config: AudioGraftConfig) -> None:
    expected = {"kind": "swiglu", "frame_size": 24, "stack_factor": 7, "hidden_size": 34, "text_size": 48}
    assert config.projector_settings() == expected


def test_round_trip_through_a_file(config: AudioGraftConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert type(read) is AudioGraftConfig
    assert read.to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)} | {
        key: value for key, value in read.to_dict().items() if key in ("_name_or_path", "transformers_version")
    }
    assert AudioGraftForConditionalGeneration.config_class is AudioGraftConfig


def test_wrong_types_are_refused() -> None:
    with pytest.raises(Exception, match="stack_factor"):
        AudioGraftConfig(text_config=TEXT, vision_config=VISION, audio_config=WHISPER, stack_factor="four")
