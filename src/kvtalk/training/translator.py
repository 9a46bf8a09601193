"""Train a translator: both models frozen, an encoder and a decoder between their caches.

First the receiver's own keys and values are regressed, which needs no backward pass through the receiver. Then the
receiver must write after the translated cache what it writes after the text itself (KL), and answer questions
(cross-entropy; with a teacher, a fine-tuned receiver that reads the text, half of that is KL to what it answers). Each
step cuts the latents to a width and packs them with a codec drawn by chance, so that one
translator serves every budget. (Recipe: docs/translator.md.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvtalk.adapters.cards import PARTS, read_card
from kvtalk.adapters.store import Half
from kvtalk.adapters.translator import (
    Encoder,
    Geometry,
    Translator,
    by_name,
    grouped,
    last_tokens,
    latent_count,
    squeezed,
)
from kvtalk.adapters.vectors import from_vectors, to_vectors
from kvtalk.cache import PADDING, KVCache
from kvtalk.device import sent
from kvtalk.errors import AdapterError, TrainingError
from kvtalk.models import LM
from kvtalk.placed import PlacedCache, PlacedLayer
from kvtalk.rope import rotate_layers
from kvtalk.training.batches import Batch, Batches, Recipe
from kvtalk.training.linear import begin_decoder, begin_encoder, begin_linear
from kvtalk.training.loop import CHECKPOINT, Loop, Weights, same_settings, weights_of
from kvtalk.training.losses import token_losses
from kvtalk.training.rounding import rounded
from kvtalk.training.texts import Texts

KEPT_BACK = 0.03
"""Share of the texts for validation."""

FOLLOWED = 0.5
"""Share of an answer's loss that is the divergence from a teacher's, if there is one; cross-entropy is the rest."""

_FITTED_ON = 8
"""Batches from which the start is computed."""


class Pair:
    """Two frozen models and what a translator between them, of so many tokens a latent, is trained on.

    Args:
        sharer: reads.
        receiver: answers.
        pool: receiver tokens a latent.
        teacher: the receiver, fine-tuned to answer from the text; its answers are followed as it gives them.

    Raises:
        TrainingError: the teacher has another tokenizer or output matrix than the receiver.
    """

    def __init__(self, sharer: LM, receiver: LM, pool: int = 1, teacher: LM | None = None) -> None:
        self.sharer, self.receiver, self.pool, self.teacher = sharer, receiver, pool, teacher
        for lm in filter(None, (sharer, receiver, teacher)):
            lm.model.requires_grad_(False)
        matrix = receiver.unembedding  # refuses a receiver that cannot be trained for, before anything is read
        if teacher is not None and not (
            teacher.spec.fingerprint.tokenizer == receiver.spec.fingerprint.tokenizer
            and teacher.head_ids() == receiver.head_ids()
            and torch.equal(teacher.unembedding.weight, matrix.weight)
        ):
            raise TrainingError(
                f"the teacher {teacher.name} has another tokenizer, prompt or output matrix than the receiver "
                f"{receiver.name}: give a LoRA of the receiver (kvtalk train lora)"
            )
        self._heads: dict[tuple[int, ...], KVCache] = {}

    def sharer_vectors(self, batch: Batch) -> Tensor:
        """``[batch, sharer tokens, sharer_values]``."""
        return to_vectors(self.sharer.read_whole(batch.sharer)[0], self.sharer.spec, batch.start)

    @torch.no_grad()
    def taught(self, batch: Batch, tails: bool) -> tuple[Tensor, Tensor | None]:
        """The receiver that reads the text: its vectors of the context, and its last layer's hidden states of the
        tails' tokens, if it reads these; of answers those of the teacher, if there is one.

        Returns:
            ``[batch, tokens, receiver_values]`` and ``[tokens of all tails, hidden]``.
        """
        follow = batch.tails if tails else [[]] * len(batch.tails)
        before = [batch.head + context for context in batch.receiver]
        cache, hidden = self.receiver.read_whole([*map(list.__add__, before, follow)])
        vectors = to_vectors(cache, self.receiver.spec, len(batch.head))[:, : batch.pairing.index.shape[1]]
        if not tails:
            return vectors, None
        where = sent(_flat([len(row) for row in before], follow, hidden.shape[1]), hidden.device)
        wanted = hidden.flatten(0, 1)[where]
        if self.teacher is not None and any(batch.answers):
            answered = self.teacher.read_whole([*map(list.__add__, before, follow)])[1].flatten(0, 1)[where]
            wanted = torch.where(sent(_labels(batch)[1], wanted.device)[:, None], answered, wanted)
        return vectors, wanted

    def continued(self, batch: Batch, vectors: Tensor, shift: int = 0) -> Tensor:
        """The receiver's hidden states of the tails' tokens, ``[tokens of all tails, hidden]``, with translated vectors
        in the text's place.

        Args:
            batch: whose tails to read.
            vectors: in the contexts' place, ``[batch, latents, receiver_values]``.
            shift: rows by which these were rolled; they keep their own lengths.
        """
        spec, head = self.receiver.spec, self._head(batch.head)
        counts = batch.pairing.counts.roll(shift)
        cache = from_vectors(vectors.to(spec.dtype), latent_count(counts, self.pool), spec)
        begin, rows = len(batch.head), len(batch.receiver)
        places = last_tokens(cache.layers[0].positions, counts, self.pool)
        places = torch.where(places == PADDING, PADDING, places + begin)
        positions = torch.cat([torch.arange(begin).expand(rows, -1), places], dim=1)
        ropes = [shape.rope for shape in spec.layers]
        turned = rotate_layers([layer.keys for layer in cache.layers], ropes, sent(places, vectors.device))
        layers = []
        for index, (keys, layer) in enumerate(zip(turned, cache.layers, strict=True)):
            values = layer.values
            if head is not None:
                own = head.layers[index]
                keys = torch.cat([own.keys.expand(rows, -1, -1, -1), keys], dim=2)
                values = torch.cat([own.values.expand(rows, -1, -1, -1), values], dim=2)
            layers.append(PlacedLayer(keys, values, keys.shape[2]))
        ends = sent(counts + begin, vectors.device)
        placed = PlacedCache(layers, [positions] * len(layers), ends, spec)
        hidden = self.receiver.states(batch.tails, placed)
        longest = hidden.shape[1]
        where = _flat([longest - len(tail) for tail in batch.tails], batch.tails, longest)
        return hidden.flatten(0, 1)[sent(where, hidden.device)]

    def losses(self, states: Tensor, wanted: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Divergence from the receiver that read the text, and cross-entropy of answers, mean nats a token.

        Where an answer is to be written, the divergence counts only if a teacher gives it: the receiver as it is
        answers worse than the gold answer does. Gradients flow through the sum, ``total``.
        """
        labels, told = _labels(batch)
        plain, answering = sent(torch.stack([~told / (~told).sum(), told / told.sum().clamp(min=1)]), states.device)
        followed = 0.0 if self.teacher is None else FOLLOWED
        weights = torch.stack([plain + followed * answering, (1 - followed) * answering])
        labels = sent(labels, states.device)
        total, divergences, entropies = token_losses(self.receiver.unembedding, states, wanted, labels, weights)
        found = {"divergence": (divergences * plain).sum(), "total": total}
        if any(batch.answers):
            found["answers"] = (entropies * answering).sum()
            if self.teacher is not None:
                found["teacher"] = (divergences * answering).sum()
        return found

    def _head(self, ids: list[int]) -> KVCache | None:
        key = tuple(ids)
        if key and key not in self._heads:
            self._heads[key] = self.receiver.read_whole([ids])[0]
        return self._heads.get(key)


class Translation:
    """What a translator learns; see :class:`kvtalk.training.loop.Objective`."""

    def __init__(self, pair: Pair, translator: Translator, recipe: Recipe, checks: Sequence[Batch]) -> None:
        self.pair, self.recipe, self.checks = pair, recipe, checks
        self.decoder = translator.decoder

    def losses(self, module: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """Regression (mean squared error of standardised channels), and nats a token."""
        target, wanted = self.pair.taught(batch, tails=not self.recipe.regresses(step))
        theirs = self.pair.sharer_vectors(batch)
        standard = module(theirs, batch.pairing.to(theirs.device), batch.width, batch.codec).float()
        regression = self._regression(standard, target, batch, every=1 if wanted is None else 4)
        if wanted is None:
            return {"regression": regression, "total": regression}
        found = self.pair.losses(self.pair.continued(batch, self._vectors(standard)), wanted, batch)
        weight = self.recipe.regression_weight if self.pair.pool == 1 else 0.0  # a group's mean is no target to keep
        total = found["total"] + weight * regression
        return {**found, "regression": regression, "total": total}

    @contextmanager
    def during(self, module: nn.Module, step: int) -> Iterator[None]:
        """In the last steps matrices are as the adapter's file will hold them; their gradients move the exact ones."""
        recipe = self.recipe
        late = step >= (1 - recipe.packed) * recipe.schedule.steps
        with rounded(module, recipe.packing if late else None):
            yield

    @torch.no_grad()
    def measure(self, module: nn.Module) -> dict[str, float]:
        """Divergence and answers' loss on kept-back texts, with the right latents, narrow, wrong and zeroed ones."""
        found: dict[str, list[float]] = {}
        for batch in self.checks:
            for name, value in self._measured(module, batch).items():
                found.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in found.items()}

    def _measured(self, module: nn.Module, batch: Batch) -> dict[str, float]:
        target, wanted = self.pair.taught(batch, tails=True)
        assert wanted is not None
        assert isinstance(module, Translator)
        found: dict[str, float] = {}
        latents = module.encoder(self.pair.sharer_vectors(batch), batch.pairing.to(target.device))
        kind = "questions" if any(batch.answers) else "text"
        if any(batch.answers):
            reader = "text" if self.pair.teacher is None else "teacher"
            found[f"nll {reader}"] = float(self.pair.losses(wanted, wanted, batch)["answers"])
        ways = {
            "": latents,
            " narrow": squeezed(latents, min(64, latents.shape[2]), "int4"),
            " wrong": latents.roll(1, dims=0),  # with its own length
            " zeroed": torch.zeros_like(latents),
        }
        for name, used in ways.items():
            standard = module.decoder.standardised(used)
            states = self.pair.continued(batch, self._vectors(standard), shift=int(name == " wrong"))
            losses = self.pair.losses(states, wanted, batch)
            found[f"kl {kind}{name}"] = float(losses["divergence"])
            if any(batch.answers):
                found[f"nll{name}"] = float(losses["answers"])
            if not name:
                found[f"mse {kind}"] = float(self._regression(standard, target, batch))
        return found

    def _vectors(self, standard: Tensor) -> Tensor:
        return torch.addcmul(self.decoder.mean, standard, self.decoder.scale)

    def _regression(self, standard: Tensor, target: Tensor, batch: Batch, every: int = 1) -> Tensor:
        """Mean squared error of every so many latents, from the mean of their tokens' vectors."""
        where = _real(batch, self.pair.pool).flatten().nonzero()[::every, 0]
        where = sent(where, standard.device)
        means = _means(target, batch, self.pair.pool)
        wanted = (means.flatten(0, 1)[where] - self.decoder.mean) / self.decoder.scale
        return (standard.flatten(0, 1)[where] - wanted).square().mean()


def training(
    sharer: LM,
    receiver: LM,
    texts: Texts,
    geometry: Geometry,
    recipe: Recipe,
    out: Path,
    trained: str | Path | None = None,
    frozen: Half | None = None,
    teacher: LM | None = None,
) -> Loop:
    """A run that trains a translator, ready to start or to go on.

    Args:
        sharer: reads.
        receiver: answers.
        texts: to train and validate on.
        geometry: of the translator.
        recipe: how.
        out: folder for checkpoints and the log; a run in it is continued.
        trained: folder of an earlier run, or an adapter, from whose weights to start instead of the best linear map.
            Give the same texts, or what is kept back for validation may be what it was trained on.
        frozen: an adapter's half that stays as it is, in its own sizes; the other one learns its latent space.
        teacher: the receiver with a LoRA; see :class:`Pair`.

    Raises:
        AdapterError: the frozen half does not fit; its weights, or those of the adapter to start from, are missing or
            damaged.
        TrainingError: the folder holds a run of other settings or the frozen half, or the earlier run or adapter is
            not there, or of another pair, frozen half, or other sizes; or the teacher is of another receiver.
    """
    if frozen is not None:
        geometry = frozen.fitted(geometry, sharer.spec, receiver.spec)
        if frozen.folder.resolve() == out.resolve():
            raise TrainingError(f"the half to build on lies in the run's own folder, {out}: give another one")
    pair = Pair(sharer, receiver, geometry.pool, teacher)
    learned, kept_back = texts.split(KEPT_BACK)
    batches = Batches(learned, sharer, receiver, recipe, geometry.latent)
    checks = Batches(kept_back, sharer, receiver, recipe, geometry.latent).checks(32)
    torch.manual_seed(recipe.seed)
    translator = Translator(geometry)
    if frozen is not None:
        setattr(translator, frozen.part, frozen.load().requires_grad_(False))
    translator.to(receiver.device)
    settings: dict[str, Any] = {
        "geometry": asdict(geometry, dict_factory=by_name),
        "recipe": asdict(recipe),
        "sharer": asdict(sharer.spec.fingerprint),
        "receiver": asdict(receiver.spec.fingerprint),
        "texts": texts.digest,
        "frozen": frozen and {frozen.part: frozen.card.weights[frozen.part]},
        "teacher": teacher and {**asdict(teacher.spec.fingerprint), "followed": FOLLOWED},
    }
    begun = None if trained is None else _begun(trained, settings)
    settings["trained"] = begun and begun.digest
    loop = Loop(translator, Translation(pair, translator, recipe, checks), batches, recipe.schedule, settings, out)
    if loop.step == 0 and begun is not None:
        begun.into(translator)
    elif loop.step == 0 and frozen is None:
        begin_linear(translator, _aligned(pair, batches))
    elif loop.step == 0 and frozen is not None and frozen.part == "decoder":
        begin_encoder(translator, _aligned(pair, batches))
    elif loop.step == 0:
        begin_decoder(translator, _aligned(pair, batches, translator.encoder))
    return loop


def _begun(trained: str | Path, settings: dict[str, Any]) -> Weights:
    """What an earlier run learned, or what an adapter holds."""
    alike = ("geometry", "sharer", "receiver", "frozen")
    if (Path(trained) / CHECKPOINT).exists():
        return weights_of(Path(trained), settings, alike)
    try:
        card, folder = read_card(trained, "translator")
    except AdapterError as error:
        raise TrainingError(f"{trained} holds no {CHECKPOINT} of an earlier run, and no adapter: {error}") from error
    frozen = settings["frozen"]
    theirs = {
        "geometry": json.loads(json.dumps(asdict(card.geometry, dict_factory=by_name))),
        "sharer": asdict(card.sharer.fingerprint),
        "receiver": asdict(card.receiver.fingerprint),
        "frozen": frozen and {part: card.weights[part] for part in frozen},
    }
    same_settings(f"the adapter {trained}", theirs, settings, alike)
    halves = {part: Half(part, card, folder).load() for part in PARTS["translator"]}
    states = {
        f"{part}.{name}": value.float() for part, half in halves.items() for name, value in half.state_dict().items()
    }
    return Weights(states, card.identity)


def _aligned(pair: Pair, batches: Batches, encoder: Encoder | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The sharer's and the receiver's vectors of the receiver's tokens of the first batches.

    With an encoder its latents instead of the sharer's, and for each the mean of the receiver's of its tokens.
    """
    for number in range(min(_FITTED_ON, len(batches))):
        batch = batches[number, 0]
        theirs, ours = pair.sharer_vectors(batch), pair.taught(batch, False)[0]
        pairing = batch.pairing.to(ours.device)
        if encoder is None:
            theirs = theirs[torch.arange(len(theirs), device=ours.device)[:, None], pairing.index]
        else:
            theirs, ours = encoder(theirs, pairing), _means(ours, batch, pair.pool)
        real = _real(batch, 1 if encoder is None else pair.pool).to(ours.device)
        yield theirs[real], ours[real]


def _labels(batch: Batch) -> tuple[Tensor, Tensor]:
    """For each token of all tails the next one, and whether that one belongs to an answer."""
    labels: list[int] = []
    told: list[bool] = []
    for tail, count in zip(batch.tails, batch.answers, strict=True):
        labels += [*tail[1:], 0]
        told += [len(tail) - count <= place + 1 < len(tail) for place in range(len(tail))]
    return torch.tensor(labels), torch.tensor(told)


def _flat(begins: Sequence[int], tails: Sequence[Sequence[int]], longest: int) -> Tensor:
    """Where the tails' tokens lie in rows of a length, one after the other."""
    places = [
        torch.arange(row * longest + begin, row * longest + begin + len(tail))
        for row, (begin, tail) in enumerate(zip(begins, tails, strict=True))
    ]
    return torch.cat(places)


def _real(batch: Batch, pool: int) -> Tensor:
    """Which latents are no padding, ``[batch, latents]``."""
    counts = latent_count(batch.pairing.counts, pool)
    return torch.arange(int(counts.max())) < counts[:, None]


def _means(vectors: Tensor, batch: Batch, pool: int) -> Tensor:
    """Of the tokens of each latent, ``[batch, latents, values]``."""
    return grouped(vectors, sent(batch.pairing.counts, vectors.device), pool).mean(dim=2)
