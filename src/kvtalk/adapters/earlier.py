"""Earlier turns of a conversation, which a model goes on from instead of reading them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvtalk.cache import KVCache
from kvtalk.models import LM
from kvtalk.placed import PlacedCache, PlacedLayer


@dataclass
class Earlier:
    """What a model has read of a conversation; grows turn by turn.

    Attributes:
        placed: its cache, one row; None before the first turn.
        unread: the last token that it wrote, which it has not read.
    """

    placed: PlacedCache | None = None
    unread: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return 0 if self.placed is None else self.placed.columns


def read_on(lm: LM, rows: Sequence[list[int]], earlier: Earlier | None) -> KVCache:
    """Read tokens after those of earlier turns; the cache of them all."""
    if earlier is None or earlier.placed is None:
        return lm.read_whole(rows)[0]
    lm.states(rows, earlier.placed)
    return earlier.placed.to_cache()


def placed_whole(lm: LM, cache: KVCache) -> PlacedCache:
    """A model's own cache from position 0 on, to go on from."""
    held = [PlacedLayer(layer.keys, layer.values, layer.tokens) for layer in cache.layers]
    ends = torch.tensor(cache.length, device=lm.device)
    return PlacedCache(held, [layer.positions for layer in cache.layers], ends, lm.spec)
