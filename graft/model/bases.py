"""Reading pretrained bases from any folder or hub name in stock Hugging Face format: whole, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import AutoConfig, PreTrainedConfig


@contextmanager
def reading(key: str, base: str) -> Iterator[None]:
    """Errors of files that are not there or not readable become a ``ValueError`` that names the recipe's key."""
    try:
        yield
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{key}: {base}: {reason} (expected: a folder in Hugging Face format, or a name on the hub)"
        ) from error


def load_config(key: str, base: str, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The config of ``base``.

    Raises:
        ValueError: if there is none, or it is another kind of model's.
    """
    with reading(key, base):
        config = AutoConfig.from_pretrained(base)
    if not isinstance(config, config_class):
        raise ValueError(f"{key}: {base} holds a '{config.model_type}', a '{config_class.model_type}' was expected")
    return config


def refuse_missing(key: str, base: str, missing: Sequence[str]) -> None:
    """Transformers would leave missing weights random, with a mere warning.

    Raises:
        ValueError: if any weight is missing; it names the first ones.
    """
    if missing:
        names = sorted(missing)
        rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(f"{key}: {base} lacks {len(names)} weights: {', '.join(names[:5])}{rest}")
