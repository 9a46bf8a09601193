"""Short contexts cut out of longer ones."""

from __future__ import annotations

import gzip
import importlib
import json
import random
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
crops = importlib.import_module("crops")

CONTEXT = (
    "The mill at Tarn was built in 1804. Its owner, Berthe Quill, sold eels and rye bread there. "
    "A flood took the old bridge. The ferry has crossed at noon since then! Nobody pays for it."
)


def row(answer: str) -> dict:
    return {"id": answer, "context": CONTEXT, "question": "Which?", "answers": [answer, "Tarn"]}


def test_sentences_are_found_with_where_they_lie() -> None:
    found = crops.sentences(CONTEXT)
    assert len(found) == 5
    assert "".join(CONTEXT[begin:end] for begin, end in found) == CONTEXT
    assert CONTEXT[slice(*found[2])] == "A flood took the old bridge. "


def test_a_crop_holds_the_answer_and_little_else() -> None:
    for seed in range(20):
        (crop,) = crops.crops([row("Berthe Quill")], random.Random(seed))
        assert "Berthe Quill" in crop["context"]
        assert crop["context"] in CONTEXT
        assert len(crops.sentences(crop["context"])) <= 3
        assert crop["answers"] == ["Berthe Quill", *["Tarn"] * ("Tarn" in crop["context"])]


def test_what_cannot_be_cut_is_left_out() -> None:
    for answer in ("the", "1804. Its", "zebra"):  # more than once, across a full stop, nowhere
        assert not list(crops.crops([row(answer)], random.Random(0)))
    assert not list(crops.crops([{**row("mill"), "context": "The mill at Tarn."}], random.Random(0)))


def test_a_crop_that_leaves_nearly_everything_is_none() -> None:
    whole = {**row("Berthe Quill"), "context": "It is old. Its owner, Berthe Quill, sold eels for years."}
    assert not list(crops.crops([whole], random.Random(0)))


def test_the_command_draws_the_same_rows_again(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row(answer)) + "\n" for answer in ("Berthe Quill", "noon", "flood", "rye bread"))
    made = []
    for name in ("one", "other"):
        command = [sys.executable, str(BENCHMARKS / "crops.py"), "rows.jsonl.gz", f"{name}.jsonl.gz"]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "2 of 4 crops of 4 questions" in run.stdout
    every = [*command[:2], "rows.jsonl.gz", "rows.jsonl.gz", "all.jsonl.gz", "--share", "1"]
    assert "8 of 8" in subprocess.run(every, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    for name in ("one", "other"):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "rt") as file:
            made.append([json.loads(line) for line in file])
    assert made[0] == made[1]
    assert [one["id"] for one in made[0]] == ["crop-00000", "crop-00001"]
