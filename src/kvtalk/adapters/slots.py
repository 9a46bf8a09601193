"""Keys and values as a fuser takes them: of all its slots at once, gathered, rotated, averaged and computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kvtalk.adapters.enriched import Addition
from kvtalk.adapters.fuser import Fuser, FuserGeometry
from kvtalk.adapters.graphs import Graphed
from kvtalk.adapters.pairs import Pairs
from kvtalk.cache import KVCache, LayerCache
from kvtalk.device import sent, sent_together
from kvtalk.rope import Angles, StackRope, rotate_layers
from kvtalk.spec import ModelSpec

_SLOTS_ON_CPU = 4
"""Slots to compute at a time: what they make of 512 tokens stays in a core's cache."""


class Slots:
    """Slots of a fuser at the receiver: all that fusing needs of them whatever is fused, made once.

    Attributes:
        which: their numbers.
        places: the same, ``[slots, 1]``, on the receiver's device.
    """

    def __init__(self, which: Sequence[int], spec: ModelSpec, rope: str, device: torch.device | str) -> None:
        """Make the tables.

        Args:
            which: their numbers.
            spec: of the receiver.
            rope: whether keys are fused ``before`` their rotary embedding or ``after`` it.
            device: of the receiver.
        """
        self.which = tuple(which)
        self.places = torch.tensor(self.which, device=device)[:, None]
        self._kv_heads = spec.layers[0].kv_heads
        turned = [rope == "before" and slot % 2 == 0 for slot in self.which]
        ropes = [spec.layers[slot // 2].rope if turns else None for slot, turns in zip(self.which, turned, strict=True)]
        self._rope = StackRope(ropes, device)

    def angles(self, positions: Tensor) -> list[Angles]:
        """Of keys at some positions, ``[tokens]``."""
        return self._rope.angles(positions)

    def turned(self, vectors: Tensor, angles: Sequence[Angles], inverse: bool = False) -> Tensor:
        """Keys and values of some tokens, ``[slots, tokens, width]``, written over: keys rotated to their positions, or
        back, where they are fused before that."""
        heads = vectors.view(*vectors.shape[:2], self._kv_heads, -1)
        self._rope.rotate_(heads.transpose(1, 2), angles, inverse)
        return vectors


def slots_at_once(device: str, fuser: Fuser) -> int:
    """How many slots of a fuser are computed together."""
    return len(fuser.slots) if device == "cuda" else _SLOTS_ON_CPU


def read_of(geometry: FuserGeometry, slots: Sequence[int]) -> list[tuple[int, int]]:
    """What slots read: index of the sharer's layer, and whether its keys (0) or values (1)."""
    return [(geometry.layers[slot // 2], slot % 2) for slot in slots]


def bare_layers(
    cache: KVCache, spec: ModelSpec, geometry: FuserGeometry, wanted: Sequence[int], start: int = 0
) -> dict[int, LayerCache]:
    """Some layers of a cache that holds every token, from position ``start`` on, keys as the fuser takes them."""
    layers = [cache.layers[index].span(start, cache.layers[index].tokens) for index in wanted]
    keys = [layer.keys for layer in layers]
    if geometry.rope == "before":
        steps = sent(torch.arange(start, start + keys[0].shape[2]), keys[0].device)
        keys = rotate_layers(keys, [spec.layers[index].rope for index in wanted], steps, inverse=True)
    return {index: replace(layer, keys=one) for index, layer, one in zip(wanted, layers, keys, strict=True)}


def read_by(layers: Mapping[int, LayerCache], slots: Sequence[tuple[int, int]]) -> Tensor:
    """What each slot reads, ``[slots, batch, kv_heads, tokens, head_dim]``.

    Args:
        layers: of one shape.
        slots: index of the layer, and whether its keys (0) or values (1).
    """
    return torch.stack([(layers[index].keys, layers[index].values)[kind] for index, kind in slots])


def taken(held: Tensor, places: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Keys and values of some tokens, all heads one after the other, ``[slots, tokens, width]``.

    Args:
        held: ``[any, batch, kv_heads, tokens, head_dim]``.
        places: of each slot in it, ``[slots, 1]``, on its device.
        rows: of each token, ``[tokens]``, there too.
        columns: of each token, ``[tokens]``, or ``[slots, tokens]`` where they differ between slots; −1 is the last.
    """
    return held.transpose(2, 3)[places, rows, columns].flatten(2)


def own_vectors(held: Tensor, pairs: Pairs, slots: Slots, angles: Sequence[Angles]) -> Tensor:
    """Keys and values of some tokens of a cache from position 0 on, keys as the fuser takes them.

    Args:
        held: the receiver's, as :meth:`kvtalk.cache.KVCache.stacked` gives it.
        pairs: which tokens, each once.
        slots: which layers' keys or values.
        angles: of the tokens' positions, as ``slots`` gives them.

    Returns:
        ``[slots, tokens, width]``.
    """
    return slots.turned(taken(held, slots.places, pairs.rows, pairs.ours), angles, inverse=True)


def averaged(vectors: Tensor, missing: Tensor, owners: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean of the sharer tokens that stand for each receiver token, of those that were sent.

    Args:
        vectors: of every entry, ``[slots, entries, width]``.
        missing: which of them were not sent, bool ``[slots, entries]``.
        owners: number of each entry's receiver token, ``[entries]``, never decreasing.
        count: of the receiver tokens.

    Returns:
        means, ``[slots, count, width]``, of the same type, averaged in float32 or better; and which receiver tokens
        were sent nothing, bool ``[slots, count]``.
    """
    if len(owners) == count:
        return vectors, missing
    exact = torch.promote_types(vectors.dtype, torch.float32)
    there = (~missing)[:, :, None].to(exact)
    sums = vectors.new_zeros(len(vectors), count, vectors.shape[2], dtype=exact).index_add_(1, owners, vectors * there)
    counts = there.new_zeros(len(vectors), count, 1).index_add_(1, owners, there)
    return (sums / counts.clamp(min=1)).to(vectors.dtype), counts[:, :, 0] == 0


class Network:
    """A fuser at the receiver: what its slots add to some tokens, as a CUDA graph where there is a GPU."""

    def __init__(self, fuser: Fuser, spec: ModelSpec, device: torch.device) -> None:
        """Put a fuser to work; its weights stay where they are.

        Args:
            fuser: with its open slots alone, on the device.
            spec: of the receiver.
            device: of the receiver.
        """
        self.slots = Slots(fuser.slots, spec, fuser.geometry.rope, device)
        self._last = fuser.geometry.last
        lent, read, layers = read_of(fuser.geometry, fuser.slots), fuser.sharer_layers, fuser.geometry.sharer.layers
        self._layers = torch.tensor([read.index(layer) for layer, _ in lent], device=device)
        self._places = torch.tensor([kind * layers + layer for layer, kind in lent], device=device)[:, None]
        parts = fuser.split(slots_at_once(device.type, fuser))
        weights = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
        self._added = Graphed(partial(_added, parts, self.slots), weights)

    def added(
        self, lent: Tensor, rows: Tensor, columns: Tensor, owners: Tensor, held: Tensor, pairs: Pairs
    ) -> Addition:
        """What is to be added to tokens of the receiver's cache; zeros where nothing was sent.

        Args:
            lent: what packets held, on the receiver's device, as :func:`kvtalk.cache.unpacked` gives it.
            rows: of each of its tokens, ``[entries]``, like all that says which tokens on the CPU.
            columns: of each in every layer that the fuser reads, ``[layers, entries]``; −1 where it was not sent.
            owners: number of each one's receiver token, ``[entries]``, never decreasing.
            held: the receiver's cache from position 0 on, as :meth:`kvtalk.cache.KVCache.stacked` gives it.
            pairs: which of its tokens, each once.
        """
        whole = len(owners) == len(pairs.rows) and bool((columns >= 0).all())  # one sharer token for each, all sent
        which = rows, columns, owners, pairs.rows, pairs.ours, pairs.theirs
        rows, columns, owners, *once = sent_together(which, held.device)
        pairs, columns = Pairs(*once), columns[self._layers]
        theirs = taken(lent, self._places, rows, columns)
        ours = taken(held, self.slots.places, pairs.rows, pairs.ours)
        missing: list[Tensor] = []
        if not whole:
            theirs, *missing = averaged(theirs, columns < 0, owners, len(pairs.rows))
        added = self._added(theirs, ours, pairs.ours[None], *missing)
        return Addition(pairs, self.slots.places, added, self._last)


def _added(
    parts: Sequence[Fuser], slots: Slots, sharer: Tensor, receiver: Tensor, positions: Tensor, *missing: Tensor
) -> Tensor:
    """All of it that goes token by token; the receiver's keys come rotated and are written over. What was sent for no
    slot and token is told only where something was not."""
    angles = slots.angles(positions[0])
    receiver = slots.turned(receiver, angles, inverse=True)
    sizes = [len(part.slots) for part in parts]
    both = zip(parts, torch.split(sharer, sizes), torch.split(receiver, sizes), strict=True)
    added = [part(theirs, ours) for part, theirs, ours in both]
    whole = added[0] if len(added) == 1 else torch.cat(added)
    for nothing in missing:
        whole = whole.masked_fill(nothing[:, :, None], 0)
    return slots.turned(whole, angles)
