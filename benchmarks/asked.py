"""Questions about running text, asked and answered by Gemma, one of the two models: more to train on than people wrote.

    python benchmarks/asked.py learn squad_v1_train.jsonl.gz asks.jsonl.gz
    kvtalk train lora --receiver gemma3-270m --data asks.jsonl.gz --questions 0.9 --steps 250 --tokens 8192 \\
        --rate 1e-3 --out asks
    kvtalk train lora --receiver gemma3-270m --data squad_v1_train.jsonl.gz --questions 0.9 --steps 250 --tokens 8192 \\
        --rate 1e-3 --out answers
    python benchmarks/asked.py want general.jsonl.gz wanted.jsonl.gz --questions 60000 --each 2
    python benchmarks/asked.py ask wanted.jsonl.gz asked.jsonl.gz --asks gemma3-270m+asks \\
        --answers gemma3-270m+answers --others

One LoRA learns from people's questions to ask for an answer that it is given, another one to answer. The first is given
names, numbers and phrases of passages; what it asks is kept where the second, which does not see the wanted answer,
finds it again in the passage, or with ``--others`` another one that the passage holds. Rows have ``id``, ``context``,
``question``, ``answers``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from cloze import NAME, NUMBER, passages
from rich.progress import track

from kvtalk.evaluation.metrics import f1
from kvtalk.models import LM

WANTED = 'Which question about the text has the answer "{}"?'
PHRASE = re.compile(r"(?<![\w'-])(?:[a-z][\w'-]* ){0,3}[a-z][\w'-]{3,}(?![\w'-])")
BARE = re.compile(
    r"\b(?:the|a|an|and|or|but|of|to|in|on|at|by|for|with|from|as|is|was|are|were|be|been|that|which|who|it)\b"
)
NAMED = 0.6
"""Share of the wanted answers that are names or numbers; the others are phrases of up to four plain words."""
LEAST_F1 = 0.7
"""Of the answer that was found again."""
LONGEST = 60
"""Characters of another answer that is kept."""
ASKED, ANSWERED = 28, 18
"""Tokens of a question and of an answer at most; what is cut off is hardly ever kept."""

Row = dict[str, Any]


def learn(rows: Iterable[Row]) -> Iterator[Row]:
    """People's questions as answers to be learned."""
    for row in rows:
        yield {**row, "question": WANTED.format(row["answers"][0]), "answers": [row["question"].strip()]}


def want(rows: Iterable[Row], count: int, each: int = 1) -> Iterator[Row]:
    """Passages of texts, or contexts of questions as they are, each with some answers to ask for."""
    rng = random.Random(1)
    every = list(dict.fromkeys(row["context"] for row in rows if "context" in row))
    texts = dict.fromkeys(row["text"] for row in rows if "text" in row)
    every += [" ".join(some) for text in texts for some in passages(text, rng)]
    rng.shuffle(every)
    made = 0
    for context in every:
        for answer in dict.fromkeys(_answer(context, rng) for _ in range(each)):
            if answer is None:
                continue
            yield {
                "id": f"asked-{made:05d}",
                "context": context,
                "question": WANTED.format(answer),
                "answers": [answer],
            }
            made += 1
            if made == count:
                return


def _answer(context: str, rng: random.Random) -> str | None:
    """A name, number or phrase that stands once in a passage."""
    kinds = [[*NAME.finditer(context), *NUMBER.finditer(context)], [*PHRASE.finditer(context)]]
    found = [match[0] for match in kinds[rng.random() >= NAMED]]
    usable = [text for text in found if 2 <= len(text) <= 40 and context.count(text) == 1 and not _bare(text)]
    return rng.choice(usable) if usable else None


def _bare(phrase: str) -> bool:
    """Whether a phrase begins or ends in a word that says nothing by itself."""
    words = phrase.split()
    return any(BARE.fullmatch(word) for word in (words[0], words[-1]))


def check(rows: Iterable[Row], answers: dict[str, str]) -> Iterator[Row]:
    """What was asked, to be answered by a model that does not see what was wanted."""
    for row in rows:
        question = answers.get(row["id"], "").strip()
        asked = {**row, "question": question}
        if question.endswith("?") and not _told(row["answers"][0], asked):
            yield asked


def keep(rows: Iterable[Row], answers: dict[str, str], others: bool = False) -> Iterator[Row]:
    """What was answered as it was wanted; with ``others`` also what was answered otherwise, in the passage's words."""
    for row in rows:
        found = answers.get(row["id"], "").strip().rstrip(".")
        if f1(found, row["answers"]) >= LEAST_F1:
            yield row
        elif others and 0 < len(found) <= LONGEST and found in row["context"] and not _told(found, row):
            yield {**row, "answers": [found]}


def written(lm: LM, rows: Sequence[Row], tokens: int, batch: int) -> dict[str, str]:
    """So many tokens that a model writes after each row's context and question, up to a line's end; by the row's id.

    Raises:
        ValueError: two rows have one id.
    """
    head, end = lm.head_ids(), lm.encode("\n")[-1]
    ends = [end, *(own for own in [lm.tokenizer.eos_token_id] if own is not None)]
    both = [row["context"] for row in rows], [lm.prompt.tail(row["question"]) for row in rows]
    contexts, tails = (lm.tokenizer(texts, add_special_tokens=False).input_ids for texts in both)
    texts = {row["id"]: head + one + other for row, one, other in zip(rows, contexts, tails, strict=True)}
    if len(texts) < len(rows):
        raise ValueError(
            "two rows have one id: ask for what each `want` made by itself, and put the questions together"
        )
    order = sorted(texts, key=lambda name: len(texts[name]))
    found = {}
    for start in track(range(0, len(order), batch), f"{lm.name}: writing"):
        names = order[start : start + batch]
        longest = len(texts[names[-1]])
        ids = torch.tensor([[end] * (longest - len(texts[name])) + texts[name] for name in names])
        read = torch.tensor([[0] * (longest - len(texts[name])) + [1] * len(texts[name]) for name in names])
        with torch.no_grad():
            made = lm.model.generate(
                input_ids=ids.to(lm.device),
                attention_mask=read.to(lm.device),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=end,
            )
        answers = lm.tokenizer.batch_decode(made[:, longest:].tolist(), skip_special_tokens=True)
        found |= {name: answer.partition("\n")[0].strip() for name, answer in zip(names, answers, strict=True)}
    return found


def _told(answer: str, row: Row) -> bool:
    """Whether the question holds an answer."""
    return answer.lower() in row["question"].lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    for step, lines in {
        "learn": "people's questions become what a LoRA is to write",
        "want": "passages and answers to ask for",
        "ask": "questions for these answers, and what is found when they are asked",
    }.items():
        one = steps.add_parser(step, help=lines)
        one.add_argument("rows", type=Path)
        one.add_argument("out", type=Path)
        if step == "want":
            one.add_argument("--questions", type=int, default=24_000)
            one.add_argument("--each", type=int, default=1, help="answers to ask for in a passage, at most")
        if step == "ask":
            one.add_argument("--asks", required=True, help="model that asks, such as gemma3-270m+FOLDER")
            one.add_argument("--answers", required=True, help="model that answers")
            one.add_argument("--others", action="store_true", help="keep other answers, too, if the passage holds them")
            one.add_argument("--batch", type=int, default=1024)
    args = parser.parse_args()
    with gzip.open(args.rows, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    if args.step == "ask":
        asked = list(check(rows, written(LM.load(args.asks), rows, ASKED, args.batch)))
        made = list(keep(asked, written(LM.load(args.answers), asked, ANSWERED, args.batch), args.others))
    else:
        made = list(learn(rows) if args.step == "learn" else want(rows, args.questions, args.each))
    with gzip.open(args.out, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
    print(f"{len(made):,} of {len(rows):,} rows")


if __name__ == "__main__":
    main()
