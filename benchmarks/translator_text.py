"""What of a plain text crosses a translator: KL from the receiver that reads it, on what follows.

python benchmarks/translator_text.py TEXT --sharer A --receiver B [--adapter FOLDER] --out FILE

Passages are cut evenly from the text; the receiver's predictions of each passage's continuation, after the translated
cache, are compared with its predictions after the passage itself. Controls: the passage's before, and zeroed latents.
Intervals are 95% bootstraps over passages.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
from pathlib import Path

import numpy as np
import torch

from kvtalk import LM
from kvtalk.adapters.cards import read_card, shipped_for
from kvtalk.adapters.translator import squeezed
from kvtalk.adapters.weights import load_decoder, load_encoder
from kvtalk.training.batches import Batch, Batches, Example, Recipe
from kvtalk.training.losses import token_losses
from kvtalk.training.texts import Texts
from kvtalk.training.translator import Pair

WAYS = ("1024 bf16", "1024 int4", "512 int4", "256 int8", "256 int4", "128 int4", "64 int4", "32 int4")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--sharer", default="smollm2-135m")
    parser.add_argument("--receiver", default="gemma3-270m")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--passages", type=int, default=128)
    parser.add_argument("--context", type=int, default=1000, help="characters of a passage")
    parser.add_argument("--continuation", type=int, default=280, help="characters after it")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    opener = gzip.open if options.text.suffix == ".gz" else open
    with opener(options.text, "rt", encoding="utf-8") as file:
        text = Texts([file.read()])
    sharer, receiver = LM.load(options.sharer), LM.load(options.receiver)
    folder = options.adapter or shipped_for(sharer.spec, receiver.spec)
    if folder is None:
        parser.error("no adapter for this pair comes with kvtalk: give --adapter")
    card, folder = read_card(folder)
    encoder, decoder = (
        half.to(receiver.device).eval() for half in (load_encoder(card, folder), load_decoder(card, folder))
    )
    pair, batches = (
        Pair(sharer, receiver, card.geometry.pool),
        Batches(text, sharer, receiver, Recipe(), card.geometry.latent),
    )
    found: dict[str, list[float]] = {}
    ways = [way for way in WAYS if int(way.split()[0]) <= card.geometry.latent]
    for start in range(0, options.passages, 16):
        places = [(number + 0.5) / options.passages for number in range(start, min(start + 16, options.passages))]
        rows = [Example(*text.passage(place, options.context, options.continuation)) for place in places]
        batch = batches.of(rows, batches.bare_head)
        with torch.no_grad():
            _, wanted = pair.taught(batch, tails=True)
            latents = encoder(pair.sharer_vectors(batch).float(), batch.pairing.to(receiver.device))
            sent = {way: squeezed(latents, int(way.split()[0]), way.split()[1]) for way in ways}
            sent |= {"another passage": latents.roll(1, dims=0), "zeroed": torch.zeros_like(latents)}
            for way, used in sent.items():
                states = pair.continued(batch, decoder(used), shift=int(way == "another passage"))
                found.setdefault(way, []).extend(_divergences(receiver, batch, states, wanted))
        print(f"{start + len(places)} of {options.passages}", flush=True)
    report = {
        "command": f"python benchmarks/translator_text.py {options.text.name} --sharer {options.sharer} "
        f"--receiver {options.receiver} --passages {options.passages}",
        "adapter": card.identity,
        "dtype": {"models": str(receiver.spec.dtype).removeprefix("torch."), "translator": "float32"},
        "machine": torch.cuda.get_device_name(receiver.device)
        if receiver.device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "passages": options.passages,
        "characters": [options.context, options.continuation],
        "kl": {way: _interval(values) for way, values in found.items()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    for way, (mean, low, high) in report["kl"].items():
        print(f"{way:16} {mean:.3f} [{low:.3f}, {high:.3f}] nats a token")


def _divergences(receiver: LM, batch: Batch, states: torch.Tensor, wanted: torch.Tensor) -> list[float]:
    """Mean KL of each passage's continuation."""
    counts = [len(tail) for tail in batch.tails]
    labels = torch.zeros(sum(counts), dtype=torch.long, device=states.device)
    each = token_losses(
        receiver.unembedding, states, wanted, labels, torch.zeros(2, len(labels), device=states.device)
    )[1]
    return [float(part.mean()) for part in each.split(counts)]


def _interval(values: list[float]) -> list[float]:
    """Mean and 95% bootstrap over passages."""
    numbers, rng = np.array(values), np.random.default_rng(0)
    means = numbers[rng.integers(0, len(numbers), (2000, len(numbers)))].mean(1)
    return [round(float(x), 4) for x in (numbers.mean(), *np.quantile(means, [0.025, 0.975]))]


if __name__ == "__main__":
    main()
