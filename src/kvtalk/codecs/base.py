"""What every codec does, and how values share their scales."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvtalk.errors import CodecError

_CHUNK_VALUES = {"cpu": 1 << 16}
"""Values to work on at a time: few enough for a processor's cache; elsewhere everything at once."""


@dataclass(frozen=True)
class Blocks:
    """Values of one head that share a scale: a block of so many tokens by so many channels.

    Attributes:
        tokens: tokens of a block; 0 for all of the packet's.
        channels: channels of a block; 0 for the whole head.
    """

    tokens: int
    channels: int

    def across(self, tokens: int, head_dim: int) -> tuple[int, int]:
        """Blocks along tokens and along channels; the last block of tokens may be smaller.

        Raises:
            CodecError: the channels of a block do not divide the head.
        """
        size, channels = self.tokens or max(tokens, 1), self.channels or head_dim
        if head_dim % channels:
            raise CodecError(f"blocks of {channels} channels do not divide a head of {head_dim}")
        return -(-tokens // size), head_dim // channels

    def __str__(self) -> str:
        return f"{self.tokens or '*'}x{self.channels or '*'}"


class Codec(ABC):
    """Packs one layer's keys or values, ``[kv_heads, tokens, head_dim]``, into codes and scales.

    Heads do not know of each other, so those of several sequences can be packed in one go.

    Codes are ``kv_heads × tokens`` rows of equal length, so that any range of tokens can be read by itself.
    """

    family: ClassVar[str]
    bits: ClassVar[int]

    def __init__(self, blocks: Blocks | None = None) -> None:
        self.blocks = blocks or Blocks(1, 0)

    def __str__(self) -> str:
        return f"{self.family}:{self.blocks}" if self.scale_bytes else self.family

    @property
    @abstractmethod
    def scale_bytes(self) -> int:
        """Bytes of one block's scales; 0 without scales."""

    @property
    def by_token(self) -> bool:
        """Whether what a token comes back as depends on that token alone."""
        return self.blocks.tokens == 1 or not self.scale_bytes

    def code_size(self, kv_heads: int, tokens: int, head_dim: int) -> int:
        """Bytes of the codes."""
        return kv_heads * tokens * head_dim * self.bits // 8

    def scales_size(self, kv_heads: int, tokens: int, head_dim: int) -> int:
        """Bytes of the scales."""
        along_tokens, along_channels = self.blocks.across(tokens, head_dim)
        return kv_heads * along_tokens * along_channels * self.scale_bytes

    @abstractmethod
    def encode(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Pack.

        Args:
            values: ``[kv_heads, tokens, head_dim]``, any floating type.

        Returns:
            codes ``[kv_heads, tokens, head_dim · bits / 8]`` and scales (one-dimensional), both uint8.

        Raises:
            CodecError: NaN, infinity, or values beyond what the codec can represent.
        """

    @abstractmethod
    def decode(self, codes: Tensor, scales: Tensor, out: Tensor) -> None:
        """Unpack into ``out``.

        Args:
            codes: as made by :meth:`encode`.
            scales: as made by :meth:`encode`.
            out: ``[kv_heads, tokens, head_dim]``, any floating type, any strides.
        """

    def simulated(self, values: Tensor) -> Tensor:
        """What comes back after packing, ``[kv_heads, tokens, head_dim]``, float32; for training, without packing."""
        restored = torch.empty_like(values, dtype=torch.float32)
        self.decode(*self.encode(values), restored)
        return restored

    @staticmethod
    def tokens_at_once(values: Tensor, multiple_of: int) -> int:
        """Tokens of ``[kv_heads, tokens, head_dim]`` to work on at a time: whole blocks."""
        block = max(1, values.shape[0] * values.shape[2] * multiple_of)
        return max(1, _CHUNK_VALUES.get(values.device.type, values.numel()) // block) * multiple_of
