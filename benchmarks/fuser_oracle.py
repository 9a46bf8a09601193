"""What a question's own tokens hold of a context read before them: the receiver's cache of the question alone, with the
keys and values in their place that the same model has for them after the context, moved to where they stand.

    python benchmarks/fuser_oracle.py --items 200 --out results/fuser/oracle.json

That is the best that a fuser which passed a perfect sharer's cache on could do without learning. F1 on SQuAD.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from kvtalk.adapters.enriched import placed_but_last
from kvtalk.alignment.readings import readings
from kvtalk.cache import KVCache
from kvtalk.evaluation.data import Passage
from kvtalk.evaluation.metrics import METRICS
from kvtalk.evaluation.statistics import bootstrap
from kvtalk.evaluation.tasks import task_named
from kvtalk.models import LM
from kvtalk.rope import rotate_layers
from kvtalk.shared_prompts import prompt_of


def replaced(lm: LM, own: KVCache, after: KVCache, tokens: int) -> KVCache:
    """The last tokens of a cache as they are in another one."""
    ropes = [layer.rope for layer in lm.spec.layers]
    length, longer = own.length[0], after.length[0]
    keys = [layer.keys[:, :, -tokens:] for layer in after.layers]
    keys = rotate_layers(keys, ropes, torch.arange(longer - tokens, longer), inverse=True)
    keys = rotate_layers(keys, ropes, torch.arange(length - tokens, length), inverse=False)
    layers = [
        replace(
            one,
            keys=torch.cat([one.keys[:, :, :-tokens], moved], dim=2),
            values=torch.cat([one.values[:, :, :-tokens], other.values[:, :, -tokens:]], dim=2),
        )
        for one, other, moved in zip(own.layers, after.layers, keys, strict=True)
    ]
    return KVCache(tuple(layers), own.length)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gemma3-270m", "smollm2-135m"])
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/fuser/oracle.json"))
    args = parser.parse_args()
    items = [item for item in task_named("squad").load(args.data, limit=args.items) if isinstance(item, Passage)]
    found = []
    for name in args.models:
        lm = LM.load(name)
        written: dict[str, list[str]] = {"alone": [], "replaced": [], "text": []}
        for item in tqdm(items, desc=name):
            prompts = prompt_of(lm.prompt, item.question), prompt_of(lm.prompt, item.question, item.context)
            alone, whole = readings(lm.tokenizer, prompts)
            own, after = (lm.read_whole([one.ids])[0] for one in (alone, whole))
            tokens = len(alone.ids) - alone.begin
            caches = {"alone": own, "replaced": replaced(lm, own, after, tokens), "text": after}
            for way, cache in caches.items():
                placed = placed_but_last(lm, cache, cache.stacked(), [], awaits=True)
                written[way].append(lm.generate([alone.ids[-1:]], placed, max_new_tokens=24)[0].text)
        scores = {
            way: [100 * score for score in METRICS["f1"].score(texts, items, "")] for way, texts in written.items()
        }
        found.append(
            {"model": name, "items": len(items), **{way: bootstrap(one).rounded() for way, one in scores.items()}}
        )
        print(found[-1])
    args.out.write_text(json.dumps({"measured": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
