"""Do our log-likelihoods agree with an independent implementation, item by item?

    python benchmarks/against_lm_eval.py --harness-python VENV/bin/python --data FOLDER

Runs the first items of ARC-Easy through lm-evaluation-harness (in a Python that has `lm_eval[hf]` installed; it is not
one of our dependencies) and through kvtalk, both in float32 with the same prompts on the same local file and the same
model folders, and writes ``results/bench/against_lm_eval.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

TASK = """task: kvtalk_arc_easy
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
- metric: acc
- metric: acc_norm
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--harness-python", type=Path, help="a Python with lm_eval installed")
    parser.add_argument("--data", type=Path, required=True, help="folder with arc_easy_test.jsonl.gz")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("results/bench/against_lm_eval.json"))
    parser.add_argument("--as-harness", nargs=3, metavar=("MODEL", "ROWS", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_harness:
        _harness(*options.as_harness)
    else:
        _compare(options)


def _compare(options: argparse.Namespace) -> None:
    from kvtalk import Link, bundled
    from kvtalk.evaluation.arms import make_arms
    from kvtalk.evaluation.protocols import protocol_for
    from kvtalk.evaluation.runner import run
    from kvtalk.evaluation.summary import read_records
    from kvtalk.evaluation.tasks import task_named

    task = task_named("arc_easy")
    items = task.load(options.data, limit=options.limit)
    report: dict[str, object] = {"task": task.title, "items": len(items), "dtype": "float32", "models": {}}
    for model in bundled.MODELS:
        with tempfile.TemporaryDirectory() as folder:
            rows, theirs, ours = (Path(folder) / name for name in ("rows.jsonl", "theirs.json", "ours"))
            rows.write_text("".join(item.model_dump_json() + "\n" for item in items), "utf-8")
            command = [options.harness_python, __file__, "--data", options.data]
            command += ["--as-harness", bundled.ensure(model), rows, theirs]
            subprocess.run(list(map(str, command)), check=True)
            link = Link(model, model, dtype=torch.float32)
            run(link, protocol_for(task, "likelihood"), items, make_arms(["receiver"]), ours)
            records = {record.id: record for record in read_records(ours)}
            expected = json.loads(theirs.read_text())
        report["versions"] = expected["versions"]
        report["models"][model] = _summary(records, expected["items"])  # type: ignore[index]
        print(model, {name: value for name, value in report["models"][model].items() if name != "items"})  # type: ignore[index]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def _summary(records: dict, expected: dict) -> dict:
    differences = [
        abs(a - b)
        for key, item in expected.items()
        for a, b in zip(records[key].likelihoods, item["theirs"], strict=True)
    ]
    agreed = {
        name: sum(records[key].scores[name] == item[name] for key, item in expected.items())
        for name in ("acc", "acc_norm")
    }
    return {
        "largest_difference_nats": round(max(differences), 6),
        "items_that_agree": agreed,
        "acc": sum(item["acc"] for item in expected.values()) / len(expected),
        "acc_norm": sum(item["acc_norm"] for item in expected.values()) / len(expected),
        "items": expected,
    }


def _harness(model: str, rows: str, out: str) -> None:
    """Runs in the other Python, which knows nothing of kvtalk."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        import lm_eval
        import transformers
        from lm_eval.tasks import TaskManager

        (Path(folder) / "task.yaml").write_text(TASK.format(file=rows))
        result = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={model},dtype=float32",
            tasks=["kvtalk_arc_easy"],
            task_manager=TaskManager(include_path=folder),
            device="cpu",
            batch_size=1,
            bootstrap_iters=0,
        )
    items = {
        sample["doc"]["id"]: {
            "theirs": [round(float(reply[0][0]), 5) for reply in sample["resps"]],
            "acc": float(sample["acc"]),
            "acc_norm": float(sample["acc_norm"]),
        }
        for sample in result["samples"]["kvtalk_arc_easy"]
    }
    versions = {
        "lm_eval": lm_eval.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }
    Path(out).write_text(json.dumps({"versions": versions, "items": items}))


if __name__ == "__main__":
    main()
