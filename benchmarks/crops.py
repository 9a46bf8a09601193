"""Questions about a few sentences: those of longer contexts, asked about one to three sentences around the answer.

    python benchmarks/crops.py squad_v1_train.jsonl.gz ... crops.jsonl.gz

So that a translator also learns short contexts. Rows have ``id``, ``context``, ``question`` and at least one of
``answers``. Taken are questions whose first answer stands in their context once, in one sentence, as far as full stops
tell, and whose crop has at most four fifths of the context. Of these a share is drawn; the same rows give the same
ones. Some questions need what was cut off: nobody looked.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ENDS = re.compile(r"(?<=[.!?])[\"”’)]?\s+(?=[A-Z\"“(0-9])")
MOST = 0.8
"""Of a context's characters that a crop may have."""

Row = dict[str, Any]


def sentences(text: str) -> list[tuple[int, int]]:
    """Where each begins and the next one does."""
    begins = [0, *(match.end() for match in ENDS.finditer(text))]
    return list(zip(begins, [*begins[1:], len(text)], strict=True))


def crops(rows: Iterable[Row], rng: random.Random) -> Iterator[Row]:
    """Rows whose contexts are sentences of those given, each with the answers that stand there."""
    for row in rows:
        context, answer = row["context"], row["answers"][0]
        if context.count(answer) != 1:
            continue
        found, at = sentences(context), context.index(answer)
        holding = [place for place, (begin, end) in enumerate(found) if begin <= at and at + len(answer) <= end]
        if not holding:
            continue
        first, last = max(0, holding[0] - rng.choice((0, 0, 1))), holding[0] + rng.choice((0, 0, 1))
        cropped = context[found[first][0] : found[min(last, len(found) - 1)][1]].strip()
        if len(cropped) <= MOST * len(context):
            yield {**row, "context": cropped, "answers": [one for one in row["answers"] if one in cropped]}


def main() -> None:
    """Read, crop, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, default=0.5, help="of the crops that is drawn")
    args = parser.parse_args()
    rng = random.Random(1)
    rows = []
    for path in args.rows:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows += [json.loads(line) for line in file]
    made = list(crops(rows, rng))
    drawn = rng.sample(made, round(args.share * len(made)))
    with gzip.open(args.out, "wt", encoding="utf-8") as file:
        for number, row in enumerate(drawn):
            kept = {"id": f"crop-{number:05d}", **{name: row[name] for name in ("context", "question", "answers")}}
            file.write(json.dumps(kept, ensure_ascii=False) + "\n")
    print(f"{len(drawn):,} of {len(made):,} crops of {len(rows):,} questions")


if __name__ == "__main__":
    main()
