"""Prefix placement: received caches are put before the receiver's own prompt, into one :class:`PlacedCache`.

All layers are filled in one go where they lie alike, else layer by layer, so that what is received never has to exist
twice. What a placed cache is, stands in :mod:`kvtalk.placed`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby

import torch
from torch import Tensor

from kvtalk.cache import AT_ONCE, PADDING, KVCache, LayerCache, LayerSource, Prefix
from kvtalk.device import sent
from kvtalk.errors import CacheError
from kvtalk.placed import GROWTH, PlacedCache, PlacedLayer
from kvtalk.rope import AngleTable, Rope, StackRope, rotate
from kvtalk.spec import LayerSpec, ModelSpec


def place(
    spec: ModelSpec,
    head: KVCache | None,
    contexts: Sequence[Sequence[Prefix]],
    *,
    room: int = GROWTH,
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
