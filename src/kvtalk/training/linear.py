"""A translator's start: the best linear map of its rank, in closed form, instead of random matrices.

Reduced-rank regression: of all maps ``y = x A B`` of a rank, the one with the least squared error is the ordinary
regression followed by the projection on the leading principal components of what it predicts. ``A`` becomes the way
into the translator, ``B`` the way out, and the blocks between begin as the identity. Latents hold the components by
importance, so the first numbers of a latent are the best ones from the beginning. A latent of several tokens begins as
the mean of theirs.

Where one half is given, the other begins at the best linear map to it: a decoder from the latents that the encoder
writes, an encoder into those that the decoder's linear way makes the wanted vectors of.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvtalk.adapters.translator import Decoder, Encoder, Translator

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
    encoder, decoder = translator.encoder, translator.decoder
    width, pool = translator.geometry.width, translator.geometry.pool
    fit = _fit(pairs, width)
    _standardise(encoder, *fit.inputs)
    _standardise(decoder, *fit.outputs)
    if fit.maps is None:
        return
    _fill(encoder.inward.weight, fit.maps[0].T)
    _fill(decoder.outward.weight, fit.maps[1])
    straight = torch.eye(width, device=encoder.latent.weight.device)[: translator.geometry.latent]
    encoder.latent.weight[: len(straight)] = straight.repeat(1, pool) / pool
    decoder.latent.weight.T[: len(straight)] = straight
    decoder.latent.weight[:, width:] = 0


@torch.no_grad()
def begin_encoder(translator: Translator, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Fit an encoder to the decoder that is there, whose blocks and curved heads are left out of account.

    Args:
        translator: its encoder is fresh, and changed in place.
        pairs: as for :func:`begin_linear`.
    """
    encoder, decoder = translator.encoder, translator.decoder
    fit = _fit(pairs, translator.geometry.width)
    _standardise(encoder, *fit.inputs)
    if fit.maps is None:
        return
    into, outward = fit.maps
    outward = outward * (fit.outputs[1] / decoder.scale)[:, None]  # in the decoder's own units
    back = torch.linalg.pinv(decoder.latent.weight) @ (torch.linalg.pinv(decoder.outward.weight) @ outward)
    _fill(encoder.inward.weight, into.T)
    for part in torch.split(encoder.latent.weight, translator.geometry.width, dim=1):
        _fill(part, back / translator.geometry.pool)


@torch.no_grad()
def begin_decoder(translator: Translator, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Fit a decoder to the latents of the encoder that is there.

    Args:
        translator: its decoder is fresh, and changed in place.
        pairs: latents and the receiver's vectors of the same tokens, or the means of theirs, ``[latents, latent]`` and
            ``[latents, receiver_values]``.
    """
    decoder = translator.decoder
    fit = _fit(pairs, translator.geometry.width, centred=False)
    _standardise(decoder, *fit.outputs)
    if fit.maps is None:
        return
    _fill(decoder.latent.weight, (fit.maps[0] / fit.inputs[1][:, None]).T)
    _fill(decoder.outward.weight, fit.maps[1])


@dataclass(frozen=True)
class _Fit:
    """Mean and deviation of each input and output channel, and the best map of a rank between them, standardised.

    Attributes:
        maps: ``[inputs, rank]`` and ``[outputs, rank]``; None for more channels than are fitted.
    """

    inputs: tuple[Tensor, Tensor]
    outputs: tuple[Tensor, Tensor]
    maps: tuple[Tensor, Tensor] | None


def _fit(pairs: Iterable[tuple[Tensor, Tensor]], rank: int, centred: bool = True) -> _Fit:
    """The best map of standardised channels; not ``centred``, the inputs' means are not taken off before it."""
    moments: list[_Moments] = []
    for theirs, ours in pairs:
        if not moments:
            moments = [_Moments(theirs, centred), _Moments(ours)]
            linear = max(theirs.shape[1], ours.shape[1]) <= _LARGEST
            cross = theirs.new_zeros(theirs.shape[1], ours.shape[1], dtype=torch.float32) if linear else None
            square = theirs.new_zeros(theirs.shape[1], theirs.shape[1], dtype=torch.float32) if linear else None
        x, y = (moment.add(part) for moment, part in zip(moments, (theirs, ours), strict=True))
        if cross is not None and square is not None:
            square.addmm_(x.T, x)
            cross.addmm_(x.T, y)
    (mean, scale), (our_mean, our_scale) = (moment.found() for moment in moments)
    channels = [
        (moment.centre + middle * moment.spread, deviation * moment.spread)
        for moment, (middle, deviation) in zip(moments, ((mean, scale), (our_mean, our_scale)), strict=True)
    ]
    if cross is None or square is None:
        return _Fit(channels[0], channels[1], None)
    count = moments[0].count
    around = mean if centred else torch.zeros_like(mean)
    square = (square / count - torch.outer(around, around)) / torch.outer(scale, scale)
    cross = (cross / count - torch.outer(mean, our_mean)) / torch.outer(scale, our_scale)
    square.diagonal().add_(_RIDGE)
    factor = torch.linalg.cholesky(square)
    whitened = torch.linalg.solve_triangular(factor, cross, upper=False)  # predictions' covariance is its square
    inputs, spreads, directions = torch.svd_lowrank(whitened, q=min(rank, *cross.shape), niter=2)
    lift = spreads.sqrt() / spreads.mean().sqrt()
    into = torch.linalg.solve_triangular(factor.T, inputs * lift, upper=True)
    return _Fit(channels[0], channels[1], (into, directions * spreads / lift))


def _standardise(half: Encoder | Decoder, mean: Tensor, scale: Tensor) -> None:
    half.mean.copy_(mean)
    half.scale.copy_(scale)


def _fill(matrix: Tensor, part: Tensor) -> None:
    """A part at the matrix's beginning, zero elsewhere."""
    matrix.zero_()
    matrix[: part.shape[0], : part.shape[1]] = part


class _Moments:
    """Sums over tokens, each channel counted from the first batch's mean (or from 0) in units of its deviation."""

    def __init__(self, first: Tensor, centred: bool = True) -> None:
        values = first.float()
        self.centre, self.spread = values.mean(0) * centred, values.std(0).clamp(min=1e-3)
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
