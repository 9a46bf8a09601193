"""Moving tensors to where they are needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device, without waiting for what the device is doing: a GPU fetches it from pinned memory."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def sent_together(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Tensors of one type on a device, in one transfer; they share its memory."""
    whole = sent(torch.cat([tensor.flatten() for tensor in tensors]), device)
    parts = torch.split(whole, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
