"""Losses over a large vocabulary, some tokens at a time, so that no logits of a whole step are ever held."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_VALUES = {"cpu": 1 << 24}
"""Logits to hold at a time; elsewhere :data:`_MANY`."""
_MANY = 1 << 28


def token_losses(
    unembedding: nn.Linear, states: Tensor, wanted: Tensor | None, labels: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence from another model's predictions and cross-entropy of labels, both from hidden states.

    The gradient with respect to the states is computed on the way, for one matrix product more and no second pass.

    Args:
        unembedding: makes logits of both; frozen.
        states: hidden states after the last layer, ``[tokens, hidden]``.
        wanted: those of the model to follow, the same shape; None to follow none.
        labels: the token that comes next, ``[tokens]``.
        weights: of every token's divergence and cross-entropy in the total, ``[2, tokens]``.

    Returns:
        the weighted total, and KL(wanted ‖ states) and cross-entropy of every token, ``[tokens]``, in nats; gradients
        flow through the total alone.
    """
    return _TokenLosses.apply(states, unembedding, wanted, labels, weights)  # type: ignore[no-any-return, no-untyped-call]


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, unembedding: nn.Linear, wanted: Tensor | None, labels: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = max(1, _VALUES.get(states.device.type, _MANY) // unembedding.out_features)
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        both = torch.zeros_like(weights)
        for start in range(0, len(states), rows):
            part = slice(start, start + rows)
            label, (follow, told) = labels[part], weights[:, part, None]
            follow = follow if wanted is not None else torch.zeros_like(follow)
            logs = unembedding(states[part]).log_softmax(-1, dtype=torch.float32)
            both[1, part] = -logs.gather(1, label[:, None])[:, 0]
            probable = None
            if wanted is not None:
                theirs = unembedding(wanted[part]).log_softmax(-1, dtype=torch.float32)
                probable = theirs.exp()
                both[0, part] = torch.linalg.vecdot(probable, theirs.sub_(logs))
            if gradient is not None:
                change = logs.exp_()
                if probable is not None:
                    change.addcmul_(probable, follow / (follow + told).clamp(min=1e-30), value=-1)
                change = (change.to(states.dtype) @ unembedding.weight).float() * (follow + told)
                gradient[part] = change - told * unembedding.weight[label]
        ctx.save_for_backward(gradient)
        divergences, entropies = both.unbind(0)
        ctx.mark_non_differentiable(divergences, entropies)
        return (both * weights).sum(), divergences, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (change,) = ctx.saved_tensors
        return change * gradients[0], None, None, None, None
