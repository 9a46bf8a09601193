"""What token policies that look at the projection lose when the sharer must foretell it.

    python benchmarks/fuser_policies.py FUSER --data ... --rows 100 --out results/fuser/policies.json

Of rows that the fuser was not trained on: mean cross-entropy of the answer's tokens (of multiple choice: of the right
option among all) when a share of the tokens that may cross does in every layer, as the sharer holds them, chosen by
each policy; by ``proj_vnorm_topk`` and ``delta_proj_vnorm`` also as published (``exact``), with the receiver's cache,
which a sharer does not have. ``lost`` is what foretelling costs, row by row; ``found`` is the share of the tokens that
exact scores keep which foretold ones keep too. Intervals are of a paired bootstrap.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fuser_gain import TOGETHER, Way, interval
from torch import Tensor, nn
from tqdm import tqdm

from kvtalk.adapters.cards import read_card
from kvtalk.adapters.predictor import Predictor
from kvtalk.adapters.slots import averaged, bare_layers
from kvtalk.adapters.weights import load_predictor
from kvtalk.cache import PADDING, KVCache, LayerCache
from kvtalk.models import LM
from kvtalk.selection.tokens import FORETOLD, kept_count, token_policy
from kvtalk.training.exchanges import Exchanges, FusedBatch
from kvtalk.training.fuser import FuserRecipe, Fusing
from kvtalk.training.predictor import exact

KEEPS = 0.5, 0.25, 0.1
POLICIES = "front", "back", "random", "value_norm", *FORETOLD
EXACT = tuple(f"exact {name}" for name in FORETOLD)


class ReadOnce(Fusing):
    """Reads a batch once, however often it is asked about it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._read: dict[str, tuple[FusedBatch, Any]] = {}

    def own(self, batch: FusedBatch) -> tuple[KVCache, Tensor]:
        return self._once("own", batch, super().own)

    def received(self, batch: FusedBatch) -> tuple[Tensor, Tensor]:
        return self._once("received", batch, super().received)

    def _once(self, name: str, batch: FusedBatch, read: Callable[[FusedBatch], Any]) -> Any:
        if name not in self._read or self._read[name][0] is not batch:
            self._read[name] = batch, read(batch)
        return self._read[name][1]


class Given(nn.Module):
    """Adds what was computed before, in a fuser's place."""

    def __init__(self, added: Tensor) -> None:
        super().__init__()
        self.added = added

    def forward(self, sharer: Tensor, receiver: Tensor) -> Tensor:
        return self.added


class Chosen:
    """What each policy keeps of a batch, and what the receiver makes of it."""

    @torch.no_grad()
    def __init__(self, way: Way, predictor: Predictor, batch: FusedBatch) -> None:
        self.way, self.batch = way, batch
        self.geometry, self.sharer = way.objective.geometry, way.objective.sharer
        self.received, _ = way.objective.received(batch)
        _, self.own = way.objective.own(batch)
        cache, _ = self.sharer.read_whole(batch.sharer)
        columns = batch.lent.theirs + torch.tensor(batch.begins)[batch.lent.rows]
        self.positions = torch.full_like(cache.layers[0].positions, PADDING)
        self.positions[batch.lent.rows, columns] = batch.lent.theirs
        bare = bare_layers(cache, self.sharer.spec, self.geometry, sorted(set(self.geometry.layers)))
        self.layers = {index: replace(layer, positions=self.positions) for index, layer in bare.items()}
        ways = {name: self._foretold(predictor, name) for name in FORETOLD} | self._exact()
        self.ways: dict[str, dict[int, LayerCache]] = {name: ways.get(name, self.layers) for name in POLICIES + EXACT}

    def _foretold(self, predictor: Predictor, name: str) -> dict[int, LayerCache]:
        empty = next(iter(self.layers.values())).span(0, 0)
        every = [self.layers.get(index, empty) for index in range(self.geometry.sharer.layers)]
        scored = predictor.scored(KVCache(tuple(every), (0,) * len(self.positions)), name)
        return {index: scored.layers[index] for index in self.layers}

    def _exact(self) -> dict[str, dict[int, LayerCache]]:
        """Tokens that enrich nothing score 0, below all others."""
        found = exact(self.way.fuser, self.received, self.own, self.batch.pairs)
        where = found.rows, found.theirs + torch.tensor(self.batch.begins)[found.rows]
        made: dict[str, dict[int, LayerCache]] = {name: {} for name in EXACT}
        for name, scores in zip(EXACT, found.scores.cpu(), strict=True):
            for index, layer in self.layers.items():
                placed = torch.zeros(self.positions.shape).index_put(where, scores[index])
                made[name][index] = replace(layer, scores=placed)
        return made

    def kept(self, name: str, keep: float) -> dict[int, Tensor]:
        """Of each sharer layer that is read which tokens cross, bool ``[rows, tokens]``."""
        counts = [kept_count(keep, int(count)) for count in (self.positions != PADDING).sum(dim=1)]
        rows = torch.arange(len(counts))[:, None]
        found = {}
        for index, layer in self.ways[name].items():
            columns = token_policy(name.removeprefix("exact ")).select(layer, counts).cpu()
            found[index] = torch.zeros(self.positions.shape, dtype=torch.bool)
            found[index][rows.expand_as(columns), columns] = True
        return found

    @torch.no_grad()
    def losses(self, name: str, keep: float) -> list[float]:
        """Of each prompt, when what does not cross is not fused."""
        pairs, kept = self.batch.pairs, self.kept(name, keep)
        columns = pairs.theirs + torch.tensor(self.batch.begins)[pairs.rows]
        there = [kept[self.geometry.layers[slot // 2]][pairs.rows, columns] for slot in range(self.geometry.slots)]
        once, owners = pairs.once()
        device = self.received.device
        theirs, missing = averaged(self.received, ~torch.stack(there).to(device), owners.to(device), len(once.rows))
        added = self.way.fuser(theirs, self.own).masked_fill(missing[:, :, None], 0)
        return of_prompts(self.way, Given(added), self.batch)

    def found(self, name: str, keep: float) -> list[float]:
        """Of each row the share of what the exact scores keep that the foretold ones keep too, mean of layers."""
        ours, theirs = (torch.stack(list(self.kept(one, keep).values())) for one in (name, f"exact {name}"))
        return ((ours & theirs).sum(dim=2) / theirs.sum(dim=2)).mean(dim=0).tolist()


def of_prompts(way: Way, fuser: nn.Module | None, batch: FusedBatch) -> list[float]:
    """The loss of each prompt."""
    return [loss for loss, _ in way.losses(fuser, batch)]


def measured(way: Way, predictor: Predictor, kind: str, rows: int) -> dict[str, Any]:
    """Everything of one kind of row."""
    seen: dict[tuple[float, str], list[float]] = {}
    found: dict[tuple[float, str], list[float]] = {}
    whole, none = [], []
    for chunk in tqdm(range(rows // TOGETHER), desc=kind):
        batch, _ = way.both(kind, range(chunk * TOGETHER, (chunk + 1) * TOGETHER))
        chosen = Chosen(way, predictor, batch)
        whole += of_prompts(way, way.fuser, batch)
        none += of_prompts(way, None, batch)
        for keep in KEEPS:
            for name in chosen.ways:
                seen.setdefault((keep, name), []).extend(chosen.losses(name, keep))
            for name in FORETOLD:
                found.setdefault((keep, name), []).extend(chosen.found(name, keep))
    values = {key: torch.tensor(listed, dtype=torch.float64) for key, listed in seen.items()}
    kept = {}
    for keep in KEEPS:
        best = min(POLICIES[: -len(FORETOLD)], key=lambda name: float(values[keep, name].mean()))
        kept[f"{keep:.0%}"] = {
            "loss": {name: interval(values[keep, name]) for name in (*POLICIES, *EXACT)},
            "best of the plain": best,
            "below it": {name: interval(values[keep, best] - values[keep, name]) for name in (*FORETOLD, *EXACT)},
            "lost": {name: interval(values[keep, name] - values[keep, f"exact {name}"]) for name in FORETOLD},
            "found": {name: interval(torch.tensor(found[keep, name], dtype=torch.float64)) for name in FORETOLD},
        }
    both = {
        name: interval(torch.tensor(listed, dtype=torch.float64)) for name, listed in (("all", whole), ("none", none))
    }
    return {"kind": kind, "rows": len(whole), **both, "kept": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fuser")
    parser.add_argument("--sharer", default="gemma3-270m")
    parser.add_argument("--receiver", default="smollm2-135m")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("results/fuser/policies.json"))
    args = parser.parse_args()
    predictor = load_predictor(*read_card(args.fuser, "fuser"))
    if predictor is None:
        parser.error(f"{args.fuser} has no predictor: kvtalk train predictor --fuser {args.fuser} --data ROWS.jsonl")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    receiver, sharer = LM.load(args.receiver, device=device), LM.load(args.sharer, device=device)
    asked = Exchanges.load(args.data)
    way = Way(args.fuser, sharer, receiver, asked)
    way.objective = ReadOnce(sharer, receiver, way.fuser.geometry, FuserRecipe(), [])
    found = []
    for kind, rows in asked.rows.items():
        found.append(measured(way, predictor.to(sharer.device), kind, min(args.rows, len(rows))))
        print(found[-1])
    data = [Path(name).name for name in args.data]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"models": [args.sharer, args.receiver], "data": data, "measured": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
