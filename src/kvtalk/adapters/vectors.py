"""A cache as one vector a token: un-rotated keys and values of every layer, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from kvtalk.cache import PADDING, KVCache, LayerCache
from kvtalk.device import sent
from kvtalk.errors import CacheError
from kvtalk.loading import bos
from kvtalk.models import LM
from kvtalk.rope import rotate_layers
from kvtalk.spec import ModelSpec


def lead(lm: LM) -> list[int]:
    """What a sharer reads before a context that is to be translated: its BOS, or else a line break.

    Models give their first token a cache unlike all others, whatever it is; so it should not be the context's.
    """
    return bos(lm.tokenizer) or lm.encode("\n")[:1]


def to_vectors(cache: KVCache, spec: ModelSpec, start: int) -> Tensor:
    """Every token from a position on.

    Args:
        cache: read with :meth:`kvtalk.models.LM.read_whole`.
        spec: of its model.
        start: position of the first token to give.

    Returns:
        ``[batch, tokens, values_per_token]``: for each layer from the input side all heads' keys, un-rotated, then all
        heads' values; what stands where a row has no more tokens is of no account.

    Raises:
        CacheError: a layer lacks tokens, or is padded on the left.
    """
    longest = max(cache.length)
    steps = torch.arange(longest)
    for positions in {id(layer.positions): layer.positions for layer in cache.layers}.values():
        if positions.shape[1] != longest or not bool(((positions == steps) | (positions == PADDING)).all()):
            raise CacheError("a layer lacks tokens of the context: read it with read_whole()")
    there = sent(steps[start:], cache.layers[0].keys.device)
    ropes = [shape.rope for shape in spec.layers]
    keys = rotate_layers([layer.keys[:, :, start:] for layer in cache.layers], ropes, there, inverse=True)
    values = [layer.values[:, :, start:] for layer in cache.layers]
    parts = [part for both in zip(keys, values, strict=True) for part in both]
    return torch.cat([part.transpose(1, 2).flatten(2) for part in parts], dim=2)


def from_vectors(vectors: Tensor, counts: Tensor, spec: ModelSpec) -> KVCache:
    """The cache whose vectors these are, un-rotated, from position 0 on.

    Args:
        vectors: ``[batch, tokens, values_per_token]``, right-padded.
        counts: tokens of each row, ``[batch]`` on the CPU.
        spec: of the model.
    """
    steps = torch.arange(vectors.shape[1])
    positions = torch.where(steps < counts[:, None], steps, PADDING)
    sizes = [shape.kv_heads * shape.head_dim for shape in spec.layers for _ in range(2)]
    parts = iter(torch.split(vectors, sizes, dim=2))
    layers = []
    for shape in spec.layers:
        size = (*vectors.shape[:2], shape.kv_heads, shape.head_dim)
        keys, values = next(parts).reshape(size).transpose(1, 2), next(parts).reshape(size).transpose(1, 2)
        layers.append(LayerCache(keys, values, positions))
    return KVCache(tuple(layers), tuple(counts.tolist()), rotated=False)
