"""Sentences to complete, made of running text."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
cloze = importlib.import_module("cloze")
SENTENCES = [
    "The old ferry at Marrow Point was painted green in 1902 by the sons of a baker.",
    "Nobody in the village of Harlow knew why it carried timber and eels until then.",
]


@pytest.mark.parametrize("frequent", [None, {"the", "was", "and", "why"}])
def test_a_question_is_a_sentence_of_its_context_without_its_answer(frequent: set[str] | None) -> None:
    forms, missing = set(), set()
    for seed in range(400):
        row = cloze.asked(SENTENCES, random.Random(seed), frequent)
        if row is None:
            continue
        (answer,) = row["answers"]
        missing.add(answer)
        assert row["context"] == " ".join(SENTENCES)
        before, sentence, after = row["question"].split('"')
        forms.add(f'{before}"{{}}"{after}')
        begun = f'{before}"{{}}"{after}' == cloze.GO_ON
        whole = f"{sentence} {answer}" if begun else sentence.replace("____", answer)
        assert whole in row["context"]
        assert begun or sentence.count("____") == 1
        assert not begun or len(sentence) >= cloze.BEFORE
        assert answer not in sentence.split()
    assert forms == {*cloze.ASKED, *([] if frequent is None else [cloze.GO_ON])}
    assert {"Harlow", "Marrow Point", "1902"} <= missing
    assert ("green" in missing) is (frequent is not None)
    assert not missing & (frequent or set())
