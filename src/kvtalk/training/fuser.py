"""Train a fuser: both models frozen, the receiver answers from its own cache, enriched by the sharer's.

Both read the same prompt; the loss is the cross-entropy of the answer. Some rows give the sharer a context that the
receiver does not see, which only the sharer's cache can tell it. Gates begin soft and noisy and end as they are at
inference (arXiv 2510.03215, with logistic noise). The packet's codec and token policy may stand in the loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from kvtalk.adapters.fuser import Fuser, FuserGeometry
from kvtalk.adapters.fusing import Addition, Pairs, bare_layers, enriched, own_vectors, taken
from kvtalk.cache import PADDING, KVCache, LayerCache
from kvtalk.codecs import codec
from kvtalk.device import sent
from kvtalk.models import LM
from kvtalk.placement import PlacedCache, PlacedLayer
from kvtalk.planning import Plan
from kvtalk.selection.tokens import kept_count
from kvtalk.training.exchanges import Exchanges, FusedBatch, FusedBatches, Mixture, wrong_pairs
from kvtalk.training.loop import Loop, Schedule
from kvtalk.training.losses import token_losses
from kvtalk.training.rounding import rounded

KEPT_BACK = 0.04
"""Share of the rows for validation."""

_FITTED_ON = 4
"""Batches from which means and deviations are taken."""

_COLDEST = 1e-3
"""Of the gates, as in the paper."""


@dataclass(frozen=True)
class FuserRecipe:
    """How to train a fuser.

    Attributes:
        schedule: steps, rate, optimizer.
        mixture: of the steps' rows.
        plan: with which the sharer's cache crosses, in every step; None for whole in bf16.
        packing: codec in which the matrices will be stored; None for none.
        settled: share of the steps, the last ones, with gates as at inference and matrices rounded.
        seed: of everything drawn.
    """

    schedule: Schedule = field(default_factory=lambda: Schedule(steps=1500, rate=5e-4, optimizer="adamw"))
    mixture: Mixture = field(default_factory=Mixture)
    plan: str | None = None
    packing: str | None = None
    settled: float = 0.25
    seed: int = 0

    def settles(self, step: int) -> bool:
        """Whether gates and matrices are as at inference."""
        return step >= (1 - self.settled) * self.schedule.steps

    def temperature(self, step: int) -> float:
        """Of the gates: from 1 geometrically to a thousandth, then 0."""
        return 0.0 if self.settles(step) else _COLDEST ** (step / ((1 - self.settled) * self.schedule.steps))


class Fusing:
    """What a fuser learns; see :class:`kvtalk.training.loop.Objective`."""

    def __init__(
        self, sharer: LM, receiver: LM, geometry: FuserGeometry, recipe: FuserRecipe, checks: dict[str, FusedBatch]
    ) -> None:
        self.sharer, self.receiver, self.geometry, self.recipe, self.checks = sharer, receiver, geometry, recipe, checks
        self.plan = None if recipe.plan is None else replace(Plan.parse(recipe.plan, recipe.seed), rope=geometry.rope)
        for lm in (sharer, receiver):
            lm.model.requires_grad_(False)
        _ = receiver.unembedding  # refuses a receiver that cannot be trained for, before anything is read
        self.slots = tuple(range(geometry.slots))

    def losses(self, module: nn.Module, batch: FusedBatch, step: int) -> dict[str, Tensor]:
        """Cross-entropy of the answers, nats a token, every row alike."""
        total, _ = self._answered(module, batch, batch.pairs)
        return {"total": total, batch.kind: total.detach()}

    @contextmanager
    def during(self, module: nn.Module, step: int) -> Iterator[None]:
        """Gates as warm as the step wants them, their noise drawn anew for each step, so that a run that was stopped
        draws what it would have drawn; in the last steps matrices as the adapter's file will hold them."""
        torch.manual_seed(crc32(f"{self.recipe.seed} {step}".encode()))
        fuser = _fuser(module)
        fuser.temperature = self.recipe.temperature(step)
        with rounded(module, self.recipe.packing if self.recipe.settles(step) else None):
            yield

    @torch.no_grad()
    def measure(self, module: nn.Module) -> dict[str, float]:
        """Answers' loss on kept-back rows with the right sharer cache, wrong (if there is another question), zeroed and
        none; for multiple choice the share of right answers, by likelihood a character."""
        fuser = _fuser(module)
        fuser.eval()
        found = {"gates open": float(fuser.is_open.float().mean())}
        try:
            for kind, batch in self.checks.items():
                ways: dict[str, tuple[Any, Pairs | None]] = {
                    "": (fuser, batch.pairs),
                    " wrong": (fuser, wrong_pairs(batch)),
                    " zeroed": (fuser, batch.pairs),
                    " alone": (None, batch.pairs),
                }
                for name, (used, pairs) in ways.items():
                    if pairs is None:
                        continue
                    total, entropies = self._answered(used, batch, pairs, zeroed=name == " zeroed")
                    found[f"{kind}{name}"] = float(total)
                    if kind == "choices":
                        found[f"accuracy{name}"] = _accuracy(batch, entropies)
        finally:
            fuser.train()
        return found

    def standardise(self, fuser: Fuser, batches: FusedBatches) -> None:
        """Take the channels' means and deviations from the first batches."""
        taught = [batches[number, 0] for number in range(min(_FITTED_ON, len(batches)))]
        both = [(self._theirs(batch, batch.pairs)[0], self._ours(batch)[1]) for batch in taught]
        fuser.standardise(torch.cat([one for one, _ in both], 1), torch.cat([own for _, own in both], 1))

    def _answered(
        self, module: nn.Module | None, batch: FusedBatch, pairs: Pairs, zeroed: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of right answers with all rows alike, and that of every answer's token."""
        spec = self.receiver.spec
        cache, ours = self._ours(batch)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        if module is not None:
            theirs, missing = self._theirs(batch, pairs)
            added = module(torch.zeros_like(theirs) if zeroed else theirs, ours)
            added = added if missing is None else added.masked_fill(missing[:, :, None], 0)
            layers = enriched(layers, spec, Addition(batch.pairs, self.slots, added, self.geometry.rope))
        held = [PlacedLayer(keys, values, keys.shape[2]) for keys, values in layers]
        ends = sent(torch.tensor([len(row) for row in batch.receiver]), self.receiver.device)
        placed = PlacedCache(held, [layer.positions for layer in cache.layers], ends, spec)
        hidden = self.receiver.states(batch.tails, placed)
        longest = hidden.shape[1]  # padded on the left
        counts = [len(answer) for answer in batch.answers]
        where = [row * longest + place for row, n in enumerate(counts) for place in range(longest - n, longest)]
        states = hidden.flatten(0, 1)[sent(torch.tensor(where), hidden.device)]
        labels = sent(torch.tensor([token for answer in batch.answers for token in answer]), states.device)
        told = sum(batch.right)
        each = torch.tensor([ok / (n * told) for n, ok in zip(counts, batch.right, strict=True) for _ in range(n)])
        weights = sent(torch.stack([torch.zeros_like(each), each]), states.device)
        total, _, entropies = token_losses(self.receiver.unembedding, states, None, labels, weights)
        return total, entropies

    def _ours(self, batch: FusedBatch) -> tuple[KVCache, Tensor]:
        cache, _ = self.receiver.read_whole(batch.receiver)
        return cache, own_vectors(cache, self.receiver.spec, batch.pairs, self.slots, self.geometry.rope)

    def _theirs(self, batch: FusedBatch, pairs: Pairs) -> tuple[Tensor, Tensor | None]:
        """The sharer's keys and values of aligned tokens as they would arrive, ``[slots, tokens, width]``, and which of
        them the token policy leaves out, bool ``[slots, tokens]``."""
        cache, _ = self.sharer.read_whole(batch.sharer)
        wanted = sorted(set(self.geometry.layers))
        layers = bare_layers(cache, self.sharer.spec, self.geometry, wanted)
        columns = pairs.theirs + torch.tensor(batch.begins)[pairs.rows]
        slots = [(self.geometry.layers[slot // 2], slot % 2) for slot in self.slots]
        missing = None
        if self.plan is not None:
            if not self.plan.keeps_all:
                lost = {index: _dropped(layer, batch, self.plan, pairs, columns) for index, layer in layers.items()}
                missing = torch.stack([lost[index] for index, _ in slots])
            layers = {index: _packed(layer, self.plan) for index, layer in layers.items()}
        return torch.stack([taken(layers[index], kind, pairs.rows, columns) for index, kind in slots]), missing


def training(
    sharer: LM, receiver: LM, exchanges: Exchanges, geometry: FuserGeometry, recipe: FuserRecipe, out: Path
) -> Loop:
    """A run that trains a fuser, ready to start or to go on.

    Args:
        sharer: lends its cache.
        receiver: answers.
        exchanges: to train and validate on.
        geometry: of the fuser.
        recipe: how.
        out: folder for checkpoints and the log; a run in it is continued.

    Raises:
        TrainingError: the folder holds a run of other settings.
    """
    learned, kept_back = exchanges.split(KEPT_BACK)
    mixture = replace(recipe.mixture, alignment=geometry.alignment)
    batches = FusedBatches(learned, sharer, receiver, mixture, recipe.schedule.steps, recipe.seed)
    checks = FusedBatches(kept_back, sharer, receiver, mixture, 0).checks(64)
    torch.manual_seed(recipe.seed)
    fuser = Fuser(geometry).to(receiver.device)
    settings = {
        "geometry": asdict(geometry),
        "recipe": asdict(recipe),
        "sharer": asdict(sharer.spec.fingerprint),
        "receiver": asdict(receiver.spec.fingerprint),
        "rows": exchanges.digest,
    }
    objective = Fusing(sharer, receiver, geometry, recipe, checks)
    loop = Loop(fuser, objective, batches, recipe.schedule, settings, out)
    if loop.step == 0:
        objective.standardise(fuser, batches)
    return loop


def _fuser(module: nn.Module) -> Fuser:
    inner = getattr(module, "module", module)
    assert isinstance(inner, Fuser)
    return inner


def _packed(layer: LayerCache, plan: Plan) -> LayerCache:
    """A layer as it comes back from a plan's codecs."""

    def back(values: Tensor, name: str) -> Tensor:
        flat = values.flatten(0, 1)
        return codec(name).simulated(flat).view_as(values).to(values.dtype)

    return replace(layer, keys=back(layer.keys, plan.keys), values=back(layer.values, plan.values))


def _dropped(layer: LayerCache, batch: FusedBatch, plan: Plan, pairs: Pairs, columns: Tensor) -> Tensor:
    """Which pairs' sharer tokens a plan's token policy leaves out, bool ``[pairs]``; it chooses from the aligned tokens
    of each row, of which there is at least one."""
    positions = torch.full_like(layer.positions, PADDING)
    theirs = batch.lent.theirs + torch.tensor(batch.begins)[batch.lent.rows]
    positions[batch.lent.rows, theirs] = theirs
    held = replace(layer, positions=positions)
    counts = [kept_count(plan.keep, int(count)) for count in (positions != PADDING).sum(dim=1)]
    kept = plan.choose(held, counts).positions
    there = torch.zeros(positions.shape, dtype=torch.bool)
    there[torch.arange(len(kept))[:, None].expand_as(kept), kept.clamp(min=0)] = True
    return sent(~there[pairs.rows, columns], layer.keys.device)


def _accuracy(batch: FusedBatch, entropies: Tensor) -> float:
    """Share of the questions whose right answer is the most likely one, by likelihood a character."""
    sums = [float(one.sum()) for one in torch.split(entropies, [len(answer) for answer in batch.answers])]
    best: dict[int, tuple[float, bool]] = {}
    for question, total, length, right in zip(batch.questions, sums, batch.lengths, batch.right, strict=True):
        best[question] = min(best.get(question, (float("inf"), False)), (total / max(length, 1), right))
    return sum(right for _, right in best.values()) / len(best)
