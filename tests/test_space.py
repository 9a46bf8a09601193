"""One latent space for many models: a half that stays as it is, and halves that were never trained together."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from conftest import tiny_lm
from kvtalk import Link
from kvtalk.adapters.cards import CARD, SHIPPED, Party, read_card
from kvtalk.adapters.halves import both_halves, receiver_half, tokenizer_of
from kvtalk.adapters.store import Half, average, join, save_adapter
from kvtalk.adapters.translator import Geometry, Pairing, Translator
from kvtalk.cache import Prefix
from kvtalk.errors import AdapterError, TrainingError
from kvtalk.models import LM
from kvtalk.spec import tokenizer_digest
from kvtalk.training.batches import Recipe
from kvtalk.training.linear import begin_decoder, begin_encoder
from kvtalk.training.loop import Loop, Schedule
from kvtalk.training.texts import Texts
from kvtalk.training.translator import training
from test_fuser import other_lm

CONTEXT = "The ferry was built in 1931 by the Harlow yard; naïve people call it 北京 😀."
SMALL = {"width": 64, "latent": 64, "decoder_blocks": 1, "bottleneck": 64}
RECIPE = Recipe(Schedule(4, warm_up=1), tokens=128, widths=(16, 32), longest=200, packing="nf4:1x64", packed=1.0)
S, G, G2 = "sharer", "receiver", "second receiver"
MODELS = {S: lambda: tiny_lm("llama"), G: lambda: tiny_lm("gemma3"), G2: lambda: tiny_lm("qwen3")}


def geometry(sharer: LM, receiver: LM, **changes: int) -> Geometry:
    sizes = sharer.spec.values_per_token, len(receiver.spec.layers), receiver.spec.values_per_token
    return Geometry(*sizes, **{**SMALL, **changes})


def made(
    sharer: LM, receiver: LM, folder: Path, seed: int, frozen: Half | None = None, packing: str | None = None
) -> Path:
    """An adapter that was never trained, but whose every weight matters."""
    torch.manual_seed(seed)
    translator = Translator(geometry(sharer, receiver))
    with torch.no_grad():
        for parameter in translator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    parties = (Party(lm.name, lm.spec.fingerprint) for lm in (sharer, receiver))
    save_adapter(translator, *parties, folder, packing, frozen=frozen)
    return folder


@pytest.fixture(scope="module")
def models() -> dict[str, LM]:
    return {name: load() for name, load in MODELS.items()}


@pytest.fixture(scope="module")
def first(models: dict[str, LM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From S to G, packed: it makes the space."""
    return made(models[S], models[G], tmp_path_factory.mktemp("first"), 0, packing="nf4:1x64")


@pytest.fixture(scope="module")
def last(models: dict[str, LM], first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From G to G2, in the same space by way of an encoder for G."""
    folder = tmp_path_factory.mktemp("space")
    own = made(models[G], models[G], folder / "own", 1, Half.of(first, "decoder"))
    return made(models[G], models[G2], folder / "last", 2, Half.of(own, "encoder"))


@pytest.fixture(scope="module")
def texts() -> Texts:
    rows = [{"context": f"{CONTEXT} It has number {n}.", "question": "Which?", "answers": [f"{n}"]} for n in range(300)]
    return Texts.of(rows)


def run_until(run: Loop, step: int) -> dict[str, float]:
    """What is measured after a step, where the run is stopped."""
    run.objective.checks = run.objective.checks[:1]  # type: ignore[attr-defined]
    found: dict[str, float] = {}

    def report(done: int, shown: dict[str, float]) -> None:
        if done == step and "total" not in shown:
            found.update(shown)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run.run(report, check_every=2)
    return found


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_frozen_half_stays_to_the_bit_and_the_other_learns(
    part: str, models: dict[str, LM], first: Path, texts: Texts, tmp_path: Path
) -> None:
    pair = (models[S], models[G2]) if part == "encoder" else (models[G], models[G])
    if part == "encoder":  # G2's tokens are G's
        assert models[G2].spec.fingerprint.weights != models[G].spec.fingerprint.weights
    half = Half.of(first, part)
    recipe = dataclasses.replace(RECIPE, schedule=dataclasses.replace(RECIPE.schedule, averaged=0.5))
    run = training(*pair, texts, geometry(*pair), recipe, tmp_path / "run", frozen=half)
    translator = run.module
    assert isinstance(translator, Translator)
    other = translator.decoder if part == "encoder" else translator.encoder
    before = {name: value.clone() for name, value in other.state_dict().items()}
    moved = {id(one) for optimizer in run.optimizers for group in optimizer.param_groups for one in group["params"]}
    assert moved == {id(parameter) for parameter in other.parameters()}
    run_until(run, 4)
    kept = getattr(translator, part).state_dict()
    for name, value in half.load().state_dict().items():
        assert torch.equal(kept[name], value), name
    assert all(not torch.equal(value, before[name]) for name, value in other.named_parameters() if "norm" not in name)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["module"]
    assert not any(name.startswith(part) and name.split(".")[-1] not in ("mean", "scale") for name in saved)
    parties = (Party(lm.name, lm.spec.fingerprint) for lm in pair)
    card = save_adapter(translator, *parties, tmp_path / "out", None, {"steps": 4}, half)
    file = f"{part}.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (first / file).read_bytes()
    assert card.space == half.card.space
    assert read_card(tmp_path / "out")[0] == card


def test_a_run_with_a_frozen_half_goes_on_to_the_same_and_with_no_other(
    models: dict[str, LM], first: Path, last: Path, texts: Texts, tmp_path: Path
) -> None:
    pair = models[G], models[G]
    torch.use_deterministic_algorithms(True)
    try:
        whole, cut = (
            training(*pair, texts, geometry(*pair), RECIPE, tmp_path / name, frozen=Half.of(first, "decoder"))
            for name in ("whole", "cut")
        )
        expected = run_until(whole, 4)
        run_until(cut, 2)
        again = training(*pair, texts, geometry(*pair), RECIPE, tmp_path / "cut", frozen=Half.of(first, "decoder"))
        assert again.step == 2
        assert run_until(again, 4) == expected
    finally:
        torch.use_deterministic_algorithms(False)
    for half in (None, Half.of(made(*pair, tmp_path / "other", 5), "decoder")):
        with pytest.raises(TrainingError, match=r"other settings \(frozen differ\)"):
            training(*pair, texts, geometry(*pair), RECIPE, tmp_path / "cut", frozen=half)
        with pytest.raises(TrainingError, match="another frozen"):
            training(*pair, texts, geometry(*pair), RECIPE, tmp_path / "new", tmp_path / "whole", half)
    begun = training(
        *pair, texts, geometry(*pair), RECIPE, tmp_path / "next", tmp_path / "whole", Half.of(first, "decoder")
    )
    for got, value in zip(begun.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(got, value)


def test_halves_that_do_not_fit_are_refused_before_anything_is_trained(
    models: dict[str, LM], first: Path, texts: Texts, tmp_path: Path
) -> None:
    def start(sharer: LM, receiver: LM, part: str, **changes: int) -> None:
        sizes = geometry(sharer, receiver, **changes)
        training(sharer, receiver, texts, sizes, RECIPE, tmp_path, frozen=Half.of(first, part))

    with pytest.raises(AdapterError, match="sharer is llama; .*weights"):
        start(models[G], models[G], "encoder")
    with pytest.raises(AdapterError, match="receiver is gemma3; .*weights"):
        start(models[S], models[G2], "decoder")
    with pytest.raises(AdapterError, match="each token of gemma3, and the receiver has another tokenizer"):
        start(models[S], other_lm(), "encoder")
    with pytest.raises(AdapterError, match="latent 128 of the encoder and 64 of the decoder: train both"):
        start(models[G], models[G], "decoder", latent=128)
    with pytest.raises(AdapterError, match="width 64 of the encoder and 128 of the decoder"):
        start(models[S], models[G], "encoder", width=128)
    assert not any(tmp_path.iterdir())


def test_joined_halves_are_those_of_their_adapters(
    models: dict[str, LM], first: Path, last: Path, tmp_path: Path
) -> None:
    card = join(first, last, tmp_path / "joined")
    assert read_card(tmp_path / "joined")[0] == card
    assert (card.sharer, card.receiver) == (read_card(first)[0].sharer, read_card(last)[0].receiver)
    assert card.identity not in (read_card(first)[0].identity, read_card(last)[0].identity)
    sharer, receiver = both_halves(tmp_path / "joined", models[S], models[G2])
    latents = sharer.read([CONTEXT])
    theirs = both_halves(first, models[S], models[G])[0].read([CONTEXT])
    assert torch.equal(latents.layers[0].keys, theirs.layers[0].keys)
    assert torch.equal(latents.layers[0].positions, theirs.layers[0].positions)
    got, expected = (half.decode([Prefix.of(latents)])[0] for half in (receiver, receiver_half(last, models[G2])))
    for ours, layer in zip(got.layers, expected.layers, strict=True):
        assert torch.equal(ours.keys, layer.keys)
        assert torch.equal(ours.values, layer.values)
    link = Link(models[S], models[G2], adapter=tmp_path / "joined")
    assert link.ask(CONTEXT, "What?", max_new_tokens=4).cost.bytes > 0
    again = join(tmp_path / "joined", tmp_path / "joined", tmp_path / "again")
    assert again == dataclasses.replace(card, facts=again.facts)


def test_halves_of_two_spaces_are_not_joined(models: dict[str, LM], first: Path, last: Path, tmp_path: Path) -> None:
    apart = made(models[G], models[G2], tmp_path / "apart", 3)
    with pytest.raises(AdapterError, match="not trained to one latent space: train either again with .*--encoder"):
        join(first, apart, tmp_path / "out")
    foreign = made(models[G], other_lm(), tmp_path / "foreign", 3)
    with pytest.raises(AdapterError, match="each token of gemma3, and the receiver has another tokenizer"):
        join(first, foreign, tmp_path / "out")
    content = json.loads((last / CARD).read_text("utf-8"))
    (tmp_path / CARD).write_text(json.dumps({**content, "geometry": {**content["geometry"], "latent": 128}}), "utf-8")
    with pytest.raises(AdapterError, match="latent 64 of the encoder and 128 of the decoder"):
        join(first, tmp_path, tmp_path / "out")
    (tmp_path / CARD).write_text(json.dumps(content), "utf-8")
    with pytest.raises(AdapterError, match="missing"):
        join(first, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(AdapterError, match="holds an adapter already"):
        join(first, last, last)


def test_a_card_without_a_space_has_the_one_that_its_weights_give(first: Path, tmp_path: Path) -> None:
    """Adapters are older than spaces; those that come with kvtalk are."""
    card = read_card(first)[0]
    content = json.loads((first / CARD).read_text("utf-8"))
    assert content.pop("space") == card.space
    (tmp_path / CARD).write_text(json.dumps(content), "utf-8")
    assert read_card(tmp_path)[0] == card
    (tmp_path / CARD).write_text(json.dumps({**content, "space": 7}), "utf-8")
    with pytest.raises(AdapterError, match="not an adapter"):
        read_card(tmp_path)
    content["weights"] = {"decoder": "9cd3d1c5c58b77eb", "encoder": "60e69eed73ba11a0"}
    (tmp_path / CARD).write_text(json.dumps(content), "utf-8")
    assert read_card(tmp_path)[0].space == "4312a3b432ae9ef2"  # for ever: other cards name it
    shipped = [read_card(folder)[0] for folder in sorted(SHIPPED.iterdir()) if (folder / CARD).is_file()]
    spaces = [one.space for one in shipped if one.kind == "translator"]
    assert len(set(spaces)) == len(spaces) > 1


def test_a_new_half_begins_at_the_best_linear_map_to_the_one_that_is_there() -> None:
    """A linear translator, whose curved heads and blocks do nothing yet, is undone by closed form."""
    torch.manual_seed(0)
    x = torch.randn(4000, 96) @ torch.randn(96, 96) / 10 + 3
    y = x @ (torch.randn(96, 16) / 10) @ torch.randn(16, 64) * torch.linspace(0.5, 2, 64) - 1
    there = Translator(Geometry(96, 2, 64, width=64, latent=64, bottleneck=8))
    tokens = torch.arange(1000)[None]
    pairing = Pairing(tokens, torch.full((1, 1000, 3), 15), torch.tensor([1000]))
    with torch.no_grad():
        for half, values in ((there.encoder, x), (there.decoder, y)):
            half.mean.copy_(values.mean(0) + 0.1)
            half.scale.copy_(1.1 * values.std(0))
        begin_encoder(there, [(x, y)])
        assert (there(x[None, :1000], pairing, 64, "bf16") - _standard(there, y[:1000])).abs().mean() < 0.15
        other = Translator(there.geometry)
        other.encoder = there.encoder
        begin_decoder(other, [(there.encoder(x[None, :1000], pairing)[0] + 2, y[:1000])])
        latents = there.encoder(x[None, :1000], pairing) + 2  # latents have a mean, and a decoder takes none off
        assert (other.decoder(latents)[0] - y[:1000]).abs().mean() < 0.15 * y.std()


def _standard(translator: Translator, vectors: torch.Tensor) -> torch.Tensor:
    return (vectors - translator.decoder.mean) / translator.decoder.scale


def test_a_lora_of_the_receiver_has_its_base_models_tokenizer(tiny_folder: Path) -> None:
    plain, tuned = tokenizer_of(str(tiny_folder)), tokenizer_of(f"{tiny_folder}+a-lora")
    assert tokenizer_digest(tuned) == tokenizer_digest(plain)


def test_a_mean_of_translators_is_that_of_their_weights(models: dict[str, LM], tmp_path: Path) -> None:
    folders = [made(models[S], models[G], tmp_path / str(seed), seed) for seed in (1, 2, 3)]
    card = average(folders, tmp_path / "mean")
    assert card.facts == {"mean of": [read_card(folder)[0].identity for folder in folders]}
    for part in ("encoder", "decoder"):
        mean, *others = (Half.of(folder, part).load().state_dict() for folder in (tmp_path / "mean", *folders))
        for name, tensor in mean.items():
            expected = sum(other[name].float() for other in others) / 3
            torch.testing.assert_close(tensor.float(), expected, atol=2e-2, rtol=1e-2)
    link = Link(models[S], models[G], adapter=tmp_path / "mean")
    assert link.ask(CONTEXT, "Who?", max_new_tokens=2).cost.bytes > 0


def test_a_half_that_is_the_same_in_all_stays_as_it_is_and_so_does_the_space(
    models: dict[str, LM], tmp_path: Path
) -> None:
    first = made(models[S], models[G], tmp_path / "first", 1, packing="nf4:1x64")
    second = made(models[S], models[G], tmp_path / "second", 2, Half.of(first, "decoder"))
    card = average([first, second], tmp_path / "mean", "nf4:1x64")
    assert card.space == read_card(first)[0].space
    assert (tmp_path / "mean" / "decoder.safetensors").read_bytes() == (first / "decoder.safetensors").read_bytes()
    assert card.weights["encoder"] not in {read_card(folder)[0].weights["encoder"] for folder in (first, second)}


def test_a_mean_that_cannot_be_is_refused(models: dict[str, LM], tmp_path: Path) -> None:
    one = made(models[S], models[G], tmp_path / "one", 1)
    other = made(models[S], models[G2], tmp_path / "other", 1)
    reverse = made(models[G], models[G], tmp_path / "reverse", 1)
    for names, words in (
        ([one], "two adapters at least"),
        ([one, one], "all the same"),
        ([one, other], "other receiver"),
        ([one, reverse], "other sharer"),
        ([one, "nothing"], "no adapter"),
    ):
        with pytest.raises(AdapterError, match=words):
            average(names, tmp_path / "mean")
    with pytest.raises(AdapterError, match="holds an adapter already"):
        average([one, made(models[S], models[G], tmp_path / "two", 2)], one)
