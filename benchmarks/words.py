"""A processor whose words are numbers: the real prompt template and collator run on ids of any vocabulary.

``"17 4 9"`` is the ids 17, 4, 9, and a space alone is PAUSE. A chat is BEFORE ids, the audio, AFTER ids, the reply and
one id that ends it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.shapes import Shape
from graft.data.prompt import PromptTemplate

BEFORE, AFTER, REPLY = 20, 10, 30  # tokens of prompt, and of a transcript with its end, which alone is learnt
PAUSE, END = 1, 2


@dataclass
class Words:
    """The tokenizer."""

    shape: Shape
    all_special_ids: Sequence[int] = (END,)
    added_tokens_decoder: Mapping[int, Any] = field(default_factory=dict)

    @property
    def pad_token_id(self) -> int:
        """As the shape has it."""
        return self.shape.pad_token

    def convert_tokens_to_ids(self, token: str) -> int:
        """Of the only token that is no number."""
        return self.shape.audio_token

    def __call__(self, text: str | list[str], **_: Any) -> dict[str, Any]:
        """Ids of a text, or of several."""
        if isinstance(text, str):
            return {"input_ids": _ids(text)}
        return {"input_ids": [_ids(one) for one in text]}


@dataclass
class Processor:
    """What :meth:`PromptTemplate.from_processor` asks for."""

    tokenizer: Words
    stack_factor: int
    audio_token: str = "<audio>"

    def apply_chat_template(self, messages: list[dict], tokenize: bool, add_generation_prompt: bool) -> str:
        """The same prompt for every utterance."""
        before, after = (" ".join(map(str, range(3, 3 + count))) for count in (BEFORE, AFTER))
        reply = "" if add_generation_prompt else f"{messages[-1]['content'][0]['text']} {END}"
        return f"{before} {self.audio_token} {after} {reply}"


def template(shape: Shape, stack_factor: int) -> PromptTemplate:
    """The prompt around a clip."""
    return PromptTemplate.from_processor(Processor(Words(shape), stack_factor), "", "Transcribe the speech.")


def _ids(text: str) -> list[int]:
    return [PAUSE] if text == " " else [int(word) for word in text.split()]


def transcript(ids: Sequence[int]) -> str:
    """The text of ``ids``."""
    return " ".join(map(str, ids))
