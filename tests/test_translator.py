"""Translators: what crosses, what is refused, how they are stored, and how they are trained."""

import copy
import dataclasses
import json
import random

import pytest
import torch
import torch.nn.functional as F

from conftest import byte_tokenizer, random_cache, tiny_lm
from kvtalk import Link, Plan, Receiver, Sharer
from kvtalk.adapters.cards import CARD, Party, read_card
from kvtalk.adapters.halves import both_halves, receiver_half, sharer_half
from kvtalk.adapters.store import Half, save_adapter
from kvtalk.adapters.translator import Geometry, Pairing, Translator, pair
from kvtalk.adapters.vectors import from_vectors, to_vectors
from kvtalk.adapters.weights import load_decoder, load_encoder
from kvtalk.alignment.tokens import tokenize
from kvtalk.codecs import codec
from kvtalk.errors import AdapterError, AlignmentError, BudgetError, CacheError, PacketError, TrainingError
from kvtalk.models import LM
from kvtalk.packet import Packet
from kvtalk.training import linear, losses
from kvtalk.training.batches import Batches, Recipe, _apart
from kvtalk.training.linear import begin_linear
from kvtalk.training.loop import Schedule
from kvtalk.training.texts import Texts
from kvtalk.training.translator import Pair, training

CONTEXT = "The ferry was built in 1931 by the Harlow yard; naïve people call it 北京 😀."
OTHER = "Mara Oduya opened her bakery in the old mill."
RECIPE = Recipe(Schedule(8, warm_up=2), tokens=256, widths=(16, 32), seed=3, longest=400)


def geometry(sharer: LM, receiver: LM) -> Geometry:
    return Geometry(
        sharer.spec.values_per_token,
        len(receiver.spec.layers),
        receiver.spec.values_per_token,
        width=64,
        latent=64,
        decoder_blocks=1,
        bottleneck=8,
    )


@pytest.fixture(scope="module")
def models() -> tuple[LM, LM]:
    return tiny_lm("llama"), tiny_lm("gemma3")


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    """An adapter that was never trained, but whose every weight matters."""
    torch.manual_seed(0)
    translator = Translator(geometry(*models))
    with torch.no_grad():
        for parameter in translator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    out = tmp_path_factory.mktemp("adapter")
    save_adapter(translator, *(Party(lm.name, lm.spec.fingerprint) for lm in models), out)
    return out


@pytest.fixture(scope="module")
def texts() -> Texts:
    rows = [{"context": f"{CONTEXT} It has number {n}.", "question": "Which?", "answers": [f"{n}"]} for n in range(400)]
    return Texts.of(rows)


def test_vectors_hold_every_key_and_value_of_every_token(models):
    for lm in models:
        ids = [list(range(3, 30)), list(range(9, 20))]
        cache, hidden = lm.read_whole(ids)
        assert torch.allclose(lm.unembedding(hidden[0, -1]), lm.model(torch.tensor(ids[:1])).logits[0, -1], atol=1e-4)
        vectors = to_vectors(cache, lm.spec, start=2)
        assert vectors.shape == (2, 25, lm.spec.values_per_token)
        back = from_vectors(vectors, torch.tensor([25, 9]), lm.spec)
        for row in range(2):
            own = cache.row(row).since(2).unrotated(lm.spec)
            for got, layer in zip(back.row(row).layers, own.layers, strict=True):
                torch.testing.assert_close(got.keys, layer.keys)
                torch.testing.assert_close(got.values, layer.values)


def test_a_cache_that_lacks_tokens_has_no_vectors(models):
    lm = models[1]
    with pytest.raises(CacheError, match="read_whole"):
        to_vectors(lm.prefill([list(range(3, 40))]), lm.spec, start=0)
    with pytest.raises(CacheError):
        to_vectors(random_cache(lm.spec, 8, start=4), lm.spec, start=0)


def test_a_receiver_token_is_made_of_the_sharer_token_at_its_end():
    tokens = tokenize(byte_tokenizer(), [CONTEXT])
    found = pair(tokens, tokens)
    assert (tokens[0].spans[found.index[0]][:, 1] == tokens[0].spans[:, 1]).all()
    with pytest.raises(AlignmentError, match="same text"):
        pair(tokenize(byte_tokenizer(), [""]), tokens)


def test_only_latents_cross_and_the_answer_follows_from_them(models, folder):
    link = Link(*models, adapter=folder)
    shared = link.sharer.share(CONTEXT)
    packet = Packet.parse(shared.blob)
    assert packet.manifest.payload == "latent"
    assert packet.manifest.adapter == link.card.identity
    assert len(shared.blob) < 64 * 2 * len(CONTEXT.encode()) + 1200
    first, again, other = (
        link.receiver.lm.logits(
            [[5, 6]], link.receiver.lm.place([[link.receiver.prefix(link.sharer.share(text).blob)]])
        )
        for text in (CONTEXT, CONTEXT, OTHER)
    )
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-3
    cost = link.ask(CONTEXT, "What?").cost
    assert cost.context_tokens == link.sharer.count(CONTEXT)
    assert cost.bits_per_value == 8 * cost.bytes / (cost.context_tokens * models[0].spec.values_per_token)


def test_halves_work_apart(models, folder, tmp_path):
    sharer = Sharer(models[0], both_halves(folder, *models)[0])
    blob = bytes(sharer.share(CONTEXT).blob)
    receiver = Receiver(models[1], receiver_half(folder, models[1]))
    assert receiver.answer(blob, "What?").text == Link(*models, adapter=folder).ask(CONTEXT, "What?").text


def test_several_contexts_are_encoded_and_decoded_as_each_alone(models, folder):
    link = Link(*models, adapter=folder)
    sharer, receiver = link.sharer, link.receiver
    plan = sharer.plan(sharer.read(CONTEXT), 10, None, Plan.parse("int4 width=32"))
    together = sharer.encode_rows(sharer.read(CONTEXT, OTHER), [plan, plan])
    alone = [sharer.encode(sharer.read(text), plan) for text in (CONTEXT, OTHER)]
    for one, other in zip(together, alone, strict=True):
        assert len(one) == len(other)
    both = receiver.decode([receiver.unpack(blob) for blob in together])
    for prefix, blob in zip(both, together, strict=True):
        for got, expected in zip(prefix.layers, receiver.prefix(blob).layers, strict=True):
            torch.testing.assert_close(got.keys, expected.keys, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("plan", ["bf16", "int8 width=32", "int4 width=16", "int2 front@50% width=32", "fp32 random@7"])
def test_plans_say_width_codec_and_tokens(models, folder, plan):
    link = Link(*models, adapter=folder)
    cache = link.sharer.read(CONTEXT)
    used = link.sharer.plan(cache, link.sharer.count(CONTEXT), None, Plan.parse(plan))
    shared = link.sharer.share(CONTEXT, plan=Plan.parse(plan))
    layout = Packet.parse(shared.blob).layout.layers[0]
    assert (layout.head_dim, layout.values) == (used.width, "none")
    assert Plan.parse(str(used)).width == used.width
    link.receiver.answer(shared.blob, "What?", max_new_tokens=2)


def test_budgets_are_kept(models, folder):
    link = Link(*models, adapter=folder)
    sizes = []
    for budget in ("8KB", "4KB", "2500", "1800", "1200"):
        shared = link.sharer.share(CONTEXT, budget=budget)
        assert len(shared.blob) <= int(budget.replace("KB", "000"))
        sizes.append(len(shared.blob))
    assert sizes == sorted(sizes, reverse=True)


def test_the_wrong_control_of_training_is_another_context(models, texts):
    for batch in Batches(texts.split(0.03)[1], *models, RECIPE, 64).checks(32):
        assert len(batch.receiver) > 1
        assert len({tuple(row) for row in batch.receiver}) == len(batch.receiver)


def test_latents_that_say_more_than_there_is_are_refused(models, folder):
    link = Link(*models, adapter=folder)
    blob = bytes(link.sharer.share(CONTEXT).blob)
    for more in (b"garbage", blob):
        with pytest.raises(PacketError):
            link.receiver.answer(blob + more, "What?")
    cache = link.sharer.read("x" * 2040)
    assert len(link.receiver.decode([link.receiver.unpack(link.sharer.encode(cache, Plan()))])) == 1
    with pytest.raises(PacketError, match="reads at most 2048"):
        link.receiver.decode([dataclasses.replace(link.receiver.unpack(blob), length=2049)])
    for plan in ("int8/int2", "int8 before", "int8 layers=first:1", "int8 width=0"):
        with pytest.raises(AdapterError):
            link.ask(CONTEXT, "What?", plan=Plan.parse(plan))
    with pytest.raises(BudgetError, match="give an adapter"):
        Link(models[0], models[0]).ask(CONTEXT, "What?", plan=Plan.parse("bf16 width=8"))


@pytest.mark.parametrize(
    "wrong", [{"width": 96}, {"latent": 8}, {"latent": 8192}, {"receiver_layers": 3}, {"width": "x"}]
)
def test_sizes_that_cannot_be_are_refused(models, wrong):
    with pytest.raises(AdapterError):
        dataclasses.replace(geometry(*models), **wrong)


def test_wrong_packets_and_adapters_are_refused(models, folder, tmp_path):
    blob = Link(*models, adapter=folder).sharer.share(CONTEXT).blob
    with pytest.raises(PacketError, match="load that adapter"):
        Receiver(models[1]).answer(blob, "What?")
    plain = Sharer(models[0]).share(CONTEXT).blob
    receiver = Receiver(models[1], receiver_half(folder, models[1]))
    with pytest.raises(PacketError, match="other half"):
        receiver.answer(plain, "What?")
    with pytest.raises(AdapterError, match="sharer is llama"):
        Link(models[1], models[0], adapter=folder)
    with pytest.raises(AdapterError, match="kvtalk train translator --sharer llama"):
        Link(*models).ask(CONTEXT, "What?")
    with pytest.raises(AdapterError, match="a latent of this adapter has 64"):
        Link(*models, adapter=folder).ask(CONTEXT, "What?", plan=Plan.parse("bf16 width=65"))
    other = tmp_path / "other"
    save_adapter(Translator(geometry(*models)), *(Party(lm.name, lm.spec.fingerprint) for lm in models), other)
    with pytest.raises(PacketError, match="both sides need the same"):
        Receiver(models[1], receiver_half(other, models[1])).answer(blob, "What?")


def test_the_sharer_needs_the_receivers_tokenizer(models, folder):
    from kvtalk.adapters.halves import SharerHalf

    card, where = read_card(folder)
    odd = byte_tokenizer()
    odd.backend_tokenizer.add_tokens(["ferry"])
    with pytest.raises(AdapterError, match="tokenizer of gemma3"):
        SharerHalf(card, load_encoder(card, where), models[0], odd)
    with pytest.raises(Exception, match="gemma3"):
        sharer_half(folder, models[0])  # a name that cannot be loaded is named


def test_damaged_adapters_are_refused(models, folder, tmp_path):
    with pytest.raises(AdapterError, match="a hub id, or one of gemma3-270m.smollm2-135m"):
        read_card(tmp_path / "nothing")
    card, _ = read_card(folder)
    (tmp_path / CARD).write_text((folder / CARD).read_text())
    with pytest.raises(AdapterError, match="missing"):
        load_decoder(card, tmp_path)
    (tmp_path / "decoder.safetensors").write_bytes((folder / "decoder.safetensors").read_bytes()[:-1])
    with pytest.raises(AdapterError, match="damaged"):
        load_decoder(card, tmp_path)
    (tmp_path / CARD).write_text("{}")
    with pytest.raises(AdapterError, match="not an adapter"):
        read_card(tmp_path)


@pytest.mark.parametrize("packing", [None, "nf4:1x64", "int8:1x64"])
def test_stored_matrices_come_back(models, tmp_path, packing):
    torch.manual_seed(1)
    shape = dataclasses.replace(geometry(*models), bottleneck=64)
    translator = Translator(shape)
    parties = [Party(lm.name, lm.spec.fingerprint) for lm in models]
    card = save_adapter(translator, *parties, tmp_path, packing)
    loaded = load_encoder(*read_card(tmp_path))
    tolerance = {None: 0.005, "nf4:1x64": 0.16, "int8:1x64": 0.01}[packing]
    for (name, got), expected in zip(
        loaded.state_dict().items(), translator.encoder.state_dict().values(), strict=True
    ):
        assert (got - expected).abs().max() <= tolerance * expected.abs().max() + 1e-6, name
    assert json.loads((tmp_path / CARD).read_text())["weights"] == card.weights


def test_the_receivers_own_vectors_are_as_good_as_the_text(models, texts):
    for lm in models:
        both = Pair(lm, lm)
        for batch in Batches(texts, lm, lm, RECIPE, 64).checks(3):
            vectors, wanted = both.taught(batch, True)
            got = both.losses(both.continued(batch, vectors), wanted, batch)
            assert float(got["divergence"]) < 1e-6


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_training_goes_down_keeps_the_models_and_resumes_to_the_same_losses(models, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "_LARGEST", 0)  # from random matrices: these texts are all alike
    before = [{name: value.clone() for name, value in lm.model.state_dict().items()} for lm in models]
    recipe = dataclasses.replace(
        RECIPE, schedule=Schedule(24, warm_up=2), regression=0.25, packing="nf4:1x8", packed=0.6
    )

    def seen_until(out, until):
        seen = {}
        run = training(*models, texts, geometry(*models), recipe, out)
        run.objective.checks = run.objective.checks[:1]

        class StopError(Exception):
            pass

        def report(step, shown):
            seen[step] = shown
            if step == until < recipe.schedule.steps and any(name.startswith("kl") for name in shown):
                raise StopError

        with pytest.raises(StopError) if until < recipe.schedule.steps else _nothing():
            run.run(report, check_every=6, report_every=6)
        return seen

    whole = seen_until(tmp_path / "whole", 24)
    assert whole[6]["mse text"] > whole[24]["mse text"]
    assert whole[6]["kl text"] > whole[24]["kl text"]
    seen_until(tmp_path / "cut", 12)  # where matrices are rounded, which the checkpoint must not be
    stopped = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["module"]["decoder.outward.weight"]
    assert not torch.equal(stopped, codec(recipe.packing).simulated(stopped[None])[0])
    resumed = seen_until(tmp_path / "cut", 24)
    assert 6 not in resumed
    assert resumed[24]["kl text"] == whole[24]["kl text"]
    for lm, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in lm.model.state_dict().items())
    begun = training(*models, texts, geometry(*models), RECIPE, tmp_path / "next", trained=tmp_path / "whole")
    state = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)["module"]
    assert all(torch.equal(value, state[name]) for name, value in begun.module.state_dict().items())
    for where, size in ((tmp_path / "none", geometry(*models)), (tmp_path / "whole", geometry(*models[::-1]))):
        with pytest.raises(TrainingError, match="no checkpoint|another geometry"):
            training(*models, texts, size, RECIPE, tmp_path / "next2", trained=where)
    with pytest.raises(TrainingError, match="other settings"):
        training(*models, texts, geometry(*models), dataclasses.replace(recipe, tokens=99), tmp_path / "whole")


def test_answers_follow_a_teacher_and_all_else_the_receiver(models, texts, tmp_path):
    sharer, receiver = models
    tuned = copy.deepcopy(receiver.model)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith("q_proj.weight"):
                parameter.add_(0.5 * torch.randn_like(parameter))
    teacher = LM(tuned, receiver.tokenizer, "tuned", receiver.prompt)
    plain, taught = Pair(sharer, receiver), Pair(sharer, receiver, teacher=teacher)
    text, *asked = Batches(texts, sharer, receiver, RECIPE, 64).checks(3)
    assert torch.equal(taught.taught(text, True)[1], plain.taught(text, True)[1])
    for batch in asked:
        vectors, own = plain.taught(batch, True)
        again, wanted = taught.taught(batch, True)
        assert torch.equal(vectors, again), "what is regressed is the receiver's own"
        told = torch.zeros(len(own), dtype=torch.bool)
        ends = torch.tensor([len(tail) for tail in batch.tails]).cumsum(0)
        for end, count in zip(ends, batch.answers, strict=True):
            told[end - count - 1 : end - 1] = True
        theirs = Pair(sharer, teacher).taught(batch, True)[1]
        assert torch.equal(wanted[~told], own[~told])
        assert torch.equal(wanted[told], theirs[told])
        states = taught.continued(batch, vectors.roll(1, dims=0), shift=1)
        alone, led = plain.losses(states, own, batch), taught.losses(states, wanted, batch)
        torch.testing.assert_close(alone["total"], alone["divergence"] + alone["answers"])
        half = 0.5 * (led["answers"] + led["teacher"])
        torch.testing.assert_close(led["total"], led["divergence"] + half)
        torch.testing.assert_close(led["divergence"], alone["divergence"])
        assert float(led["teacher"]) > 0.01
    run = training(*models, texts, geometry(*models), RECIPE, tmp_path / "run", teacher=teacher)
    run.objective.checks = run.objective.checks[:2]
    seen = {}
    run.run(lambda step, shown: seen.update({step: shown}), check_every=4)
    assert "nll teacher" in seen[8]
    with pytest.raises(TrainingError, match="other settings"):
        training(*models, texts, geometry(*models), RECIPE, tmp_path / "run")
    with pytest.raises(TrainingError, match="another tokenizer, prompt or output matrix"):
        Pair(sharer, receiver, teacher=sharer)


def test_a_run_starts_from_an_adapter(models, texts, tmp_path):
    parties = [Party(lm.name, lm.spec.fingerprint) for lm in models]
    for name in ("one", "other"):
        save_adapter(Translator(geometry(*models)), *parties, tmp_path / name, "nf4:1x8")
    begun = training(*models, texts, geometry(*models), RECIPE, tmp_path / "run", trained=tmp_path / "one")
    card, folder = read_card(tmp_path / "one")
    held = {"encoder": load_encoder(card, folder), "decoder": load_decoder(card, folder)}
    for name, value in begun.module.state_dict().items():
        part, _, rest = name.partition(".")
        assert torch.equal(value, held[part].state_dict()[rest].float())
    with pytest.raises(TrainingError, match=r"the adapter .*one has another geometry, sharer, receiver"):
        training(*models[::-1], texts, geometry(*models[::-1]), RECIPE, tmp_path / "run2", trained=tmp_path / "one")
    half = Half.of(tmp_path / "one", "decoder")
    training(*models, texts, geometry(*models), RECIPE, tmp_path / "half", trained=tmp_path / "one", frozen=half)
    with pytest.raises(TrainingError, match="another frozen"):
        training(*models, texts, geometry(*models), RECIPE, tmp_path / "run3", trained=tmp_path / "other", frozen=half)


def test_the_mean_of_the_last_weights_is_measured_kept_and_started_from(models, texts, tmp_path):
    recipe = dataclasses.replace(RECIPE, schedule=Schedule(8, warm_up=2, averaged=0.5))
    seen, checked = {}, []

    def run_until(last):
        run = training(*models, texts, geometry(*models), recipe, tmp_path)
        measure = run.objective.measure

        def measured(module):
            checked.append(module.encoder.inward.weight.clone())
            return measure(module)

        run.objective.checks, run.objective.measure = run.objective.checks[:1], measured

        def report(step, shown):
            if "total" in shown:
                seen[step] = run.module.encoder.inward.weight.detach().clone()
            elif step == last < 8:
                raise KeyboardInterrupt

        return run.run(report, check_every=3, report_every=1)

    with pytest.raises(KeyboardInterrupt):
        run_until(6)
    kept = run_until(8).encoder.inward.weight
    torch.testing.assert_close(kept, torch.stack([seen[step] for step in (5, 6, 7, 8)]).mean(dim=0))
    assert torch.equal(checked[-1], kept)
    assert torch.equal(checked[1], seen[3])  # before there is a mean
    begun = training(*models, texts, geometry(*models), RECIPE, tmp_path / "next", trained=tmp_path)
    assert torch.equal(begun.module.encoder.inward.weight, kept)


def test_a_loss_that_is_no_number_stops_training_and_keeps_the_last_checkpoint(models, texts, tmp_path):
    run = training(*models, texts, geometry(*models), RECIPE, tmp_path)
    run.objective.checks = run.objective.checks[:1]

    def report(step, shown):
        if step == 5:
            run.module.encoder.inward.weight.data.fill_(torch.nan)

    with pytest.raises(TrainingError, match="no longer a number at step"):
        run.run(report, check_every=4, report_every=1)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4
    assert all(torch.isfinite(value).all() for value in state["module"].values())


def test_a_run_from_the_linear_start_gets_better(models, texts, tmp_path):
    run = training(
        *models, texts, geometry(*models), dataclasses.replace(RECIPE, schedule=Schedule(30, 1e-3)), tmp_path
    )
    seen = {}
    run.run(lambda step, shown: seen.setdefault(step, {}).update(shown), check_every=30)
    assert seen[30]["nll"] < seen[0]["nll"]


def test_some_texts_are_as_in_corpora_that_were_tokenized(models, texts):
    text = "In 1,250 well-known cases, he said: (go!)"
    assert _apart(text, random.Random(0)) == "In 1 @,@ 250 well @-@ known cases , he said : ( go ! ) "
    assert "<unk>" in _apart(text * 20, random.Random(0))
    batches = Batches(texts, *models, dataclasses.replace(RECIPE, questions=0), 64)
    read = [models[1].tokenizer.decode(row) for step in range(24) for row in batches[step, 0].receiver]
    assert 0 < sum(" ;" in row for row in read) < len(read) / 2


def test_some_steps_read_the_context_again(models, texts):
    plain = Recipe(Schedule(20), regression=0.2, questions=0, tokens=512, longest=400)
    quoting = Batches(texts, *models, dataclasses.replace(plain, quotes=1.0), 64)
    tokenizer = models[1].tokenizer
    for step in range(4):  # those that only regress
        assert quoting[step, 0].tails == Batches(texts, *models, plain, 64)[step, 0].tails
    for step in range(4, 8):
        batch = quoting[step, 0]
        for context, tail in zip(batch.receiver, batch.tails, strict=True):
            assert tokenizer.decode(tail) == f"\n\n{tokenizer.decode(context)}"


def test_texts_that_cannot_be_used_are_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"words": "x"}))
    with pytest.raises(TrainingError, match="row 1 has words; expected context"):
        Texts.load([str(file)])
    for bad in ({"context": "a", "question": "b", "answers": []}, {"text": None}, {"prompt": "a", "response": 1}):
        with pytest.raises(TrainingError, match="row 1"):
            Texts.of([bad])
    for raw, words in (("{", "cannot be read"), ("[1]", "JSON object")):
        file.write_text(raw)
        with pytest.raises(TrainingError, match=words):
            Texts.load([str(file)])
    squad = {"context": "c" * 20_000, "question": "q", "answers": {"text": ["a", "b"], "answer_start": [1, 2]}}
    assert Texts.of([squad]).questions[0].answers == ("a", "b")
    file.write_text(json.dumps({"text": "short"}))
    with pytest.raises(TrainingError, match="too few"):
        Texts.load([str(file)])


def test_no_context_is_trained_on_and_validated_on(texts):
    training, kept_back = texts.split(0.1)
    assert not set(training.documents) & set(kept_back.documents)
    assert not {q.context for q in training.questions} & {q.context for q in kept_back.questions}
    assert all(question.context not in training.plain for question in kept_back.questions)


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


@pytest.mark.parametrize("follows", [True, False])
def test_losses_in_parts_are_the_losses_of_all_logits(follows, monkeypatch):
    monkeypatch.setattr(losses, "_VALUES", {"cpu": 7 * 50})  # several parts, the last one smaller
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False).requires_grad_(False)
    states, wanted = torch.randn(16, 8, requires_grad=True), torch.randn(16, 8) if follows else None
    labels, weights = torch.randint(0, 50, (16,)), torch.rand(2, 16)
    weights[0, :3], weights[1, 3:6] = 0, 0
    total, divergences, entropies = losses.token_losses(head, states, wanted, labels, weights)
    total.backward()
    found, states.grad = states.grad, None
    mine = head(states).log_softmax(-1)
    expected = [torch.zeros(16), F.cross_entropy(head(states), labels, reduction="none")]
    if wanted is not None:
        theirs = head(wanted).log_softmax(-1)
        expected[0] = (theirs.exp() * (theirs - mine)).sum(-1)
    sum((one * weight).sum() for one, weight in zip(expected, weights, strict=True)).backward()
    torch.testing.assert_close(found, states.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(divergences, expected[0].detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(entropies, expected[1].detach(), atol=1e-5, rtol=1e-4)


def test_a_translator_begins_at_the_best_linear_map_of_every_width():
    torch.manual_seed(0)
    mixing, across, back = torch.randn(96, 96) / 10, torch.randn(96, 16) / 10, torch.randn(16, 64)
    x = torch.randn(8000, 96) @ mixing + 3
    y = x @ across @ back * torch.linspace(0.5, 2, 64) - 1
    translator = Translator(Geometry(96, 2, 64, width=64, latent=64, bottleneck=8))
    begin_linear(translator, zip(x.split(2000), y.split(2000), strict=True))
    tokens = torch.arange(1000)[None]
    latents = translator.encoder(x[None, :1000], Pairing(tokens, torch.full((1, 1000, 3), 15), torch.tensor([1000])))
    standard = (y - y.mean(0)) / y.std(0)
    energy = torch.linalg.svdvals(standard).square()
    for width in (64, 16, 8, 4):
        error = (translator.decoder.standardised(latents[:, :, :width])[0] - standard[:1000]).square().mean()
        assert error < energy[width:].sum() / energy.sum() * 1.1 + 0.01, width
    assert (translator.decoder(latents)[0] - y[:1000]).abs().mean() < 0.1 * y.std()
