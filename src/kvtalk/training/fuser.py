"""Train a fuser: both models frozen, the receiver answers from its own cache, enriched by the sharer's.

Both read the same prompt; the loss is the cross-entropy of the answer, and of multiple choice that of the right option
among all, by likelihood a character, as they are compared in evaluations: what it is worth to know the words alone is
common to all options. Some rows give the sharer a context that the receiver does not see, which only the sharer's cache
can tell it. Gates begin soft and noisy and end as they are at inference (arXiv 2510.03215, with logistic noise). The
packet's codec and token policy may stand in the loop.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from kvtalk.adapters.enriched import Addition, placed_but_last
from kvtalk.adapters.fuser import Fuser, FuserGeometry
from kvtalk.adapters.slots import Slots, averaged, bare_layers, own_vectors, read_by, read_of, taken
from kvtalk.cache import PADDING, KVCache, LayerCache
from kvtalk.codecs import codec
from kvtalk.device import sent
from kvtalk.errors import TrainingError
from kvtalk.models import LM
from kvtalk.planning import Plan
from kvtalk.selection.tokens import FORETOLD, kept_count
from kvtalk.training.exchanges import Exchanges, FusedBatch, FusedBatches, Mixture
from kvtalk.training.loop import GAIN, Loop, Schedule, weights_of
from kvtalk.training.losses import token_losses
from kvtalk.training.rounding import rounded

KEPT_BACK = 0.04
"""Share of the rows for validation."""

_FITTED_ON = 2
"""Batches of each kind from which means and deviations are taken, of the first :data:`_SEEN`."""
_SEEN = 16

_COLDEST = 1e-3
"""Of the gates, as in the paper."""

_IN_WORDS = "oracle", "running", "instructions"
"""Kinds of rows whose answers are not compared with others."""
_COMPARED = {"choices": "", "known": "known "}
"""The other kinds, and how their figures' names begin."""

SHARPNESS = 8.0
"""Options are compared by this times their log-likelihood a character."""
_WORDS = 0.1
"""Weight of the right option's own words where options are compared."""


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
        self._before = self._versions()
        self.plan = None if recipe.plan is None else replace(Plan.parse(recipe.plan, recipe.seed), rope=geometry.rope)
        if self.plan is not None and self.plan.tokens in FORETOLD:
            raise TrainingError(f"{self.plan.tokens} is fitted to a trained fuser: train with another token policy")
        for lm in (sharer, receiver):
            lm.model.requires_grad_(False)
        _ = receiver.unembedding  # refuses a receiver that cannot be trained for, before anything is read
        self.slots = Slots(range(geometry.slots), receiver.spec, geometry.rope, receiver.device)

    def losses(self, module: nn.Module, batch: FusedBatch, step: int) -> dict[str, Tensor]:
        """See :func:`answers_loss`."""
        total = answers_loss(self.receiver, *self._states(module, batch), batch)
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
        share of right answers, by likelihood a character, and how surely the right one is chosen, nats; where only the
        sharer knows the context, their names begin with ``known``.

        Wrong is another question's; where only the sharer reads a context, the same question's with another context.
        ``gain`` is by how much the right cache's losses are below the lower one of wrong and zeroed, nats, mean of the
        kinds, of rows that have a wrong one; of multiple choice the preference counts. Rows of a kind count alike.

        Raises:
            TrainingError: one of the models has changed.
        """
        if self._before != self._versions():
            raise TrainingError("a model that is not to be trained has changed: what is measured would be another one")
        fuser = _fuser(module)
        fuser.eval()
        found: dict[str, list[tuple[float, int]]] = {}
        guided: dict[str, list[tuple[float, int]]] = {}
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
                    total, entropies = self.answered(used, lent, zeroed=name == " zeroed")
                    for figure, value in figures_of(batch, total, entropies).items():
                        for figures in (found,) if wrong is None else (found, guided):
                            figures.setdefault(f"{figure}{name}", []).append((value, len(batch.receiver)))
        finally:
            fuser.train()
        among = means_of(guided)
        preferences = (f"{begin}preference" for begin in _COMPARED.values())
        guides = [guide for guide in (*preferences, *_IN_WORDS) if guide in among]
        gains = [min(among[f"{guide} wrong"], among[f"{guide} zeroed"]) - among[guide] for guide in guides]
        gain = {GAIN: sum(gains) / len(gains)} if gains else {}
        return {"gates open": float(fuser.is_open.float().mean()), **gain, **means_of(found)}

    def standardise(self, fuser: Fuser, batches: FusedBatches) -> None:
        """Take the channels' means and deviations from the first batches."""
        taught: dict[str, list[FusedBatch]] = {}
        for number in range(min(_SEEN, len(batches))):
            batch = batches[number, 0]
            taught.setdefault(batch.kind, []).append(batch)
        some = [batch for listed in taught.values() for batch in listed[:_FITTED_ON]]
        both = [self.vectors(batch) for batch in some]
        fuser.standardise(torch.cat([one for one, _ in both], 1), torch.cat([own for _, own in both], 1))

    def vectors(self, batch: FusedBatch) -> tuple[Tensor, Tensor]:
        """The sharer's keys and values of aligned tokens as they would arrive, and the receiver's own, each
        ``[slots, tokens, width]``."""
        return self._theirs(batch)[0], self.own(batch)[1]

    def received(self, batch: FusedBatch) -> tuple[Tensor, Tensor]:
        """The sharer's keys and values of every entry of the aligned tokens as they would arrive,
        ``[slots, entries, width]``, and which of them do not, by the token policy, bool ``[slots, entries]``."""
        cache, _ = self.sharer.read_whole(batch.sharer)
        wanted = sorted(set(self.geometry.layers))
        layers = bare_layers(cache, self.sharer.spec, self.geometry, wanted)
        pairs, slots = batch.pairs, read_of(self.geometry, self.slots.which)
        columns = pairs.theirs + torch.tensor(batch.begins)[pairs.rows]
        missing = torch.zeros(len(slots), len(columns), dtype=torch.bool)
        if self.plan is not None:
            first, *others = layers.values()
            joined = first.stacked(others)  # the rows of all layers: as many operations whatever their number
            kept = _kept(joined, batch, self.plan)
            read = torch.tensor([wanted.index(index) for index, _ in slots])[:, None]
            missing = ~kept.view(len(wanted), -1, kept.shape[1])[read, pairs.rows, columns]
            keys, values = _packed(joined.keys, kept, self.plan.keys), _packed(joined.values, kept, self.plan.values)
            parts = zip(wanted, keys.chunk(len(wanted)), values.chunk(len(wanted)), strict=True)
            layers = {index: LayerCache(key, value, first.positions) for index, key, value in parts}
        rows, columns = sent(torch.stack([pairs.rows, columns]), self.receiver.device)
        return taken(read_by(layers, slots), self.slots.places, rows, columns), sent(missing, self.receiver.device)

    def own(self, batch: FusedBatch) -> tuple[KVCache, Tensor]:
        """The receiver's cache of the prompts, and its keys and values of the tokens that are enriched,
        ``[slots, tokens, width]``."""
        cache, _ = self.receiver.read_whole(batch.receiver)
        pairs = batch.pairs.once()[0].to(self.receiver.device)
        return cache, own_vectors(cache.stacked(), pairs, self.slots, self.slots.angles(pairs.ours))

    def answered(self, module: nn.Module | None, batch: FusedBatch, *, zeroed: bool = False) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of right answers with all rows alike, and that of every answer's token."""
        return answers_of(self.receiver, *self._states(module, batch, zeroed=zeroed), batch)

    def _states(self, module: nn.Module | None, batch: FusedBatch, *, zeroed: bool = False) -> tuple[Tensor, Tensor]:
        """The receiver's hidden states before every answer's token, ``[tokens, hidden]``, and these tokens."""
        cache, ours = self.own(batch)
        additions = []
        if module is not None:
            theirs, missing = self._theirs(batch)
            added = module(torch.zeros_like(theirs) if zeroed else theirs, ours)
            pairs = batch.pairs.once()[0].to(self.receiver.device)
            angles = self.slots.angles(pairs.ours)
            added = self.slots.turned(added.masked_fill(missing[:, :, None], 0), angles)
            additions.append(Addition(pairs, self.slots.places, added, self.geometry.last))
        placed = placed_but_last(self.receiver, cache, cache.stacked(), additions, self.geometry.last)
        hidden = self.receiver.states(batch.tails, placed.rows(batch.prompts))
        longest = hidden.shape[1]  # padded on the left
        counts = [len(answer) for answer in batch.answers]
        where = [row * longest + place for row, n in enumerate(counts) for place in range(longest - n, longest)]
        states = hidden.flatten(0, 1)[sent(torch.tensor(where), hidden.device)]
        labels = torch.tensor([token for answer in batch.answers for token in answer])
        return states, sent(labels, states.device)

    def _versions(self) -> list[tuple[int, int]]:
        """Of every parameter of both models where it lies and how often it was written."""
        models = (self.sharer.model, self.receiver.model)
        return [(one.data_ptr(), one._version) for model in models for one in model.parameters()]

    def _theirs(self, batch: FusedBatch) -> tuple[Tensor, Tensor]:
        """The same of every receiver token, ``[slots, tokens, width]`` and ``[slots, tokens]``."""
        once, owners = batch.pairs.once()
        return averaged(*self.received(batch), sent(owners, self.receiver.device), len(once.rows))


def answers_loss(lm: LM, states: Tensor, labels: Tensor, batch: FusedBatch) -> Tensor:
    """Cross-entropy of the answers, nats a token, every row alike; where options are compared, that of the right one
    among them, and a little of its words'.

    Args:
        lm: the model that answers.
        states: its hidden states before every answer's token, ``[tokens, hidden]``.
        labels: these tokens.
        batch: what was asked.
    """
    unembedding, compared = lm.unembedding, len(batch.receiver) < len(batch.answers)
    weights = _told(batch, _WORDS)
    if compared:
        with torch.no_grad():
            nothing = torch.zeros(2, len(labels), device=labels.device)
            _, _, entropies = token_losses(unembedding, states.detach(), None, labels, nothing)
        preferred, pulls = _preference(batch, entropies)
        weights = weights + pulls
    total, _, _ = token_losses(unembedding, states, None, labels, _both(weights, states))
    if compared:  # what it weighs the tokens by is of this step; what it is worth is the loss
        words = total.detach() - (pulls.to(labels.device) * entropies).sum()
        total = total + (preferred + words - total).detach()
    return total


def answers_of(lm: LM, states: Tensor, labels: Tensor, batch: FusedBatch) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of right answers with all rows alike, and that of every answer's token; see
    :func:`answers_loss`."""
    total, _, entropies = token_losses(lm.unembedding, states, None, labels, _both(_told(batch), states))
    return total, entropies


def figures_of(batch: FusedBatch, total: Tensor, entropies: Tensor) -> dict[str, float]:
    """What a validation writes down of a batch: its loss by the kind of its rows, and where options are compared the
    share of right answers (``accuracy``) and how surely the right one is chosen (``preference``)."""
    chosen = _chosen(batch, entropies, _COMPARED[batch.kind]) if batch.kind in _COMPARED else {}
    return {batch.kind: float(total), **chosen}


def training(
    sharer: LM,
    receiver: LM,
    exchanges: Exchanges,
    geometry: FuserGeometry,
    recipe: FuserRecipe,
    out: Path,
    checks: int = 64,
    patience: int = 0,
    trained: Path | None = None,
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
        patience: see :class:`kvtalk.training.loop.Loop`; what counts is the sharer's own gain, see
            :meth:`Fusing.measure`.
        trained: folder of an earlier run, from whose weights to start. Give the same rows, or what is kept back for
            validation may be what that run was trained on.

    Raises:
        TrainingError: the folder holds a run of other settings, the earlier run has another pair or fuser, or no row
            is of a kind that has a share.
    """
    learned, kept_back = exchanges.split(KEPT_BACK)
    recipe.mixture.check(learned)
    batches = FusedBatches(learned, sharer, receiver, recipe.mixture, geometry, recipe.schedule.steps, recipe.seed)
    checked = FusedBatches(kept_back, sharer, receiver, recipe.mixture, geometry, 0).checks(checks)
    torch.manual_seed(recipe.seed)
    fuser = Fuser(geometry).to(receiver.device)
    settings: dict[str, Any] = {
        "geometry": asdict(geometry),
        "recipe": asdict(recipe),
        "sharer": asdict(sharer.spec.fingerprint),
        "receiver": asdict(receiver.spec.fingerprint),
        "rows": exchanges.digest,
    }
    begun = None if trained is None else weights_of(trained, settings, ("geometry", "sharer", "receiver"))
    settings["trained"] = begun and begun.digest
    objective = Fusing(sharer, receiver, geometry, recipe, checked)
    loop = Loop(fuser, objective, batches, recipe.schedule, settings, out, patience)
    if loop.step == 0 and begun is not None:
        begun.into(fuser)
    elif loop.step == 0:
        objective.standardise(fuser, batches)
    return loop


def _fuser(module: nn.Module) -> Fuser:
    inner = getattr(module, "module", module)
    assert isinstance(inner, Fuser)
    return inner


def _packed(tensor: Tensor, kept: Tensor, packing: str) -> Tensor:
    """Keys or values whose kept tokens are as they come back from a codec, each row by itself.

    All rows in one go where a token does not depend on others; where scales span a packet's tokens, those that keep as
    many.

    Args:
        tensor: ``[rows, kv_heads, tokens, head_dim]``.
        kept: bool ``[rows, tokens]``.
        packing: name of the codec.
    """
    packer, counts = codec(packing), kept.sum(dim=1, keepdim=True)
    groups = [kept] if packer.by_token else [kept & (counts == count) for count in torch.unique(counts)]
    back = tensor.clone()
    for group in groups:
        rows, columns = sent(group.nonzero().T, tensor.device)
        sequences = 1 if packer.by_token else int(group.any(dim=1).sum())
        found = tensor.transpose(1, 2)[rows, columns]
        values = found.view(sequences, -1, *found.shape[1:]).transpose(1, 2)
        made = packer.simulated(values.flatten(0, 1)).view(values.shape).transpose(1, 2).flatten(0, 1)
        back.transpose(1, 2)[rows, columns] = made.to(tensor.dtype)
    return back


def _kept(layer: LayerCache, batch: FusedBatch, plan: Plan) -> Tensor:
    """Which tokens would cross, bool ``[rows, tokens]``; a plan's token policy chooses from the aligned ones of each
    row, of which there is at least one.

    Args:
        layer: of the sharer's cache of the batch; of several layers the rows of each follow each other.
        batch: whose aligned tokens.
        plan: which chooses.
    """
    theirs = batch.lent.theirs + torch.tensor(batch.begins)[batch.lent.rows]
    positions = torch.full((len(batch.sharer), layer.tokens), PADDING)
    positions[batch.lent.rows, theirs] = theirs
    positions = positions.repeat(len(layer.positions) // len(positions), 1)
    counts = [kept_count(plan.keep, count) for count in (positions != PADDING).sum(dim=1).tolist()]
    kept = plan.choose(replace(layer, positions=positions), counts).positions
    there = torch.zeros(positions.shape, dtype=torch.bool)
    there[torch.arange(len(kept))[:, None].expand_as(kept), kept.clamp(min=0)] = True
    return there & (positions != PADDING)


def means_of(figures: dict[str, list[tuple[float, int]]]) -> dict[str, float]:
    """Means of values that stand for so many rows each."""
    return {name: sum(value * n for value, n in listed) / sum(n for _, n in listed) for name, listed in figures.items()}


def _told(batch: FusedBatch, compared: float = 1.0) -> Tensor:
    """Weights of the answers' tokens, by which right answers count alike, ``[tokens]``.

    Args:
        batch: whose answers.
        compared: weight of those that are compared with others.
    """
    told, asked = sum(batch.right), Counter(batch.prompts)
    each = [
        ok * (compared if asked[prompt] > 1 else 1.0) / (len(answer) * told)
        for answer, ok, prompt in zip(batch.answers, batch.right, batch.prompts, strict=True)
    ]
    return torch.tensor([weight for weight, answer in zip(each, batch.answers, strict=True) for _ in answer])


def _both(weights: Tensor, states: Tensor) -> Tensor:
    """For :func:`kvtalk.training.losses.token_losses`: no divergence, and these entropies."""
    return sent(torch.stack([torch.zeros_like(weights), weights]), states.device)


@dataclass(frozen=True)
class _Option:
    """An answer to a question: its number in the batch, characters, cross-entropy in nats, and whether it is right."""

    row: int
    characters: int
    entropy: float
    right: bool


def _options(batch: FusedBatch, entropies: Tensor) -> list[list[_Option]]:
    """The answers to each question that has several, of which one is right."""
    counts = [len(answer) for answer in batch.answers]
    sums = [float(one.sum()) for one in torch.split(entropies.cpu(), counts)]
    asked: dict[int, list[_Option]] = {}
    columns = zip(batch.prompts, batch.lengths, sums, batch.right, strict=True)
    for row, (prompt, length, total, right) in enumerate(columns):
        asked.setdefault(prompt, []).append(_Option(row, max(length, 1), total, right))
    return [listed for listed in asked.values() if len(listed) > 1 and any(one.right for one in listed)]


def _preference(batch: FusedBatch, entropies: Tensor) -> tuple[float, Tensor]:
    """Mean cross-entropy of the right option among all, by likelihood a character, nats; and its derivative by every
    token's cross-entropy, ``[tokens]``."""
    asked, pulls, total = _options(batch, entropies), [0.0] * len(batch.answers), 0.0
    for listed in asked:
        logs = torch.tensor([-SHARPNESS * one.entropy / one.characters for one in listed]).log_softmax(0)
        for one, log in zip(listed, logs.tolist(), strict=True):
            total -= log * one.right / len(asked)
            pulls[one.row] = SHARPNESS / one.characters * (one.right - math.exp(log)) / len(asked)
    spread = [pull for pull, answer in zip(pulls, batch.answers, strict=True) for _ in answer]
    return total, torch.tensor(spread)


def _chosen(batch: FusedBatch, entropies: Tensor, begin: str = "") -> dict[str, float]:
    """``accuracy``: share of the questions whose right answer is the most likely one, by likelihood a character.
    ``preference``: see :func:`_preference`. The names begin as given."""
    asked = _options(batch, entropies)
    best = [min(listed, key=lambda one: one.entropy / one.characters) for listed in asked]
    accuracy = sum(one.right for one in best) / len(best)
    return {f"{begin}accuracy": accuracy, f"{begin}preference": _preference(batch, entropies)[0]}
