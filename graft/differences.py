"""Where two trees of settings differ: what a refusal has to tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def differences(one: Any, other: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value in ``one``, value in ``other``) of everything that differs between two trees."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in {**one, **other}:
            yield from differences(one.get(name), other.get(name), f"{key}.{name}" if key else str(name))
    elif one != other:
        yield key, one, other


def there_and_here(there: Any, here: Any) -> list[str]:
    """A line for each: ``stack_factor: 4 there, 8 here``."""
    return [f"{key}: {theirs!r} there, {ours!r} here" for key, theirs, ours in differences(there, here)]
