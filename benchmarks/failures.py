"""Where a translated or fused cache loses: F1 by kind of answer and length of context.

python benchmarks/failures.py results/squad/smollm2-135m+gemma3-270m SQUAD.jsonl.gz [--list]
python benchmarks/failures.py results/fuser/qat/parent/gaps/PAIR GAPS.jsonl.gz --arms 'fused bf16,wrong bf16'
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from kvtalk.evaluation.summary import read_records

ARMS = ("text", "cache bf16", "cache int4:token width=256", "cache int4:token width=64")


def kinds(row: dict) -> Iterator[str]:
    """What a question is counted as."""
    answer, words = row["answers"][0], len(row["context"].split())
    if any(letter.isdigit() for letter in answer):
        yield "answer has a number"
    elif any(word[0].isupper() for word in answer.split()):
        yield "answer has a name"
    else:
        yield "answer in plain words"
    yield "context up to 100 words" if words <= 100 else "101 to 150" if words <= 150 else "more than 150 words"
    yield "all"


def main() -> None:
    """Print a table, and the wrong answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--arms", default=",".join(ARMS), help="of the run; the first but the text is judged")
    parser.add_argument(
        "--list", action="store_true", help="wrong answers where the text's is right; needs the arm text"
    )
    options = parser.parse_args()
    columns = options.arms.split(",")
    with gzip.open(options.data, "rt", encoding="utf-8") as file:
        rows = {str(row["id"]): row for row in map(json.loads, file)}
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    said: dict[str, dict[str, str]] = defaultdict(dict)
    right: dict[str, dict[str, float]] = defaultdict(dict)
    for record in read_records(options.results):
        said[record.id][record.arm], right[record.id][record.arm] = record.answer, record.scores["f1"]
        for kind in kinds(rows[record.id]):
            found[kind][record.arm].append(100 * record.scores["f1"])
    print(f"| questions | number | {' | '.join(columns)} |")
    print("| --- " * (len(columns) + 2) + "|")
    for kind, arms in sorted(found.items()):
        cells = [f"{sum(arms[arm]) / len(arms[arm]):.1f}" if arms[arm] else "" for arm in columns]
        print(f"| {kind} | {len(arms[columns[0]])} | {' | '.join(cells)} |")
    if "text" not in columns:
        return
    judged = next(arm for arm in columns if arm != "text")
    wrong = [name for name in said if right[name][judged] < 0.5]
    both = sum(right[name]["text"] < 0.5 for name in wrong)
    print(f"\nF1 below 0.5: {len(wrong)} of {len(said)}; in {both} of them the frozen receiver's own reading is too")
    if options.list:
        for name in wrong:
            if right[name]["text"] >= 0.5:
                row = rows[name]
                print(f"{row['question']} | {row['answers'][0]} | {said[name][judged]} | {said[name]['text']}")


if __name__ == "__main__":
    main()
