"""What a sharer adds to the answers that a receiver is taught, in nats, above what stands in its place.

    python benchmarks/fuser_gain.py FUSER [SELF] --data ... --rows 200 --out results/fuser/gain.json

Of rows that neither fuser was trained on: mean cross-entropy of the answer's tokens (of multiple choice: of the right
option among all, and the share of right ones in percent) with the right cache, a wrong and a zeroed one, none, and with
the receiver's own through a fuser that was trained alike (SELF). The gain is against the best of wrong, zeroed and
self, row by row; where the sharer alone knows a context, self would know it too, and the gain is against the better of
wrong and zeroed. Intervals are of a paired bootstrap.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kvtalk.adapters.cards import read_card
from kvtalk.adapters.fuser import Fuser
from kvtalk.adapters.fusing import geometry_of
from kvtalk.adapters.weights import load_fuser
from kvtalk.evaluation.statistics import bootstrap
from kvtalk.models import LM
from kvtalk.training.exchanges import Exchanges, FusedBatch, FusedBatches, Mixture
from kvtalk.training.fuser import SHARPNESS, FuserRecipe, Fusing

BLIND = "choices", "instructions"
"""Kinds of rows of which the sharer knows no more than the receiver."""
TOGETHER = 8
"""Rows; each gets the wrong cache from another of these."""


class Way:
    """A trained fuser and what it is asked."""

    def __init__(self, folder: str, sharer: LM, receiver: LM, asked: Exchanges) -> None:
        card, where = read_card(folder, "fuser")
        for role, lm in (("sharer", sharer), ("receiver", receiver)):
            card.check(role, lm.spec)
        geometry = geometry_of(card)
        self.fuser: Fuser = load_fuser(card, where).eval().to(receiver.device)
        self.objective = Fusing(sharer, receiver, geometry, FuserRecipe(), [])
        self.batches = FusedBatches(asked, sharer, receiver, Mixture(letters=0, bare=0), geometry, 0)

    def both(self, kind: str, numbers: range) -> tuple[FusedBatch, FusedBatch | None]:
        """Some rows, and the same with caches of others."""
        rows = self.batches.exchanges.rows[kind]
        made = [self.batches.exchange(rows[number], random.Random(number)) for number in numbers]
        batch = self.batches.of(made, kind)
        assert len(batch.receiver) == len(numbers)
        return batch, self.batches.wrong(made, batch)

    @torch.no_grad()
    def losses(self, fuser: Fuser | None, batch: FusedBatch, zeroed: bool = False) -> Iterator[tuple[float, float]]:
        """Of each prompt, and 100 where the right one of several options is the most likely, else 0."""
        _, entropies = self.objective.answered(fuser, batch, zeroed=zeroed)
        parts = torch.split(entropies.cpu(), [len(answer) for answer in batch.answers])
        for prompt in range(len(batch.receiver)):
            here = [row for row, owner in enumerate(batch.prompts) if owner == prompt]
            right = next(place for place, row in enumerate(here) if batch.right[row])
            if len(here) == 1:
                yield float(parts[here[0]].mean()), 0.0
            else:
                scores = torch.tensor(
                    [-SHARPNESS * float(parts[row].sum()) / max(1, batch.lengths[row]) for row in here]
                )
                yield -float(scores.log_softmax(0)[right]), 100.0 * (int(scores.argmax()) == right)


def interval(values: Tensor) -> list[float]:
    """Mean, low, high."""
    found = bootstrap(values.tolist())
    return [round(value, 3) for value in (found.mean, found.low, found.high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fuser")
    parser.add_argument("own", metavar="SELF", nargs="?")
    parser.add_argument("--sharer", default="gemma3-270m")
    parser.add_argument("--receiver", default="smollm2-135m")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("results/fuser/gain.json"))
    args = parser.parse_args()
    receiver, sharer = LM.load(args.receiver), LM.load(args.sharer)
    asked = Exchanges.load(args.data)
    ours = Way(args.fuser, sharer, receiver, asked)
    own = args.own and Way(args.own, receiver, receiver, asked)
    found = []
    for kind, rows in asked.rows.items():
        names = ("right", "wrong", "zeroed", "none", *(("self",) if own else ()))
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        count = min(args.rows, len(rows)) // TOGETHER
        for chunk in tqdm(range(count), desc=kind):
            numbers = range(chunk * TOGETHER, (chunk + 1) * TOGETHER)
            batch, wrong = ours.both(kind, numbers)
            if wrong is None:
                continue
            seen["right"] += ours.losses(ours.fuser, batch)
            seen["wrong"] += ours.losses(ours.fuser, wrong)
            seen["zeroed"] += ours.losses(ours.fuser, batch, zeroed=True)
            seen["none"] += ours.losses(None, batch)
            if own:
                seen["self"] += own.losses(own.fuser, own.both(kind, numbers)[0])
        controls = [name for name in ("wrong", "zeroed", "self") if name in seen and (kind in BLIND or name != "self")]
        compared = ("nats", "accuracy") if kind in ("choices", "known") else ("nats",)
        for column, measure in enumerate(compared):
            values = {
                name: torch.tensor([both[column] for both in listed], dtype=torch.float64)
                for name, listed in seen.items()
            }
            sign = 1 if measure == "nats" else -1  # fewer nats are better, more right answers are
            best = min(controls, key=lambda name: sign * float(values[name].mean()))
            gain: Tensor = sign * (values[best] - values["right"])
            found.append(
                {
                    "kind": kind,
                    "measure": measure,
                    "rows": len(gain),
                    **{name: interval(one) for name, one in values.items()},
                    "best": best,
                    "gain": interval(gain),
                }
            )
            print(found[-1])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    data = [Path(name).name for name in args.data]
    args.out.write_text(
        json.dumps({"models": [args.sharer, args.receiver], "data": data, "measured": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
