"""A cache that was put before the receiver's own prompt, as its model reads on from it.

A placed cache is a `transformers` cache, so the model's own forward pass and `generate` run on it. It differs from
the native one in four ways: every key has an explicit position, layers may hold different tokens (or none), room for
the prompt and the answer is allocated once, so that a new token costs no copy of the old ones, and the first token to
come may find its own keys and values there already. Because layers differ, one mask for all layers will not do: while
:func:`attending` is active, each attention module is given the mask of its own layer, built from positions. (Sliding
windows and padding are then just cases of that mask.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from kvtalk.cache import PADDING, KVCache, LayerCache
from kvtalk.device import sent
from kvtalk.errors import ModelError
from kvtalk.spec import ModelSpec

GROWTH = 256
"""Columns of room for tokens to come."""


class PlacedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer in a buffer with room to grow; `transformers` appends through ``update``.

    Attributes:
        awaited: keys and values, ``[batch, heads, head_dim]`` each, that stand in for those which the model makes of
            the first token to come; None for none.
        arriving: which of the tokens to come is that one, bool ``[batch, 1, tokens, 1]``; None if it does not come.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, used: int, awaited: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self._keys, self._values, self.used = keys, values, used
        self.awaited = awaited
        self.arriving: Tensor | None = None
        self.keys, self.values = keys[:, :, :used], values[:, :, :used]
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: a placed layer is born with its buffer."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens in place; grows the buffer when it is full."""
        if self.awaited is not None and self.arriving is not None:
            both = zip((key_states, value_states), self.awaited, strict=True)
            key_states, value_states = (_replaced(states, one[:, :, None], self.arriving) for states, one in both)
        if self._keys.requires_grad:  # part of a training step, read once
            self._keys = torch.cat([self.keys, key_states], dim=2)
            self._values = torch.cat([self.values, value_states], dim=2)
            self.keys, self.values, self.used = self._keys, self._values, self._keys.shape[2]
            return self.keys, self.values
        stop = self.used + key_states.shape[2]
        if stop > self._keys.shape[2]:
            self._keys = _grown(self._keys, self.used, stop + GROWTH)
            self._values = _grown(self._values, self.used, stop + GROWTH)
        self._keys[:, :, self.used : stop] = key_states
        self._values[:, :, self.used : stop] = value_states
        self.used = stop
        self.keys, self.values = self._keys[:, :, :stop], self._values[:, :, :stop]
        return self.keys, self.values

    def forget(self, columns: int) -> None:
        """Drop the last columns; the buffer keeps its room."""
        self.used -= columns
        self.keys, self.values = self._keys[:, :, : self.used], self._values[:, :, : self.used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys; the mask itself comes from :class:`PlacedCache`."""
        return self.used + query_length, 0

    def get_seq_length(self) -> int:
        """Columns held."""
        return self.used

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def rows(self, which: Tensor) -> PlacedLayer:
        """A copy that holds the given rows."""
        awaited = self.awaited and (self.awaited[0].index_select(0, which), self.awaited[1].index_select(0, which))
        both = self._keys.index_select(0, which), self._values.index_select(0, which)
        return PlacedLayer(*both, self.used, awaited)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams, whose positions are all the same."""
        beam_idx = beam_idx.to(self._keys.device)
        self._keys, self._values = self._keys[beam_idx], self._values[beam_idx]
        self.keys, self.values = self._keys[:, :, : self.used], self._values[:, :, : self.used]


@dataclass(frozen=True, eq=False)
class Mark:
    """A point in a placed cache's growth."""

    columns: int
    next_positions: Tensor


class PlacedCache(Cache):  # type: ignore[misc]
    """A cache with positions, ready for the model's forward pass and `generate`.

    Attributes:
        next_positions: ``[batch]``, where each row's prompt starts.
    """

    def __init__(
        self,
        layers: Sequence[PlacedLayer],
        positions: Sequence[Tensor],
        next_positions: Tensor,
        spec: ModelSpec,
    ) -> None:
        super().__init__(layers=list(layers))
        self.next_positions = next_positions
        self.spec = spec
        tracks, self._track_of = _shared_tracks(positions)
        self._tracks = [sent(track, next_positions.device) for track in tracks]
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}
        self._queries = next_positions[:, None]
        self._before = self.columns

    @property
    def requires_grad(self) -> bool:
        """Whether it is part of a training step."""
        return any(layer.keys.requires_grad for layer in self.layers)

    @property
    def columns(self) -> int:
        """Columns of the longest layer, padding included."""
        return max((int(layer.used) for layer in self.layers), default=0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the longest layer: what `generate` counts as already read."""
        return self.columns

    def rows(self, which: Sequence[int]) -> PlacedCache:
        """A copy that holds the given rows, each as often as it is named."""
        rows = torch.tensor(which, device=self.next_positions.device)
        other = copy(self)
        other.layers = [layer.rows(rows) for layer in self.layers]
        other._tracks = [track[rows] for track in self._tracks]
        other.next_positions = self.next_positions[rows]
        other._masks = {}
        return other

    def mark(self) -> Mark:
        """Where the cache stands, to come back to with :meth:`rewind`."""
        return Mark(self.columns, self.next_positions)

    def rewind(self, mark: Mark) -> None:
        """Forget every token read since the mark."""
        extra = self.columns - mark.columns
        for layer in self.layers:
            layer.forget(extra)
        self._tracks = [track[:, : track.shape[1] - extra] for track in self._tracks]
        self.next_positions = mark.next_positions

    def begin(self, positions: Tensor, real: Tensor) -> None:
        """Announce the tokens of the coming forward pass.

        Args:
            positions: ``[batch, tokens]``, where they stand.
            real: the same shape, False for padding.
        """
        positions = positions.expand(real.shape)
        self._queries = positions
        self.next_positions = positions[:, -1] + 1
        self._masks = {}
        awaited = self.columns == self._before and any(layer.awaited is not None for layer in self.layers)
        arriving = _first(real)[:, None, :, None] if awaited else None
        for layer in self.layers:
            layer.arriving = arriving
        appended = torch.where(real, positions, PADDING)
        self._tracks = [torch.cat([track, appended], dim=1) for track in self._tracks]

    def mask(self, layer: int) -> Tensor | None:
        """Which keys each announced token may attend in a layer.

        Returns:
            bool ``[batch, 1, tokens, keys]``, or None where a single token attends everything.
        """
        key = (self._track_of[layer], self.spec.layers[layer].window)
        if key not in self._masks:
            self._masks[key] = _visible(self._tracks[key[0]], self._queries, key[1])
        return self._masks[key]

    def to_cache(self) -> KVCache:
        """Everything read so far, as views."""
        layers = tuple(
            LayerCache(layer.keys, layer.values, self._tracks[track].cpu())
            for layer, track in zip(self.layers, self._track_of, strict=True)
        )
        return KVCache(layers, tuple(self.next_positions.tolist()))


@contextmanager
def attending(model: PreTrainedModel) -> Iterator[None]:
    """While active, the model's layers attend a :class:`PlacedCache` by position, each with its own mask."""
    decoder = model.get_decoder()
    eager = decoder.config._attn_implementation == "eager"
    if decoder.config._attn_implementation not in ("eager", "sdpa"):
        raise ModelError(
            f"attention {decoder.config._attn_implementation!r} takes no mask per layer: "
            "load the model with attn_implementation='sdpa'"
        )

    def announce(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        cache = kwargs.get("past_key_values")
        mask = kwargs.get("attention_mask")  # generate drops a mask without padding
        told = isinstance(mask, dict) or (mask is not None and mask.dim() == 4)  # the decoder, by its model
        if not isinstance(cache, PlacedCache) or told:
            return None
        positions = kwargs["position_ids"]
        real = torch.ones_like(positions) if mask is None else mask[:, -positions.shape[1] :]
        cache.begin(positions, real.bool())
        # A mask that is already four-dimensional is handed through as it is, so the model builds none in vain.
        return args, {**kwargs, "attention_mask": real.new_ones((1, 1, 1, 1), dtype=torch.bool)}

    def swap_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, PlacedCache):
            return None
        mask = cache.mask(module.layer_idx)  # type: ignore[arg-type]
        if eager and mask is not None:
            blocked = torch.finfo(model.dtype).min
            mask = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, blocked)
        return args, {**kwargs, "attention_mask": mask}

    handles = [part.register_forward_pre_hook(announce, with_kwargs=True) for part in (model, decoder)]
    handles += [
        module.register_forward_pre_hook(swap_mask, with_kwargs=True)
        for layer in decoder.layers
        for module in layer.children()
        if hasattr(module, "layer_idx")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _grown(buffer: Tensor, used: int, columns: int) -> Tensor:
    larger = buffer.new_empty((*buffer.shape[:2], columns, buffer.shape[3]))
    larger[:, :, :used] = buffer[:, :, :used]
    return larger


def _first(real: Tensor) -> Tensor:
    """The first token of each row that is no padding, bool ``[batch, tokens]``."""
    return torch.arange(real.shape[1], device=real.device) == real.int().argmax(dim=1)[:, None]


def _replaced(states: Tensor, awaited: Tensor, where: Tensor) -> Tensor:
    """One token of each row, ``[batch, heads, tokens, head_dim]``, in whose place an awaited one is put."""
    return awaited if states.shape[2] == 1 else torch.where(where, awaited, states)


def _shared_tracks(positions: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Distinct position tables, and which of them each layer follows."""
    seen: dict[bytes, int] = {}
    tracks: list[Tensor] = []
    track_of = []
    for table in positions:
        key = repr(tuple(table.shape)).encode() + table.numpy().tobytes()
        if key not in seen:
            seen[key] = len(tracks)
            tracks.append(table)
        track_of.append(seen[key])
    return tracks, track_of


def _visible(keys: Tensor, queries: Tensor, window: int | None) -> Tensor | None:
    key, query = keys[:, None, :], queries[:, :, None]
    visible = (key >= 0) & (key <= query)
    if window is not None:
        visible &= key > query - window
    tokens = queries.shape[1]
    if tokens == 1:
        return None if bool(visible.all()) else visible[:, None]
    # A padded query must attend something, or softmax gives NaN: itself.
    visible[:, :, -tokens:] |= torch.eye(tokens, dtype=torch.bool, device=visible.device)
    return visible[:, None]
