"""Training in several processes, as ``torchrun`` and ``accelerate launch`` start them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from conftest import tiny_lm
from kvtalk.training.loop import CHECKPOINT, LOG


def test_two_processes_train_one_translator(tiny_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    lm = tiny_lm(seed=1)
    lm.model.save_pretrained(other)
    lm.tokenizer.save_pretrained(other)
    rows = [
        {"text": f"House {n} is the painter's, who sells {7 * n} boats a year at the lake. " * 3} for n in range(200)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    sizes = ("--steps", "10", "--tokens", "128", "--width", "64", "--latent", "32", "--longest", "400")
    both = ("--sharer", str(tiny_folder), "--receiver", str(other), "--data", str(tmp_path / "rows.jsonl"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "kvtalk"]
    run = subprocess.run(
        [
            *launch,
            "train",
            "translator",
            *both,
            *sizes,
            "--packing",
            "bf16",
            "--check-every",
            "5",
            "--out",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    state = torch.load(tmp_path / "out" / CHECKPOINT, weights_only=True)
    assert state["settings"]["processes"] == 2
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / LOG).read_text("utf-8").splitlines()]
    assert steps == sorted(steps)  # one process alone writes the log
    assert steps[-1] == 10
    assert (tmp_path / "out" / "adapter.json").exists()
