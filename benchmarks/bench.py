"""Time to first token from an int4 packet over loopback against the receiver's own prefill, and peak memory.

`make bench`, or: python benchmarks/bench.py [--model NAME] [--tokens 256 1024 4096] [--repeat N] [--out FILE]

Both ways start from the question and end at the first token of the answer, in one process, taken in turns:
  text:   the receiver reads context and question with transformers' own prefill and cache
  packet: HTTP GET from another process on this machine, verify, decode, place, read the question
Memory is what encoding and decoding add to a process that holds the model, over the bf16 cache's size.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache

from kvtalk import __version__
from kvtalk.link import Receiver, Sharer
from kvtalk.models import LM
from kvtalk.packet_writing import encode, write
from kvtalk.planning import Plan
from kvtalk.prompts import BARE
from kvtalk.transport import file, http

PLAN = Plan("int4:channel", "int4:token", "before")
QUESTION = "What did the writer of this text see first?"


def text_of(lm: LM, tokens: int) -> str:
    """About that many tokens of plain text."""
    from kvtalk.evaluation.data import unrelated_text

    ids = lm.encode(unrelated_text("x" * tokens * 8))[:tokens]
    return str(lm.tokenizer.decode(ids))


@torch.no_grad()
def first_token_from_text(lm: LM, ids: list[int]) -> None:
    cache = DynamicCache(config=lm.spec.config)
    logits = lm.model(torch.tensor([ids], device=lm.device), past_key_values=cache, logits_to_keep=1).logits
    int(logits[0, -1].argmax())


@torch.no_grad()
def first_token_from_packet(receiver: Receiver, url: str, prompt: list[int]) -> None:
    placed = receiver.lm.place([[receiver.prefix(http.fetch(url))]], room=len(prompt) + 64)
    int(receiver.lm.logits([prompt], placed, keep=1)[0, -1].argmax())


def in_turns(ways: dict[str, Callable[[], None]], repeat: int) -> dict[str, list[float]]:
    """Seconds of each way, taken in turns after one warm-up, so that a slow moment hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeat + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


class Peak:
    """Peak resident memory of a block above its beginning, sampled every half millisecond."""

    def __enter__(self) -> Peak:
        self.before = self.peak = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, resident())

    @property
    def added(self) -> int:
        return self.peak - self.before

    def _watch(self) -> None:
        while not self._stop.wait(0.0005):
            self.peak = max(self.peak, resident())


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_memory(name: str, tokens: int) -> dict[str, float]:
    """Encode and decode once in this fresh process; shares of the bf16 cache, the cache itself included."""
    lm = LM.load(name, dtype=torch.bfloat16, prompt=BARE)
    sharer, receiver = Sharer(lm), Receiver(lm)
    small = sharer.share(text_of(lm, 64), plan=PLAN)  # kernels and their workspaces
    receiver.lm.place([[receiver.prefix(small.blob)]])
    cache = sharer.read(text_of(lm, tokens))
    full = tokens * lm.spec.bytes_per_token
    shares = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, plan in (("int4", PLAN), ("bf16", Plan())):
            path = Path(folder) / name
            trim()
            with Peak() as memory, file.saving(path) as target:
                write(target, cache, plan, lm.spec, sharer.start)
            shares[f"encode_{name}_to_file"] = (memory.added + cache.nbytes) / full
        trim()
        with Peak() as memory:
            blob = encode(cache, PLAN, lm.spec, sharer.start)
        shares["encode_int4_in_memory"] = (memory.added + cache.nbytes) / full
        del cache, blob
        for name in ("int4", "bf16"):
            trim()
            with Peak() as memory:
                placed = receiver.lm.place([[receiver.prefix(file.load(Path(folder) / name))]], room=0)
            shares[f"decode_{name}_from_file"] = memory.added / full
            del placed
    return shares


def memory_in_fresh_processes(name: str, tokens: int, processes: int = 3) -> dict[str, float]:
    """Medians over processes: the allocator keeps a few megabytes more or less each time."""
    runs = []
    for _ in range(processes):
        command = [sys.executable, __file__, "--model", name, "--memory-of", str(tokens)]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        runs.append(json.loads(run.stdout.splitlines()[-1]))
    return {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}


def trim() -> None:
    """What earlier work freed must not hide what the next takes."""
    ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    arguments.add_argument("--repeat", type=int, default=5)
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.memory_of:
        print(json.dumps(measure_memory(chosen.model, chosen.memory_of)))
        return
    lm = LM.load(chosen.model, prompt=BARE)
    sharer, receiver = Sharer(lm), Receiver(lm)
    prompt = receiver.prompt(QUESTION)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        server, address = serve(folder)
        try:
            for tokens in chosen.tokens:
                context = text_of(lm, tokens)
                shared = sharer.share(context, plan=PLAN)
                with file.saving(Path(folder) / f"{tokens}.kvt") as target:
                    target.write(shared.blob)
                ids = lm.head_ids() + lm.encode(context) + prompt
                url = f"{address}/{tokens}.kvt"
                seconds = in_turns(
                    {
                        "text": lambda ids=ids: first_token_from_text(lm, ids),
                        "packet": lambda url=url: first_token_from_packet(receiver, url, prompt),
                    },
                    chosen.repeat,
                )
                ratios = [p / t for p, t in zip(seconds["packet"], seconds["text"], strict=True)]
                memory = memory_in_fresh_processes(chosen.model, tokens)
                rows.append(
                    {
                        "tokens": shared.cost.context_tokens,
                        "packet_bytes": len(shared.blob),
                        "text_ms": round(1000 * statistics.median(seconds["text"]), 1),
                        "packet_ms": round(1000 * statistics.median(seconds["packet"]), 1),
                        "ratio": round(statistics.median(ratios), 3),
                        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
                        "memory_over_bf16_cache": memory,
                    }
                )
                row = rows[-1]
                print(
                    f"{row['tokens']:>5} tokens  first token: text {row['text_ms']:>8.1f} ms, int4 packet "
                    f"{row['packet_ms']:>7.1f} ms, ratio {row['ratio']:.3f} {row['ratio_range']}  "
                    f"memory / bf16 cache: {row['memory_over_bf16_cache']}",
                    flush=True,
                )
        finally:
            server.terminate()
    if chosen.out:
        about = {
            "command": "python " + " ".join(sys.argv),
            "model": chosen.model,
            "dtype": str(lm.spec.dtype),
            "plan": str(PLAN),
            "threads": torch.get_num_threads(),
            "device": str(lm.device),
            "repeat": chosen.repeat,
            "versions": {"kvtalk": __version__, "torch": torch.__version__},
        }
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def serve(folder: str) -> tuple[subprocess.Popen[bytes], str]:
    """A file server in another process on a free port of this machine."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", folder],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    return server, f"http://127.0.0.1:{port}"


if __name__ == "__main__":
    main()
