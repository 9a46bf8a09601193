"""Questions about running text to train on, without anybody to ask them: a word of a sentence is left out.

    python benchmarks/cloze.py general.jsonl.gz cloze.jsonl.gz --questions 20000

Rows have ``id``, ``context``, ``question``, ``answers``. A context is a passage of the text, the question one of its
sentences with a gap whose words stand nowhere else in that sentence, its beginning up to there, to be gone on with, or
the sentence with *What* in the place of how it begins. Every other time a name or number is to be left out, and a
sentence without any gives no question (with ``--names`` every time, and nothing is to be gone on with), else a word
that is not among the most frequent. They teach to keep which word stood where, for which human questions are too few.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SENTENCE = re.compile(r"(?<=[.!?]) +(?=[A-Z\"'])")
NAME = re.compile(r"(?<![.!?\"'] )(?<!^)\b[A-Z][\w'-]+(?: (?:of |the |de |van )?[A-Z][\w'-]+)*")
NUMBER = re.compile(r"\b\d[\d,.:]*\d\b|\b\d+\b")
WORD = re.compile(r"(?<![\w'-])[a-z]{3,}(?![\w'-])")
FREQUENT = 400
"""Words of the texts that are not left out by themselves, the most frequent ones: they say little."""
BEGINNING = re.compile(
    r"^(?:The |A |An )?[A-Z][\w'-]+(?: [A-Z][\w'-]+)+(?= (?:is|was|are|were|has|had|can|will|came|made)\b)"
)
ASKED = (
    'What is missing here: "{}"?',
    'Which word or number fills the gap in "{}"?',
    'Complete what the text says: "{}"',
    'In the text, what stands for ____ in: "{}"',
)
GO_ON = 'Go on as the text does: "{}"'
BEFORE = 20
"""Characters of a beginning at least."""
LEAST, MOST = 40, 220
"""Characters of a sentence."""
CONTEXT = 300, 1200
"""Characters of a context, from, to."""


def passages(text: str, rng: random.Random) -> Iterator[list[str]]:
    """Sentences of passages, one after the other."""
    for paragraph in re.split(r"\n{2,}", text):
        some: list[str] = []
        wanted = rng.randint(*CONTEXT)
        for sentence in SENTENCE.split(" ".join(paragraph.split())):
            some.append(sentence)
            if sum(map(len, some)) >= wanted:
                yield some
                some, wanted = [], rng.randint(*CONTEXT)
        if sum(map(len, some)) >= CONTEXT[0]:
            yield some


def asked(sentences: list[str], rng: random.Random, frequent: set[str] | None) -> dict[str, Any] | None:
    """A question about one of them; without ``frequent`` words only about names and numbers."""
    usable = [sentence for sentence in sentences if LEAST <= len(sentence) <= MOST]
    if not usable:
        return None
    sentence, context = rng.choice(usable), " ".join(sentences)
    begins = BEGINNING.match(sentence)
    if begins and rng.random() < 0.5:
        return {"context": context, "question": f"What{sentence[begins.end() :].rstrip('.!')}?", "answers": [begins[0]]}
    found = [*NAME.finditer(sentence), *NUMBER.finditer(sentence)]
    if frequent is not None and rng.random() < 0.5:
        found = [word for word in WORD.finditer(sentence) if word[0] not in frequent]
    gaps = [gap for gap in found if 2 <= len(gap[0]) <= 40 and sentence.count(gap[0]) == 1]
    if not gaps:
        return None
    gap = rng.choice(gaps)
    before = sentence[: gap.start()].rstrip()
    if frequent is not None and len(before) >= BEFORE and rng.random() < 0.5:
        question = GO_ON.format(before)
    else:
        question = rng.choice(ASKED).format(f"{sentence[: gap.start()]}____{sentence[gap.end() :]}")
    return {"context": context, "question": question, "answers": [gap[0]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="rows with text, or with context")
    parser.add_argument("out", type=Path)
    parser.add_argument("--questions", type=int, default=20_000)
    parser.add_argument("--names", action="store_true", help="leave out names and numbers alone")
    args = parser.parse_args()
    rng = random.Random(0)
    with gzip.open(args.texts, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = dict.fromkeys(row["text"] if "text" in row else row["context"] for row in rows)
    every = [some for text in texts for some in passages(text, rng)]
    counts = Counter(word[0] for some in every for sentence in some for word in WORD.finditer(sentence))
    frequent = None if args.names else {word for word, _ in counts.most_common(FREQUENT)}
    rng.shuffle(every)
    made: list[dict[str, Any]] = []
    for sentences in every:
        row = asked(sentences, rng, frequent)
        if row is not None:
            made.append({"id": f"{args.texts.name.partition('.')[0]}-{len(made):05d}", **row})
        if len(made) == args.questions:
            break
    with gzip.open(args.out, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
    print(f"{len(made):,} questions from {len(every):,} passages")


if __name__ == "__main__":
    main()
