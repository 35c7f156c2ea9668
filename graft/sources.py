"""Where a recipe's features come from: the one place where data and model meet before training."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch

from graft.data.cache import GB, Cache, RemoteFiles
from graft.data.fetch import origin_of
from graft.data.loader import FeatureSource, MixedSource, OnlineSource, ShardSource
from graft.data.manifest import Manifest, read_manifest
from graft.data.shard_format import FeatureSet
from graft.data.views import check_has_views, read_split
from graft.model.assemble import DTYPES
from graft.model.encoder import SpeechEncoder
from graft.ranks import Ranks
from graft.recipe import Recipe


class Sources:
    """Opens the feature sources of a recipe for this rank.

    With ``features: shards`` no rank keeps an encoder; rank 0 reads its weights once, to know their fingerprint. With
    ``features: online`` each rank holds a frozen replica, outside the training engine.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, device: torch.device | str) -> None:
        self.recipe, self.ranks, self.device = recipe, ranks, device
        self._encoder: SpeechEncoder | None = None
        self._fingerprint: str | None = None

    @property
    def encoder(self) -> SpeechEncoder:
        """This rank's frozen replica, loaded when it is first needed."""
        if self._encoder is None:
            precision = DTYPES[self.recipe.run.precision]
            window = self.recipe.audio.window
            self._encoder = SpeechEncoder(self.recipe.bases.whisper, precision, self.device, window)
        return self._encoder

    @property
    def fingerprint(self) -> str:
        """Of the recipe's encoder. Every rank must ask at the same time: rank 0 tells the others."""
        if self._fingerprint is None:
            # In bf16 on the CPU, and let go at once.
            base, window = self.recipe.bases.whisper, self.recipe.audio.window
            mine = self.ranks.by_first(lambda: SpeechEncoder(base, audio_window=window).fingerprint)
            self._fingerprint = self.ranks.gather(mine)[0]
        return self._fingerprint

    def open(self, split: str) -> FeatureSource:
        """The source of a split, from shards or online as the recipe says.

        Raises:
            ValueError: on every rank, if it cannot be used on any.
        """
        if self.recipe.data.features == "online":
            return self._online(lambda: read_split(self.recipe, split))
        expected = self.fingerprint
        return self.ranks.together(lambda: ShardSource(open_set(self.recipe, split, expected)))

    def open_mixed(self, splits: Collection[str]) -> FeatureSource:
        """The sources of several splits as one, all of the recipe's encoder; a single split is opened as it is.

        Raises:
            ValueError: on every rank, if one cannot be used on any, or is empty.
        """
        sources = {split: self.open(split) for split in splits}
        if len(sources) == 1:
            return next(iter(sources.values()))
        return self.ranks.together(lambda: MixedSource(sources))

    def open_manifest(self, path: Path) -> OnlineSource:
        """The utterances of a manifest, encoded when they are needed."""
        return self._online(lambda: read_manifest(path))

    def _online(self, read: Callable[[], Manifest]) -> OnlineSource:
        long_audio = self.recipe.audio.long_audio
        return self.ranks.together(
            lambda: OnlineSource(read(), self.encoder.encode, window=self.encoder.window, long_audio=long_audio)
        )


def open_set(recipe: Recipe, split: str, expected_fingerprint: str | None = None) -> FeatureSet:
    """The feature set of a split, from its folder or, through the cache, from wherever ``data.shards`` says.

    Raises:
        ValueError: see :meth:`FeatureSet.open` and :func:`check_has_views`.
    """
    origin = origin_of(recipe.data.shards, split)
    files: Path | RemoteFiles = recipe.set_folder(split)
    if origin is not None:
        files = RemoteFiles(origin, Cache(Path(recipe.data.cache_dir).expanduser(), recipe.data.cache_gb * GB))
    opened = FeatureSet.open(files, expected_fingerprint)
    where = f"the set of '{split}' in {recipe.data.shards}"
    check_has_views((entry.id for entry in opened.entries), recipe.data.views.get(split, []), where)
    return opened
