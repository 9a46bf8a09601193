"""Fit a fuser's predictor: what the fuser makes of the receiver's values, foretold from the sharer's cache alone.

Ridge regression in closed form, a layer and a policy each. The scores of all receiver layers that read a sharer layer
are summed, as that layer's tokens cross for all of them or for none; the regression of a sum is the sum of regressions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtalk.adapters.cards import read_card
from kvtalk.adapters.fuser import Fuser
from kvtalk.adapters.pairs import Pairs
from kvtalk.adapters.predictor import Predictor
from kvtalk.adapters.slots import averaged
from kvtalk.adapters.store import add_predictor
from kvtalk.adapters.weights import load_fuser
from kvtalk.models import LM
from kvtalk.selection.tokens import FORETOLD
from kvtalk.training.exchanges import Exchanges, FusedBatches, Mixture
from kvtalk.training.fuser import FuserRecipe, Fusing

_BATCHES, _ROWS = 16, 8
_RIDGE = 0.01
"""Added to the variance of every standardised channel, which is 1."""


@dataclass(frozen=True)
class Exact:
    """What a fuser makes of each sharer token that it enriches something with.

    Attributes:
        rows: number of its prompt, ``[tokens]``.
        theirs: its index in the shared text, ``[tokens]``.
        entry: which entry of the aligned tokens is one of its, ``[tokens]``.
        scores: ``[policies, sharer layers, tokens]``, policies as in :data:`kvtalk.selection.tokens.FORETOLD`; 0 in
            layers that no open gate reads.
    """

    rows: Tensor
    theirs: Tensor
    entry: Tensor
    scores: Tensor


@torch.no_grad()
def exact(fuser: Fuser, sharer: Tensor, receiver: Tensor, pairs: Pairs) -> Exact:
    """The scores of SparseC2C (github.com/SujeethJinesh/LatentWire), with the receiver's cache at hand.

    Of a receiver token in a layer they are the L2 norm, averaged over heads, of its value with what is added, and of
    what is added. A sharer token has the mean of the receiver tokens that it is aligned with, summed over the layers
    that read its own. Where only keys are read, keys are judged.

    Args:
        fuser: gates as at inference.
        sharer: its own vectors of every entry, ``[slots, entries, sharer.width]``.
        receiver: its vectors of every token that is enriched, ``[slots, tokens, receiver.width]``.
        pairs: the aligned tokens.
    """
    geometry = fuser.geometry
    once, owners = pairs.once()
    owners = owners.to(receiver.device)
    nothing = torch.zeros(sharer.shape[:2], dtype=torch.bool, device=sharer.device)
    added = fuser(averaged(sharer, nothing, owners, len(once.rows))[0], receiver)
    norms = torch.stack(
        [
            vectors.unflatten(2, (geometry.receiver.kv_heads, -1)).norm(dim=3).mean(dim=2)
            for vectors in (receiver + added, added)
        ]
    )
    layers = torch.tensor([geometry.layers[slot // 2] for slot in fuser.slots])
    values = fuser.is_open & torch.tensor([slot % 2 == 1 for slot in fuser.slots])
    judged = values | fuser.is_open & ~torch.isin(layers, layers[values])
    tokens, which = torch.unique(torch.stack([pairs.rows, pairs.theirs]), dim=1, return_inverse=True)
    counts = which.bincount().to(norms.device)
    by_layer = norms.new_zeros(len(norms), geometry.sharer.layers, norms.shape[2])
    by_layer.index_add_(1, layers[judged].to(norms.device), norms[:, judged.to(norms.device)])
    scores = norms.new_zeros(*by_layer.shape[:2], len(counts))
    scores.index_add_(2, which.to(norms.device), by_layer[:, :, owners])
    entry = torch.empty_like(tokens[0]).scatter_(0, which, torch.arange(len(which)))
    return Exact(tokens[0], tokens[1], entry, scores / counts)


@torch.no_grad()
def fitted(fuser: Fuser, sharer: LM, receiver: LM, exchanges: Exchanges) -> Predictor:
    """The predictor of a fuser.

    Args:
        fuser: trained, beside the receiver, gates as at inference.
        sharer: lends its cache.
        receiver: answers.
        exchanges: to fit to.
    """
    geometry = fuser.geometry
    objective = Fusing(sharer, receiver, geometry, FuserRecipe(), [])
    batches = FusedBatches(exchanges, sharer, receiver, Mixture(rows=_ROWS), geometry, _BATCHES)
    read = {layer: 2 * geometry.layers.index(layer) for layer in sorted(set(geometry.layers))}
    moments: Tensor | None = None
    for number in range(_BATCHES):
        batch = batches[number, 0]
        received, _ = objective.received(batch)
        found = exact(fuser, received, objective.own(batch)[1], batch.pairs)
        keys = torch.tensor(list(read.values()), device=received.device)
        told = received[:, found.entry.to(received.device)].double()
        ones = told.new_ones(len(keys), told.shape[1], 1)
        scores = found.scores[:, list(read)].permute(1, 2, 0).double()
        columns = torch.cat([told[keys], told[keys + 1], scores, ones], dim=2)
        both = columns.mT @ columns
        moments = both if moments is None else moments + both
    assert moments is not None
    predictor = Predictor(geometry)
    weight, bias = _ridge(moments.cpu())
    predictor.weight[:, list(read)], predictor.bias[:, list(read)] = weight.float(), bias.float()
    return predictor


def fit_predictor(
    folder: Path, sharer: LM, receiver: LM, exchanges: Exchanges, facts: dict[str, Any] | None = None
) -> None:
    """Fit the predictor of a stored fuser and write it beside that.

    Args:
        folder: of the fuser.
        sharer: lends its cache.
        receiver: answers.
        exchanges: to fit to.
        facts: on what, for people.

    Raises:
        AdapterError: not a fuser, damaged, or not for these models.
    """
    card, folder = read_card(folder, "fuser")
    for role, lm in (("sharer", sharer), ("receiver", receiver)):
        card.check(role, lm.spec)
    fuser = load_fuser(card, folder).to(receiver.device).eval()
    add_predictor(folder, fitted(fuser, sharer, receiver, exchanges), facts)


def _ridge(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and biases of regressions on standardised channels, for channels as they are.

    Args:
        moments: sums of products of channels, scores and 1, ``[layers, columns, columns]``, float64.

    Returns:
        ``[policies, layers, channels]`` and ``[policies, layers]``.
    """
    means = moments[:, -1, :-1] / moments[:, -1:, -1]
    covariance = moments[:, :-1, :-1] / moments[:, -1:, -1:] - means[:, :, None] * means[:, None]
    channels = means.shape[1] - len(FORETOLD)
    scales = covariance.diagonal(dim1=1, dim2=2)[:, :channels].clamp(min=1e-8).sqrt()
    alike = covariance[:, :channels, :channels] / (scales[:, :, None] * scales[:, None])
    wanted = covariance[:, :channels, channels:] / scales[:, :, None]
    weight = torch.linalg.solve(alike + _RIDGE * torch.eye(channels, dtype=alike.dtype), wanted) / scales[:, :, None]
    bias = means[:, channels:] - (means[:, :channels, None] * weight).sum(dim=1)
    return weight.permute(2, 0, 1), bias.T
