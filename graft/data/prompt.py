"""The token ids around the audio, from the processor's own chat template.

The template is rendered once per instruction and cut at the audio placeholder and at the reply. What is trained on is
then exactly what generation starts from: ``training_ids`` begins with ``prompt_ids``, and text is tokenised apart from
the prompt, as a model that generates it would emit it.

A: audio tokens
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import add
from os.path import commonprefix
from threading import Lock
from typing import Any

import numpy as np

from graft.data.loader import Entry
from graft.data.progress import Meter
from graft.lengths import audio_tokens

IGNORE_INDEX = -100  # a label that gives no loss: torch's default
REPLY = "reply"  # stands for the text while the template is rendered
TEXTS_AT_A_TIME = 10_000
NO_CHARACTER = "\ufffd"  # what bytes decode to that are none


@dataclass(frozen=True)
class Parts:
    """Token ids before and after the audio tokens; ``after`` ends where the reply begins."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass
class PromptTemplate:
    """Prompts and targets of one processor, system text and default instruction."""

    processor: Any = field(repr=False)
    system: str
    instruction: str
    stack_factor: int
    audio_token_id: int
    pad_token_id: int
    end_ids: tuple[int, ...] = ()
    _parts: dict[str, Parts] = field(default_factory=dict, repr=False)
    _inside: dict[int, int] = field(default_factory=dict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    @classmethod
    def from_processor(cls, processor: Any, system: str, instruction: str) -> PromptTemplate:
        """Use a processor with ``tokenizer``, ``apply_chat_template``, ``audio_token`` and ``stack_factor``.

        Raises:
            ValueError: the template does not hold the audio exactly once, or ends a reply with no special token.
        """
        tokenizer = processor.tokenizer
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token; Qwen2-VL's has one")
        template = cls(
            processor,
            system,
            instruction,
            stack_factor=processor.stack_factor,
            audio_token_id=tokenizer.convert_tokens_to_ids(processor.audio_token),
            pad_token_id=tokenizer.pad_token_id,
        )
        template.end_ids = template._find_end()
        template._parts_of(instruction)
        return template

    @property
    def before_ids(self) -> tuple[int, ...]:
        """Ids before the audio, with the default instruction."""
        return self._parts_of(self.instruction).before

    @property
    def after_ids(self) -> tuple[int, ...]:
        """Ids between the audio and the reply, with the default instruction."""
        return self._parts_of(self.instruction).after

    def asks_what_is_said(self, instruction: str | None) -> bool:
        """Whether an utterance's text is its transcript: so it is with the recipe's own instruction."""
        return instruction in (None, self.instruction)

    def num_shared(self, instructions: Iterable[str | None]) -> int:
        """Positions before the audio that begin the prompts of all ``instructions`` in the same way."""
        return len(commonprefix([self._parts_of(each or self.instruction).before for each in instructions]))

    def prompt_ids(self, num_audio_tokens: int, instruction: str | None = None) -> list[int]:
        """Ids up to where the model's reply begins, with ``num_audio_tokens`` placeholders."""
        if num_audio_tokens < 1:
            raise ValueError(f"a prompt needs at least one audio token, got {num_audio_tokens}")
        parts = self._parts_of(instruction or self.instruction)
        return [*parts.before, *[self.audio_token_id] * num_audio_tokens, *parts.after]

    def training_ids(
        self, num_audio_tokens: int, text: str, instruction: str | None = None
    ) -> tuple[list[int], list[int]]:
        """(ids, labels): the prompt and the reply; labels are the reply's text and its end token, else -100."""
        prompt = self.prompt_ids(num_audio_tokens, instruction)
        reply = [*self.text_ids(text), *self.end_ids]
        return prompt + reply, [IGNORE_INDEX] * len(prompt) + reply

    def text_ids(self, text: str) -> list[int]:
        """Ids of a transcript. Spelled-out special tokens in it are text like any other, never control."""
        return self._tokenised([text], as_text=True)[0]

    @property
    def pause_id(self) -> int:
        """The id of a single space: what stands for silence where audio is aligned with words.

        Raises:
            ValueError: the tokenizer has no such token. Qwen2-VL's has, as every byte-level one.
        """
        ids = self.text_ids(" ")
        if len(ids) != 1:
            raise ValueError(
                f"stage1.alignment_steps needs a tokenizer with one token for a space; this one gives {ids}"
            )
        return ids[0]

    def spoken_ids(self, text: str) -> list[int]:
        """Ids of a transcript's words, each as it is inside a sentence, without pauses."""
        pause = self.pause_id
        return [token for token in self.text_ids(f" {text}") if token != pause]

    def inside_id(self, token: int) -> int:
        """What says a reply's first ``token`` inside a sentence, behind a space; itself, where that takes several.

        A part of a character's bytes is no text, and stays what it is.
        """
        if token not in self._inside:
            text = self.processor.tokenizer.decode([token])
            ids = self.spoken_ids(text)
            self._inside[token] = ids[0] if len(ids) == 1 and NO_CHARACTER not in text else token
        return self._inside[token]

    def num_audio_tokens(self, num_frames: int) -> int:
        """Placeholders that ``num_frames`` encoder frames take."""
        return audio_tokens(num_frames, self.stack_factor)

    def cost(self, num_frames: int, text: str, instruction: str | None = None) -> int:
        """Positions of the training sequence of an utterance."""
        return self._frame_cost(num_frames, instruction) + len(self.text_ids(text))

    def costs(self, entries: Sequence[Entry], quiet: bool = True) -> np.ndarray:
        """:meth:`cost` of many utterances (U,), tokenised some thousand together: all ids may not fit the memory."""
        costs = np.empty(len(entries), dtype=np.int32)
        with Meter("counting tokens", len(entries), "utterances", quiet=quiet) as meter:
            for first in range(0, len(entries), TEXTS_AT_A_TIME):
                part = [entries[i] for i in range(first, min(first + TEXTS_AT_A_TIME, len(entries)))]
                texts = self._tokenised([entry.text for entry in part], as_text=True)
                frames = (self._frame_cost(entry.num_frames, entry.instruction) for entry in part)
                costs[first : first + len(part)] = [*map(add, frames, map(len, texts))]
                meter.set(first + len(part))
        return costs

    def _frame_cost(self, num_frames: int, instruction: str | None) -> int:
        parts = self._parts_of(instruction or self.instruction)
        return len(parts.before) + self.num_audio_tokens(num_frames) + len(parts.after) + len(self.end_ids)

    def _parts_of(self, instruction: str) -> Parts:
        if instruction not in self._parts:
            text = self._render(instruction)
            pieces = text.split(self.processor.audio_token)
            if len(pieces) != 2:
                raise ValueError(
                    f"the prompt holds the audio {len(pieces) - 1} times, expected once. Instruction {instruction!r} "
                    f"or the chat template must not spell {self.processor.audio_token}: {text!r}"
                )
            self._parts[instruction] = Parts(*(tuple(self._ids(piece)) for piece in pieces))
        return self._parts[instruction]

    def _find_end(self) -> tuple[int, ...]:
        """What the template puts after a reply, up to its first special token: there generation ends.

        That is ``<|im_end|>``, which is the end token of Qwen2-VL-Instruct's tokenizer, but not of the base model's.
        """
        prompt, whole = self._render(self.instruction), self._render(self.instruction, REPLY)
        if not whole.startswith(prompt + REPLY):
            raise ValueError(f"the chat template does not continue its own prompt with the reply: {whole!r}")
        tail = self._ids(whole.removeprefix(prompt + REPLY))
        special = _special_ids(self.processor.tokenizer)
        end = next((position for position, token in enumerate(tail) if token in special), None)
        if end is None:
            raise ValueError(
                f"the chat template ends a reply with {whole.removeprefix(prompt + REPLY)!r}, which holds no special "
                "token: generation would never know where to stop"
            )
        return tuple(tail[: end + 1])

    def _render(self, instruction: str, reply: str | None = None) -> str:
        messages = [
            {"role": "system", "content": [{"type": "text", "text": self.system}]},
            {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": instruction}]},
        ]
        if reply is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply is None)

    def _ids(self, text: str) -> list[int]:
        return self._tokenised([text], as_text=False)[0]

    def _tokenised(self, texts: list[str], as_text: bool) -> list[list[int]]:
        """Ids of each text; ``as_text`` splits spelled-out special tokens.

        One caller at a time: whether to split them is a state of the tokenizer, and steps are read ahead in a thread.
        """
        with self._lock:
            return self.processor.tokenizer(texts, add_special_tokens=False, split_special_tokens=as_text)["input_ids"]


def _special_ids(tokenizer: Any) -> set[int]:
    """Ids that stand for control, not text, whether or not the tokenizer has a name (eos, pad) for them."""
    return set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
