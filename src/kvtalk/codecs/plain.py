"""Floats as they are."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kvtalk.codecs.base import Codec
from kvtalk.errors import CodecError


class Plain(Codec):
    """Values rounded to a float type; exact for a model that computes in it."""

    dtype: ClassVar[torch.dtype]

    @property
    def scale_bytes(self) -> int:
        return 0

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor]:
        cast = values.to(self.dtype).contiguous()
        if not bool(torch.isfinite(cast).all()):
            raise CodecError(f"NaN, infinity or a value beyond {self.family}: use bf16 for large values")
        return cast.view(torch.uint8), torch.empty(0, dtype=torch.uint8)

    def decode(self, codes: Tensor, scales: Tensor, out: Tensor) -> None:
        if codes.storage_offset() % self.dtype.itemsize:
            codes = codes.clone()  # in a packet they may begin at an odd byte
        out.copy_(codes.view(self.dtype))


class BF16(Plain):
    """bfloat16."""

    family = "bf16"
    bits = 16
    dtype = torch.bfloat16


class FP16(Plain):
    """IEEE half precision: three more bits of mantissa than bf16, up to 65,504."""

    family = "fp16"
    bits = 16
    dtype = torch.float16


class FP32(Plain):
    """IEEE single precision, for exact transfers of models that compute in it."""

    family = "fp32"
    bits = 32
    dtype = torch.float32


class Nothing(Codec):
    """No bytes: for the values of a latent, which has none, and for keys or values that a fuser does not read."""

    family = "none"
    bits = 0

    @property
    def scale_bytes(self) -> int:
        return 0

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty(*values.shape[:2], 0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)

    def decode(self, codes: Tensor, scales: Tensor, out: Tensor) -> None:
        """Zeros."""
        out.zero_()
