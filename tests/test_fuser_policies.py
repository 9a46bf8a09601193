"""Token policies by what a fuser adds: the exact scores, what foretells them at a sharer, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load, save
from torch import Tensor

from conftest import tiny_lm
from kvtalk import Budget, Link, Plan
from kvtalk.adapters.cards import CARD, Party, read_card
from kvtalk.adapters.fuser import Fuser
from kvtalk.adapters.fusing import SharerSide
from kvtalk.adapters.pairs import Pairs
from kvtalk.adapters.predictor import Predictor
from kvtalk.adapters.store import add_predictor, save_adapter
from kvtalk.adapters.weights import load_fuser, load_predictor
from kvtalk.cache import KVCache
from kvtalk.errors import AdapterError, SelectionError, TrainingError
from kvtalk.evaluation.curve import grid
from kvtalk.fusion import FusedSharer
from kvtalk.models import LM
from kvtalk.packet import Packet
from kvtalk.selection.tokens import FORETOLD
from kvtalk.shared_prompts import Prompt
from kvtalk.training import predictor as fitting
from kvtalk.training.exchanges import Exchange, Exchanges, FusedBatch
from kvtalk.training.fuser import FuserRecipe, Fusing
from kvtalk.training.predictor import Exact, exact, fit_predictor, fitted
from test_fuser import THEIRS, geometry_of, other_lm, random_fuser
from test_fuser_training import batches, rows

MODELS = other_lm(), tiny_lm("gemma3")


def fuser_with(closed: list[int], **changes: Any) -> Fuser:
    fuser = random_fuser(replace(geometry_of(*MODELS), **changes))
    with torch.no_grad():
        fuser.gates[closed] = -1
    return fuser


def random_predictor(fuser: Fuser) -> Predictor:
    torch.manual_seed(5)
    predictor = Predictor(fuser.geometry)
    with torch.no_grad():
        predictor.weight.normal_()
    return predictor


def stored(fuser: Fuser, folder: Path, predictor: Predictor | None = None) -> Path:
    save_adapter(fuser, *(Party(lm.name, lm.spec.fingerprint) for lm in MODELS), folder, "fp32")
    if predictor is not None:
        add_predictor(folder, predictor, {"data": ["rows"]})
    return folder


def sharer_of(folder: Path) -> FusedSharer:
    card, folder = read_card(folder, "fuser")
    slots, predictor = load_fuser(card, folder).opened().slots, load_predictor(card, folder)
    return FusedSharer(SharerSide(card, slots, MODELS[0], MODELS[1].tokenizer, predictor))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fuser = fuser_with([])
    return stored(fuser, tmp_path_factory.mktemp("fuser"), random_predictor(fuser))


def vectors_of(fuser: Fuser) -> tuple[FusedBatch, Tensor, Tensor]:
    """The sharer's of every entry, and the receiver's own; by means, characters of several tokens are given several."""
    made = batches(MODELS, alignment=fuser.geometry.alignment)
    batch = made[3, 0]
    if fuser.geometry.alignment == "mean":
        prompts = [Prompt("", text) for text in ("naïve 北京 😀 of the old yard", "the mill", "Wer fährt? 😀")]
        batch = made.of([Exchange(prompt, prompt, (" x",)) for prompt in prompts], "instructions")
    objective = Fusing(*MODELS, fuser.geometry, FuserRecipe(), [])
    return batch, objective.received(batch)[0], objective.own(batch)[1]


@pytest.mark.parametrize("alignment", ["coverage", "mean"])
@pytest.mark.parametrize("closed", [[], [1, 4], [3, 5, 6, 7]])
@torch.no_grad()
def test_exact_scores_are_norms_of_what_the_receiver_then_holds(closed: list[int], alignment: str) -> None:
    fuser = fuser_with(closed, layers=(0, 2, 2, 3), alignment=alignment)
    batch, theirs, ours = vectors_of(fuser)
    found, pairs = exact(fuser, theirs, ours, batch.pairs), batch.pairs
    entries = list(zip(pairs.rows.tolist(), pairs.ours.tolist(), pairs.theirs.tolist(), strict=True))
    tokens = sorted({(row, there) for row, _, there in entries})
    assert list(zip(found.rows.tolist(), found.theirs.tolist(), strict=True)) == tokens
    assert len(tokens) < len(entries)  # some stand for several
    enriched = list(dict.fromkeys((row, here) for row, here, _ in entries))
    assert ours.shape[1] == len(enriched)
    assert (len(enriched) < len(entries)) == (alignment == "mean")  # and some are given several
    given = [[at for at, entry in enumerate(entries) if entry[:2] == token] for token in enriched]
    added = fuser(torch.stack([theirs[:, ats].mean(dim=1) for ats in given], dim=1), ours)
    heads = fuser.geometry.receiver.kv_heads

    def norm(vector: Tensor) -> float:
        return sum(float(head.norm()) for head in vector.chunk(heads)) / heads

    for number, token in enumerate(tokens):
        own = [enriched.index((row, here)) for row, here, there in entries if (row, there) == token]
        row, _, there = entries[int(found.entry[number])]
        assert (row, there) == token
        for layer in range(4):
            slots = [slot for slot in range(8) if fuser.geometry.layers[slot // 2] == layer and slot not in closed]
            judged = [slot for slot in slots if slot % 2] or slots
            wanted = [
                sum(norm(ours[slot, at] + added[slot, at]) for slot in judged for at in own) / len(own),
                sum(norm(added[slot, at]) for slot in judged for at in own) / len(own),
            ]
            assert found.scores[:, layer, number].tolist() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("alignment", ["coverage", "mean"])
def test_what_is_linear_in_the_sharers_own_cache_is_foretold(alignment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fuser, width = fuser_with([], alignment=alignment), 32
    torch.manual_seed(1)
    slopes = torch.randn(len(FORETOLD), 4, 2 * width)
    slopes[..., 0] *= 50

    def linear(fuser: Fuser, sharer: Tensor, receiver: Tensor, pairs: Pairs) -> Exact:
        found = exact(fuser, sharer, receiver, pairs)
        vectors = torch.stack([torch.cat([sharer[2 * at], sharer[2 * at + 1]], dim=1)[found.entry] for at in range(4)])
        return replace(found, scores=torch.einsum("ltw,plw->plt", vectors, slopes) + 7)

    monkeypatch.setattr(fitting, "exact", linear)
    predictor = fitted(fuser, *MODELS, Exchanges.of(rows()))
    monkeypatch.undo()
    batch, theirs, ours = vectors_of(fuser)
    wanted = linear(fuser, theirs, ours, batch.pairs)
    vectors = torch.stack([torch.cat([theirs[2 * at], theirs[2 * at + 1]], dim=1)[wanted.entry] for at in range(4)])
    got = torch.einsum("ltw,plw->plt", vectors, predictor.weight) + predictor.bias[..., None]
    left = (got - wanted.scores).square().mean(dim=2) / wanted.scores.var(dim=2)
    assert left.max() < 0.02


def test_a_fitted_predictor_finds_what_the_exact_scores_choose(tmp_path: Path) -> None:
    fuser = fuser_with([])
    fit_predictor(stored(fuser, tmp_path), *MODELS, Exchanges.of(rows()), {"data": ["rows"]})
    card, _ = read_card(tmp_path)
    assert card.facts["predictor"] == {"data": ["rows"]}
    assert card.parts == ("fuser", "predictor")
    predictor = load_predictor(card, tmp_path)
    assert predictor is not None
    batch, theirs, ours = vectors_of(fuser)
    found = exact(fuser, theirs, ours, batch.pairs)
    for layer in range(4):
        vectors = torch.cat([theirs[2 * layer], theirs[2 * layer + 1]], dim=1)[found.entry]
        told = vectors @ predictor.weight[:, layer].T + predictor.bias[:, layer]
        for got, wanted in zip(told.T, found.scores[:, layer], strict=True):
            assert torch.corrcoef(torch.stack([got, wanted]))[0, 1] > 0.5


@pytest.mark.parametrize("policy", FORETOLD)
def test_packets_hold_the_tokens_of_the_highest_scores(folder: Path, policy: str) -> None:
    sharer = sharer_of(folder)
    read = sharer.read(*THEIRS)
    plan = sharer.plan(read, None, Plan.parse(f"fp32 {policy}@30%"))
    assert str(plan) == f"fp32 before {policy}@30%"
    blobs = sharer.encode_rows(THEIRS, read, [plan] * 3)
    predictor = sharer.side.predictor
    assert predictor is not None
    for row, blob in enumerate(blobs):
        assert len(blob) == len(sharer.encode_rows([THEIRS[row]], sharer.read(THEIRS[row]), [plan])[0])
        for index, packed in enumerate(Packet.parse(blob).layers()):
            layer = read.layers[index]
            columns = (layer.positions[row] != -1).nonzero()[:, 0]
            vectors = [tensor[row, :, columns].transpose(0, 1).flatten(1) for tensor in (layer.keys, layer.values)]
            scores = torch.cat(vectors, dim=1) @ predictor.weight[FORETOLD.index(policy), index]
            sent = torch.isin(layer.positions[row, columns], packed.positions[0])
            assert sent.sum() == len(packed.positions[0]) == -(-3 * len(columns) // 10)
            assert scores[sent].min() >= scores[~sent].max() - 1e-4


def test_the_two_choose_differently_and_neither_as_the_others_do(folder: Path) -> None:
    sharer = sharer_of(folder)
    read = sharer.read(THEIRS[0])

    def chosen(policy: str) -> list[list[int]]:
        plan = sharer.plan(read, None, Plan.parse(f"fp32 {policy}@30%"))
        blob = sharer.encode_rows(THEIRS[:1], read, [plan])[0]
        return [layer.positions[0].tolist() for layer in Packet.parse(blob).layers()]

    every = [chosen(policy) for policy in (*FORETOLD, "front", "value_norm")]
    assert all(one != other for number, one in enumerate(every) for other in every[:number])


@pytest.mark.parametrize("policy", FORETOLD)
def test_budgets_are_kept(folder: Path, policy: str) -> None:
    sharer = sharer_of(folder)
    read = sharer.read(THEIRS[0])
    for budget in ("25%", "3000"):
        plan = sharer.plan(read, budget, Plan.parse(f"int8 {policy}@90%"))
        assert plan.tokens == policy
        blob = sharer.encode_rows(THEIRS[:1], read, [plan])[0]
        assert len(blob) <= Budget.parse(budget).bytes_for(read.length[0], MODELS[0].spec)


@pytest.mark.parametrize("policy", FORETOLD)
def test_without_a_fuser_or_a_predictor_they_are_refused(tmp_path: Path, policy: str) -> None:
    plan = Plan.parse(f"int8 {policy}@50%")
    lm = MODELS[1]
    with pytest.raises(SelectionError, match=f"{policy} foretells what a fuser adds: use it with --fuser"):
        Link(lm, lm).ask("The ferry was built by the Harlow yard.", "Who?", plan=plan)
    sharer = sharer_of(stored(fuser_with([]), tmp_path))
    read = sharer.read(THEIRS[0])
    for action in (lambda: sharer.plan(read, None, plan), lambda: sharer.encode_rows(THEIRS[:1], read, [plan])):
        with pytest.raises(AdapterError, match=f"{policy}: nothing foretells it .* kvtalk train predictor --fuser"):
            action()
    with pytest.raises(TrainingError, match=f"{policy} is fitted to a trained fuser"):
        Fusing(*MODELS, sharer.side.geometry, FuserRecipe(plan=str(plan)), [])


def test_a_curve_takes_them_by_name() -> None:
    assert grid(["int4"], ["front", *FORETOLD], ["25%"], []) == [
        f"int4:token {policy}@25%" for policy in ("front", *FORETOLD)
    ]


def test_scores_go_with_the_rows_of_a_layer(folder: Path) -> None:
    sharer = sharer_of(folder)
    scored: KVCache = sharer.side.scored(sharer.read(*THEIRS), Plan(tokens=FORETOLD[0]))
    layer = scored.layers[1]
    assert layer.scores is not None
    some = layer.of_rows([2, 0]).scores
    assert some is not None
    assert torch.equal(some, layer.scores[[2, 0]])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight": torch.zeros(2, 4, 63)}, "weight"),
        ({"weight": torch.zeros(1 << 10, 4, 64)}, "weight"),
        ({"weight": torch.zeros(2, 4, 64, dtype=torch.int8)}, "weight"),
        ({"bias": None}, "bias"),
        ({"more": torch.zeros(1)}, "more"),
    ],
)
def test_a_predictor_of_other_sizes_is_refused(changes: dict[str, Tensor | None], words: str, tmp_path: Path) -> None:
    fuser = fuser_with([])
    file = stored(fuser, tmp_path, random_predictor(fuser)) / "predictor.safetensors"
    made = {**load(file.read_bytes()), **changes}
    file.write_bytes(save({name: tensor for name, tensor in made.items() if tensor is not None}))
    content = json.loads((tmp_path / CARD).read_text())
    content["weights"]["predictor"] = xxhash.xxh3_64_hexdigest(file.read_bytes())
    (tmp_path / CARD).write_text(json.dumps(content))
    with pytest.raises(AdapterError, match=f"predictor.safetensors: its weights do not have .*'{words}'"):
        sharer_of(tmp_path)


def test_a_damaged_or_missing_predictor_is_refused(tmp_path: Path) -> None:
    fuser = fuser_with([])
    file = stored(fuser, tmp_path, random_predictor(fuser)) / "predictor.safetensors"
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(blob)
    with pytest.raises(AdapterError, match="predictor.safetensors: damaged"):
        sharer_of(tmp_path)
    file.unlink()
    with pytest.raises(AdapterError, match="predictor.safetensors: missing"):
        sharer_of(tmp_path)
    add_predictor(tmp_path, random_predictor(fuser))  # another one takes its place
    sharer_of(tmp_path)


def test_it_is_fitted_beside_its_own_models_only(folder: Path) -> None:
    before = (folder / CARD).read_bytes()
    with pytest.raises(AdapterError, match="this adapter's sharer is"):
        fit_predictor(folder, MODELS[1], MODELS[1], Exchanges.of(rows()))
    assert (folder / CARD).read_bytes() == before


def test_the_sharers_side_holds_only_what_is_sized_by_its_own_cache(folder: Path) -> None:
    predictor, lm = sharer_of(folder).side.predictor, MODELS[0]
    assert predictor is not None
    assert isinstance(lm, LM)
    width = lm.spec.layers[0].kv_heads * lm.spec.layers[0].head_dim
    sizes = {name: tuple(tensor.shape) for name, tensor in predictor.state_dict().items()}
    assert sizes == {"weight": (2, 4, 2 * width), "bias": (2, 4)}
