"""Training a fuser: what it is taught, that it resumes, and that training computes what inference does."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import byte_tokenizer, tiny_lm
from kvtalk import Plan
from kvtalk.adapters.cards import Party, read_card
from kvtalk.adapters.fuser import Fuser, FuserGeometry
from kvtalk.adapters.fusing import ReceiverSide, SharerSide
from kvtalk.adapters.slots import bare_layers
from kvtalk.adapters.store import save_adapter
from kvtalk.adapters.weights import load_fuser
from kvtalk.alignment.tokens import NONE, align, spread, tokenize
from kvtalk.codecs import codec
from kvtalk.errors import TrainingError
from kvtalk.fusion import FusedReceiver, FusedSharer
from kvtalk.models import LM
from kvtalk.packet import Packet
from kvtalk.prompts import BARE
from kvtalk.shared_prompts import chat_prompt, prompt_of
from kvtalk.training import fuser as fuser_training
from kvtalk.training.exchanges import (
    Exchange,
    Exchanges,
    FusedBatch,
    FusedBatches,
    Instruction,
    Mixture,
    Multiple,
    Prompt,
    letter_turn,
    wrong_of,
)
from kvtalk.training.fuser import FuserRecipe, Fusing, training
from kvtalk.training.loop import Loop, Schedule
from kvtalk.training.muon import orthogonal
from kvtalk.training.texts import Question
from test_fuser import geometry_of, other_lm, random_fuser

CHOICE = {"question": "Which gas do the plants take in?", "choices": ["oxygen", "carbon dioxide"], "answer": 1}
ASKED = {
    "context": "The ferry was built by the Harlow yard.",
    "question": "Who built the ferry?",
    "answers": ["Harlow"],
}
TOLD = {"prompt": "Name the tallest bird.", "response": "The ostrich"}
SCHEDULE = Schedule(12, rate=3e-3, warm_up=2, optimizer="adamw")
RECIPE = FuserRecipe(SCHEDULE, Mixture(rows=6, tokens=1024), seed=3)
PACKED = "int4 value_norm@25%"


def rows(count: int = 8) -> list[dict[str, Any]]:
    """So many of each form, of many lengths."""
    made = []
    for number in range(count):
        many = "and more " * (number % 4)
        made += [
            {**CHOICE, "question": f"Which is the number {many}{number}?", "answer": number % 2},
            {"context": f"Box {many}{number} is red.", "question": f"Which is box {number}?", "answers": ["red"]},
            {"prompt": f"Say {many}{number}.", "response": f"It is {number}"},
        ]
    return made


@pytest.fixture(scope="module")
def models() -> tuple[LM, LM]:
    return other_lm(), tiny_lm("gemma3")


@pytest.fixture(scope="module")
def geometry(models: tuple[LM, LM]) -> FuserGeometry:
    return geometry_of(*models)


def batches(models: tuple[LM, LM], mixture: Mixture = RECIPE.mixture, seed: int = 0, **changes: Any) -> FusedBatches:
    return FusedBatches(Exchanges.of(rows()), *models, mixture, geometry_of(*models, **changes), 10, seed)


def content(batch: FusedBatch) -> Any:
    pairs = [tensor.tolist() for some in (batch.pairs, batch.lent) for tensor in vars(some).values()]
    return {name: value for name, value in vars(batch).items() if name not in ("pairs", "lent")}, pairs


def varied(models: tuple[LM, LM], **changes: Any) -> tuple[list[Exchange], FusedBatch]:
    """Prompts of many lengths, with and without text around the shared one, with more after it at either model, and
    with what is left out."""
    made = batches(models, **changes)
    some = [row for kind in made.exchanges.rows.values() for row in kind[:3]]
    every = [made.exchange(row, random.Random(7)) for row in some]
    every.append(Exchange(Prompt("Notes.", " the"), Prompt("Q:", " the"), (" x",)))
    every.append(Exchange(Prompt("", "a mill", " So:"), Prompt("Q:", "a mill", " Then, in short:"), (" x",)))
    every.append(Exchange(Prompt("", "a mill", " Then, in short:"), Prompt("Q:", "a mill", "\n"), (" x",)))
    return every, made.of(every, "instructions")


# What is taught


def test_rows_of_each_form_are_read(models: tuple[LM, LM], tmp_path: Path) -> None:
    text = "The ferry came late that day. " * 200
    loaded = Exchanges.of([CHOICE] * 5 + [ASKED] * 6 + [TOLD] * 7 + [{"text": text}, {"text": "Too short."}])
    found = {kind: len(listed) for kind, listed in loaded.rows.items()}
    assert found == {"choices": 5, "oracle": 6, "instructions": 7, "running": 3}
    assert sorted("".join(row.text for row in loaded.rows["running"])) == sorted(text.strip())
    assert loaded.rows["choices"][0] == Multiple(CHOICE["question"], ("oxygen", "carbon dioxide"), 1)
    assert loaded.rows["oracle"][0] == Question(ASKED["context"], ASKED["question"], ("Harlow",))
    assert loaded.rows["instructions"][0] == Instruction(*TOLD.values())
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), "utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(TOLD) + "\n")
    from_files = Exchanges.load([str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz")])
    assert from_files.digest == Exchanges.of([*rows(), TOLD]).digest != loaded.digest


def test_of_choices_with_a_context_only_the_sharer_reads_it(models: tuple[LM, LM]) -> None:
    rows = [{**CHOICE, "question": f"{CHOICE['question']} {n}?", "context": f"Text {n}."} for n in range(16)]
    loaded = Exchanges.of(rows)
    assert list(loaded.rows) == ["known"]
    made = batches(models, Mixture(letters=1))
    asked = [made.exchange(row, random.Random(0)) for row in loaded.rows["known"][:2]]
    first = loaded.rows["known"][0]
    assert asked[0].receiver == Prompt("", f"Question: {first.question}\nAnswer:")
    assert asked[0].sharer == replace(asked[0].receiver, before=f"{first.context}\n")
    assert (asked[0].answers, asked[0].right) == ((" oxygen", " carbon dioxide"), 1)
    batch = made.of(asked, "known")
    wrong = made.wrong(asked, batch)
    assert wrong is not None
    assert wrong.receiver == batch.receiver
    moved = [replace(one.sharer, before=other.sharer.before) for one, other in zip(asked, asked[::-1], strict=True)]
    exchanged = [replace(one, sharer=prompt) for one, prompt in zip(asked, moved, strict=True)]
    assert wrong.sharer == made.of(exchanged, "known").sharer != batch.sharer


def test_both_models_read_the_same_and_only_the_sharer_the_context(models: tuple[LM, LM]) -> None:
    question = Question(ASKED["context"], ASKED["question"], ("Harlow",))
    asked = batches(models).exchange(question, random.Random(0))
    assert asked.sharer == prompt_of(BARE, ASKED["question"], ASKED["context"])
    assert asked.receiver == prompt_of(BARE, ASKED["question"])
    assert (asked.answers, asked.ends) == ((" Harlow\n",), False)
    row = Multiple(CHOICE["question"], tuple(CHOICE["choices"]), 1)
    seen = set()
    for seed in range(9):
        lettered = batches(models, Mixture(letters=1)).exchange(row, random.Random(seed))
        turned = Multiple(row.question, row.choices[::-1], 0)
        assert lettered.sharer == lettered.receiver
        assert (lettered.receiver, lettered.answers) in (
            (Prompt("", letter_turn(row)), (" B",)),
            (Prompt("", letter_turn(turned)), (" A",)),
        )
        assert lettered.ends
        seen |= set(lettered.answers)
    assert seen == {" A", " B"}
    worded = batches(models, Mixture(letters=0, bare=0)).exchange(row, random.Random(0))
    assert worded.receiver == Prompt("", f"Question: {CHOICE['question']}\nAnswer:")
    assert (worded.answers, worded.ends, worded.right) == ((" oxygen", " carbon dioxide"), False, 1)
    told = batches(models).exchange(Instruction("Say it.", "word " * 99), random.Random(0))
    assert (told.receiver, told.ends) == (Prompt("", "Say it."), False)
    assert told.answers[0].startswith("\nword word")
    assert len(told.answers[0]) <= 241


def test_a_chat_template_stands_around_what_is_shared(models: tuple[LM, LM]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "<u>{{ messages[0]['content'] }}</u>{% if add_generation_prompt %}<a>{% endif %}"
    chats = LM(tiny_lm("llama").model, tokenizer, "chats", BARE)
    made = batches((models[0], chats)).exchange(Instruction("Say it.", "word"), random.Random(0))
    assert made.sharer == Prompt("", "Say it.")
    assert made.receiver == chat_prompt(tokenizer, "Say it.") == Prompt("<u>", "Say it.", "</u><a>")
    assert made.answers == ("word",)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**CHOICE, "answer": 2}, "answer must be the index"),
        ({**CHOICE, "answer": -1}, "answer must be the index"),
        ({**CHOICE, "answer": "B"}, "answer must be the index"),
        ({**CHOICE, "answer": True}, "answer must be the index"),
        ({**CHOICE, "choices": "AB"}, "choices must be a list of texts"),
        ({**CHOICE, "choices": []}, "choices must be a list of texts"),
        ({**CHOICE, "choices": ["one", " "]}, "choices must be a list of texts"),
        ({**CHOICE, "choices": ["one"], "answer": 0}, "one choice alone leaves nothing to choose"),
        ({"text": " "}, "text must be a text that is not empty"),
        ({**CHOICE, "choices": ["one", 2]}, "choices must be a list of texts"),
        ({**CHOICE, "question": None}, "question must be a text"),
        ({**CHOICE, "question": " "}, "question must be a text"),
        ({**TOLD, "prompt": ""}, "prompt and response must be texts"),
        ({**TOLD, "response": None}, "prompt and response must be texts"),
        ({**ASKED, "context": " "}, "context, question and at least one answer"),
        ({**ASKED, "question": 7}, "context, question and at least one answer"),
        ({**ASKED, "answers": []}, "context, question and at least one answer"),
        ({**ASKED, "answers": {"text": [""]}}, "context, question and at least one answer"),
    ],
)
def test_malformed_rows_are_refused_by_number_and_field(row: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingError, match=f"^row 17: {words}") as refused:
        Exchanges.of([*rows()[:16], row])
    assert "\n" not in str(refused.value)


def test_rows_without_responses_are_refused_with_what_is_expected() -> None:
    for row, names in (({"words": "Words."}, "words"), ({"prompt": "Say it."}, "prompt"), ({}, "nothing")):
        with pytest.raises(TrainingError, match=f"^row 17 has {names}; .*expected prompt, response; or question, cho"):
            Exchanges.of([*rows()[:16], row])
    with pytest.raises(TrainingError, match="15 rows are too few to train on: give at least 16"):
        Exchanges.of(rows()[:15])


def test_a_part_is_kept_back_with_two_rows_of_a_kind_at_least() -> None:
    whole = Exchanges.of([*rows(30), *(dict(TOLD, prompt=f"Bird {number}?") for number in range(120))])
    learned, kept = whole.split(0.04)
    for kind, listed in whole.rows.items():
        assert learned.rows[kind] + kept.rows[kind] == listed
    assert {kind: len(listed) for kind, listed in kept.rows.items()} == {"choices": 2, "oracle": 2, "instructions": 6}
    learned, kept = Exchanges.of([ASKED, *(dict(TOLD, prompt=f"Say {number}.") for number in range(15))]).split(0.04)
    assert set(learned.rows) == {"instructions"}
    assert len(kept.rows["oracle"]) == 1


def test_a_batch_depends_on_seed_step_and_process_alone(models: tuple[LM, LM]) -> None:
    one, other = batches(models), batches(models)
    ahead = content(one[5, 0])
    for key in ((0, 0), (1, 0), (5, 1)):
        assert content(one[key]) == content(other[key]) != ahead
    assert content(other[5, 0]) == ahead != content(batches(models, seed=1)[5, 0])


def test_texts_are_tokenized_as_in_the_whole_prompt(models: tuple[LM, LM]) -> None:
    made, (every, batch) = batches(models), varied(models)
    for row, exchange in enumerate(every):
        for lm, prompt in zip(models, (exchange.sharer, exchange.receiver), strict=True):
            parts = [lm.encode(text) for text in (prompt.before, prompt.shared, prompt.after) if text]
            assert list(chain(*parts)) == lm.encode(prompt.before + prompt.shared + prompt.after)
        begin, whole = batch.begins[row], batch.sharer[row]
        assert whole[begin:] == models[0].encode(exchange.sharer.shared + exchange.sharer.after)
        prompt = exchange.receiver
        ids = models[1].encode(prompt.before + prompt.shared + prompt.after)
        assert batch.receiver[row] == ids
        answers = [answer for answer, prompt in enumerate(batch.prompts) if prompt == row]
        assert [batch.answers[answer] for answer in answers] == [
            made.parties[1].ids(text) + made.parties[1].end * exchange.ends for text in exchange.answers
        ]
        assert [batch.right[answer] for answer in answers] == [n == exchange.right for n in range(len(answers))]
        for answer in answers:
            assert batch.tails[answer] + batch.answers[answer][-1:] == ids[-1:] + batch.answers[answer]


def test_aligned_tokens_lie_over_the_same_characters(models: tuple[LM, LM]) -> None:
    every, batch = varied(models)
    spans = [
        [one.spans for one in tokenize(lm.tokenizer, [exchange.sharer.shared for exchange in every])] for lm in models
    ]
    after = set()
    for row, ours, theirs in zip(*(tensor.tolist() for tensor in vars(batch.pairs).values()), strict=True):
        begin = len(models[1].encode(every[row].receiver.before))
        assert ours < len(batch.receiver[row])
        if theirs < len(spans[0][row]):
            one, other = spans[0][row][theirs], spans[1][row][ours - begin]
            assert max(one[0], other[0]) < min(one[1], other[1])
            continue
        after.add(row)
        assert ours >= begin + len(spans[1][row])
        assert len(batch.receiver[row]) - ours == len(batch.sharer[row]) - batch.begins[row] - theirs
    assert after == {row for row, one in enumerate(every) if one.sharer.after and one.receiver.after}


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("roles", [True, False])
def test_what_is_enriched_and_what_crosses(models: tuple[LM, LM], roles: bool, last: bool) -> None:
    _, both = varied(models)
    _, batch = varied(models, roles=roles, last=last)
    assert batch.receiver == both.receiver

    def of(found: FusedBatch) -> set[tuple[int, int, int]]:
        return set(zip(*(tensor.tolist() for tensor in vars(found.pairs).values()), strict=True))

    ends = [len(row) - 1 for row in both.receiver]
    every, text = varied(models)[0], [models[0].encode(one.sharer.shared) for one in varied(models)[0]]
    wanted = {(row, ours, theirs) for row, ours, theirs in of(both) if roles or theirs < len(text[row])}
    assert of(batch) == {one for one in wanted if last or one[1] < ends[one[0]]}
    assert len(of(both)) > len(of(batch)) or (roles and last)
    crossing = set(zip(batch.lent.rows.tolist(), batch.lent.theirs.tolist(), strict=True))
    after = {
        (row, len(text[row]) + index)
        for row, one in enumerate(every)
        for index in range(len(models[0].encode(one.sharer.after)) if one.sharer.after else 0)
    }
    assert crossing == {(row, theirs) for row, _, theirs in wanted} | (after if roles else set())


def test_prompts_of_which_nothing_can_be_fused_are_left_out(models: tuple[LM, LM]) -> None:
    """A receiver whose last token stays as it is has nothing to be enriched in such a prompt."""
    made = batches(models, last=False)
    good = [Exchange(Prompt("", text), Prompt("", text), (" x",)) for text in ("the mill", "Who?")]
    single = Exchange(Prompt("", "a"), Prompt("", "a"), (" x",))
    last = Exchange(Prompt("Q:", "a"), Prompt("Q:", "a"), (" x",))
    assert content(made.of([single, good[0], last, good[1]], "instructions")) == content(made.of(good, "instructions"))
    with pytest.raises(TrainingError, match="nothing aligns in any prompt of a step"):
        made.of([single, last], "instructions")


def test_a_wrong_pair_is_of_another_question(models: tuple[LM, LM]) -> None:
    made = batches(models)
    checks = made.checks(8)
    assert {batch.kind for batch, _ in checks} == {"choices", "oracle", "instructions"}
    for batch, wrong in ((varied(models)[1], wrong_of(varied(models)[1])), *checks):
        assert wrong is not None
        assert all(own != other for own, other in zip(batch.sharer, wrong.sharer, strict=True))
        assert torch.equal(wrong.pairs.rows, batch.pairs.rows)
        assert torch.equal(wrong.pairs.ours, batch.pairs.ours)
        counts = [len(ids) - begin for ids, begin in zip(wrong.sharer, wrong.begins, strict=True)]
        assert bool((wrong.pairs.theirs < torch.tensor(counts)[wrong.pairs.rows]).all())
        if batch.kind == "oracle":  # the same question after another context
            assert torch.equal(wrong.pairs.theirs, batch.pairs.theirs)
            for own, other, begin, there in zip(batch.sharer, wrong.sharer, batch.begins, wrong.begins, strict=True):
                assert own[begin:] == other[there:]
                assert own[:begin] != other[:there]
    same = Exchange(Prompt("", "Who?"), Prompt("", "Who?"), (" x",))
    other = Exchange(Prompt("", "When was it?"), Prompt("", "When was it?"), (" x",))
    batch = made.of([same, same, other], "instructions")
    twice = wrong_of(batch)
    assert twice is not None
    assert twice.sharer == [batch.sharer[2], batch.sharer[2], batch.sharer[0]]
    assert wrong_of(made.of([same, same], "instructions")) is None


def test_another_text_stands_in_token_by_token() -> None:
    assert spread([1, 2, 3], [1, 2, 3]).tolist() == [0, 1, 2]
    assert spread([7, 1, 2, 8, 9], [7, 5, 8, 9]).tolist() == [0, 1, 1, 2, 3]
    assert spread([7, 1, 8], [7, 4, 5, 6, 3, 8]).tolist() == [0, 1, 5]
    assert spread([7, 1, 8], [7, 8]).tolist() == [0, 1, 1]
    assert spread([], [1]).tolist() == []
    assert spread([1, 1, 1], [1]).tolist() == [0, 0, 0]


def test_no_context_question_or_prompt_is_in_both_parts() -> None:
    rows = [{"context": f"Text {n // 5}.", "question": f"What is {n}?", "answers": ["it"]} for n in range(60)]
    rows += [{"prompt": f"Do {n // 2}.", "response": "Done."} for n in range(60)]
    rows += [{"question": f"Which {n // 3}?", "choices": ["a", "b"], "answer": 0} for n in range(60)]
    learned, kept = Exchanges.of(rows).split(0.1)
    for kind, field in (("oracle", "context"), ("instructions", "prompt"), ("choices", "question")):
        both = [{getattr(row, field) for row in part.rows[kind]} for part in (learned, kept)]
        assert not both[0] & both[1]
        assert len(both[1]) >= 2
        assert len(learned.rows[kind]) + len(kept.rows[kind]) == 60


def test_no_text_is_in_both_parts_whatever_its_rows_are() -> None:
    asked = [f"What is {number}?" for number in range(60)]
    rows = [{"question": text, "choices": ["a", "b"], "answer": 0} for text in asked]
    rows += [{"context": f"Text {n}.", "question": text, "answers": ["a"]} for n, text in enumerate(asked)]
    rows += [{"prompt": f"{text}\nOptions:\n- a\n- b", "response": "a"} for text in asked[::-1]]
    learned, kept = Exchanges.of(rows).split(0.05)

    def texts(part: Exchanges) -> set[str]:
        found = {row.question for kind in ("choices", "oracle") for row in part.rows[kind]}
        return found | {row.prompt.partition("\n")[0] for row in part.rows["instructions"]}

    assert not texts(learned) & texts(kept)
    assert {kind: len(listed) for kind, listed in kept.rows.items()} == {"choices": 3, "oracle": 3, "instructions": 3}
    assert all(len(listed) >= 51 for listed in learned.rows.values())
    with pytest.raises(TrainingError, match="all rows ask the same: nothing is left"):
        Exchanges.of([CHOICE] * 20).split(0.05)


# What a token policy drops


def reference(models: tuple[LM, LM], exchange: Exchange, layer: int, plan: Plan) -> set[int]:
    """Sharer tokens of one prompt that cross, the plain way: the largest values' norms of aligned tokens."""
    theirs, ours = (tokenize(lm.tokenizer, [exchange.sharer.shared])[0] for lm in models)
    after = models[0].encode(exchange.sharer.after) if exchange.sharer.after else []
    aligned = sorted(set(align(theirs, ours).tolist()) - {NONE})
    aligned += range(len(theirs.ids), len(theirs.ids) + len(after))
    before = models[0].encode(exchange.sharer.before) if exchange.sharer.before else []
    cache, _ = models[0].read_whole([before + theirs.ids + after])
    norms = cache.layers[layer].values[0].square().sum(-1).sqrt().mean(0)
    count = -(-len(aligned) // 4) if isinstance(plan.keep, float) else min(int(plan.keep), len(aligned))
    return set(sorted(aligned, key=lambda token: -float(norms[len(before) + token]))[:count])


def dropped(models: tuple[LM, LM], geometry: FuserGeometry, batch: FusedBatch, plan: Plan) -> dict[int, Tensor]:
    cache, _ = models[0].read_whole(batch.sharer)
    layers = bare_layers(cache, models[0].spec, geometry, sorted(set(geometry.layers)))
    columns = batch.pairs.theirs + torch.tensor(batch.begins)[batch.pairs.rows]
    kept = {index: fuser_training._kept(layer, batch, plan) for index, layer in layers.items()}
    return {index: ~which[batch.pairs.rows, columns] for index, which in kept.items()}


@pytest.mark.parametrize("keep", ["25%", "3"])
def test_what_training_drops_is_what_each_row_alone_would_drop(
    models: tuple[LM, LM], geometry: FuserGeometry, keep: str
) -> None:
    every, batch = varied(models)
    assert len({len(row) for row in batch.sharer}) > 6
    plan = Plan.parse(f"bf16 value_norm@{keep}")
    for layer, lost in dropped(models, geometry, batch, plan).items():
        kept = [reference(models, exchange, layer, plan) for exchange in every]
        both = zip(batch.pairs.rows.tolist(), batch.pairs.theirs.tolist(), strict=True)
        assert lost.tolist() == [token not in kept[row] for row, token in both]


def test_a_row_without_aligned_tokens_would_break_the_choice_and_never_comes_to_it(
    models: tuple[LM, LM], geometry: FuserGeometry
) -> None:
    """As on a GPU, where it was an index out of bounds in ``LayerCache.take``."""
    made, plan = batches(models), Plan.parse(PACKED)
    texts = ("the mill by the sea", "\ud7ff", "Who?")
    exchanges = [Exchange(Prompt("", text), Prompt("", text), (" x",)) for text in texts]
    empty = made._of([*exchanges, Exchange(Prompt("A ", ""), Prompt("A ", ""), (" x",))], "instructions")
    assert 3 not in empty.pairs.rows
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        dropped(models, geometry, empty, plan)
    left = made.of([*exchanges, Exchange(Prompt("A ", ""), Prompt("A ", ""), (" x",))], "instructions")
    assert len(left.sharer) == 3
    assert all(len(lost) == len(left.pairs.rows) for lost in dropped(models, geometry, left, plan).values())


# Training and inference


class Pair:
    """A saved fuser between two models, as at inference."""

    def __init__(self, models: tuple[LM, LM], folder: Path) -> None:
        card, where = read_card(folder, "fuser")
        fuser = load_fuser(card, where)
        self.sharer = FusedSharer(SharerSide(card, fuser.opened().slots, models[0], models[1].tokenizer))
        self.receiver = FusedReceiver(models[1], [ReceiverSide(card, fuser, models[1], models[0].tokenizer)])

    def packet(self, exchange: Exchange, plan: str) -> memoryview:
        prompt = exchange.sharer
        return self.sharer.encode_rows([prompt], self.sharer.read(prompt), [Plan.parse(plan)])[0]

    def logits(self, exchange: Exchange, plan: str, tail: list[int], answer: int) -> Tensor:
        """After every token before the answer's, ``[answer, vocabulary]``."""
        received = self.receiver.unpack(0, self.packet(exchange, plan))
        last, placed = self.receiver.fuse([exchange.receiver], [[received]])
        assert last == [tail[:1]]
        return self.receiver.lm.logits([tail], placed)[0, -answer:]


def saved(fuser: Fuser, models: tuple[LM, LM], folder: Path, packing: str = "fp32") -> Pair:
    save_adapter(fuser, *(Party(lm.name, lm.spec.fingerprint) for lm in models), folder, packing)
    return Pair(models, folder)


@torch.no_grad()
def trained_logits(objective: Fusing, fuser: Fuser, batch: FusedBatch, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What training makes of each row, ``[answer, vocabulary]``, gates as at inference."""
    seen: list[Tensor] = []
    losses = fuser_training.token_losses

    def spy(unembedding: Any, states: Tensor, *rest: Any) -> Any:
        seen.append(unembedding(states))
        return losses(unembedding, states, *rest)

    monkeypatch.setattr(fuser_training, "token_losses", spy)
    fuser.eval()
    objective.answered(fuser, batch)
    return list(torch.split(seen[0], [len(answer) for answer in batch.answers]))


def assert_same(
    objective: Fusing,
    fuser: Fuser,
    pair: Pair,
    made: tuple[list[Exchange], FusedBatch],
    plan: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every, batch = made
    found = trained_logits(objective, fuser, batch, monkeypatch)
    assert len(batch.answers) > len(every) == len(batch.receiver)
    for row, (prompt, got) in enumerate(zip(batch.prompts, found, strict=True)):
        wanted = pair.logits(every[prompt], plan, batch.tails[row], len(batch.answers[row]))
        torch.testing.assert_close(got, wanted, atol=2e-3, rtol=1e-4)


def untaught(models: tuple[LM, LM], geometry: FuserGeometry, plan: str | None) -> Fusing:
    return Fusing(*models, geometry, replace(RECIPE, plan=plan), {})


@pytest.mark.parametrize(
    ("rope", "plan", "alignment"),
    [
        ("before", None, "coverage"),
        ("after", None, "coverage"),
        ("before", PACKED, "coverage"),
        ("after", PACKED, "coverage"),
        ("before", "nf4 back@5", "coverage"),
        ("before", None, "mean"),
        ("after", PACKED, "mean"),
        ("before", "int8 back@40%", "mean"),
    ],
)
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
def test_training_computes_what_inference_does(
    models: tuple[LM, LM],
    rope: Any,
    plan: str | None,
    alignment: str,
    turned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a sharer of fewer, longer tokens, and of more, shorter ones, of which several stand for one."""
    models = models[::-1] if turned else models
    geometry = geometry_of(*models, rope=rope, alignment=alignment)
    fuser = random_fuser(geometry)
    with torch.no_grad():
        fuser.gates[[0, 3]] = -1
    objective = untaught(models, geometry, plan)
    pair = saved(fuser, models, tmp_path)
    assert_same(objective, fuser, pair, varied(models, alignment=alignment), plan or "fp32", monkeypatch)


def test_the_fuser_matters_in_these_comparisons(
    models: tuple[LM, LM], geometry: FuserGeometry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuser, objective = random_fuser(geometry), untaught(models, geometry, PACKED)
    pair, (every, batch) = saved(fuser, models, tmp_path), varied(models)
    packed = trained_logits(objective, fuser, batch, monkeypatch)
    none = trained_logits(objective, Fuser(geometry), batch, monkeypatch)
    for row, prompt in enumerate(batch.prompts):
        whole = pair.logits(every[prompt], "fp32", batch.tails[row], len(batch.answers[row]))
        assert (packed[row] - none[row]).abs().max() > 0.05
        assert (whole - none[row]).abs().max() > 0.05
    assert max(float((one - other).abs().max()) for one, other in zip(packed, none, strict=True)) > 1


@pytest.mark.parametrize("plan", [PACKED, "int8 random@30%", "bf16 key_norm@4", "fp16 sinks_recent@50%"])
def test_training_drops_exactly_what_the_packet_drops(
    models: tuple[LM, LM], geometry: FuserGeometry, plan: str, tmp_path: Path
) -> None:
    every, batch = varied(models)
    lost = dropped(models, geometry, batch, replace(Plan.parse(plan), rope=geometry.rope))
    pair = saved(random_fuser(geometry), models, tmp_path)
    for row, exchange in enumerate(every):
        packed = list(Packet.parse(pair.packet(exchange, plan)).layers())
        here = batch.pairs.rows == row
        for layer, missing in lost.items():
            assert torch.equal(~missing[here], torch.isin(batch.pairs.theirs[here], packed[layer].positions[0]))


SPANNING = "int4:channel", "int8:2x1", "nf4:*x4"
BY_TOKEN = "fp32", "bf16", "fp16", "int8", "int4", "int2", "nf4", "nf4:1x8", "bf16:channel"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packing", [*BY_TOKEN, *SPANNING])
def test_rows_packed_together_come_back_as_each_alone(packing: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(6, 3, 80, 16).mul(3).to(dtype)
    kept = torch.zeros(6, 80, dtype=torch.bool)
    for row, count in enumerate((70, 7, 1, 70, 7, 13)):
        kept[row, torch.randperm(80)[:count]] = True
    tensor[~kept[:, None].expand(-1, 3, -1)] = torch.inf  # what does not cross has no part in it
    packer = codec(packing)
    assert packer.by_token == (packing in BY_TOKEN)
    wanted = tensor.clone()
    for row, which in enumerate(kept):
        wanted[row, :, which] = packer.simulated(tensor[row, :, which]).to(dtype)
    assert torch.equal(fuser_training._packed(tensor, kept, packing), wanted)


@torch.no_grad()
def test_layers_chosen_and_packed_together_are_as_each_alone(models: tuple[LM, LM], geometry: FuserGeometry) -> None:
    _, batch = varied(models)
    plan = replace(Plan.parse(PACKED), rope=geometry.rope)
    vectors, missing = untaught(models, geometry, PACKED).received(batch)
    whole, _ = untaught(models, geometry, None).received(batch)
    for slot, layer in enumerate(chain.from_iterable((layer, layer) for layer in geometry.layers)):
        lost = dropped(models, geometry, batch, plan)[layer]
        assert torch.equal(missing[slot], lost)
        assert torch.equal(vectors[slot, lost], whole[slot, lost])
        heads = whole[slot, ~lost].unflatten(1, (geometry.sharer.kv_heads, -1)).transpose(0, 1)
        wanted = codec(plan.keys).simulated(heads).transpose(0, 1).flatten(1)
        assert torch.equal(vectors[slot, ~lost], wanted)


# How options are compared


def test_the_right_option_is_preferred_by_likelihood_a_character(
    models: tuple[LM, LM], geometry: FuserGeometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, rng = batches(models, Mixture(letters=0)), random.Random(0)
    longer = Multiple("Which is far?", ("a sun that is very far away", "the mill", "me"), 2)
    every = [made.exchange(row, rng) for row in (*made.exchanges.rows["choices"][:3], longer)]
    letters = batches(models, Mixture(letters=1))
    every.insert(2, letters.exchange(longer, rng))  # counts as a row of its own
    batch = made.of(every, "choices")
    fuser, objective = random_fuser(geometry).eval(), untaught(models, geometry, None)
    losses = objective.losses(fuser, batch, 0)
    losses["total"].backward()
    found = {name: parameter.grad.clone() for name, parameter in fuser.named_parameters() if parameter.grad is not None}
    fuser.zero_grad()
    states, labels = objective._states(fuser, batch)
    entropies = -models[1].unembedding(states).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    sums = torch.stack([one.sum() for one in torch.split(entropies, [len(answer) for answer in batch.answers])])
    means = torch.stack([one.mean() for one in torch.split(entropies, [len(answer) for answer in batch.answers])])
    right, words, preferred = torch.tensor(batch.right), [], []
    for prompt in range(len(batch.receiver)):
        here = torch.tensor(batch.prompts) == prompt
        scores = -fuser_training.SHARPNESS * sums[here] / torch.tensor(batch.lengths)[here]
        if here.sum() > 1:
            preferred.append(-scores.log_softmax(0)[right[here]][0])
        words.append((fuser_training._WORDS if here.sum() > 1 else 1) * means[here & right][0])
    assert (len(preferred), len(words)) == (4, 5)
    total = torch.stack(preferred).mean() + torch.stack(words).mean()
    total.backward()
    torch.testing.assert_close(losses["total"], total, atol=1e-4, rtol=1e-5)
    assert found.keys() == {name for name, parameter in fuser.named_parameters() if parameter.grad is not None}
    for name, parameter in fuser.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-3)
    chosen = fuser_training._chosen(batch, entropies.detach())
    best = [
        bool(right[rows][(sums[rows] / torch.tensor(batch.lengths)[rows]).argmin()])
        for rows in (torch.tensor(batch.prompts) == prompt for prompt in (0, 1, 3, 4))
    ]
    assert chosen["accuracy"] == sum(best) / len(best)
    assert chosen["preference"] == pytest.approx(float(torch.stack(preferred).mean().detach()), rel=1e-4)


def test_running_text_is_cut_in_three(models: tuple[LM, LM]) -> None:
    text = " ".join(f"word{number}" for number in range(150))
    rows = [{"text": text}, {"text": "x" * 2600}, {"text": "😀" * 500}]
    made = FusedBatches(Exchanges.of(rows * 8), *models, Mixture(rows=6), geometry_of(*models), 9)
    for step in range(9):
        assert made[step, 0].kind == "running"
    for row in made.exchanges.rows["running"]:
        for seed in range(30):
            one = made.exchange(row, random.Random(seed))
            assert one.receiver == Prompt("", one.sharer.shared)
            assert len(one.sharer.before) >= 50
            assert one.sharer.shared
            assert one.answers[0].strip()
            whole = one.sharer.before + one.sharer.shared + one.answers[0]
            assert whole in row.text
            if " " in row.text:
                assert one.sharer.shared[0] == one.answers[0][0] == " "


# The loop


def seen_until(
    run: Loop, until: int, check_every: int = 4, then: Callable[[int], None] | None = None
) -> dict[int, dict[str, float]]:
    """What is reported, by step; ends as if killed after the checkpoint of a step."""
    seen: dict[int, dict[str, float]] = {}

    class KilledError(Exception):
        pass

    def report(step: int, shown: dict[str, float]) -> None:
        seen.setdefault(step, {}).update(shown)
        if then is not None:
            then(step)
        if step == until < run.schedule.steps and "gates open" in shown:
            raise KilledError

    try:
        run.run(report, check_every=check_every, report_every=1)
    except KilledError:
        return seen
    return seen


def timeless(seen: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in seen.items() if name != "steps a second"}


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def weights(lms: Sequence[LM]) -> list[dict[str, Tensor]]:
    return [{name: value.clone() for name, value in lm.model.state_dict().items()} for lm in lms]


def test_the_loss_of_what_can_be_learned_falls_and_the_models_stay(
    models: tuple[LM, LM], geometry: FuserGeometry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights(models)
    asked = ("Is it the mill?", "Is it red?", "a", "Who?", "Is it a bird?", "Is it the sea?", "Is it far?", "Is it?")
    few = [{"prompt": prompt, "response": "yes"} for prompt in asked] * 3
    recipe = replace(RECIPE, schedule=replace(SCHEDULE, steps=40), packing="nf4:1x8")
    run = training(*models, Exchanges.of(few), geometry, recipe, tmp_path)
    seen = seen_until(run, 40, check_every=20)
    assert seen[0]["instructions"] == seen[0]["instructions alone"]  # an untrained fuser adds nothing
    assert seen[40]["instructions"] < 0.5 * seen[0]["instructions"]
    assert seen[40]["total"] < 0.5 * seen[1]["total"]
    assert seen[40]["instructions alone"] == seen[0]["instructions alone"]
    for lm, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in lm.model.state_dict().items())
        assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    fuser = run.module
    assert isinstance(fuser, Fuser)
    pair = saved(fuser, models, tmp_path, "nf4:1x8")
    objective = run.objective
    assert isinstance(objective, Fusing)
    with objective.during(fuser, 40):  # with matrices as the file holds them
        assert_same(objective, fuser, pair, varied(models), "fp32", monkeypatch)


@pytest.mark.usefixtures("deterministic")
def test_a_run_with_a_plan_in_the_loop_resumes_to_the_same_losses_and_is_what_inference_computes(
    models: tuple[LM, LM], geometry: FuserGeometry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, exchanges = replace(RECIPE, plan=PACKED), Exchanges.of(rows())
    run = training(*models, exchanges, geometry, recipe, tmp_path / "whole")
    whole = seen_until(run, 12)
    kinds = {"choices", "oracle", "instructions", "accuracy"}
    assert {f"{kind}{way}" for kind in kinds for way in ("", " wrong", " zeroed", " alone")} <= whole[12].keys()
    assert "gates open" in whole[12]
    seen_until(training(*models, exchanges, geometry, recipe, tmp_path / "cut"), 4)
    torch.manual_seed(99)
    again = training(*models, exchanges, geometry, recipe, tmp_path / "cut")
    assert again.step == 4
    resumed = seen_until(again, 12)
    assert sorted(resumed) == list(range(5, 13))
    assert {step: timeless(shown) for step, shown in resumed.items()} == {
        step: timeless(shown) for step, shown in whole.items() if step > 4
    }
    assert (tmp_path / "cut" / "log.jsonl").read_text().count("\n") == len(
        (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    )
    objective, fuser = run.objective, run.module
    assert isinstance(objective, Fusing)
    assert isinstance(fuser, Fuser)
    pair = saved(fuser, models, tmp_path / "fuser")
    assert_same(objective, fuser, pair, varied(models), PACKED, monkeypatch)
    for change in (
        {"plan": None},
        {"seed": 4},
        {"packing": "nf4:1x8"},
        {"schedule": replace(SCHEDULE, rate=1e-3)},
        {"mixture": replace(RECIPE.mixture, rows=7)},
    ):
        with pytest.raises(TrainingError, match=r"run with other settings \(recipe differ\)"):
            training(*models, exchanges, geometry, replace(recipe, **change), tmp_path / "whole")
    with pytest.raises(TrainingError, match=r"\(rows differ\)"):
        training(*models, Exchanges.of([*rows(), TOLD]), geometry, recipe, tmp_path / "whole")
    with pytest.raises(TrainingError, match=r"\(geometry differ\)"):
        training(*models, exchanges, replace(geometry, rope="after"), recipe, tmp_path / "whole")


@pytest.mark.usefixtures("deterministic")
def test_a_run_started_from_another_one_goes_on_with_its_weights_and_steps_of_its_own(
    models: tuple[LM, LM], geometry: FuserGeometry, tmp_path: Path
) -> None:
    exchanges = Exchanges.of(rows())
    first = training(*models, exchanges, geometry, RECIPE, tmp_path / "first")
    ended = seen_until(first, 12)[12]
    learned = {name: value.clone() for name, value in first.module.state_dict().items()}
    packed = replace(RECIPE, plan=PACKED)
    second = training(*models, exchanges, geometry, packed, tmp_path / "second", trained=tmp_path / "first")
    assert second.step == 0
    assert all(torch.equal(value, learned[name]) for name, value in second.module.state_dict().items())
    same = training(*models, exchanges, geometry, RECIPE, tmp_path / "same", trained=tmp_path / "first")
    begun = seen_until(same, 4)[0]
    assert {name: value for name, value in begun.items() if name != "steps a second"} == {
        name: ended[name] for name in begun if name != "steps a second"
    }
    again = training(*models, exchanges, geometry, RECIPE, tmp_path / "same", trained=tmp_path / "first")
    assert again.step == 4
    with pytest.raises(TrainingError, match=r"\(trained differ\)"):
        training(*models, exchanges, geometry, RECIPE, tmp_path / "same")
    with pytest.raises(TrainingError, match="has another geometry: start from one with the same"):
        training(
            *models, exchanges, replace(geometry, rope="after"), RECIPE, tmp_path / "x", trained=tmp_path / "first"
        )
    with pytest.raises(TrainingError, match="another sharer, receiver"):
        training(*models[::-1], exchanges, geometry, RECIPE, tmp_path / "y", trained=tmp_path / "first")


def test_kinds_of_rows_are_drawn_by_their_shares(
    models: tuple[LM, LM], geometry: FuserGeometry, tmp_path: Path
) -> None:
    mixture = Mixture(rows=4).shared(["oracle=3", "choices=1", "instructions=0"])
    assert dict(mixture.shares) == {"choices": 1, "known": 0.1, "oracle": 3, "running": 0.1, "instructions": 0}
    made = FusedBatches(Exchanges.of(rows()), *models, mixture, geometry_of(*models), 400)
    kinds = [made[step, 0].kind for step in range(400)]
    assert set(kinds) == {"oracle", "choices"}
    assert 260 < kinds.count("oracle") < 340  # 300, and five deviations
    for wrong in ("oracle", "oracle=", "oracle=x", "oracle=-1", "oracle=inf", "oracle=nan", "else=1", "=1"):
        with pytest.raises(TrainingError, match=r"give a share as KIND=NUMBER, 0 or more; kinds are choices, known,"):
            mixture.shared([wrong])
    nothing = replace(RECIPE, mixture=Mixture().shared(["instructions=0"]))
    told = [{"prompt": f"Name bird {number}.", "response": "The ostrich"} for number in range(16)]
    with pytest.raises(TrainingError, match="no share is left to the rows that are there: they are of instructions"):
        training(*models, Exchanges.of(told), geometry, nothing, tmp_path)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("averaged", [0, 0.75])
def test_a_run_with_patience_ends_early_with_what_it_was_best_with(
    models: tuple[LM, LM], geometry: FuserGeometry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, averaged: float
) -> None:
    recipe = replace(RECIPE, schedule=replace(SCHEDULE, averaged=averaged))
    gains = {0: 0.0, 2: 0.1, 4: 0.5, 6: 0.2, 8: 0.5, 10: 0.9, 12: 0.9}
    honest = Fusing.measure

    def run(out: Path, until: int) -> tuple[Loop, dict[int, dict[str, Tensor]]]:
        made = training(*models, Exchanges.of(rows()), geometry, recipe, out, patience=2)
        seen: dict[int, dict[str, Tensor]] = {}

        def measured(self: Fusing, module: Any) -> dict[str, float]:
            seen[made.step] = {name: value.clone() for name, value in module.state_dict().items()}
            return {**honest(self, module), "gain": gains[made.step]}

        monkeypatch.setattr(Fusing, "measure", measured)
        seen_until(made, until, check_every=2)
        return made, seen

    whole, seen = run(tmp_path / "whole", 12)
    assert whole.step == 8  # two validations no better than that of step 4
    assert all(torch.equal(value, seen[4][name]) for name, value in whole.module.state_dict().items())
    run(tmp_path / "cut", 6)
    again, _ = run(tmp_path / "cut", 12)
    assert again.step == 8
    assert all(torch.equal(value, seen[4][name]) for name, value in again.module.state_dict().items())
    with pytest.raises(TrainingError, match="other settings .patience differ"):
        training(*models, Exchanges.of(rows()), geometry, recipe, tmp_path / "cut")
    begun = training(*models, Exchanges.of(rows()), geometry, RECIPE, tmp_path / "next", trained=tmp_path / "cut")
    assert all(torch.equal(value, seen[4][name]) for name, value in begun.module.state_dict().items())


def test_the_gain_is_above_the_better_control(
    models: tuple[LM, LM], geometry: FuserGeometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = Fusing(*models, geometry, RECIPE, batches(models).checks(3))
    found = objective.measure(random_fuser(geometry))
    kinds = "preference", "oracle", "instructions"
    gains = [min(found[f"{kind} wrong"], found[f"{kind} zeroed"]) - found[kind] for kind in kinds]
    assert found["gain"] == pytest.approx(sum(gains) / 3)
    parameter = next(models[1].model.parameters())
    for change in (lambda: parameter.add_(0), lambda: setattr(parameter, "data", parameter.data.clone())):
        objective = Fusing(*models, geometry, RECIPE, objective.checks)
        with torch.no_grad():
            change()
        with pytest.raises(TrainingError, match="a model that is not to be trained has changed"):
            objective.measure(random_fuser(geometry))


def test_a_gain_is_of_rows_that_have_a_wrong_cache_and_rows_count_alike(
    models: tuple[LM, LM], geometry: FuserGeometry, tmp_path: Path
) -> None:
    made = batches(models)
    every = [made.exchange(row, random.Random(1)) for row in made.exchanges.rows["instructions"][:6]]
    parts = [
        made.of(every[:2], "instructions"),
        made.of(every[2:5], "instructions"),
        made.of(every[5:], "instructions"),
    ]
    checks = [(part, wrong_of(part)) for part in parts]
    assert [wrong is None for _, wrong in checks] == [False, False, True]
    fuser = random_fuser(geometry)
    found = [Fusing(*models, geometry, RECIPE, [check]).measure(fuser) for check in checks]
    whole = Fusing(*models, geometry, RECIPE, checks).measure(fuser)
    assert "gain" not in found[2]

    def mean(name: str, counts: Sequence[int]) -> float:
        return sum(n * one[name] for n, one in zip(counts, found, strict=False)) / sum(counts)

    assert whole["instructions"] == pytest.approx(mean("instructions", (2, 3, 1)))
    best = min(mean("instructions wrong", (2, 3)), mean("instructions zeroed", (2, 3)))
    assert whole["gain"] == pytest.approx(best - mean("instructions", (2, 3)))
    few = [{**ASKED, "question": f"What is {number}?"} for number in range(20)] + [{**ASKED, "context": "Two."}] * 2
    with pytest.raises(TrainingError, match="patience needs a gain to wait for"):
        seen_until(training(*models, Exchanges.of(few), geometry, RECIPE, tmp_path, patience=2), 12)


def test_muon_moves_stacks_by_nearly_orthogonal_steps(
    models: tuple[LM, LM], geometry: FuserGeometry, tmp_path: Path
) -> None:
    for shape in ((3, 20, 64), (3, 64, 20), (2, 32, 32)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert float(values.max()) < 1.3
        assert float(values.median()) > 0.6
    run = training(
        *models,
        Exchanges.of([{"prompt": f"Is it {n}?", "response": "yes"} for n in range(20)]),
        geometry,
        replace(RECIPE, schedule=replace(SCHEDULE, steps=40, rate=2e-2, optimizer="muon")),
        tmp_path,
    )
    kinds = [type(optimizer.optimizer).__name__ for optimizer in run.optimizers]
    assert kinds == ["StackedMuon", "AdamW"]
    stacked, rest = ({id(p) for group in one.param_groups for p in group["params"]} for one in run.optimizers)
    every = dict(run.module.named_parameters())
    assert stacked | rest == {id(parameter) for parameter in every.values()}
    assert {name for name, parameter in every.items() if id(parameter) in rest} == {
        name for name in every if "norm" in name or "bias" in name or name == "gates"
    }
    seen = seen_until(run, 40, check_every=20)
    assert seen[40]["instructions"] < 0.5 * seen[0]["instructions"]


def test_gates_cool_down_geometrically_and_end_as_at_inference(models: tuple[LM, LM], geometry: FuserGeometry) -> None:
    recipe = replace(RECIPE, schedule=replace(SCHEDULE, steps=40))
    temperatures = [recipe.temperature(step) for step in range(41)]
    assert temperatures[0] == 1
    assert temperatures[30:] == [0.0] * 11
    ratios = [after / before for before, after in pairwise(temperatures[:30])]
    assert ratios == pytest.approx([1e-3 ** (1 / 30)] * 29)
    assert [step for step in range(41) if recipe.settles(step)] == list(range(30, 41))
    objective, fuser = Fusing(*models, geometry, recipe, {}), random_fuser(geometry).train()
    sharer, own = torch.randn(8, 9, 32), torch.randn(8, 9, 64)
    with torch.no_grad(), objective.during(fuser, 40):
        fuser.gates[2] = -1
        assert torch.equal(fuser(sharer, own), fuser.eval()(sharer, own))
    fuser.train()
    drawn = []
    for step in (0, 1, 0):
        with torch.no_grad(), objective.during(fuser, step):
            drawn.append(fuser(sharer, own))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("packing", [None, "nf4:1x8"])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(
    models: tuple[LM, LM], geometry: FuserGeometry, packing: str | None, tmp_path: Path
) -> None:
    recipe = replace(RECIPE, packing=packing, settled=0.9)
    run = training(*models, Exchanges.of(rows()), geometry, recipe, tmp_path)

    def spoil(step: int) -> None:
        if step == 5:
            for name, value in run.module.named_parameters():
                if name == "inward.weight":
                    value.data.fill_(torch.nan)

    with pytest.raises(TrainingError, match=r"no longer a number at step 6; the last good checkpoint is .*checkpoint"):
        seen_until(run, 12, then=spoil)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4
    assert all(torch.isfinite(value).all() for value in state["module"].values())
