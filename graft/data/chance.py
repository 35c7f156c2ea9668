"""Chance that follows from a key: the same numbers on any rank, machine and version of any library, for ever."""

from __future__ import annotations

import json
from hashlib import blake2b


class Chance:
    """Draws that depend on ``key`` alone, such as ("time masks", seed, epoch, utterance id, pass)."""

    def __init__(self, *key: int | str) -> None:
        self._drawn = blake2b(json.dumps(key).encode(), digest_size=8)  # JSON: ("1", 2) and (1, 2) are two keys

    def below(self, bound: int) -> int:
        """A whole number from 0 to ``bound - 1``, each as likely as the others up to bound / 2^64."""
        self._drawn.update(b"\0")
        return int.from_bytes(self._drawn.digest(), "big") * bound >> 64
