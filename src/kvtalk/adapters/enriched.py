"""The receiver's own cache, and what sharers add to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvtalk.adapters.earlier import Earlier, read_on
from kvtalk.adapters.pairs import Pairs
from kvtalk.alignment.readings import readings
from kvtalk.cache import PADDING, KVCache
from kvtalk.device import sent
from kvtalk.errors import InputError
from kvtalk.models import LM
from kvtalk.placed import PlacedCache, PlacedLayer
from kvtalk.shared_prompts import Prompt


@dataclass(frozen=True)
class Addition:
    """What one sharer adds.

    Attributes:
        pairs: to which tokens, each once; on the device of what is added.
        slots: numbers of those added to, ``[slots, 1]``, there too.
        added: ``[slots, tokens, width]``, keys rotated as the model holds them.
        last: whether it adds to the prompts' last tokens, too.
    """

    pairs: Pairs
    slots: Tensor
    added: Tensor
    last: bool


class Own:
    """The receiver's own cache of prompts, whose last token runs a second time, on what is fused.

    Attributes:
        read: the prompts in its tokens.
        start: tokens of earlier turns.
        held: of them all, the last token's too, as :meth:`kvtalk.cache.KVCache.stacked` gives it.
        cache: the same, layer by layer, in the same memory.
    """

    def __init__(self, lm: LM, prompts: Sequence[Prompt], earlier: Earlier | None = None) -> None:
        """Read prompts.

        Args:
            lm: the receiver.
            prompts: what it reads.
            earlier: of a single prompt, the turns before it, which are not read again.

        Raises:
            InputError: one of fewer than two tokens.
        """
        self.lm, self.start = lm, 0 if earlier is None else earlier.tokens
        begin = earlier.unread if earlier is not None and self.start else None
        self.read = readings(lm.tokenizer, prompts, begin)
        if min(len(one.ids) for one in self.read) < 2:
            raise InputError("the prompt is too short to be fused: it needs two tokens at least")
        cache = read_on(lm, [one.ids for one in self.read], earlier)
        self.held = cache.stacked()
        both = zip(cache.layers, _in_twos(self.held.unbind()), strict=True)
        self.cache = replace(
            cache, layers=tuple(replace(layer, keys=keys, values=values) for layer, (keys, values) in both)
        )

    @property
    def last(self) -> list[list[int]]:
        """The last token of each prompt, with which the receiver goes on."""
        return [one.ids[-1:] for one in self.read]

    def placed(self, additions: Sequence[Addition]) -> PlacedCache:
        """The cache with what sharers add, ready for the last token."""
        awaits = any(addition.last for addition in additions)
        return placed_but_last(self.lm, self.cache, self.held.clone(), additions, awaits)


def placed_but_last(lm: LM, cache: KVCache, held: Tensor, additions: Sequence[Addition], awaits: bool) -> PlacedCache:
    """A model's own cache from position 0 on with what sharers add, ready to read the last token of each row once more.

    Gradients flow into the additions.

    Args:
        lm: the model.
        cache: its own.
        held: a copy of it, as :meth:`kvtalk.cache.KVCache.stacked` gives it, which becomes the placed cache.
        additions: what sharers add.
        awaits: whether the last token's keys and values are those of the cache with what is added, or what the model
            makes of it now.
    """
    for addition in additions:
        enrich(held, addition)
    ends = torch.tensor(cache.length) - 1
    rows, last = torch.arange(len(ends)), sent(ends, lm.device)
    both = list(_in_twos(held.unbind()))
    awaited: Iterable[tuple[Tensor, Tensor] | None] = [None] * len(both)
    if awaits:
        awaited = _in_twos(held.transpose(2, 3)[:, sent(rows, lm.device), last].unbind())
    layers = [PlacedLayer(*one, held.shape[3] - 1, waits) for one, waits in zip(both, awaited, strict=True)]
    tracks: dict[int, Tensor] = {}
    for layer in cache.layers:
        if id(layer.positions) not in tracks:
            track = layer.positions.clone()
            track[rows, ends] = PADDING
            tracks[id(layer.positions)] = track[:, :-1]
    return PlacedCache(layers, [tracks[id(layer.positions)] for layer in cache.layers], last, lm.spec)


def enrich(held: Tensor, addition: Addition) -> None:
    """Add to the keys and values of a cache, in place; gradients flow into what is added.

    Args:
        held: of every layer, ``[2 · layers, batch, kv_heads, tokens, head_dim]``, keys before values.
        addition: what is added.
    """
    pairs, added = addition.pairs, addition.added
    held.transpose(2, 3)[addition.slots, pairs.rows, pairs.ours] += added.reshape(*added.shape[:2], held.shape[2], -1)


def _in_twos(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of each layer."""
    return zip(tensors[::2], tensors[1::2], strict=True)
