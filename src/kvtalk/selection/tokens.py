"""Token policies: which of the context's tokens to send.

A policy scores the tokens of a layer; the highest scores are kept, in their original order. Policies return column
indices, so that what was dropped is known and positions stay right. The interface is that of kvpress (NVIDIA), less
the parts that need the receiver.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from kvtalk.cache import LayerCache
from kvtalk.errors import SelectionError

SINKS = 4


class TokenPolicy(ABC):
    """Scores the tokens of one layer of one sequence.

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
            layer: one sequence, ``[1, kv_heads, tokens, head_dim]``.

        Returns:
            ``[tokens]``, higher is kept first.
        """

    def select(self, layer: LayerCache, count: int) -> Tensor:
        """Column indices of one layer to keep.

        Args:
            layer: one sequence, ``[1, kv_heads, tokens, head_dim]``.
            count: how many, at most the layer's tokens.

        Returns:
            ``[count]``, ascending, on the CPU.
        """
        return self.score(layer).cpu().topk(count).indices.sort().values


class Front(TokenPolicy):
    """The first tokens."""

    name = "front"
    positional = True

    def score(self, layer: LayerCache) -> Tensor:
        return -torch.arange(layer.tokens, dtype=torch.float32)


class Back(TokenPolicy):
    """The last tokens."""

    name = "back"
    positional = True

    def score(self, layer: LayerCache) -> Tensor:
        return torch.arange(layer.tokens, dtype=torch.float32)


class Random(TokenPolicy):
    """Tokens drawn without replacement, the same ones for the same seed and number of tokens."""

    name = "random"
    positional = True

    def score(self, layer: LayerCache) -> Tensor:
        return torch.rand(layer.tokens, generator=torch.Generator().manual_seed(self.seed))


class SinksAndRecent(TokenPolicy):
    """The first four tokens and then the last ones (StreamingLLM, arXiv 2309.17453)."""

    name = "sinks_recent"
    positional = True

    def score(self, layer: LayerCache) -> Tensor:
        order = torch.arange(layer.tokens, dtype=torch.float32)
        order[:SINKS] += layer.tokens
        return order


class KeyNorm(TokenPolicy):
    """Tokens whose keys have a small L2 norm, averaged over heads (arXiv 2406.11430: these draw the attention)."""

    name = "key_norm"
    positional = False

    def score(self, layer: LayerCache) -> Tensor:
        norms: Tensor = layer.keys[0].float().square().sum(dim=-1).sqrt()
        return -norms.mean(dim=0)


class ValueNorm(TokenPolicy):
    """Tokens whose values have a large L2 norm, averaged over heads (the value half of VATP, arXiv 2406.12335)."""

    name = "value_norm"
    positional = False

    def score(self, layer: LayerCache) -> Tensor:
        norms: Tensor = layer.values[0].float().square().sum(dim=-1).sqrt()
        return norms.mean(dim=0)


TOKEN_POLICIES: dict[str, type[TokenPolicy]] = {
    policy.name: policy for policy in (Front, Back, Random, SinksAndRecent, KeyNorm, ValueNorm)
}


def token_policy(name: str, seed: int = 0) -> TokenPolicy:
    """A token policy by name.

    Raises:
        SelectionError: unknown name.
    """
    if name not in TOKEN_POLICIES:
        raise SelectionError(f"no token policy {name!r}; there are {', '.join(TOKEN_POLICIES)}")
    return TOKEN_POLICIES[name](seed)


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
