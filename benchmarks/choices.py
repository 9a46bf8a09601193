"""Multiple-choice questions to train a fuser on, from data sets in other forms.

``python benchmarks/choices.py DATA OUT.jsonl.gz`` reads ``instruct_flan_cot`` (its ECQA and QASC questions: options in
the prompt, the right one named at the end of the response) and ``squad_v1_train`` (each question without its text; the
other options are answers to other questions about the same text) from the folder DATA.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPTION = re.compile(r"^- (?:\(([A-Z])\) )?(.+)$", re.MULTILINE)
SETS = "flan-cot-ecqa", "flan-cot-qasc"
OPTIONS = 4


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """Of a file."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def from_flan(data: Path) -> Iterator[dict[str, Any]]:
    """Questions with options in the prompt."""
    for row in rows(data / "instruct_flan_cot.jsonl.gz"):
        question, found, options = row["prompt"].partition("\nOptions:\n")
        if not row["id"].startswith(SETS) or not found:
            continue
        named = OPTION.findall(options)
        said = row["response"].rpartition("The answer is ")[2].rstrip(".")
        right = [index for index, (letter, text) in enumerate(named) if said in (f"({letter})", text)]
        if len(right) == 1:
            yield {"question": question, "choices": [text for _, text in named], "answer": right[0]}


def from_squad(data: Path) -> Iterator[dict[str, Any]]:
    """Questions whose text is left out."""
    asked: dict[str, list[dict[str, Any]]] = {}
    for row in rows(data / "squad_v1_train.jsonl.gz"):
        asked.setdefault(row["context"], []).append(row)
    rng = random.Random(0)
    for listed in asked.values():
        for row in listed:
            own = {answer.lower() for answer in row["answers"]}
            others = {other["answers"][0] for other in listed if other["answers"][0].lower() not in own}
            if len(others) >= OPTIONS - 1:
                choices = [*rng.sample(sorted(others), OPTIONS - 1), row["answers"][0]]
                rng.shuffle(choices)
                yield {"question": row["question"], "choices": choices, "answer": choices.index(row["answers"][0])}


if __name__ == "__main__":
    folder, out = map(Path, sys.argv[1:])
    made = [*from_flan(folder), *from_squad(folder)]
    with gzip.open(out, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
    print(f"{len(made):,} questions")
