"""Questions that a model asks itself, and the choices of a recipe that are changed one at a time."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path

import pytest
import torch

from conftest import tiny_lm
from kvtalk.adapters.translator import Geometry
from kvtalk.training import linear, translator
from kvtalk.training.batches import Recipe
from kvtalk.training.loop import Schedule

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
asked = importlib.import_module("asked")
ablations = importlib.import_module("translator_ablations")

TEXT = (
    "The old ferry at Marrow Point was painted green in 1902 by the sons of a baker. Nobody in Harlow knew why it "
    "carried timber and eels until then, nor who had paid the harbour dues for so many winters. In the spring after "
    "the flood it was sold to Ada Lindqvist, who mended its boiler and rowed across in a smaller boat meanwhile."
)


def test_what_is_wanted_stands_once_in_its_passage_and_says_something() -> None:
    rows = list(asked.want([{"text": TEXT}] * 3, 10))
    assert len(rows) == 1, "a text is read once, however often it is given"
    several = list(asked.want([{"context": TEXT, "question": "Who?"}], 10, each=6))
    assert {row["context"] for row in several} == {TEXT}, "a question's context stays whole"
    assert 1 < len({row["answers"][0] for row in several}) == len(several) <= 6
    assert len(list(asked.want([{"context": TEXT}], 2, each=6))) == 2
    wanted = {asked._answer(TEXT, random.Random(seed)) for seed in range(300)}
    assert {"Marrow Point", "1902", "Harlow", "Ada Lindqvist"} <= wanted
    for answer in wanted:
        assert TEXT.count(answer) == 1
        assert answer.split()[0] not in ("the", "of", "in", "and", "who")
        assert answer.split()[-1] not in ("the", "of", "in", "and", "who")


def test_a_question_is_kept_where_the_wanted_answer_is_found_again() -> None:
    row = {"id": "a", "context": TEXT, "question": asked.WANTED.format("Ada Lindqvist"), "answers": ["Ada Lindqvist"]}
    (learned,) = asked.learn([{**row, "question": " Who bought it? ", "answers": ["Ada Lindqvist", "Ada"]}])
    assert learned["question"] == row["question"]
    assert learned["answers"] == ["Who bought it?"]
    assert [one["question"] for one in asked.check([row], {"a": " Who bought the ferry?"})] == ["Who bought the ferry?"]
    assert not list(asked.check([row], {"a": "Who bought the ferry, and when"})), "it was cut off"
    assert not list(asked.check([row], {"a": "Who is Ada Lindqvist?"})), "it holds its answer"
    assert not list(asked.check([row], {}))
    assert list(asked.keep([row], {"a": "Ada Lindqvist."})) == [row]
    assert not list(asked.keep([row], {"a": "the sons of a baker"}))
    assert not list(asked.keep([row], {}))
    (other,) = asked.keep([row], {"a": " the sons of a baker."}, others=True)
    assert other["answers"] == ["the sons of a baker"], "what was found instead"
    assert not list(asked.keep([row], {"a": "her brother"}, others=True)), "the passage does not say so"
    assert not list(asked.keep([row], {"a": ""}, others=True))
    told = {**row, "question": "Who mended the boiler of the old ferry?"}
    assert not list(asked.keep([told], {"a": "ferry"}, others=True)), "the question holds it"


def test_what_is_written_in_batches_is_what_the_model_writes_alone() -> None:
    lm = tiny_lm("llama")
    rows = [{"id": f"{n}", "context": TEXT[: 40 + 23 * n], "question": "Who?"[n:]} for n in range(5)]
    end = lm.encode(lm.prompt.stop[0])[-1]
    found = asked.written(lm, rows, 9, 2)
    assert found.keys() == {row["id"] for row in rows}
    for row in rows:
        ids = lm.head_ids() + lm.encode(row["context"]) + lm.encode(lm.prompt.tail(row["question"]))
        with torch.no_grad():
            made = lm.model.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False, eos_token_id=end)
        assert found[row["id"]] == lm.tokenizer.decode(made[0, len(ids) :]).partition("\n")[0].strip()
    assert len(set(found.values())) > 1
    with pytest.raises(ValueError, match="one id"):
        asked.written(lm, [*rows, rows[0]], 9, 2)


@pytest.mark.parametrize("name", ablations.CHOICES)
def test_a_choice_changes_what_the_recipe_knows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = ablations.CHOICES[name]
    monkeypatch.setattr(linear, "_LARGEST", linear._LARGEST)
    monkeypatch.setattr(translator, "token_losses", translator.token_losses)
    Geometry(1024, 4, 1024, **choice.sizes)
    Recipe(schedule=Schedule(**choice.schedule), **choice.recipe)
    if choice.patch is not None:
        choice.patch()
    assert (linear._LARGEST == 0) == (name == "random")
    head, states, wanted = torch.nn.Linear(8, 16, bias=False), torch.randn(6, 8), torch.randn(6, 8)
    labels, weights = torch.randint(16, (6,)), torch.rand(2, 6)
    total, divergence, entropy = translator.token_losses(head, states, wanted, labels, weights)
    parts = (divergence * weights[0]).sum(), (entropy * weights[1]).sum()
    counted = {"undistilled": parts[1:], "unanswered": parts[:1]}.get(name, parts)
    torch.testing.assert_close(total, sum(counted))
