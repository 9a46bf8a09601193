"""A translator's start: the best linear map of its rank, in closed form, instead of random matrices.

Reduced-rank regression: of all maps ``y = x A B`` of a rank, the one with the least squared error is the ordinary
regression followed by the projection on the leading principal components of what it predicts. ``A`` becomes the way
into the translator, ``B`` the way out, and the blocks between begin as the identity. Latents hold the components by
importance, so the first numbers of a latent are the best ones from the beginning.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kvtalk.adapters.translator import Translator

_LARGEST = 32_768
"""Values per token of the sharer or the receiver, beyond which moments take too much memory: only means are fitted."""

_RIDGE = 0.01


@torch.no_grad()
def begin_linear(translator: Translator, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Fit means, deviations, and the way through a translator.

    Args:
        translator: fresh; changed in place.
        pairs: vectors of the sharer and of the receiver for the same receiver tokens, ``[tokens, sharer_values]`` and
            ``[tokens, receiver_values]``.
    """
    moments: list[_Moments] = []
    linear = max(translator.geometry.sharer_values, translator.geometry.receiver_values) <= _LARGEST
    for theirs, ours in pairs:
        if not moments:
            moments = [_Moments(theirs), _Moments(ours)]
            cross = theirs.new_zeros(theirs.shape[1], ours.shape[1], dtype=torch.float32) if linear else None
            square = theirs.new_zeros(theirs.shape[1], theirs.shape[1], dtype=torch.float32) if linear else None
        x, y = (moment.add(part) for moment, part in zip(moments, (theirs, ours), strict=True))
        if cross is not None and square is not None:
            square.addmm_(x.T, x)
            cross.addmm_(x.T, y)
    encoder, decoder = translator.encoder, translator.decoder
    (mean, scale), (our_mean, our_scale) = (moment.found() for moment in moments)
    encoder.mean.copy_(moments[0].centre + mean * moments[0].spread)
    encoder.scale.copy_(scale * moments[0].spread)
    decoder.mean.copy_(moments[1].centre + our_mean * moments[1].spread)
    decoder.scale.copy_(our_scale * moments[1].spread)
    if cross is None or square is None:
        return
    count = moments[0].count
    square = (square / count - torch.outer(mean, mean)) / torch.outer(scale, scale)
    cross = (cross / count - torch.outer(mean, our_mean)) / torch.outer(scale, our_scale)
    square.diagonal().add_(_RIDGE)
    factor = torch.linalg.cholesky(square)
    whitened = torch.linalg.solve_triangular(factor, cross, upper=False)  # predictions' covariance is its square
    width, latent = translator.geometry.width, translator.geometry.latent
    rank = min(width, *cross.shape)
    inputs, spreads, directions = torch.svd_lowrank(whitened, q=rank, niter=2)
    lift = spreads.sqrt() / spreads.mean().sqrt()
    encoder.inward.weight[:rank] = torch.linalg.solve_triangular(factor.T, inputs * lift, upper=True).T
    decoder.outward.weight[:, :rank] = directions * spreads / lift
    encoder.inward.weight[rank:] = 0
    decoder.outward.weight[:, rank:] = 0
    for matrix in (encoder.latent.weight, decoder.latent.weight.T):
        matrix[: min(width, latent)] = torch.eye(width, device=matrix.device)[:latent]
    decoder.latent.weight[:, width:] = 0


class _Moments:
    """Sums over tokens, each channel counted from the first batch's mean in units of its deviation."""

    def __init__(self, first: Tensor) -> None:
        values = first.float()
        self.centre, self.spread = values.mean(0), values.std(0).clamp(min=1e-3)
        self.count = 0
        self.sums = values.new_zeros(2, values.shape[1], dtype=torch.float64)

    def add(self, values: Tensor) -> Tensor:
        """Count tokens in; returns them in these units."""
        scaled = (values.float() - self.centre) / self.spread
        self.count += len(scaled)
        self.sums += torch.stack([scaled.double().sum(0), scaled.double().square().sum(0)])
        return scaled

    def found(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel, in these units."""
        mean = self.sums[0] / self.count
        return mean.float(), (self.sums[1] / self.count - mean.square()).clamp(min=1e-6).sqrt().float()
