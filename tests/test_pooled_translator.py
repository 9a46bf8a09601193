"""Translators of several tokens a latent: how many cross, where they stand, what is refused, how they are trained."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from conftest import tiny_lm
from kvtalk import Link, Plan
from kvtalk.adapters.cards import CARD, SHIPPED, Party, read_card
from kvtalk.adapters.store import Half, join, save_adapter
from kvtalk.adapters.translator import Geometry, Pairing, Translator, grouped
from kvtalk.adapters.weights import load_encoder
from kvtalk.cache import PADDING
from kvtalk.errors import AdapterError, PacketError, TrainingError
from kvtalk.models import LM
from kvtalk.packet import Packet
from kvtalk.packet_writing import predict
from kvtalk.training.batches import Batches, Example, Recipe
from kvtalk.training.linear import begin_decoder, begin_encoder, begin_linear
from kvtalk.training.loop import Schedule
from kvtalk.training.texts import Texts
from kvtalk.training.translator import Pair, training

CONTEXT = "The ferry was built in 1931 by the Harlow yard; naïve people call it 北京 😀."
POOL = 4
RECIPE = Recipe(Schedule(4, 3e-3, warm_up=2), tokens=256, widths=(16, 32), seed=3, longest=400)


def geometry(sharer: LM, receiver: LM, pool: int = POOL) -> Geometry:
    sizes = sharer.spec.values_per_token, len(receiver.spec.layers), receiver.spec.values_per_token
    return Geometry(*sizes, width=64, latent=64, decoder_blocks=1, bottleneck=64, pool=pool)


def made(sharer: LM, receiver: LM, folder: Path, pool: int = POOL) -> Path:
    """An adapter that was never trained, but whose every weight matters."""
    torch.manual_seed(0)
    translator = Translator(geometry(sharer, receiver, pool))
    with torch.no_grad():
        for parameter in translator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(translator, *(Party(lm.name, lm.spec.fingerprint) for lm in (sharer, receiver)), folder)
    return folder


@pytest.fixture(scope="module")
def models() -> tuple[LM, LM]:
    return tiny_lm("llama"), tiny_lm("gemma3")


@pytest.fixture(scope="module")
def folder(models: tuple[LM, LM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(*models, tmp_path_factory.mktemp("pooled"))


@pytest.fixture(scope="module")
def link(models: tuple[LM, LM], folder: Path) -> Link:
    return Link(*models, adapter=folder)


@pytest.fixture(scope="module")
def texts() -> Texts:
    rows = [{"context": f"{CONTEXT} It has number {n}.", "question": "Which?", "answers": [f"{n}"]} for n in range(300)]
    return Texts.of(rows)


def test_what_is_older_than_pools_stays_what_it_is(models: tuple[LM, LM], tmp_path: Path) -> None:
    """Packets name an adapter's identity, and so do results."""
    shipped = read_card("smollm2-135m+gemma3-270m")[0]
    card = dataclasses.replace(
        shipped, weights={"encoder": "66dd7ef245428564", "decoder": "a0f5f1a22d1cbcaa"}
    )  # of that time
    assert (card.geometry.pool, card.identity) == (1, "407f706ee1503bfc")
    made(*models, tmp_path, pool=1)
    for where in (tmp_path, SHIPPED / "smollm2-135m+gemma3-270m"):
        assert "pool" not in json.loads((where / CARD).read_text("utf-8"))["geometry"]


def test_an_encoder_whose_parts_are_equal_writes_the_mean_of_each_groups_latents(models: tuple[LM, LM]) -> None:
    torch.manual_seed(0)
    alone, pooled = (Translator(geometry(*models, pool)).encoder for pool in (1, POOL))
    weight = alone.latent.weight.repeat(1, POOL) / POOL
    pooled.load_state_dict({**alone.state_dict(), "latent.weight": weight})
    counts = torch.tensor([9, 6])
    pairing = Pairing(torch.arange(9).repeat(2, 1), torch.full((2, 9, 3), 15), counts)
    vectors = torch.randn(2, 9, models[0].spec.values_per_token)
    each, found = alone(vectors, pairing), pooled(vectors, pairing)
    assert found.shape == (2, 3, 64)
    torch.testing.assert_close(found[0, 1], each[0, 4:8].mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[0, 2], each[0, 8], atol=1e-5, rtol=1e-4)  # the last token again and again
    torch.testing.assert_close(found[1, 1], each[1, [4, 5, 5, 5]].mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 11])
def test_a_latent_stands_where_its_last_token_would_and_the_question_after_the_text(link: Link, tokens: int) -> None:
    blob = link.sharer.share("x" * tokens).blob
    manifest, layout = Packet.parse(blob).manifest, Packet.parse(blob).layout
    count = math.ceil(tokens / POOL)
    assert (manifest.end, manifest.longest, layout.layers[0].kept) == (tokens, count, count)
    prefix = link.receiver.prefix(blob)
    expected = [*range(POOL - 1, tokens, POOL)]
    expected += [tokens - 1] * (len(expected) < count)
    assert [layer.positions.tolist() for layer in prefix.layers] == [[expected]] * len(link.receiver.lm.spec.layers)
    lm = link.receiver.lm
    head = len(lm.head_ids())
    placed = lm.place([[link.receiver.prefix(blob)]])
    assert (placed.columns, placed.next_positions.tolist()) == (head + count, [head + tokens])
    closed = lm.place([[link.receiver.prefix(blob)]], gaps=False)
    assert closed.next_positions.tolist() == [head + count]


def test_rows_of_different_lengths_are_as_each_alone(link: Link) -> None:
    contexts = [CONTEXT, "A mill.", "Three eels were here.", "x"]
    cache = link.sharer.read(*contexts)
    assert cache.length == tuple(len(text.encode()) for text in contexts)
    rows = link.sharer.encode_rows(cache, [link.sharer.half.plan(Plan.parse("fp32"))] * len(contexts))
    both = link.receiver.decode([link.receiver.unpack(blob) for blob in rows])
    for blob, text, prefix in zip(rows, contexts, both, strict=True):
        alone = link.sharer.share(text, plan=Plan.parse("fp32")).blob
        assert len(alone) == len(blob)
        for got, expected in zip(prefix.layers, link.receiver.prefix(alone).layers, strict=True):
            torch.testing.assert_close(got.keys, expected.keys, atol=1e-5, rtol=1e-4)
            assert torch.equal(got.positions, expected.positions)


@pytest.mark.parametrize("plan", ["bf16", "int4 width=16", "int2 front@50% width=32", "int8 random@3"])
def test_packets_take_a_share_of_the_bytes_and_their_size_is_predicted(
    plan: str, link: Link, models: tuple[LM, LM], tmp_path: Path
) -> None:
    sizes = []
    for one in (link, Link(*models, adapter=made(*models, tmp_path, pool=1))):
        used = one.sharer.half.plan(Plan.parse(plan))
        cache, blob = one.sharer.read(CONTEXT * 9), one.sharer.share(CONTEXT * 9, plan=used).blob
        assert len(blob) == predict(cache, used, one.sharer.half.spec(used.width))
        one.receiver.answer(blob, "What?", max_new_tokens=2)
        sizes.append(sum(Packet.parse(blob).layout.section_sizes().values()))
    if "random" not in plan:  # so many latents of either
        assert sizes[0] == pytest.approx(sizes[1] / POOL, rel=0.01)


def test_budgets_are_kept(link: Link) -> None:
    for budget in (3000, 2000, 1400, 1100):
        shared = link.sharer.share(CONTEXT, budget=str(budget))
        assert len(shared.blob) <= budget
        assert link.receiver.answer(shared.blob, "What?", max_new_tokens=2).cost.context_tokens == len(CONTEXT.encode())


def test_latents_beyond_the_last_tokens_are_refused(link: Link) -> None:
    prefix = link.receiver.unpack(link.sharer.share("x" * 9).blob)
    with pytest.raises(PacketError, match="8 tokens have fewer latents, at 4 tokens each"):
        link.receiver.decode([dataclasses.replace(prefix, length=8)])


@pytest.mark.parametrize("pool", [0, 65, "4", 2.0])
def test_pools_that_cannot_be_are_refused(models: tuple[LM, LM], folder: Path, tmp_path: Path, pool: object) -> None:
    with pytest.raises(AdapterError, match="pool"):
        dataclasses.replace(geometry(*models), pool=pool)
    content = json.loads((folder / CARD).read_text("utf-8"))
    content["geometry"]["pool"] = pool
    (tmp_path / CARD).write_text(json.dumps(content), "utf-8")
    with pytest.raises(AdapterError, match="pool"):
        read_card(tmp_path)


def test_another_pool_than_the_weights_is_refused(folder: Path) -> None:
    card = read_card(folder)[0]
    wrong = dataclasses.replace(card, geometry=dataclasses.replace(card.geometry, pool=3))
    with pytest.raises(AdapterError, match="'latent.weight'"):
        load_encoder(wrong, folder)


def test_halves_of_different_pools_do_not_fit(
    models: tuple[LM, LM], folder: Path, texts: Texts, tmp_path: Path
) -> None:
    _, receiver = models
    with pytest.raises(AdapterError, match="pool 2 of the encoder and 4 of the decoder: train both with the same"):
        other = geometry(receiver, receiver, 2)
        training(receiver, receiver, texts, other, RECIPE, tmp_path / "run", frozen=Half.of(folder, "decoder"))
    with pytest.raises(AdapterError, match="pool 2 of the encoder and 4 of the decoder"):
        join(made(receiver, receiver, tmp_path / "two", 2), folder, tmp_path / "joined")


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_half_can_be_trained_to_one_that_is_there(
    models: tuple[LM, LM], folder: Path, texts: Texts, tmp_path: Path, part: str
) -> None:
    pair = models if part == "encoder" else (models[1], models[1])
    run = training(*pair, texts, geometry(*pair), RECIPE, tmp_path / "run", frozen=Half.of(folder, part))
    run.objective.checks = run.objective.checks[:1]  # type: ignore[attr-defined]
    trained = run.run(lambda step, shown: None, check_every=4)
    assert isinstance(trained, Translator)
    parties = (Party(lm.name, lm.spec.fingerprint) for lm in pair)
    save_adapter(trained, *parties, tmp_path / "out", None, frozen=Half.of(folder, part))
    halves = (tmp_path / "out", folder) if part == "decoder" else (folder, tmp_path / "out")
    join(*halves, tmp_path / "joined")
    assert Link(*pair, adapter=tmp_path / "joined").ask(CONTEXT, "What?", max_new_tokens=2).cost.bytes > 0


def test_training_computes_what_inference_does(link: Link, models: tuple[LM, LM], folder: Path, texts: Texts) -> None:
    sharer, receiver = models
    rows = [Example(text, " Which one?", " That.") for text in (CONTEXT, "A mill.", "Three eels were here.")]
    batch = Batches(texts, *models, RECIPE, 64).of(rows, receiver.head_ids())
    pair = Pair(sharer, receiver, POOL)
    encoder, decoder = link.sharer.half.encoder, link.receiver.half.decoder
    with torch.no_grad():
        vectors = decoder(encoder(pair.sharer_vectors(batch), batch.pairing))
        found = receiver.unembedding(pair.continued(batch, vectors)).split([len(tail) for tail in batch.tails])
    for row, tail, logits in zip(rows, batch.tails, found, strict=True):
        blob = link.sharer.share(row.context, plan=Plan.parse("fp32")).blob
        expected = receiver.logits([tail], receiver.place([[link.receiver.prefix(blob)]]))[0]
        torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)


def test_a_run_gets_better_goes_on_and_starts_another_of_its_pool_alone(
    models: tuple[LM, LM], texts: Texts, tmp_path: Path
) -> None:
    def until(out: Path, last: int) -> dict[int, dict[str, float]]:
        seen: dict[int, dict[str, float]] = {}
        run = training(*models, texts, geometry(*models), recipe, out)
        run.objective.checks = run.objective.checks[1:2]  # type: ignore[attr-defined]

        def report(step: int, shown: dict[str, float]) -> None:
            if "total" not in shown:
                seen[step] = shown
                if step == last < 24:
                    raise InterruptedError

        if last < 24:
            with pytest.raises(InterruptedError):
                run.run(report, check_every=12)
        else:
            run.run(report, check_every=12)
        return seen

    recipe = dataclasses.replace(RECIPE, schedule=Schedule(24, 3e-3, warm_up=4), packing="nf4:1x64")
    torch.use_deterministic_algorithms(True)
    try:
        whole = until(tmp_path / "whole", 24)
        until(tmp_path / "cut", 12)
        assert until(tmp_path / "cut", 24)[24] == whole[24]
    finally:
        torch.use_deterministic_algorithms(False)
    assert whole[24]["nll"] < whole[0]["nll"]
    assert {"kl questions wrong", "kl questions zeroed", "kl questions narrow", "mse questions"} <= whole[24].keys()
    training(*models, texts, geometry(*models), recipe, tmp_path / "next", trained=tmp_path / "whole")
    with pytest.raises(TrainingError, match="another geometry"):
        training(*models, texts, geometry(*models, 2), recipe, tmp_path / "other", trained=tmp_path / "whole")


def test_a_start_gives_the_mean_of_what_each_token_would_give() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 96) @ torch.randn(96, 96) / 10 + 3
    y = x @ (torch.randn(96, 16) / 10) @ torch.randn(16, 64) * torch.linspace(0.5, 2, 64) - 1
    counts = torch.tensor([998])
    pairing = Pairing(torch.arange(998)[None], torch.full((1, 998, 3), 15), counts)
    means = grouped(y[None, :998], counts, POOL).mean(2)[0]
    fresh = Translator(Geometry(96, 2, 64, width=64, latent=64, bottleneck=8, pool=POOL))
    with torch.no_grad():
        begin_linear(fresh, [(x, y)])
        latents = fresh.encoder(x[None, :998], pairing)
        assert (fresh.decoder(latents)[0] - means).abs().mean() < 0.1 * means.std()
        other = Translator(fresh.geometry)
        other.decoder = fresh.decoder
        begin_encoder(other, [(x, y)])
        assert (other.decoder(other.encoder(x[None, :998], pairing))[0] - means).abs().mean() < 0.15 * means.std()
        other = Translator(fresh.geometry)
        begin_decoder(other, [(latents[0], means)])
        assert (other.decoder(latents)[0] - means).abs().mean() < 0.15 * means.std()


def test_padding_stays_padding(link: Link) -> None:
    positions = link.sharer.read("x" * 9, "x" * 3).layers[0].positions
    assert positions.tolist() == [[0, 1, 2], [0, PADDING, PADDING]]
