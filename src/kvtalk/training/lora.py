"""Train a LoRA of the receiver on the texts an adapter is trained on, reading the text itself.

It is the baseline that a trained adapter must stand beside: an adapter also learns the task's form, and what it gains
by that is no merit of the sharer's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

from kvtalk.device import sent
from kvtalk.models import LM
from kvtalk.training.batches import Batch, Batches, Recipe
from kvtalk.training.loop import Loop
from kvtalk.training.losses import token_losses
from kvtalk.training.texts import Texts
from kvtalk.training.translator import KEPT_BACK


class Reading:
    """What the LoRA learns: answers after questions, and what follows plain text."""

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
        longest = max(map(len, rows))
        ids = sent(torch.tensor([row + [0] * (longest - len(row)) for row in rows]), self.lm.device)
        hidden = self.lm.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        before: list[int] = []
        labels: list[int] = []
        for number, (row, tail, answer) in enumerate(zip(rows, batch.tails, batch.answers, strict=True)):
            learned = answer or len(tail)
            before += range(number * longest + len(row) - learned - 1, number * longest + len(row) - 1)
            labels += row[len(row) - learned :]
        states = hidden.flatten(0, 1)[sent(torch.tensor(before), hidden.device)]
        weights = torch.full((2, len(labels)), 1 / len(labels), device=states.device)
        weights[0] = 0
        return token_losses(self.lm.unembedding, states, None, sent(torch.tensor(labels), states.device), weights)[0]


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
    torch.manual_seed(recipe.seed)
    tuned = peft.get_peft_model(lm.model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    settings = {
        "rank": rank,
        "recipe": asdict(recipe),
        "receiver": asdict(lm.spec.fingerprint),
        "texts": texts.digest,
    }
    batches = Batches(learned, lm, lm, recipe, 1)
    return Loop(tuned, Reading(lm, checks), batches, recipe.schedule, settings, out)
