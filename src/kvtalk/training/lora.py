"""Train a LoRA of the receiver on what an adapter is trained on: the texts of a translator, which it reads itself, or
the prompts of a fuser, without a sharer.

It is the baseline that a trained adapter must stand beside: an adapter also learns the task's form, and what it gains
by that is no merit of the sharer's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from kvtalk.adapters.fuser import FuserGeometry, Shape
from kvtalk.device import sent
from kvtalk.models import LM
from kvtalk.training import fuser
from kvtalk.training.batches import Batch, Batches, Recipe
from kvtalk.training.exchanges import Exchanges, FusedBatch, FusedBatches, Mixture
from kvtalk.training.loop import Loop, Schedule
from kvtalk.training.losses import token_losses
from kvtalk.training.texts import Texts
from kvtalk.training.translator import KEPT_BACK


class Reading:
    """What a LoRA learns beside a translator: answers after questions, and what follows plain text."""

    def __init__(self, lm: LM, checks: Sequence[Batch]) -> None:
        self.lm, self.checks = lm, checks

    def losses(self, module: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """Cross-entropy, nats a token."""
        return {"total": self._loss(batch)}

    def during(self, module: nn.Module, step: int) -> AbstractContextManager[None]:
        """Nothing special."""
        return nullcontext()

    @torch.no_grad()
    def measure(self, module: nn.Module) -> dict[str, float]:
        """The same on kept-back texts."""
        found: dict[str, list[float]] = {}
        for batch in self.checks:
            found.setdefault("nll" if any(batch.answers) else "nll plain", []).append(float(self._loss(batch)))
        return {name: sum(values) / len(values) for name, values in found.items()}

    def _loss(self, batch: Batch) -> Tensor:
        rows = [batch.head + text + tail for text, tail in zip(batch.receiver, batch.tails, strict=True)]
        learned = [answer or len(tail) for tail, answer in zip(batch.tails, batch.answers, strict=True)]
        states, labels = _before_last(self.lm, rows, learned)
        weights = torch.full((2, len(labels)), 1 / len(labels), device=states.device)
        weights[0] = 0
        return token_losses(self.lm.unembedding, states, None, labels, weights)[0]


class Answering:
    """What a LoRA learns beside a fuser: the same answers to the same prompts, with the same loss."""

    def __init__(self, lm: LM, checks: Sequence[FusedBatch]) -> None:
        self.lm, self.checks = lm, checks

    def losses(self, module: nn.Module, batch: FusedBatch, step: int) -> dict[str, Tensor]:
        """See :func:`kvtalk.training.fuser.answers_loss`."""
        total = fuser.answers_loss(self.lm, *self._states(batch), batch)
        return {"total": total, batch.kind: total.detach()}

    def during(self, module: nn.Module, step: int) -> AbstractContextManager[None]:
        """Nothing special."""
        return nullcontext()

    @torch.no_grad()
    def measure(self, module: nn.Module) -> dict[str, float]:
        """Answers' loss on kept-back rows, see :func:`kvtalk.training.fuser.figures_of`; rows of a kind count alike."""
        found: dict[str, list[tuple[float, int]]] = {}
        for batch in self.checks:
            measured = fuser.figures_of(batch, *fuser.answers_of(self.lm, *self._states(batch), batch))
            for figure, value in measured.items():
                found.setdefault(figure, []).append((value, len(batch.receiver)))
        return fuser.means_of(found)

    def _states(self, batch: FusedBatch) -> tuple[Tensor, Tensor]:
        """Hidden states before every answer's token, and these tokens."""
        rows = [batch.receiver[prompt] + answer for prompt, answer in zip(batch.prompts, batch.answers, strict=True)]
        return _before_last(self.lm, rows, [len(answer) for answer in batch.answers])


def _before_last(lm: LM, rows: Sequence[list[int]], learned: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Hidden states before so many last tokens of each row, ``[tokens, hidden]``, and these tokens."""
    longest = max(map(len, rows))
    ids = sent(torch.tensor([row + [0] * (longest - len(row)) for row in rows]), lm.device)
    hidden = lm.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    before: list[int] = []
    labels: list[int] = []
    for number, (row, count) in enumerate(zip(rows, learned, strict=True)):
        before += range(number * longest + len(row) - count - 1, number * longest + len(row) - 1)
        labels += row[len(row) - count :]
    states = hidden.flatten(0, 1)[sent(torch.tensor(before), hidden.device)]
    return states, sent(torch.tensor(labels), states.device)


def training(lm: LM, texts: Texts, rank: int, recipe: Recipe, out: Path) -> Loop:
    """A run that trains a LoRA of all linear layers, ready to start or to go on.

    Args:
        lm: the receiver; it is changed in place.
        texts: to train and validate on.
        rank: of the matrices.
        recipe: of the steps; what concerns latents is of no account.
        out: folder for checkpoints and the log; a run in it is continued.

    Raises:
        TrainingError: the folder holds a run of other settings.
    """
    learned, kept_back = texts.split(KEPT_BACK)
    checks = Batches(kept_back, lm, lm, recipe, 1).checks(32)
    settings = {"recipe": asdict(recipe), "texts": texts.digest}
    batches = Batches(learned, lm, lm, recipe, 1)
    return _loop(lm, rank, Reading(lm, checks), batches, recipe.schedule, settings, out, recipe.seed)


def rank_of(lm: LM, parameters: int) -> int:
    """The largest rank with at most so many parameters in all linear layers, at least 1."""
    sizes = [
        linear.in_features + linear.out_features
        for name, linear in lm.model.named_modules()
        if isinstance(linear, nn.Linear) and linear is not lm.unembedding
    ]
    return max(1, parameters // sum(sizes))


def answering(
    lm: LM,
    exchanges: Exchanges,
    rank: int,
    schedule: Schedule,
    out: Path,
    mixture: Mixture | None = None,
    checks: int = 64,
    seed: int = 0,
) -> Loop:
    """A run that trains a LoRA of all linear layers on what a fuser is trained on, ready to start or to go on.

    Args:
        lm: the receiver; it is changed in place.
        exchanges: to train and validate on; contexts that are for a sharer alone are not read.
        rank: of the matrices.
        schedule: steps, rate, optimizer.
        out: folder for checkpoints and the log; a run in it is continued.
        mixture: of the steps' rows.
        checks: kept-back rows of each kind to validate on.
        seed: of everything drawn.

    Raises:
        TrainingError: the folder holds a run of other settings.
    """
    mixture, shape = mixture or Mixture(), Shape.of(lm.spec)
    geometry = FuserGeometry(shape, shape, tuple(range(shape.layers)))
    learned, kept_back = exchanges.split(fuser.KEPT_BACK)
    mixture.check(learned)
    checked = FusedBatches(kept_back, lm, lm, mixture, geometry, 0).checks(checks)
    batches = FusedBatches(learned, lm, lm, mixture, geometry, schedule.steps, seed)
    settings = {"recipe": {**asdict(schedule), **asdict(mixture), "seed": seed}, "rows": exchanges.digest}
    objective = Answering(lm, [batch for batch, _ in checked])
    return _loop(lm, rank, objective, batches, schedule, settings, out, seed)


def _loop(
    lm: LM,
    rank: int,
    objective: Reading | Answering,
    batches: Batches | FusedBatches,
    schedule: Schedule,
    settings: dict[str, Any],
    out: Path,
    seed: int,
) -> Loop:
    torch.manual_seed(seed)
    tuned = peft.get_peft_model(lm.model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    settings = {"rank": rank, "receiver": asdict(lm.spec.fingerprint), **settings}
    return Loop(tuned, objective, batches, schedule, settings, out)
