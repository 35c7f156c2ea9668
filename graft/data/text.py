"""Text is text: one place where transcripts are cleaned and made comparable.

``clean_text`` is what training targets and references go through: it changes how a text is written down, never
what it says. ``normalize`` is for scoring and throws away case, punctuation and more, by a normaliser with a name.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache

BYTE_ORDER_MARK = "\ufeff"
LITERAL_ESCAPE = re.compile(r"\\[nrt]")  # a newline, CR or tab that some corpora spell as backslash and letter
BRACKETED = re.compile(r"<[^>]*>|\[[^\]]*\]|\([^)]*\)")  # "(laughs)", "[noise]": as Whisper's normalisers do


def clean_text(text: str) -> str:
    """Unicode NFC, and every run of white space, control characters or spelled-out escapes as one space."""
    composed = unicodedata.normalize("NFC", text.replace(BYTE_ORDER_MARK, ""))
    spaced = LITERAL_ESCAPE.sub(" ", composed)
    return " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in spaced).split())


def normalize(text: str, name: str) -> str:
    """``text`` made comparable by the normaliser ``name``.

    Raises:
        ValueError: if there is no such normaliser.
    """
    if name not in NORMALIZERS:
        raise ValueError(f"normalizer is {name!r}, expected one of {', '.join(NORMALIZERS)}")
    return NORMALIZERS[name](clean_text(text))


def _basic(text: str) -> str:
    """Lower case, no punctuation or symbols; unlike Whisper's ``basic`` it keeps the vowel signs of Indic and Thai.

    Marks (Mn, Mc) carry meaning in those scripts: dropping them turns "नमस्ते" into "नमस त".
    """
    visible = "".join(c for c in _nfkc(BRACKETED.sub(" ", text)) if unicodedata.category(c) != "Cf")
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PSZ" else c for c in _nfkc(visible.lower())).split())


def _nfkc(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _english(text: str) -> str:
    return " ".join(_english_normalizer()(text).split())


@cache
def _english_normalizer() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})  # the spelling table belongs to a checkpoint, not to the library


NORMALIZERS: dict[str, Callable[[str], str]] = {"none": lambda text: text, "basic": _basic, "english": _english}
