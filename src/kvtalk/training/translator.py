"""Train a translator: both models frozen, an encoder and a decoder between their caches.

First the receiver's own keys and values are regressed, which needs no backward pass through the receiver. Then the
receiver must write after the translated cache what it writes after the text itself (KL), and answer questions
(cross-entropy). Each step cuts the latents to a width and packs them with a codec drawn by chance, so that one
translator serves every budget. (Recipe: docs/translator.md.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtalk.adapters.translator import Geometry, Translator, squeezed
from kvtalk.adapters.vectors import from_vectors, to_vectors
from kvtalk.cache import PADDING, KVCache
from kvtalk.device import sent
from kvtalk.models import LM
from kvtalk.placement import PlacedCache, PlacedLayer
from kvtalk.rope import rotate_layers
from kvtalk.training.batches import Batch, Batches, Recipe
from kvtalk.training.loop import Loop
from kvtalk.training.texts import Texts

KEPT_BACK = 0.03
"""Share of the texts for validation."""


class Pair:
    """Two frozen models and what a translator between them is trained on."""

    def __init__(self, sharer: LM, receiver: LM) -> None:
        self.sharer, self.receiver = sharer, receiver
        for lm in (sharer, receiver):
            lm.model.requires_grad_(False)
        self._heads: dict[tuple[int, ...], KVCache] = {}

    def sharer_vectors(self, batch: Batch) -> Tensor:
        """``[batch, sharer tokens, sharer_values]``."""
        return to_vectors(self.sharer.read_whole(batch.sharer)[0], self.sharer.spec, batch.start)

    @torch.no_grad()
    def taught(self, batch: Batch, with_logits: bool) -> tuple[Tensor, Tensor | None]:
        """The receiver that reads the text: its vectors of the context, and its logits after the tails' tokens.

        Returns:
            ``[batch, tokens, receiver_values]`` and ``[tokens of all tails, vocabulary]``.
        """
        tails = batch.tails if with_logits else [[]] * len(batch.tails)
        before = [batch.head + context for context in batch.receiver]
        cache, hidden = self.receiver.read_whole([*map(list.__add__, before, tails)])
        vectors = to_vectors(cache, self.receiver.spec, len(batch.head))[:, : batch.pairing.index.shape[1]]
        if not with_logits:
            return vectors, None
        where = _flat([len(row) for row in before], tails, hidden.shape[1])
        return vectors, self.receiver.head_of(hidden.flatten(0, 1)[sent(where, hidden.device)])

    def student_logits(self, batch: Batch, vectors: Tensor, shift: int = 0) -> Tensor:
        """The receiver's logits after the tails' tokens, ``[tokens of all tails, vocabulary]``, with translated vectors
        in the text's place."""
        spec, head = self.receiver.spec, self._head(batch.head)
        counts = torch.tensor([len(row) for row in batch.receiver]).roll(shift)
        cache = from_vectors(vectors.to(spec.dtype), counts, spec)
        begin, rows = len(batch.head), len(batch.receiver)
        steps = torch.arange(vectors.shape[1])
        positions = torch.where(steps < counts[:, None], steps + begin, PADDING)
        positions = torch.cat([torch.arange(begin).expand(rows, -1), positions], dim=1)
        ropes = [shape.rope for shape in spec.layers]
        turned = rotate_layers([layer.keys for layer in cache.layers], ropes, (steps + begin).to(vectors.device))
        layers = []
        for index, (keys, layer) in enumerate(zip(turned, cache.layers, strict=True)):
            values = layer.values
            if head is not None:
                own = head.layers[index]
                keys = torch.cat([own.keys.expand(rows, -1, -1, -1), keys], dim=2)
                values = torch.cat([own.values.expand(rows, -1, -1, -1), values], dim=2)
            layers.append(PlacedLayer(keys, values, keys.shape[2]))
        ends = (counts + begin).to(vectors.device)
        placed = PlacedCache(layers, [positions] * len(layers), ends, spec)
        logits = self.receiver.logits(batch.tails, placed)
        longest = logits.shape[1]
        where = _flat([longest - len(tail) for tail in batch.tails], batch.tails, longest)
        return logits.flatten(0, 1)[sent(where, logits.device)]

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
        target, wanted = self.pair.taught(batch, with_logits=not self.recipe.regresses(step))
        theirs = self.pair.sharer_vectors(batch)
        standard = module(theirs, batch.pairing.to(theirs.device), batch.width, batch.codec).float()
        found = {"regression": self._regression(standard, target, batch)}
        if wanted is None:
            return {**found, "total": found["regression"]}
        got = self.pair.student_logits(batch, self._vectors(standard))
        found["divergence"] = divergence(got, wanted)
        total = self.recipe.regression_weight * found["regression"] + found["divergence"]
        answers = answer_loss(got, batch)
        if answers is not None:
            found["answers"] = answers
            total = total + answers
        return {**found, "total": total}

    @torch.no_grad()
    def measure(self, module: nn.Module) -> dict[str, float]:
        """Divergence and answers' loss on kept-back texts, with the right latents, narrow, wrong and zeroed ones."""
        found: dict[str, list[float]] = {}
        for batch in self.checks:
            for name, value in self._measured(module, batch).items():
                found.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in found.items()}

    def _measured(self, module: nn.Module, batch: Batch) -> dict[str, float]:
        target, wanted = self.pair.taught(batch, with_logits=True)
        assert wanted is not None
        assert isinstance(module, Translator)
        found: dict[str, float] = {}
        latents = module.encoder(self.pair.sharer_vectors(batch), batch.pairing.to(target.device))
        told, kind = answer_loss(wanted, batch), "answers" if any(batch.answers) else "text"
        if told is not None:
            found["nll text"] = float(told)
        ways = {
            "": latents,
            " narrow": squeezed(latents, min(64, latents.shape[2]), "int4"),
            " wrong": latents.roll(1, dims=0),  # with its own length
            " zeroed": torch.zeros_like(latents),
        }
        for name, used in ways.items():
            standard = module.decoder.standardised(used)
            got = self.pair.student_logits(batch, self._vectors(standard), shift=int(name == " wrong"))
            found[f"kl {kind}{name}"] = float(divergence(got, wanted))
            nll = answer_loss(got, batch)
            if nll is not None:
                found[f"nll{name}"] = float(nll)
            if not name:
                found[f"mse {kind}"] = float(self._regression(standard, target, batch))
        return found

    def _vectors(self, standard: Tensor) -> Tensor:
        return standard * self.decoder.scale + self.decoder.mean

    def _regression(self, standard: Tensor, target: Tensor, batch: Batch) -> Tensor:
        wanted = (target - self.decoder.mean) / self.decoder.scale
        real = sent(_left_real([len(row) for row in batch.receiver], standard.shape[1]), standard.device)
        return ((standard - wanted).square().mean(dim=2) * real).sum() / real.sum()


def training(sharer: LM, receiver: LM, texts: Texts, geometry: Geometry, recipe: Recipe, out: Path) -> Loop:
    """A run that trains a translator, ready to start or to go on.

    Args:
        sharer: reads.
        receiver: answers.
        texts: to train and validate on.
        geometry: of the translator.
        recipe: how.
        out: folder for checkpoints and the log; a run in it is continued.

    Raises:
        TrainingError: the folder holds a run of other settings.
    """
    pair = Pair(sharer, receiver)
    learned, kept_back = texts.split(KEPT_BACK)
    batches = Batches(learned, sharer, receiver, recipe, geometry.latent)
    checks = Batches(kept_back, sharer, receiver, recipe, geometry.latent).checks(32)
    torch.manual_seed(recipe.seed)
    translator = Translator(geometry).to(receiver.device)
    settings = {
        "geometry": asdict(geometry),
        "recipe": asdict(recipe),
        "sharer": asdict(sharer.spec.fingerprint),
        "receiver": asdict(receiver.spec.fingerprint),
        "texts": texts.digest,
    }
    loop = Loop(translator, Translation(pair, translator, recipe, checks), batches, recipe.schedule, settings, out)
    if loop.step == 0:
        _standardise(translator, pair, batches)
    return loop


@torch.no_grad()
def _standardise(translator: Translator, pair: Pair, batches: Batches) -> None:
    """Means and deviations of both sides' channels over the first batches."""
    sums: list[list[Tensor]] = [[], []]
    for number in range(min(8, len(batches))):
        batch = batches[number, 0]
        theirs = [len(row) - batch.start for row in batch.sharer]
        found = (pair.sharer_vectors(batch), theirs), (pair.taught(batch, False)[0], list(map(len, batch.receiver)))
        for parts, (vectors, counts) in zip(sums, found, strict=True):
            rows = vectors[_left_real(counts, vectors.shape[1]).to(vectors.device)].double()
            parts.append(torch.stack([rows.sum(0), rows.square().sum(0), torch.full_like(rows[0], len(rows))]))
    encoder, decoder = translator.encoder, translator.decoder
    for means, scales, parts in ((encoder.mean, encoder.scale, sums[0]), (decoder.mean, decoder.scale, sums[1])):
        total, squares, count = torch.stack(parts).sum(0)
        means.copy_(total / count)
        scales.copy_((squares / count - (total / count).square()).clamp(min=1e-6).sqrt())


def divergence(got: Tensor, wanted: Tensor) -> Tensor:
    """Mean KL(wanted ‖ got) in nats of logits ``[tokens, vocabulary]``."""
    theirs, ours = wanted.float().log_softmax(-1), got.float().log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def answer_loss(got: Tensor, batch: Batch) -> Tensor | None:
    """Mean cross-entropy of the answers' tokens, nats; None where nothing was asked."""
    if not any(batch.answers):
        return None
    rows: list[int] = []
    labels: list[int] = []
    end = 0
    for tail, count in zip(batch.tails, batch.answers, strict=True):
        end += len(tail)
        rows += range(end - count - 1, end - 1)
        labels += tail[len(tail) - count :]
    return F.cross_entropy(got[sent(torch.tensor(rows), got.device)].float(), sent(torch.tensor(labels), got.device))


def _flat(begins: Sequence[int], tails: Sequence[Sequence[int]], longest: int) -> Tensor:
    """Where the tails' tokens lie in rows of a length, one after the other."""
    places = [
        torch.arange(row * longest + begin, row * longest + begin + len(tail))
        for row, (begin, tail) in enumerate(zip(begins, tails, strict=True))
    ]
    return torch.cat(places)


def _left_real(counts: Sequence[int], longest: int) -> Tensor:
    return torch.arange(longest) < torch.tensor(counts)[:, None]
