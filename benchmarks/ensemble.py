"""What two models know together: options chosen by a weighted sum of both models' log-likelihoods a character.

    python benchmarks/ensemble.py --out results/fuser/ensemble.json

Reads the records of both models under results/ and the questions that they belong to (``--data``, or the hub).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tables import CHOICE_TASKS, MODELS, RESULTS

from kvtalk.evaluation.data import Choice
from kvtalk.evaluation.summary import read_records
from kvtalk.evaluation.tasks import task_named

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the second model."""


def normal(likelihoods: tuple[float, ...], item: Choice) -> npt.NDArray[np.float64]:
    """Of each option, a character."""
    return np.array(likelihoods) / [len(choice) for choice in item.choices]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "fuser" / "ensemble.json")
    args = parser.parse_args()
    found = []
    for task in CHOICE_TASKS:
        both = [
            {record.id: record.likelihoods for record in read_records(RESULTS / task / model / "likelihood")}
            for model in MODELS
        ]
        items = [item for item in task_named(task).load(args.data) if isinstance(item, Choice)]
        items = [item for item in items if all(item.id in one for one in both)]
        accuracy = {}
        for share in SHARES:
            sums = [(1 - share) * normal(both[0][i.id], i) + share * normal(both[1][i.id], i) for i in items]
            right = [int(one.argmax()) == item.answer for one, item in zip(sums, items, strict=True)]
            accuracy[str(share)] = round(100 * float(np.mean(right)), 2)
        found.append({"task": task, "questions": len(items), "accuracy": accuracy})
        print(found[-1])
    args.out.write_text(json.dumps({"models": MODELS, "measured": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
