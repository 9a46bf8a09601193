"""Multiple-choice questions to train a fuser on, from data sets in other forms.

    python benchmarks/choices.py DATA OUT.jsonl.gz
    python benchmarks/choices.py DATA OUT.jsonl.gz --contexts [--squad squad_v1_test]

reads ``instruct_flan_cot`` (its ECQA and QASC questions: options in the prompt, the right one named at the end of the
response) and ``squad_v1_train`` (each question without its text; the other options are answers to other questions about
the same text) from the folder DATA. With ``--contexts`` it makes SQuAD's questions alone, each with its text, which a
sharer is to know and the receiver is not.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
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


def alike(text: str, answers: set[str]) -> bool:
    """Whether an option is, holds or lies in one of the answers."""
    return any(text.lower() in answer or answer in text.lower() for answer in answers)


def from_squad(file: Path, contexts: bool) -> Iterator[dict[str, Any]]:
    """Questions with their texts or without."""
    asked: dict[str, list[dict[str, Any]]] = {}
    for row in rows(file):
        asked.setdefault(row["context"], []).append(row)
    rng = random.Random(0)
    for listed in asked.values():
        for row in listed:
            own = {answer.lower() for answer in row["answers"]}
            others = {text for other in listed if not alike(text := other["answers"][0], own)}
            if len(others) >= OPTIONS - 1:
                choices = [*rng.sample(sorted(others), OPTIONS - 1), row["answers"][0]]
                rng.shuffle(choices)
                known = {"context": row["context"]} if contexts else {}
                right = choices.index(row["answers"][0])
                yield {**known, "question": row["question"], "choices": choices, "answer": right}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--contexts", action="store_true")
    parser.add_argument("--squad", default="squad_v1_train")
    args = parser.parse_args()
    squad = from_squad(args.data / f"{args.squad}.jsonl.gz", args.contexts)
    made = [*squad] if args.contexts else [*from_flan(args.data), *squad]
    with gzip.open(args.out, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
    print(f"{len(made):,} questions")
