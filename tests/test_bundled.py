"""The two real models: loaded right, exact in float32, and answering from caches of texts they never saw."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from conftest import bundled_lm
from kvtalk import Link, Plan, bundled
from kvtalk import packet as wire
from kvtalk.cache import Prefix
from kvtalk.evaluation.arms import parse_arms
from kvtalk.evaluation.items import load_items, samples, unrelated_text
from kvtalk.evaluation.metrics import contains_answer
from kvtalk.evaluation.runner import run
from kvtalk.loading import sentence_nats
from kvtalk.models import LM
from kvtalk.packet import Packet

pytestmark = pytest.mark.models
both = pytest.mark.parametrize("name", list(bundled.MODELS))


@both
def test_reads_a_famous_sentence_as_well_as_the_gguf_file_does(name: str) -> None:
    lm = bundled_lm(name)
    expected = {"smollm2-135m": 0.92, "gemma3-270m": 0.65}[name]
    assert sentence_nats(lm.model, lm.tokenizer) == pytest.approx(expected, abs=0.03)


@both
def test_geometry_is_that_of_the_model_card(name: str) -> None:
    lm = bundled_lm(name)
    shapes = {(x.kv_heads, x.head_dim, x.window) for x in lm.spec.layers}
    if name == "smollm2-135m":
        assert (len(lm.spec.layers), shapes, lm.spec.bytes_per_token) == (30, {(3, 64, None)}, 23_040)
    else:
        assert (len(lm.spec.layers), shapes) == (18, {(1, 256, 512), (1, 256, None)})
        assert lm.spec.bytes_per_token == 18_432
        assert [index for index, x in enumerate(lm.spec.layers) if x.window is None] == [5, 11, 17]


@both
def test_loading_takes_seconds(name: str) -> None:
    """Measured: 0.4 s and 2.2 s; the bound leaves room for a busy machine."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        LM.load(name)
        best = min(best, time.perf_counter() - start)
    assert best < 5


@both
@torch.no_grad()
def test_generation_from_a_placed_cache_is_native_generation(name: str) -> None:
    """Float32, a context longer than Gemma's window of 512, token for token and logits within 1e-4 of their scale."""
    lm = bundled_lm(name)
    context = lm.head_ids() + lm.encode(unrelated_text("x" * 4000))
    prompt = lm.encode(lm.prompt.tail("Who founded the town?"))
    assert len(context) > 600
    ids = torch.tensor([context + prompt])
    native = lm.model(ids).logits[0, -len(prompt) :]
    cache = lm.prefill([context]).attendable(lm.spec)
    logits = lm.logits([prompt], lm.place([[Prefix.of(cache)]], head=False))[0]
    assert (logits - native).abs().max() < 1e-4 * native.abs().max()
    expected = lm.model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
    lm_free = LM(lm.model, lm.tokenizer, name, type(lm.prompt)("", "", ""))
    made = lm_free.generate([prompt], lm.place([[Prefix.of(cache)]], head=False), max_new_tokens=16)[0]
    assert list(made.ids) == expected[: len(made.ids)]
    assert len(made.ids) >= 1


@both
@torch.no_grad()
def test_bf16_packet_is_the_bf16_models_own_cache(name: str) -> None:
    """A model that computes in bf16 loses nothing in a bf16 packet: the very same keys and values arrive."""
    lm = LM.load(name, dtype=torch.bfloat16, device="cpu")
    context = lm.encode(unrelated_text("x" * 1500))
    cache = lm.prefill([context]).attendable(lm.spec)
    got = wire.to_cache([Packet.parse(wire.encode(cache, Plan(), lm.spec))], lm.spec)
    for one, other in zip(got.layers, cache.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.positions, other.positions)


@both
def test_answers_from_the_cache_are_answers_from_the_text(name: str) -> None:
    lm = bundled_lm(name)
    link = Link(lm, lm)
    for item in samples()[3:40:9]:
        cache = link.ask(item.context, item.question, plan=Plan("fp16", "fp16"), max_new_tokens=10)
        text = link.receiver.answer_text(item.context, item.question, max_new_tokens=10)
        assert cache.text == text.text


def test_a_corrupted_packet_changes_the_answers() -> None:
    """What the receiver knows is in the packet: turn its values round and the right answers are gone."""
    lm = bundled_lm("gemma3-270m")
    link = Link(lm, lm)
    right, spoiled, changed = 0.0, 0.0, 0
    items = samples()[1:48:6]
    for item in items:
        cache = link.sharer.read(item.context)
        answers = []
        for _ in range(2):
            blob = link.sharer.encode(cache, Plan("fp16", "fp16"))
            answers.append(link.receiver.answer(blob, item.question, max_new_tokens=10).text)
            for layer in cache.layers:
                layer.values.copy_(layer.values.flip(2))
        right += contains_answer(answers[0], item.answers)
        spoiled += contains_answer(answers[1], item.answers)
        changed += answers[0] != answers[1]
    assert changed >= len(items) - 1
    assert right >= len(items) / 2
    assert spoiled <= 1


def test_the_cache_buys_what_the_text_buys_and_its_controls_buy_nothing(tmp_path: Path) -> None:
    lm = LM.load("gemma3-270m")
    arms = parse_arms(["none", "text", "wrong", "zeroed", "bf16", "int4:channel/int4:token before"])
    rows = {row["arm"]: row for row in run(Link(lm, lm), samples()[::4], arms, tmp_path)["arms"]}
    assert max(rows[name]["contains"][0] for name in ("none", "wrong", "zeroed")) <= 10
    assert rows["bf16"]["contains"][0] >= 45
    assert abs(rows["bf16"]["contains"][0] - rows["text"]["contains"][0]) <= 10
    assert rows["int4:channel/int4:token before"]["nll"] < rows["bf16"]["nll"] + 0.15
    assert rows["int4:channel/int4:token before"]["bits_per_value"] < 4.7


def test_public_questions_from_the_cache(shared_data: Path, tmp_path: Path) -> None:
    lm = LM.load("gemma3-270m")
    items = load_items(shared_data / "squad_v1_test.jsonl.gz", limit=24)
    arms = parse_arms(["none", "text", "wrong", "bf16"])
    rows = {row["arm"]: row for row in run(Link(lm, lm), items, arms, tmp_path, batch=12)["arms"]}
    assert rows["bf16"]["nll"] == pytest.approx(rows["text"]["nll"], abs=0.05)
    assert rows["bf16"]["nll"] < min(rows["none"]["nll"], rows["wrong"]["nll"]) - 0.5
