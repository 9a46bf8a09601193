"""How much longer an evaluation takes than the model calls in it, on this machine.

    python benchmarks/eval_overhead.py --data FOLDER --out results/bench/eval_overhead_cpu.json

Runs SQuAD through SmolLM2-135M with every arm and reports items a second, seconds inside the model's forward pass, the
ratio of the two, and peak memory with one batch of items and with all of them.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch

from kvtalk import Link
from kvtalk.evaluation import runner
from kvtalk.evaluation.arms import make_arms
from kvtalk.evaluation.batch import Settings
from kvtalk.evaluation.protocols import protocol_for
from kvtalk.evaluation.tasks import task_named

ARMS = ("receiver", "sharer", "text", "relay", "routing", "cache", "wrong", "zeroed", "self")
PLAN = "int8:channel/int8:token before"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with squad_v1_test.jsonl.gz; by default KVTALK_DATA")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--relay-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    link = Link(options.model, options.model)
    link.warm_up()
    lm = link.receiver.lm
    protocol = protocol_for(task_named("squad"))
    items = task_named("squad").load(options.data, limit=options.limit)
    settings = Settings.for_device(lm.device)
    settings = Settings(options.batch or settings.batch, options.relay_tokens)
    clock = _Clock(lm.device)
    lm.model.register_forward_pre_hook(clock.start)
    lm.model.register_forward_hook(clock.stop)
    arms = make_arms(ARMS, [PLAN])
    found = {}
    for name, part in (("one batch", items[: settings.batch]), ("all", items)):
        clock.seconds = 0.0
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            runner.run(link, protocol, part, arms, Path(folder), settings)
            seconds = time.perf_counter() - begin
        peak = (
            torch.cuda.max_memory_allocated()
            if lm.device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        found[name] = {
            "items": len(part),
            "arms": len(arms),
            "batch": settings.batch,
            "seconds": round(seconds, 2),
            "model_seconds": round(clock.seconds, 2),
            "ratio": round(seconds / clock.seconds, 3),
            "items_per_second": round(len(part) / seconds, 2),
            "peak_memory_bytes": peak,
        }
        print(name, found[name], flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"model": options.model, **found}, indent=1) + "\n")


class _Clock:
    """Adds up the seconds between the beginning and the end of forward passes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self._begin = device, 0.0, 0.0

    def start(self, *_: object) -> None:
        self._begin = self._now()

    def stop(self, *_: object) -> None:
        self.seconds += self._now() - self._begin

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


if __name__ == "__main__":
    main()
