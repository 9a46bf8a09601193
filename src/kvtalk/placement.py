"""Prefix placement: a cache is put before the receiver's own prompt.

A placed cache is a `transformers` cache, so the model's own forward pass and `generate` run on it. It differs from
the native one in four ways: every key has an explicit position, layers may hold different tokens (or none), room for
the prompt and the answer is allocated once, so that a new token costs no copy of the old ones, and the first token to
come may find its own keys and values there already. Because layers differ, one mask for all layers will not do: while
:func:`attending` is active, each attention module is given the mask of its own layer, built from positions. (Sliding
windows and padding are then just cases of that mask.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from kvtalk.cache import AT_ONCE, PADDING, KVCache, LayerCache, LayerSource, Prefix
from kvtalk.device import sent
from kvtalk.errors import CacheError, ModelError
from kvtalk.rope import AngleTable, Rope, StackRope, rotate
from kvtalk.spec import LayerSpec, ModelSpec

_GROWTH = 256


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
            self._keys = _grown(self._keys, self.used, stop + _GROWTH)
            self._values = _grown(self._values, self.used, stop + _GROWTH)
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


def place(
    spec: ModelSpec,
    head: KVCache | None,
    contexts: Sequence[Sequence[Prefix]],
    *,
    room: int = _GROWTH,
    gaps: bool = True,
    device: torch.device | str = "cpu",
) -> PlacedCache:
    """Put received caches before the receiver's prompt.

    Each row is: the receiver's own head (its BOS and whatever it says before any context), then its prefixes one
    after the other. Positions continue from the head; keys are turned to their new positions in float32.

    Args:
        spec: the receiver's geometry.
        head: the receiver's own cache of its head, one row; None for none.
        contexts: per row, the prefixes that follow the head; an empty sequence for a row without context.
        room: columns to reserve for prompt and answer.
        gaps: True keeps each token's distance to its neighbours, holes included; False closes the holes, so that
            kept tokens stand next to each other and end where the prompt begins.
        device: where to place it.

    Raises:
        CacheError: a prefix does not have the receiver's layers and shapes.
    """
    if head is not None and (head.batch != 1 or not head.rotated):
        raise CacheError("the head must be one sequence with rotated keys")
    start = 0 if head is None else head.length[0]
    begins = [list(accumulate((one.extent(gaps) for one in row), initial=start)) for row in contexts]
    ends = torch.tensor([starts[-1] for starts in begins], device=device)
    if _lie_alike(spec, head, contexts, torch.device(device)):
        return PlacedCache(*_filled_at_once(spec, head, contexts, begins, room, gaps, device), ends, spec)
    streams = [
        [_parts(prefix, begin, gaps) for prefix, begin in zip(row, starts, strict=False)]
        for row, starts in zip(contexts, begins, strict=True)
    ]
    table = AngleTable(device)
    layers: list[PlacedLayer] = []
    tracks: list[Tensor] = []
    before: list[list[Tensor]] = []
    for index, shape in enumerate(spec.layers):
        own = [] if head is None else [_Part(head.layers[index], head.layers[index].positions, None)]
        rows = [own + _next(index, row, streams_of_row) for row, streams_of_row in enumerate(streams)]
        layers.append(_fill(index, shape, rows, room, spec.dtype, table))
        standing = [[part.positions for part in row] for row in rows]
        tracks.append(tracks[-1] if tracks and _are_same(standing, before) else _track(standing))
        before = standing
    if any(next(stream, None) is not None for row in streams for stream in row):
        raise CacheError(f"a received cache has more than the receiver's {len(spec.layers)} layers")
    return PlacedCache(layers, tracks, ends, spec)


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


@dataclass(frozen=True)
class _Part:
    """A run of tokens to copy, and how far to turn its keys (``[1, tokens]`` or None)."""

    source: LayerSource
    positions: Tensor
    turn: Tensor | None

    @property
    def tokens(self) -> int:
        return self.positions.shape[1]


def _parts(prefix: Prefix, begin: int, gaps: bool) -> Iterator[_Part]:
    """The layers of a prefix, read one by one, with where their tokens come to stand from ``begin`` on."""
    before: Tensor | None = None
    for layer in prefix.layers:
        if layer.positions is not before:  # else they stand where those of the layer before do
            before = layer.positions
            if gaps:
                positions = before - prefix.start + begin
            else:
                end = begin + prefix.extent(gaps)
                positions = torch.arange(end - before.shape[1], end)[None]
            moved = positions - before if prefix.rotated else positions
            turn = moved if bool(moved.any()) else None
        yield _Part(layer, positions, turn)


def _lie_alike(
    spec: ModelSpec, head: KVCache | None, contexts: Sequence[Sequence[Prefix]], device: torch.device
) -> bool:
    """Whether all layers can be filled in one go: their shape is one, and what they receive lies in memory, at the
    same positions, and is not so much that a second copy of it costs more than it saves."""
    shape = spec.layers[0].kv_heads, spec.layers[0].head_dim
    if any((layer.kv_heads, layer.head_dim) != shape for layer in spec.layers):
        return False
    if head is not None and len({layer.tokens for layer in head.layers}) > 1:
        return False
    values = 0
    for layers in (prefix.layers for row in contexts for prefix in row):
        if not isinstance(layers, tuple) or len(layers) != len(spec.layers):
            return False
        for layer in layers:
            if not isinstance(layer, LayerCache) or layer.positions is not layers[0].positions:
                return False
            if layer.shape != shape or layer.keys.dtype != spec.dtype:
                return False
            if layer.keys.device != layers[0].keys.device or layer.keys.device.type != device.type:
                return False
            values += layer.keys.numel()
    return 0 < values <= AT_ONCE.get(device.type, 0)


def _filled_at_once(
    spec: ModelSpec,
    head: KVCache | None,
    contexts: Sequence[Sequence[Prefix]],
    begins: Sequence[Sequence[int]],
    room: int,
    gaps: bool,
    device: torch.device | str,
) -> tuple[list[PlacedLayer], list[Tensor]]:
    """All layers in one buffer, in as many operations whatever their number; and the positions of each layer."""
    own = [] if head is None else [(_stacked(head.layers), _Part(head.layers[0], head.layers[0].positions, None))]
    rows = [
        own + [(_stacked(one.layers), next(_parts(one, begin, gaps))) for one, begin in zip(row, starts, strict=False)]
        for row, starts in zip(contexts, begins, strict=True)
    ]
    ends = [sum(part.tokens for _, part in row) for row in rows]
    size = (2 * len(spec.layers), len(rows), spec.layers[0].kv_heads, max(ends) + room, spec.layers[0].head_dim)
    held = torch.empty(size, dtype=spec.dtype, device=device)
    rope = _stack_rope(tuple(shape.rope for shape in spec.layers), held.device)
    for row, parts in enumerate(rows):
        columns = accumulate((part.tokens for _, part in parts), initial=0)
        for column, (both, part) in zip(columns, parts, strict=False):
            there = held[:, row, :, column : column + part.tokens]
            there.copy_(both)
            if part.turn is not None:
                rope.rotate_(there[::2], rope.angles(sent(part.turn[0], held.device)))
    _blank(held[:, :, :, : max(ends)], ends)
    track = _track([[part.positions for _, part in row] for row in rows])
    layers = [PlacedLayer(*both, max(ends)) for both in zip(held[::2].unbind(), held[1::2].unbind(), strict=True)]
    return layers, [track] * len(layers)


def _stacked(layers: Iterable[LayerSource]) -> Tensor:
    """Keys and values of one sequence's layers in memory, ``[2 · layers, kv_heads, tokens, head_dim]``, by turns."""
    held = (layer for layer in layers if isinstance(layer, LayerCache))
    return torch.stack([tensor[0] for layer in held for tensor in (layer.keys, layer.values)])


@lru_cache(maxsize=16)
def _stack_rope(ropes: tuple[Rope | None, ...], device: torch.device) -> StackRope:
    return StackRope(ropes, device)


def _blank(held: Tensor, ends: Sequence[int]) -> None:
    """Zeros after each row's end, ``[..., rows, kv_heads, tokens, head_dim]``.

    Padding is masked, but a masked NaN left over in memory would still spoil the weighted sum.
    """
    if min(ends, default=held.shape[-2]) < held.shape[-2]:
        steps = torch.arange(held.shape[-2], device=held.device)
        beyond = steps >= sent(torch.tensor(ends), held.device)[:, None]
        held.masked_fill_(beyond[:, None, :, None], 0)


def _next(index: int, row: int, streams: Sequence[Iterator[_Part]]) -> list[_Part]:
    parts = [part for part in (next(stream, None) for stream in streams) if part is not None]
    if len(parts) < len(streams):
        raise CacheError(f"the cache for row {row} ends before layer {index}: sharer and receiver differ in depth")
    return parts


def _are_same(standing: Sequence[Sequence[Tensor]], others: Sequence[Sequence[Tensor]]) -> bool:
    """Whether the positions of two layers, of the same rows and parts, are the same tensors."""
    both = zip(standing, others, strict=True)
    return all(one is other for row in both for one, other in zip(*row, strict=True))


def _track(standing: Sequence[Sequence[Tensor]]) -> Tensor:
    """Positions of a layer, ``[rows, columns]``, right-padded, from those of each row's parts, ``[1, tokens]``."""
    joined = [torch.cat(list(row), dim=1)[0] if row else torch.empty(0, dtype=torch.long) for row in standing]
    track = torch.full((len(joined), max(map(len, joined), default=0)), PADDING)
    for positions, one in zip(track, joined, strict=True):
        positions[: len(one)] = one
    return track


def _fill(
    index: int,
    shape: LayerSpec,
    rows: Sequence[Sequence[_Part]],
    room: int,
    dtype: torch.dtype,
    table: AngleTable,
) -> PlacedLayer:
    ends = [sum(part.tokens for part in row) for row in rows]
    used = max(ends, default=0)
    full = (len(rows), shape.kv_heads, used + room, shape.head_dim)
    keys = torch.empty(full, dtype=dtype, device=table.device)
    values = torch.empty(full, dtype=dtype, device=table.device)
    for row, column, parts in _runs(rows):
        source = parts[0].source
        if source.shape != (shape.kv_heads, shape.head_dim):
            raise CacheError(
                f"layer {index} has {source.shape[0]} KV heads of {source.shape[1]}, the receiver "
                f"{shape.kv_heads} of {shape.head_dim}: an adapter is needed between these models"
            )
        if len(parts) > 1:
            source = source.stacked([part.source for part in parts[1:]])
        stop = column + max(part.tokens for part in parts)
        there = keys[row : row + len(parts), :, column:stop]
        source.keys_into(there)
        if shape.rope is not None and any(part.turn is not None for part in parts):
            rotate(there, table.angles(shape.rope, _turns(parts)), out=there)
        source.values_into(values[row : row + len(parts), :, column:stop])
    for tensor in (keys, values):
        _blank(tensor[:, :, :used], ends)
    return PlacedLayer(keys, values, used)


def _runs(rows: Sequence[Sequence[_Part]]) -> Iterator[tuple[int, int, list[_Part]]]:
    """First row, column and parts of neighbouring rows whose parts can be read together; each row's in order."""
    ends = [0] * len(rows)
    for slot in range(max(map(len, rows), default=0)):
        listed = [(row, parts[slot]) for row, parts in enumerate(rows) if slot < len(parts)]
        together = groupby(enumerate(listed), lambda x: (x[1][0] - x[0], ends[x[1][0]], x[1][1].source.kind))
        for (_, column, _), members in together:
            run = [member for _, member in members]
            yield run[0][0], column, [part for _, part in run]
        for row, part in listed:
            ends[row] += part.tokens


def _turns(parts: Sequence[_Part]) -> Tensor:
    """How far to turn each key, ``[parts, tokens]``, right-padded."""
    turns = torch.zeros(len(parts), max(part.tokens for part in parts), dtype=torch.long)
    for row, part in zip(turns, parts, strict=True):
        if part.turn is not None:
            row[: part.tokens] = part.turn[0]
    return turns


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
