"""Time to first token through a translator: decoding and placing latents against the receiver's own prefill.

    python benchmarks/translator.py --out results/bench/translator_cpu.json

Speed does not depend on what a translator has learned, so its weights are random. Every round measures the receiver's
prefill of the text and, on the same text in the same process, unpacking, decoding and placing; ratios are medians over
rounds. For larger receivers only operations are counted, and marked so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from kvtalk import LM, Link, Plan
from kvtalk.adapters.cards import Party
from kvtalk.adapters.store import save_adapter
from kvtalk.adapters.translator import Decoder, Geometry, Translator
from kvtalk.evaluation.data import samples

LARGER = {
    "Llama-3.2-1B": (16, 16 * 2 * 8 * 64, 0.97e9),
    "Llama-3.1-8B": (32, 32 * 2 * 8 * 128, 6.98e9),
    "Llama-3.1-70B": (80, 80 * 2 * 8 * 128, 68.5e9),
}
"""Layers, keys and values of a token, parameters without embeddings."""


def geometry_of(sharer: LM, receiver: LM) -> Geometry:
    return Geometry(sharer.spec.values_per_token, len(receiver.spec.layers), receiver.spec.values_per_token)


def measured(sharer: LM, receiver: LM, plan: str, tokens: int, rounds: int) -> dict[str, object]:
    """Medians in milliseconds."""
    parties = [Party(lm.name, lm.spec.fingerprint) for lm in (sharer, receiver)]
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Translator(geometry_of(sharer, receiver)), *parties, Path(folder), "nf4:1x64")
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        link = Link(sharer, receiver, adapter=folder)
    ids = receiver.encode(" ".join(item.context for item in samples()))
    text = receiver.tokenizer.decode((ids * (tokens // len(ids) + 1))[:tokens])
    shared = link.sharer.share(text, plan=Plan.parse(plan))
    tokens_of_text = receiver.encode(text)
    count = len(tokens_of_text)
    seconds: dict[str, list[float]] = {"prefill": [], "decode": [], "place": []}
    for _ in range(rounds + 1):
        placed = receiver.place([[]], room=count + 8)  # its own head is read beforehand on both ways
        marks = [_now(receiver)]
        receiver.logits([tokens_of_text], placed, keep=1)
        marks.append(_now(receiver))
        prefix = link.receiver.prefix(shared.blob)
        marks.append(_now(receiver))
        receiver.place([[prefix]])
        marks.append(_now(receiver))
        for name, begin, end in zip(seconds, marks, marks[1:], strict=False):
            seconds[name].append(end - begin)
    warm = {name: values[1:] for name, values in seconds.items()}
    ratios = [(d + p) / own for own, d, p in zip(*warm.values(), strict=True)]
    return {
        "sharer": sharer.name,
        "receiver": receiver.name,
        "dtype": str(receiver.spec.dtype),
        "tokens": count,
        "plan": plan,
        "packet_bytes": len(shared.blob),
        "adapter_bytes": size,
        **{f"{name}_ms": round(1000 * statistics.median(values), 1) for name, values in warm.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def counted() -> list[dict[str, object]]:
    """Operations of decoding over those of the receiver's prefill, a token; attention left out on both sides."""
    rows = []
    for name, (layers, values, parameters) in LARGER.items():
        decoder = Decoder(Geometry(11_520, layers, values))
        own = sum(parameter.numel() for parameter in decoder.parameters())
        rows.append({"receiver": name, "decoder_parameters": own, "operations_ratio": round(own / parameters, 4)})
    return rows


def _now(lm: LM) -> float:
    if lm.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/bench/translator_cpu.json"))
    parser.add_argument("--plan", default="int4 width=128")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    models = [LM.load(name) for name in ("smollm2-135m", "gemma3-270m")]
    rows = [
        measured(*pair, options.plan, tokens, options.rounds)
        for pair in (models, models[::-1])
        for tokens in options.tokens
    ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    report = {"device": gpu or f"{os.cpu_count()} CPU cores", "measured": rows, "counted": counted()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
