"""Fusing 512 tokens, SmolLM2 → Gemma: our fuser against one of C2C's published size and way of computing.

    python benchmarks/fuser.py --out results/bench/fuser_cpu.json

All ways begin with both models' caches, the sharer's as it is unpacked (for ours in one tensor), and end with the
receiver's enriched one, all gates open. ``layers`` is the published module: hidden 1,024, plain linear layers, one
receiver layer after the other. ``stacked`` has its very weights in a fuser of ours, all layers at once; ``ours`` is a
fuser of the default size. Speed does not depend on what a fuser has learned, so weights are random. Every round times
each way once, in the same process; ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtalk.adapters.enriched import enrich
from kvtalk.adapters.fuser import Fuser, FuserGeometry, Shape, narrowed
from kvtalk.adapters.pairs import Pairs
from kvtalk.adapters.slots import Network
from kvtalk.adapters.weights import is_matrix
from kvtalk.alignment.layers import layer_map
from kvtalk.cache import KVCache, LayerCache
from kvtalk.rope import Rope
from kvtalk.spec import Fingerprint, LayerSpec, ModelSpec

SHARER, RECEIVER = Shape(30, 3, 64), Shape(18, 1, 256)
DEFAULT = 27_000_000
DEFAULT_GEOMETRY = FuserGeometry(SHARER, RECEIVER, layer_map(SHARER.layers, RECEIVER.layers, "terminal"))
PUBLISHED = replace(DEFAULT_GEOMETRY, hidden=1024, middle=1024, weighing=1024, rope="after")
WAYS = ("layers", "stacked", "ours")


class Block(nn.Module):
    """RMSNorm, linear, GELU, linear, plus what came in."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.up, self.down = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(F.gelu(self.up(self.norm(hidden))))


class Slot(nn.Module):
    """Keys or values of one receiver layer, ``[batch, kv_heads, tokens, head_dim]`` each."""

    def __init__(self, geometry: FuserGeometry) -> None:
        super().__init__()
        ours, hidden = geometry.receiver.width, geometry.hidden
        self.inward = nn.Linear(geometry.sharer.width + ours, hidden)
        self.shared, self.projection, self.weighing = Block(hidden), Block(hidden), Block(hidden)
        self.outward, self.weights = nn.Linear(hidden, ours), nn.Linear(hidden, geometry.receiver.kv_heads)

    def forward(self, sharer: Tensor, receiver: Tensor) -> Tensor:
        both = torch.cat([sharer.transpose(1, 2).flatten(2), receiver.transpose(1, 2).flatten(2)], dim=-1)
        hidden = self.shared(self.inward(both))
        projected = self.outward(self.projection(hidden)).unflatten(2, (receiver.shape[1], -1)).transpose(1, 2)
        weights = self.weights(self.weighing(hidden)).sigmoid().transpose(1, 2)[..., None]
        return receiver + weights * projected

    def adopt(self, fuser: Fuser, slot: int) -> None:
        """The weights of a fuser's slot."""
        theirs = {name.replace("projection.0.", "projection."): row[slot] for name, row in fuser.state_dict().items()}
        for name, parameter in self.named_parameters():
            mine = theirs[name.removesuffix(".weight") if ".norm" in name else name]
            parameter.data.copy_(mine.T if parameter.dim() == 2 else mine.view(-1))


def spec_of(shape: Shape, dtype: torch.dtype) -> ModelSpec:
    """A model of this shape, without the model."""
    pairs = shape.head_dim // 2
    rope = Rope(tuple(10_000.0 ** (-channel / pairs) for channel in range(pairs)))
    layers = (LayerSpec(shape.kv_heads, shape.head_dim, None, rope),) * shape.layers
    return ModelSpec(layers, dtype, 1 << 15, Fingerprint("none", *["0"] * 4), None)


def cache_of(shape: Shape, tokens: int, dtype: torch.dtype, device: str) -> KVCache:
    size = (1, shape.kv_heads, tokens, shape.head_dim)
    positions = torch.arange(tokens)[None]
    made = ((torch.randn(size, device=device, dtype=dtype) for _ in "kv") for _ in range(shape.layers))
    return KVCache(tuple(LayerCache(*both, positions) for both in made), (tokens,))


def stacked(network: Network, received: Tensor, own: KVCache, pairs: Pairs) -> list[tuple[Tensor, Tensor]]:
    """What the receiver's side does once a packet is decoded and its tokens are aligned."""
    columns = pairs.theirs.expand(len(set(PUBLISHED.layers)), -1)
    clean = own.stacked()
    addition = network.added(received, pairs.rows, columns, pairs.ours, clean, pairs)
    held = clean.clone()
    enrich(held, addition)
    return list(zip(held[::2].unbind(), held[1::2].unbind(), strict=True))


def by_layer(slots: nn.ModuleList, sharer: KVCache, own: KVCache) -> list[tuple[Tensor, Tensor]]:
    """The same as the published code goes about it."""
    made = []
    for layer, theirs in enumerate(PUBLISHED.layers):
        source, target = sharer.layers[theirs], own.layers[layer]
        keys = slots[2 * layer](source.keys, target.keys)
        made.append((keys, slots[2 * layer + 1](source.values, target.values)))
    return made


def prepared(fuser: Fuser, dtype: torch.dtype, device: str) -> Fuser:
    for parameter in fuser.parameters():
        if is_matrix(parameter):
            parameter.data = parameter.data.to(dtype)
    return fuser.to(device).eval().opened().fold()


@torch.no_grad()
def measured(dtype: torch.dtype, device: str, tokens: int, rounds: int) -> dict[str, object]:
    """Medians in milliseconds."""
    torch.manual_seed(0)
    large, small = Fuser(PUBLISHED), Fuser(narrowed(DEFAULT_GEOMETRY, DEFAULT))
    for fuser in (large, small):
        nn.init.normal_(fuser.outward.weight, std=fuser.geometry.hidden**-0.5)
    slots = nn.ModuleList(Slot(PUBLISHED) for _ in range(PUBLISHED.slots))
    for number, slot in enumerate(slots):
        slot.adopt(large, number)  # type: ignore[operator]
    slots = slots.to(device, dtype).eval()
    large, small = prepared(large, dtype, device), prepared(small, dtype, device)
    sharer, own = (cache_of(shape, tokens, dtype, device) for shape in (SHARER, RECEIVER))
    spec, every = spec_of(RECEIVER, dtype), torch.arange(tokens)
    pairs = Pairs(torch.zeros_like(every), every, every)
    wide, narrow = (Network(fuser, spec, torch.device(device)) for fuser in (large, small))
    received = torch.stack([*(layer.keys for layer in sharer.layers), *(layer.values for layer in sharer.layers)])
    ways: dict[str, Callable[[], list[tuple[Tensor, Tensor]]]] = {
        "layers": lambda: by_layer(slots, sharer, own),
        "stacked": lambda: stacked(wide, received, own, pairs),
        "ours": lambda: stacked(narrow, received, own, pairs),
    }
    differences = [
        float((one - other).abs().max())
        for both in zip(ways["layers"](), ways["stacked"](), strict=True)
        for one, other in zip(*both, strict=True)
    ]
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds + 2):
        for name in WAYS:
            took = timed(ways[name], device)
            if number > 1:  # two rounds to warm up
                seconds[name].append(took)
    return {
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "rounds": rounds,
        "hidden": {"layers": PUBLISHED.hidden, "stacked": PUBLISHED.hidden, "ours": small.geometry.hidden},
        "parameters": {"layers": count(slots), "stacked": count(large), "ours": count(small)},
        "largest_difference_layers_stacked": max(differences),
        **{f"{name}_ms": round(1000 * statistics.median(seconds[name]), 2) for name in WAYS},
        "layers_over_ours": ratio(seconds["layers"], seconds["ours"]),
        "layers_over_stacked": ratio(seconds["layers"], seconds["stacked"]),
    }


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds, the device's work included."""
    if device == "cpu":
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begun.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return float(begun.elapsed_time(ended)) / 1000


def ratio(slow: list[float], fast: list[float]) -> dict[str, object]:
    """Median over rounds, and their range."""
    found = [one / other for one, other in zip(slow, fast, strict=True)]
    return {"median": round(statistics.median(found), 2), "range": [round(min(found), 2), round(max(found), 2)]}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/bench/fuser_cpu.json"))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = [
        measured(dtype, device, options.tokens, options.rounds)
        for device in devices
        for dtype in (torch.float32, torch.bfloat16)
    ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    report = {
        "cpu": f"{options.threads} threads of {os.cpu_count()} cores",
        "gpu": gpu,
        "torch": torch.__version__,
        "measured": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
