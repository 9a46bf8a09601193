"""Train a fuser: both models frozen, the receiver answers from its own cache, enriched by the sharer's.

Both read the same prompt; the loss is the cross-entropy of the answer. Some rows give the sharer a context that the
receiver does not see, which only the sharer's cache can tell it. Gates begin soft and noisy and end as they are at
inference (arXiv 2510.03215, with logistic noise). The packet's codec and token policy may stand in the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor, nn

from kvtalk.adapters.fuser import Fuser, FuserGeometry
from kvtalk.adapters.fusing import Addition, bare_layers, enriched, own_vectors, taken
from kvtalk.cache import PADDING, KVCache, LayerCache
from kvtalk.codecs import codec
from kvtalk.device import sent
from kvtalk.models import LM
from kvtalk.placement import PlacedCache, PlacedLayer
from kvtalk.planning import Plan
from kvtalk.selection.tokens import kept_count
from kvtalk.training.exchanges import Exchanges, FusedBatch, FusedBatches, Mixture
from kvtalk.training.loop import Loop, Schedule
from kvtalk.training.losses import token_losses
from kvtalk.training.rounding import rounded

KEPT_BACK = 0.04
"""Share of the rows for validation."""

_FITTED_ON = 2
"""Batches of each kind from which means and deviations are taken, of the first :data:`_SEEN`."""
_SEEN = 16

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
        self,
        sharer: LM,
        receiver: LM,
        geometry: FuserGeometry,
        recipe: FuserRecipe,
        checks: Sequence[tuple[FusedBatch, FusedBatch | None]],
    ) -> None:
        self.sharer, self.receiver, self.geometry, self.recipe, self.checks = sharer, receiver, geometry, recipe, checks
        self.plan = None if recipe.plan is None else replace(Plan.parse(recipe.plan, recipe.seed), rope=geometry.rope)
        for lm in (sharer, receiver):
            lm.model.requires_grad_(False)
        _ = receiver.unembedding  # refuses a receiver that cannot be trained for, before anything is read
        self.slots = tuple(range(geometry.slots))

    def losses(self, module: nn.Module, batch: FusedBatch, step: int) -> dict[str, Tensor]:
        """Cross-entropy of the answers, nats a token, every row alike."""
        total, _ = self._answered(module, batch)
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
        """Answers' loss on kept-back rows with the right sharer cache, wrong, zeroed and none; for multiple choice the
        share of right answers, by likelihood a character, and how surely the right one is chosen, nats.

        Wrong is another question's; where only the sharer reads a context, the same question's with another context.
        """
        fuser = _fuser(module)
        fuser.eval()
        found: dict[str, list[float]] = {}
        try:
            for batch, wrong in self.checks:
                ways = {
                    "": (fuser, batch),
                    " wrong": (fuser, wrong),
                    " zeroed": (fuser, batch),
                    " alone": (None, batch),
                }
                for name, (used, lent) in ways.items():
                    if lent is None:
                        continue
                    total, entropies = self._answered(used, lent, zeroed=name == " zeroed")
                    measured = {batch.kind: float(total)}
                    if batch.kind == "choices":
                        measured |= _chosen(batch, entropies)
                    for figure, value in measured.items():
                        found.setdefault(f"{figure}{name}", []).append(value)
        finally:
            fuser.train()
        means = {name: sum(values) / len(values) for name, values in found.items()}
        return {"gates open": float(fuser.is_open.float().mean()), **means}

    def standardise(self, fuser: Fuser, batches: FusedBatches) -> None:
        """Take the channels' means and deviations from the first batches."""
        taught: dict[str, list[FusedBatch]] = {}
        for number in range(min(_SEEN, len(batches))):
            batch = batches[number, 0]
            taught.setdefault(batch.kind, []).append(batch)
        some = [batch for listed in taught.values() for batch in listed[:_FITTED_ON]]
        both = [(self._theirs(batch)[0], self._ours(batch)[1]) for batch in some]
        fuser.standardise(torch.cat([one for one, _ in both], 1), torch.cat([own for _, own in both], 1))

    def _answered(self, module: nn.Module | None, batch: FusedBatch, *, zeroed: bool = False) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of right answers with all rows alike, and that of every answer's token."""
        spec = self.receiver.spec
        cache, ours = self._ours(batch)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        if module is not None:
            theirs, missing = self._theirs(batch)
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

    def _theirs(self, batch: FusedBatch) -> tuple[Tensor, Tensor | None]:
        """The sharer's keys and values of aligned tokens as they would arrive, ``[slots, tokens, width]``, and which of
        them the token policy leaves out, bool ``[slots, tokens]``."""
        cache, _ = self.sharer.read_whole(batch.sharer)
        wanted = sorted(set(self.geometry.layers))
        layers = bare_layers(cache, self.sharer.spec, self.geometry, wanted)
        pairs, slots = batch.pairs, [(self.geometry.layers[slot // 2], slot % 2) for slot in self.slots]
        columns = pairs.theirs + torch.tensor(batch.begins)[pairs.rows]
        missing = None
        if self.plan is not None:
            kept = {index: _kept(layer, batch, self.plan) for index, layer in layers.items()}
            missing = torch.stack([~kept[index][pairs.rows, columns] for index, _ in slots])
            missing = sent(missing, self.receiver.device)
            layers = {index: _packed(layer, kept[index], self.plan) for index, layer in layers.items()}
        return torch.stack([taken(layers[index], kind, pairs.rows, columns) for index, kind in slots]), missing


def training(
    sharer: LM,
    receiver: LM,
    exchanges: Exchanges,
    geometry: FuserGeometry,
    recipe: FuserRecipe,
    out: Path,
    checks: int = 64,
) -> Loop:
    """A run that trains a fuser, ready to start or to go on.

    Args:
        sharer: lends its cache.
        receiver: answers.
        exchanges: to train and validate on.
        geometry: of the fuser.
        recipe: how.
        out: folder for checkpoints and the log; a run in it is continued.
        checks: kept-back rows of each kind to validate on.

    Raises:
        TrainingError: the folder holds a run of other settings.
    """
    learned, kept_back = exchanges.split(KEPT_BACK)
    mixture = replace(recipe.mixture, alignment=geometry.alignment)
    batches = FusedBatches(learned, sharer, receiver, mixture, recipe.schedule.steps, recipe.seed)
    checked = FusedBatches(kept_back, sharer, receiver, mixture, 0).checks(checks)
    torch.manual_seed(recipe.seed)
    fuser = Fuser(geometry).to(receiver.device)
    settings = {
        "geometry": asdict(geometry),
        "recipe": asdict(recipe),
        "sharer": asdict(sharer.spec.fingerprint),
        "receiver": asdict(receiver.spec.fingerprint),
        "rows": exchanges.digest,
    }
    objective = Fusing(sharer, receiver, geometry, recipe, checked)
    loop = Loop(fuser, objective, batches, recipe.schedule, settings, out)
    if loop.step == 0:
        objective.standardise(fuser, batches)
    return loop


def _fuser(module: nn.Module) -> Fuser:
    inner = getattr(module, "module", module)
    assert isinstance(inner, Fuser)
    return inner


def _packed(layer: LayerCache, kept: Tensor, plan: Plan) -> LayerCache:
    """A layer whose kept tokens (bool ``[rows, tokens]``) are as they come back from a plan's codecs, row by row: a
    codec's scales may span a packet's tokens, and are of these alone."""
    both = {"keys": (layer.keys, plan.keys), "values": (layer.values, plan.values)}
    made = {}
    for name, (tensor, packing) in both.items():
        back = tensor.clone()
        for row, which in enumerate(kept):
            there = sent(which.nonzero()[:, 0], tensor.device)
            back[row, :, there] = codec(packing).simulated(tensor[row, :, there]).to(tensor.dtype)
        made[name] = back
    return replace(layer, **made)


def _kept(layer: LayerCache, batch: FusedBatch, plan: Plan) -> Tensor:
    """Which tokens of a layer would cross, bool ``[rows, tokens]``; a plan's token policy chooses from the aligned ones
    of each row, of which there is at least one."""
    positions = torch.full_like(layer.positions, PADDING)
    theirs = batch.lent.theirs + torch.tensor(batch.begins)[batch.lent.rows]
    positions[batch.lent.rows, theirs] = theirs
    held = replace(layer, positions=positions)
    counts = [kept_count(plan.keep, int(count)) for count in (positions != PADDING).sum(dim=1)]
    kept = plan.choose(held, counts).positions
    there = torch.zeros(positions.shape, dtype=torch.bool)
    there[torch.arange(len(kept))[:, None].expand_as(kept), kept.clamp(min=0)] = True
    return there & (positions != PADDING)


def _chosen(batch: FusedBatch, entropies: Tensor) -> dict[str, float]:
    """``accuracy``: share of the questions whose right answer is the most likely one, by likelihood a character.
    ``preference``: mean cross-entropy of the right one among the options, by their whole likelihoods, nats."""
    sums = [float(one.sum()) for one in torch.split(entropies, [len(answer) for answer in batch.answers])]
    options: dict[int, list[tuple[float, float, bool]]] = {}
    for question, total, length, right in zip(batch.questions, sums, batch.lengths, batch.right, strict=True):
        options.setdefault(question, []).append((total / max(length, 1), total, right))
    asked = [listed for listed in options.values() if any(right for _, _, right in listed)]
    accuracy = sum(min(listed)[2] for listed in asked) / len(asked)
    losses = []
    for listed in asked:
        logs = torch.tensor([-total for _, total, _ in listed]).log_softmax(0)
        losses.append(-float(next(log for log, (_, _, right) in zip(logs, listed, strict=True) if right)))
    return {"accuracy": accuracy, "preference": sum(losses) / len(losses)}
