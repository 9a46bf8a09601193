"""The demo: every pair of models in every way, fused ones where a fuser comes along."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from conftest import tiny_lm
from kvtalk.adapters import cards, fusing
from kvtalk.adapters.cards import CARD, Party, read_card
from kvtalk.adapters.predictor import Predictor
from kvtalk.adapters.store import add_predictor, save_adapter
from kvtalk.adapters.translator import Geometry, Translator
from kvtalk.evaluation import demo
from kvtalk.evaluation.data import Passage, invented_gaps, samples
from kvtalk.evaluation.summary import read_records
from kvtalk.models import LM
from test_fuser import geometry_of, other_lm, random_fuser

NAMES = ("sharer", "gemma3")
PAIRS = (NAMES, NAMES[::-1])


@pytest.fixture(scope="module")
def lms() -> dict[str, LM]:
    return dict(zip(NAMES, (other_lm(), tiny_lm("gemma3")), strict=True))


@pytest.fixture
def shipped(lms: dict[str, LM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of translators that come along, and two tiny models in the bundled ones' place."""
    for sharer, receiver in PAIRS:
        theirs, ours = (lms[name].spec for name in (sharer, receiver))
        sizes = {"width": 64, "latent": 64, "decoder_blocks": 1, "bottleneck": 8}
        translator = Translator(Geometry(theirs.values_per_token, 4, ours.values_per_token, **sizes))
        save_adapter(translator, *parties(lms, sharer, receiver), tmp_path / "shipped" / f"{sharer}+{receiver}")
    monkeypatch.setattr(cards, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(fusing, "tokenizer_of", lambda name: lms[name].tokenizer)
    monkeypatch.setattr(LM, "load", lms.__getitem__)
    for name, value in {
        "MODELS": NAMES,
        "WAYS": ("bf16", "budget=25%"),
        "ACROSS": ("bf16", "int4 width=32"),
        "TIMED_QUESTIONS": 1,
        "samples": shortened(samples),
        "invented_gaps": shortened(invented_gaps),
    }.items():
        monkeypatch.setattr(demo, name, value)
    return tmp_path / "shipped"


def shortened(items: Callable[[], list[Passage]]) -> Callable[[], list[Passage]]:
    return lambda: [item.model_copy(update={"context": item.context[:60]}) for item in items()]


def parties(lms: dict[str, LM], *names: str) -> list[Party]:
    return [Party(name, lms[name].spec.fingerprint) for name in names]


def add_fuser(shipped: Path, lms: dict[str, LM], sharer: str, receiver: str) -> None:
    folder = shipped / f"{sharer}+{receiver}.fuser"
    fuser = random_fuser(geometry_of(lms[sharer], lms[receiver]))
    save_adapter(fuser, *parties(lms, sharer, receiver), folder)
    predictor = Predictor(fuser.geometry)
    torch.nn.init.normal_(predictor.weight)
    add_predictor(folder, predictor)


def test_fusers_that_come_along_are_shown_beside_the_prefix(shipped: Path, lms: dict[str, LM], tmp_path: Path) -> None:
    for pair in PAIRS:
        add_fuser(shipped, lms, *pair)
    console = Console(record=True, width=200)
    demo.run_demo(console, tmp_path / "demo", 2)
    said, table = console.export_text(), (tmp_path / "demo" / "table.md").read_text()
    assert (tmp_path / "demo" / "picture.png").stat().st_size > 1000
    assert len(list((tmp_path / "demo").glob("*/items.jsonl.gz"))) == 6
    for sharer, receiver in PAIRS:
        name = f"{sharer}+{receiver}"
        titles = [line.split(" | ")[1] for line in table.splitlines() if line.startswith(f"| {name}, fused |")]
        assert titles == [
            "no context",
            "context as text",
            "fused, bf16",
            "another text's cache",
            "its cache, all zero",
            "fused, int4, 25%",
            "another's, int4, 25%",
            "all zero, int4, 25%",
        ]
        run = tmp_path / "demo" / f"{name}.fused"
        assert json.loads((run / "manifest.json").read_text())["task"]["name"] == "invented_gaps"
        sent = {record.arm: record.bytes for record in read_records(run)}
        assert len(list(read_records(run))) == 2 * 8
        assert 0 < sent[f"fused {demo.FUSED[1]}"] < sent["fused bf16"] == sent["zeroed bf16"]
        assert f"{sharer} reads, {receiver} completes a sentence, its cache fused: 2 further passages, 8 ways" in said
    shown = [line for line in said.splitlines() if line.startswith("  fused, int4, 25%")]
    assert len(shown) == 2
    for item in (invented_gaps()[0], samples()[0]):
        assert f"{item.question} (right: {item.answers[0]})" in said


def test_the_demo_shows_only_the_fusers_that_come_along(shipped: Path, lms: dict[str, LM]) -> None:
    prefix = [*NAMES, "sharer+gemma3", "gemma3+sharer"]
    assert [part.name for part in demo._parts(lms, 4)] == prefix
    add_fuser(shipped, lms, *NAMES)
    assert [part.name for part in demo._parts(lms, 4)] == [*prefix, "sharer+gemma3, fused"]


def test_what_comes_along_lies_under_the_names_of_its_models() -> None:
    """And nothing of its training beside it; a fuser has the predictor that the demo's second plan needs."""
    folders = [file.parent for file in cards.SHIPPED.glob(f"*/{CARD}")]
    assert len(folders) >= 2
    for folder in folders:
        card, _ = read_card(folder)
        suffix = ".fuser" if card.kind == "fuser" else ""
        assert folder.name == f"{card.sharer.name}+{card.receiver.name}{suffix}"
        assert {file.name for file in folder.iterdir()} == {CARD, *(f"{part}.safetensors" for part in card.parts)}
        assert card.parts[-1] == {"fuser": "predictor", "translator": "decoder"}[card.kind]


def test_sentences_to_complete_are_those_of_their_passages_without_a_word() -> None:
    items = invented_gaps()
    assert len({item.id for item in items}) == len({item.context for item in items}) == 24
    assert not {item.context for item in items} & {item.context for item in samples()}
    forms = {
        'What is missing here: "{}"?',
        'Which word or number fills the gap in "{}"?',
        'Complete what the text says: "{}"',
        'In the text, what stands for ____ in: "{}"',
        'Go on as the text does: "{}"',
    }
    found = set()
    for item in items:
        before, sentence, after = item.question.split('"')
        found.add(f'{before}"{{}}"{after}')
        begun = not sentence.count("____")
        assert begun == item.question.startswith("Go on")
        whole = f"{sentence} {item.answers[0]}" if begun else sentence.replace("____", item.answers[0])
        assert item.context.count(whole) == 1
        assert len(item.answers[0].split()) == 1
        assert not any(answer.lower() in item.question.lower() for answer in item.answers)
    assert found == forms
