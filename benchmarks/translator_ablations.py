"""A translator trained with one choice of its recipe changed, to see what the choice is worth.

    python benchmarks/translator_ablations.py NAME --data FILE ... --steps 300 --tokens 16384 --out FOLDER/NAME
    kvtalk eval --task squad --adapter FOLDER/NAME --plan bf16 --plan 'int4 width=112' ...

But for steps, tokens and rate all else is as ``kvtalk train translator`` has it. ``--help`` lists the choices.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtalk import LM
from kvtalk.adapters.cards import Party
from kvtalk.adapters.store import save_adapter
from kvtalk.adapters.translator import Geometry, Translator
from kvtalk.training import linear, translator
from kvtalk.training.batches import Recipe
from kvtalk.training.loop import Schedule
from kvtalk.training.losses import token_losses
from kvtalk.training.texts import Texts

PACKING = "nf4:1x64"


def _without(row: int) -> Callable[[], None]:
    """Leaves divergences (0) or answers (1) out of the loss."""

    def losses(unembedding: Any, states: Tensor, wanted: Tensor | None, labels: Tensor, weights: Tensor) -> Any:
        weights = weights.clone()
        weights[row] = 0
        return token_losses(unembedding, states, wanted, labels, weights)

    return lambda: setattr(translator, "token_losses", losses)


def _random_start() -> None:
    """Means and deviations alone are fitted, as for models that are too large for the closed form."""
    linear._LARGEST = 0


@dataclass(frozen=True)
class Choice:
    """What is changed."""

    said: str
    recipe: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    patch: Callable[[], None] | None = None


CHOICES = {
    "base": Choice("nothing"),
    "random": Choice("no linear start", patch=_random_start),
    "unregressed": Choice("no regression", {"regression": 0.0, "regression_weight": 0.0}),
    "undistilled": Choice("no divergence from the receiver that read the text", patch=_without(0)),
    "unanswered": Choice("no cross-entropy on answers", patch=_without(1)),
    "adamw": Choice("AdamW for all, at the given rate", schedule={"optimizer": "adamw"}),
    "plain": Choice("no questions", {"questions": 0.0}),
    "asking": Choice("questions alone", {"questions": 1.0}),
    "quotes": Choice("a third of the plain steps reads the context again", {"quotes": 0.33}),
    "whole": Choice("whole latents alone, no codec in the loop", {"whole": 1.0, "codecs": ("bf16",)}),
    "flat": Choice("no blocks", sizes={"sharer_blocks": 0, "encoder_blocks": 0, "decoder_blocks": 0}),
    "straight": Choice("no curved heads", sizes={"bottleneck": 1}),
    "wide": Choice("1,024 channels instead of 576", sizes={"width": 1024}),
    "deep": Choice("twice the blocks", sizes={"sharer_blocks": 2, "encoder_blocks": 2, "decoder_blocks": 4}),
}


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = "\n".join(f"{name:12} {choice.said}" for name, choice in CHOICES.items())
    parser.add_argument("name", choices=CHOICES, metavar="NAME", help="what to change, see below")
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--sharer", default="smollm2-135m")
    parser.add_argument("--receiver", default="gemma3-270m")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    choice = CHOICES[args.name]
    if choice.patch is not None:
        choice.patch()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sharer, receiver = LM.load(args.sharer, device=device), LM.load(args.receiver, device=device)
    spec = receiver.spec
    geometry = replace(Geometry(sharer.spec.values_per_token, len(spec.layers), spec.values_per_token), **choice.sizes)
    schedule = Schedule(**{"steps": args.steps, "rate": args.rate, **choice.schedule})
    recipe = replace(Recipe(schedule=schedule, tokens=args.tokens, packing=PACKING), **choice.recipe)
    run = translator.training(sharer, receiver, Texts.load(args.data), geometry, recipe, args.out)
    made = run.run(lambda step, found: print(step, found, flush=True), check_every=args.steps)
    assert isinstance(made, Translator)
    parties = (Party(lm.name, lm.spec.fingerprint) for lm in (sharer, receiver))
    save_adapter(made, *parties, args.out, PACKING, {"steps": args.steps, "changed": choice.said})


if __name__ == "__main__":
    main()
