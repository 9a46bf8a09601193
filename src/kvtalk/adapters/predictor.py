"""What a fuser makes of the receiver's values with each sharer token, foretold where no receiver's cache is at hand."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from kvtalk.adapters.fuser import FuserGeometry
from kvtalk.cache import KVCache, LayerCache
from kvtalk.selection.tokens import FORETOLD


class Predictor(nn.Module):
    """A linear map of each sharer layer's keys and values to two scores; it lies beside the sharer.

    The scores are those of SparseC2C (github.com/SujeethJinesh/LatentWire), which are computed there with the
    receiver's cache; see :func:`kvtalk.training.predictor.exact`.

    Attributes:
        weight: ``[policies, sharer layers, 2 · sharer.width]``, policies as in
            :data:`kvtalk.selection.tokens.FORETOLD`, keys before values.
        bias: ``[policies, sharer layers]``.
    """

    def __init__(self, geometry: FuserGeometry) -> None:
        """One that foretells 0 of every token.

        Args:
            geometry: of the fuser.
        """
        super().__init__()
        sizes = len(FORETOLD), geometry.sharer.layers
        self.weight = nn.Parameter(torch.zeros(*sizes, 2 * geometry.sharer.width))
        self.bias = nn.Parameter(torch.zeros(*sizes))

    @torch.no_grad()
    def scored(self, cache: KVCache, policy: str) -> KVCache:
        """The cache with a policy's scores in each layer that holds tokens.

        Args:
            cache: of the sharer, keys as the fuser takes them.
            policy: one of :data:`kvtalk.selection.tokens.FORETOLD`.
        """
        number = FORETOLD.index(policy)
        layers = [
            replace(layer, scores=self._score(number, index, layer)) if layer.tokens else layer
            for index, layer in enumerate(cache.layers)
        ]
        return replace(cache, layers=tuple(layers))

    def _score(self, policy: int, index: int, layer: LayerCache) -> Tensor:
        """Of every token of a layer, ``[batch, tokens]``, float32."""
        vectors = torch.cat([tensor.transpose(1, 2).flatten(2) for tensor in (layer.keys, layer.values)], dim=2)
        weighted = vectors.float() * self.weight[policy, index]  # no matrix product: alike tokens score alike anywhere
        return weighted.sum(dim=2) + self.bias[policy, index]
