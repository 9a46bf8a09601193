"""Token policies: which of the context's tokens to send.

A policy scores the tokens of a layer; the highest scores are kept, in their original order. Policies return column
indices, so that what was dropped is known and positions stay right. The interface is that of kvpress (NVIDIA), less
the parts that need the receiver.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kvtalk.cache import PADDING, LayerCache
from kvtalk.errors import SelectionError

SINKS = 4


class TokenPolicy(ABC):
    """Scores the tokens of one layer.

    Attributes:
        positional: True if the scores depend on positions alone, so that layers that hold the same tokens keep the
            same ones and the packet names them once.
    """

    name: ClassVar[str]
    positional: ClassVar[bool]

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    @abstractmethod
    def score(self, layer: LayerCache) -> Tensor:
        """How much each token is worth.

        Args:
            layer: ``[batch, kv_heads, tokens, head_dim]``.

        Returns:
            ``[batch, tokens]``, higher is kept first; what padding scores is of no account.
        """

    def select(self, layer: LayerCache, counts: Sequence[int]) -> Tensor:
        """Columns of one layer to keep.

        Args:
            layer: ``[batch, kv_heads, tokens, head_dim]``.
            counts: how many in each row, from one to the row's tokens.

        Returns:
            ``[batch, max(counts)]``, ascending; a row that keeps fewer repeats its last one. Of tokens that score
            the same, the first are kept.
        """
        scores = self.score(layer)
        real = (layer.positions != PADDING).to(scores.device)
        order = scores.masked_fill(~real, -torch.inf).argsort(dim=1, descending=True, stable=True)
        columns = torch.arange(scores.shape[1], device=scores.device)
        rank = torch.empty_like(order).scatter_(1, order, columns.expand_as(order))
        return kept_columns(rank < torch.tensor(counts, device=scores.device)[:, None], counts)


class Front(TokenPolicy):
    """The first tokens."""

    name = "front"
    positional = True

    def score(self, layer: LayerCache) -> Tensor:
        return -_order(layer)


class Back(TokenPolicy):
    """The last tokens."""

    name = "back"
    positional = True

    def score(self, layer: LayerCache) -> Tensor:
        return _order(layer)


class Random(TokenPolicy):
    """Tokens drawn without replacement, the same ones for the same seed and number of tokens."""

    name = "random"
    positional = True

    def score(self, layer: LayerCache) -> Tensor:
        real = layer.positions != PADDING
        scores = torch.zeros(real.shape)
        for row, which in enumerate(real):
            generator = torch.Generator().manual_seed(self.seed)
            scores[row, which] = torch.rand(int(which.sum()), generator=generator)
        return scores


class SinksAndRecent(TokenPolicy):
    """The first four tokens and then the last ones (StreamingLLM, arXiv 2309.17453)."""

    name = "sinks_recent"
    positional = True

    def score(self, layer: LayerCache) -> Tensor:
        order = _order(layer)
        return torch.where(order < SINKS, order + layer.tokens, order)


class KeyNorm(TokenPolicy):
    """Tokens whose keys have a small L2 norm, averaged over heads (arXiv 2406.11430: these draw the attention)."""

    name = "key_norm"
    positional = False

    def score(self, layer: LayerCache) -> Tensor:
        norms: Tensor = layer.keys.float().square().sum(dim=-1).sqrt()
        return -norms.mean(dim=1)


class ValueNorm(TokenPolicy):
    """Tokens whose values have a large L2 norm, averaged over heads (the value half of VATP, arXiv 2406.12335)."""

    name = "value_norm"
    positional = False

    def score(self, layer: LayerCache) -> Tensor:
        norms: Tensor = layer.values.float().square().sum(dim=-1).sqrt()
        return norms.mean(dim=1)


class Foretold(TokenPolicy):
    """Tokens by what a fuser makes of the receiver's values with them, which its predictor foretells at the sharer."""

    positional = False

    def score(self, layer: LayerCache) -> Tensor:
        """As in :meth:`TokenPolicy.score`: the layer's own scores.

        Raises:
            SelectionError: the layer has none, because no fuser is at work.
        """
        if layer.scores is None:
            raise SelectionError(f"{self.name} foretells what a fuser adds: use it with --fuser, or another policy")
        return layer.scores


class ProjectedNorm(Foretold):
    """Tokens whose projected value, the receiver's own with what is added, has a large L2 norm, averaged over heads
    (SparseC2C, github.com/SujeethJinesh/LatentWire)."""

    name = "proj_vnorm_topk"


class AddedNorm(Foretold):
    """Tokens for which what is added to the receiver's value has a large L2 norm, averaged over heads (ibid.)."""

    name = "delta_proj_vnorm"


TOKEN_POLICIES: dict[str, type[TokenPolicy]] = {
    policy.name: policy
    for policy in (Front, Back, Random, SinksAndRecent, KeyNorm, ValueNorm, ProjectedNorm, AddedNorm)
}
FORETOLD = tuple(name for name, policy in TOKEN_POLICIES.items() if issubclass(policy, Foretold))
"""Those that need a fuser's predictor."""


def token_policy(name: str, seed: int = 0) -> TokenPolicy:
    """A token policy by name.

    Raises:
        SelectionError: unknown name.
    """
    if name not in TOKEN_POLICIES:
        raise SelectionError(f"no token policy {name!r}; there are {', '.join(TOKEN_POLICIES)}")
    return TOKEN_POLICIES[name](seed)


def kept_columns(kept: Tensor, counts: Sequence[int]) -> Tensor:
    """Columns of the tokens to keep, row by row.

    Args:
        kept: bool ``[batch, tokens]``.
        counts: how many are True in each row, at least one in each or none in any.

    Returns:
        ``[batch, max(counts)]``, ascending; a row that keeps fewer repeats its last one.
    """
    if max(counts) == 0:
        return torch.empty(len(counts), 0, dtype=torch.long, device=kept.device)
    beyond = kept.shape[1]
    columns = torch.arange(beyond, device=kept.device).expand_as(kept).masked_fill(~kept, beyond)
    columns = columns.sort(dim=1).values[:, : max(counts)]
    return columns.minimum(columns.gather(1, torch.tensor(counts, device=kept.device)[:, None] - 1))


def _order(layer: LayerCache) -> Tensor:
    """0, 1, 2 ... for the tokens of each row, ``[batch, tokens]``."""
    return (layer.positions != PADDING).cumsum(dim=1).float() - 1


def kept_count(keep: float | int, tokens: int) -> int:
    """How many of ``tokens`` to keep: a float is a share (rounded up), an int a number.

    Raises:
        SelectionError: a share outside 0 to 1, or a number under 1.
    """
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            raise SelectionError(
                f"keep {keep}: a share must lie above 0 and at most 1; give a whole number for a count"
            )
        return math.ceil(keep * tokens)
    if keep < 1:
        raise SelectionError(f"keep {keep}: at least one token must be kept")
    return min(keep, tokens)
