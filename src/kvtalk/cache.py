"""A model's KV cache as plain tensors with explicit positions.

Nothing here knows how a cache is selected, packed or placed; it is the common currency of those stages. All tensors
are ``[batch, kv_heads, tokens, head_dim]`` and positions are ``[batch, tokens]``, −1 where a row has padding, so that
left padding, right padding and layers of different lengths are one and the same case.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Protocol, Self

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from kvtalk.device import sent
from kvtalk.errors import CacheError
from kvtalk.rope import AngleTable, rotate
from kvtalk.spec import ModelSpec

PADDING = -1

AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Values of all layers' keys that are packed or placed in one go at most: it takes a second copy of them."""


@dataclass(frozen=True, eq=False)
class LayerCache:
    """Keys and values of one layer.

    Attributes:
        keys: ``[batch, kv_heads, tokens, head_dim]``.
        values: the same shape.
        positions: ``[batch, tokens]`` int64, the index of each token in its own sequence; −1 for padding.
        scores: ``[batch, tokens]``, what a fuser's predictor foretells of each token, for token policies that choose by
            it, else None. Parts of a layer have none, but for whole rows.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Columns held, padding included."""
        return self.positions.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """KV heads and head_dim."""
        return self.keys.shape[1], self.keys.shape[3]

    def keys_into(self, out: Tensor) -> None:
        """Copy the keys to ``out``, of the same shape."""
        out.copy_(self.keys)

    def values_into(self, out: Tensor) -> None:
        """Copy the values to ``out``, of the same shape."""
        out.copy_(self.values)

    @property
    def kind(self) -> Hashable:
        """Layers of equal kind can be stacked."""
        return LayerCache, self.shape, self.keys.dtype, self.keys.device

    def stacked(self, others: Sequence[LayerCache]) -> LayerCache:
        """This layer's rows and those of others of its kind, right-padded to the longest."""
        layers = (self, *others)
        longest = max(layer.tokens for layer in layers)
        scores = [_padded(layer.scores, longest, 1, 0) for layer in layers if layer.scores is not None]
        return LayerCache(
            torch.cat([_padded(layer.keys, longest, 2, 0) for layer in layers]),
            torch.cat([_padded(layer.values, longest, 2, 0) for layer in layers]),
            torch.cat([_padded(layer.positions, longest, 1, PADDING) for layer in layers]),
            torch.cat(scores) if len(scores) == len(layers) else None,
        )

    def take(self, indices: Tensor) -> LayerCache:
        """The given columns, in the given order.

        Args:
            indices: ``[kept]`` for every row, or ``[batch, kept]``.
        """
        indices = indices.expand(len(self.positions), -1)
        columns = sent(indices, self.keys.device)[:, None, :, None].expand(-1, *self.keys.shape[1:2], -1, self.shape[1])
        return LayerCache(
            self.keys.gather(2, columns),
            self.values.gather(2, columns),
            self.positions.gather(1, indices.to(self.positions.device)),
        )

    def of_rows(self, rows: Sequence[int]) -> LayerCache:
        """The given sequences."""
        which = torch.tensor(rows)
        there = which.to(self.keys.device)
        scores = None if self.scores is None else self.scores[there]
        return LayerCache(self.keys[there], self.values[there], self.positions[which], scores)

    def span(self, start: int, stop: int) -> LayerCache:
        """Columns ``start`` to ``stop`` without copying."""
        return LayerCache(self.keys[:, :, start:stop], self.values[:, :, start:stop], self.positions[:, start:stop])


@dataclass(frozen=True)
class Extent:
    """The tokens of one layer: the first one's position, positions up to the last, and how many there are."""

    first: int
    span: int
    tokens: int


@dataclass(frozen=True, eq=False)
class KVCache:
    """The cache of a whole model for a batch of sequences.

    Attributes:
        layers: one entry per layer of the model, from the input side; a layer may hold no tokens.
        length: tokens read so far in each sequence, so the next token's position, ``[batch]``.
        rotated: whether the keys carry their rotary embedding.
    """

    layers: tuple[LayerCache, ...]
    length: tuple[int, ...]
    rotated: bool = True

    @property
    def batch(self) -> int:
        """Sequences held."""
        return len(self.length)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values as they lie in memory."""
        return sum(
            layer.keys.numel() * layer.keys.element_size() + layer.values.numel() * layer.values.element_size()
            for layer in self.layers
        )

    @cached_property
    def extents(self) -> tuple[tuple[Extent, ...], ...]:
        """What each layer holds of each sequence; all that the size of a packet depends on."""
        known: dict[int, list[Extent]] = {}
        for layer in self.layers:
            if id(layer.positions) not in known:
                known[id(layer.positions)] = _extents(layer.positions)
        layers = [known[id(layer.positions)] for layer in self.layers]
        return tuple(zip(*layers, strict=True))

    def stacked(self) -> Tensor:
        """A copy of every layer's keys and values, keys before values, where all layers hold as many tokens,
        ``[2 · layers, batch, kv_heads, tokens, head_dim]``."""
        return torch.stack([tensor for layer in self.layers for tensor in (layer.keys, layer.values)])

    @classmethod
    def from_transformers(cls, cache: Cache, positions: Tensor) -> KVCache:
        """Adopt a `transformers` cache without copying it.

        Args:
            cache: filled by a forward pass; sliding layers may hold only the end of the sequence.
            positions: ``[batch, tokens]`` of every token that was fed, −1 for padding.

        Raises:
            CacheError: a layer holds nothing, or more tokens than were fed.
        """
        positions = positions.detach().to("cpu", torch.long)
        layers = []
        for index, layer in enumerate(cache.layers):
            if not isinstance(getattr(layer, "keys", None), Tensor):
                raise CacheError(f"layer {index} of the cache is empty: run a forward pass with it first")
            tokens = layer.keys.shape[2]
            if tokens > positions.shape[1]:
                raise CacheError(
                    f"layer {index} holds {tokens} tokens but only {positions.shape[1]} positions were given"
                )
            there = positions if tokens == positions.shape[1] else positions[:, positions.shape[1] - tokens :]
            layers.append(LayerCache(layer.keys, layer.values, there))
        return cls(tuple(layers), tuple((positions.max(dim=1).values + 1).tolist()))

    def to_transformers(self, spec: ModelSpec) -> DynamicCache:
        """A `transformers` cache over the same tensors, for models' native forward pass.

        Only a whole cache can be given away: no padding, no missing tokens (sliding layers may be cut to their
        window), keys rotated. Anything else needs :func:`kvtalk.placement.place`.

        Raises:
            CacheError: the cache is not whole.
        """
        if not self.rotated:
            raise CacheError("keys are not rotated: call rotated_as(spec) first")
        if len(set(self.length)) != 1:
            raise CacheError("sequences of different lengths need padding: place the cache instead")
        length = self.length[0]
        native = DynamicCache(config=spec.config)
        for index, (layer, shape, target) in enumerate(zip(self.layers, spec.layers, native.layers, strict=True)):
            wanted = length if shape.window is None else min(length, shape.window - 1)
            expected = torch.arange(length - wanted, length)
            kept = layer.span(max(0, layer.tokens - wanted), layer.tokens)
            if kept.tokens != wanted or not bool((kept.positions == expected).all()):
                raise CacheError(f"layer {index} lacks tokens or is padded: place the cache instead")
            target.lazy_initialization(kept.keys, kept.values)
            target.keys, target.values = kept.keys, kept.values
            if hasattr(target, "cumulative_length"):
                target.cumulative_length = length
        return native

    def row(self, index: int) -> KVCache:
        """One sequence without its padding, as views."""
        layers = []
        for layer in self.layers:
            real = (layer.positions[index] != PADDING).nonzero()[:, 0]
            one = LayerCache(
                layer.keys[index : index + 1],
                layer.values[index : index + 1],
                layer.positions[index : index + 1],
            )
            if len(real) == 0:
                layers.append(one.span(0, 0))
            elif int(real[-1] - real[0]) + 1 == len(real):
                layers.append(one.span(int(real[0]), int(real[-1]) + 1))
            else:
                layers.append(one.take(real))
        return KVCache(tuple(layers), (self.length[index],), self.rotated)

    def of_rows(self, rows: Sequence[int]) -> KVCache:
        """The given sequences, side by side."""
        layers = tuple(layer.of_rows(rows) for layer in self.layers)
        return KVCache(layers, tuple(self.length[row] for row in rows), self.rotated)

    def rows(self) -> Iterator[KVCache]:
        """Each sequence without its padding."""
        return (self.row(index) for index in range(self.batch))

    @staticmethod
    def stack(caches: Sequence[KVCache]) -> KVCache:
        """Sequences side by side, each layer left-padded to its longest.

        Raises:
            CacheError: nothing given, or caches of different kinds.
        """
        if not caches:
            raise CacheError("nothing to stack: give at least one cache")
        if len({(len(cache.layers), cache.rotated) for cache in caches}) != 1:
            raise CacheError("caches to stack must have the same layers and all be rotated or all not")
        layers = []
        for parts in zip(*(cache.layers for cache in caches), strict=True):
            longest = max(part.tokens for part in parts)
            pads = [longest - part.tokens for part in parts]
            layers.append(
                LayerCache(
                    torch.cat([_pad_left(part.keys, pad, 2, 0) for part, pad in zip(parts, pads, strict=True)]),
                    torch.cat([_pad_left(part.values, pad, 2, 0) for part, pad in zip(parts, pads, strict=True)]),
                    torch.cat(
                        [_pad_left(part.positions, pad, 1, PADDING) for part, pad in zip(parts, pads, strict=True)]
                    ),
                )
            )
        return KVCache(tuple(layers), sum((cache.length for cache in caches), ()), caches[0].rotated)

    def since(self, position: int) -> KVCache:
        """What was read from ``position`` on, as views."""
        return self._from([position] * len(self.layers))

    def attendable(self, spec: ModelSpec) -> KVCache:
        """Without the keys and values that no later token can attend: those outside a layer's sliding window."""
        ends = torch.tensor(self.length)[:, None]
        return self._from([0 if shape.window is None else ends - shape.window + 1 for shape in spec.layers])

    def take(self, indices: Sequence[Tensor | None]) -> KVCache:
        """Chosen columns of each layer.

        Args:
            indices: per layer, ascending column indices ``[kept]``, or None to keep all.
        """
        return replace(
            self,
            layers=tuple(
                layer if kept is None else layer.take(kept) for layer, kept in zip(self.layers, indices, strict=True)
            ),
        )

    def unrotated(self, spec: ModelSpec) -> KVCache:
        """With the keys' rotary embedding taken off (computed in float32)."""
        return self._rotation(spec, rotated=False)

    def rotated_as(self, spec: ModelSpec) -> KVCache:
        """With the keys' rotary embedding put on at their positions (computed in float32)."""
        return self._rotation(spec, rotated=True)

    def moved(self, offset: int, spec: ModelSpec) -> KVCache:
        """Every token ``offset`` positions later; rotated keys are turned accordingly in float32.

        Raises:
            CacheError: a token would land before position 0.
        """
        layers = []
        for layer, shape in zip(self.layers, spec.layers, strict=True):
            real = layer.positions != PADDING
            positions = torch.where(real, layer.positions + offset, PADDING)
            if bool((positions[real] < 0).any()):
                raise CacheError(f"moving by {offset} would put a token before position 0")
            keys = layer.keys
            if self.rotated and offset and shape.rope is not None:
                turn = torch.tensor([offset], device=keys.device)
                keys = rotate(keys, shape.rope.angles(turn))
            layers.append(LayerCache(keys, layer.values, positions))
        return KVCache(tuple(layers), tuple(n + offset for n in self.length), self.rotated)

    def _rotation(self, spec: ModelSpec, rotated: bool) -> KVCache:
        if rotated == self.rotated:
            return self
        table = AngleTable(self.layers[0].keys.device)
        layers = []
        for layer, shape in zip(self.layers, spec.layers, strict=True):
            keys = layer.keys
            if shape.rope is not None:
                angles = table.angles(shape.rope, layer.positions.clamp(min=0))
                keys = rotate(keys, angles if rotated else angles.inverse())
            layers.append(replace(layer, keys=keys))
        return replace(self, layers=tuple(layers), rotated=rotated)

    def _from(self, firsts: Sequence[int | Tensor]) -> KVCache:
        """Each layer from a position on (for all rows, or ``[batch, 1]``); what lies before it becomes padding."""
        layers = []
        for layer, first in zip(self.layers, firsts, strict=True):
            real = (layer.positions != PADDING) & (layer.positions >= first)
            columns = real.any(dim=0).nonzero()[:, 0].tolist()
            begin = columns[0] if columns else layer.tokens
            masked = replace(layer, positions=layer.positions.masked_fill(~real, PADDING))
            layers.append(masked.span(begin, layer.tokens))
        return replace(self, layers=tuple(layers))


class LayerSource(Protocol):
    """Keys and values of one layer, wherever they lie: in tensors, or still packed."""

    @property
    def positions(self) -> Tensor:
        """``[batch, tokens]`` int64 on the CPU; −1 at the right of a row that has fewer tokens."""

    @property
    def shape(self) -> tuple[int, int]:
        """KV heads and head_dim."""

    @property
    def kind(self) -> Hashable:
        """Sources of equal kind can be stacked."""

    def stacked(self, others: Sequence[Self]) -> LayerSource:
        """This source's rows and those of others of its kind, to be read in one go."""

    def keys_into(self, out: Tensor) -> None:
        """Write the keys to ``out``, ``[batch, kv_heads, tokens, head_dim]``; padding may be written as anything."""

    def values_into(self, out: Tensor) -> None:
        """Write the values to ``out``, of the same shape."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """One sequence's cache on its way to be placed, layer by layer so that it never has to exist twice.

    Attributes:
        layers: every layer of the model in order; consumed once.
        start: position of the first token of the context at the sharer.
        length: the position after its last token.
        longest: the most tokens that any layer holds.
        rotated: whether the keys carry their rotary embedding.
        text: digest of the text, where the receiver has it too and must compare.
    """

    layers: Iterable[LayerSource]
    start: int
    length: int
    longest: int
    rotated: bool
    text: str | None = None

    @classmethod
    def of(cls, cache: KVCache, start: int = 0) -> Prefix:
        """A cache of one sequence, from position ``start`` on."""
        layers = cache.since(start).layers
        longest = max(layer.tokens for layer in layers)
        return cls(layers, start, cache.length[0], longest, cache.rotated)

    def extent(self, gaps: bool) -> int:
        """Positions it takes up at the receiver, with or without its holes."""
        return self.length - self.start if gaps else self.longest


def unpacked(prefixes: Sequence[Prefix], spec: ModelSpec, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Caches side by side, one row each, right-padded; neighbouring layers that lie alike are read in one go.

    Args:
        prefixes: of one sequence each.
        spec: of the model that made them, all layers of one shape.
        device: where to.

    Returns:
        keys of every layer and then values of every layer, ``[2 · layers, batch, kv_heads, tokens, head_dim]``, and the
        positions from each prefix's start on, ``[layers, batch, tokens]`` on the CPU.

    Raises:
        CacheError: a prefix does not have the model's layers.
    """
    rows = [list(prefix.layers) for prefix in prefixes]
    if any(len(row) != len(spec.layers) for row in rows):
        raise CacheError(f"a received cache has other layers than the model's {len(spec.layers)}")
    sources = [source for layer in zip(*rows, strict=True) for source in layer]
    kv_heads, head_dim = sources[0].shape
    longest = max(source.positions.shape[1] for source in sources)
    held = torch.zeros(2, len(sources), kv_heads, longest, head_dim, dtype=spec.dtype, device=device)
    positions = torch.full((len(sources), longest), PADDING)
    for _, run in groupby(range(len(sources)), lambda number: sources[number].kind):
        first, *others = run
        joined = sources[first].stacked([sources[other] for other in others]) if others else sources[first]
        tokens, there = joined.positions.shape[1], slice(first, first + 1 + len(others))
        if tokens:
            joined.keys_into(held[0, there, :, :tokens])
            joined.values_into(held[1, there, :, :tokens])
            positions[there, :tokens] = joined.positions
    positions = positions.view(len(spec.layers), -1, longest)
    starts = torch.tensor([prefix.start for prefix in prefixes])[:, None]
    positions = torch.where(positions == PADDING, PADDING, positions - starts)
    return held.view(2 * len(spec.layers), -1, kv_heads, longest, head_dim), positions


def _extents(positions: Tensor) -> list[Extent]:
    """Of each row of a layer's positions."""
    if not positions.shape[1]:
        return [Extent(0, 0, 0)] * len(positions)
    real = positions != PADDING
    counts = real.sum(dim=1).tolist()
    firsts = positions.masked_fill(~real, torch.iinfo(torch.long).max).amin(dim=1).tolist()
    lasts = positions.amax(dim=1).tolist()
    return [
        Extent(first, last - first + 1, count) if count else Extent(0, 0, 0)
        for first, last, count in zip(firsts, lasts, counts, strict=True)
    ]


def _padded(tensor: Tensor, longest: int, dim: int, value: int) -> Tensor:
    """Filled up at the right."""
    if tensor.shape[dim] == longest:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = longest - shape[dim]
    return torch.cat([tensor, tensor.new_full(shape, value)], dim=dim)


def _pad_left(tensor: Tensor, count: int, dim: int, value: int) -> Tensor:
    if count == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = count
    return torch.cat([tensor.new_full(shape, value), tensor], dim=dim)
