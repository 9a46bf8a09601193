"""Muon for stacks of matrices; `torch.optim.Muon` takes single ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = 3.4445, -4.775, 2.0315
"""Of the quintic Newton-Schulz iteration, see https://kellerjordan.github.io/posts/muon."""
_ITERATIONS = 5
_ALIKE = 0.2
"""Root mean square of an update over the learning rate, about that of AdamW (arXiv 2502.16982)."""


class StackedMuon(torch.optim.Optimizer):
    """Moves each matrix of a stack, ``[matrices, inputs, outputs]``, by its orthogonalised momentum."""

    def __init__(
        self, stacks: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(stacks, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move everything that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for stack in group["params"]:
                if stack.grad is None:
                    continue
                state: dict[str, Any] = self.state[stack]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(stack)
                moving = state["momentum"]
                moving.lerp_(stack.grad, 1 - group["momentum"])
                change = orthogonal(stack.grad.lerp(moving, group["momentum"]))
                stack.mul_(1 - group["lr"] * group["weight_decay"])
                stack.add_(change, alpha=-group["lr"] * _ALIKE * max(stack.shape[1:]) ** 0.5)
        return loss


def orthogonal(stack: Tensor) -> Tensor:
    """Each matrix of a stack with singular values near 1."""
    tall = stack.shape[1] > stack.shape[2]
    found = stack.mT if tall else stack
    found = found.bfloat16() if found.device.type == "cuda" else found
    found = found / (found.norm(dim=(1, 2), keepdim=True) + 1e-7)
    first, second, third = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = found @ found.mT
        found = first * found + (second * square + third * square @ square) @ found
    return torch.as_tensor(found.mT if tall else found).to(stack.dtype)
