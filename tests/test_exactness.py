"""Generating from a packet is generating from the text: token for token, for every supported architecture."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from conftest import ARCHITECTURES, WINDOW, bare_spec, random_cache, tiny_config, tiny_lm
from kvtalk.cache import KVCache, Prefix
from kvtalk.models import LM
from kvtalk.packet import prefix, read_stream
from kvtalk.packet_writing import write
from kvtalk.placed import PlacedCache
from kvtalk.placement import place
from kvtalk.planning import Plan

TEXT = "The old ferry crossed the river at noon, and nobody on the quay saw who steered it."
PROMPT = " Who steered the ferry?"
LONGER = TEXT + " Later a boy said that it had been the miller, but he had been asleep at that hour."
TOLERANCE = 1e-4
WINDOWED = ("mistral-window", "qwen2-half-window", "gemma3")

each_architecture = pytest.mark.parametrize("arch", list(ARCHITECTURES))


def native_logits(lm: LM, ids: list[int], last: int, offset: int = 0) -> torch.Tensor:
    positions = torch.arange(offset, offset + len(ids))[None]
    with torch.no_grad():
        return lm.model(torch.tensor([ids]), position_ids=positions).logits[0, -last:]


def native_generation(lm: LM, ids: list[int], new_tokens: int) -> tuple[int, ...]:
    with torch.no_grad():
        made = lm.model.generate(torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return tuple(made[0, len(ids) :].tolist())


def through_packet(lm: LM, cache: KVCache, plan: Plan, start: int = 0, parts: int = 1) -> Prefix:
    target = BytesIO()
    write(target, cache.since(start).attendable(lm.spec), plan, lm.spec, start, parts)
    return prefix(read_stream(target.getbuffer()), lm.spec)


# A packet of 16-bit values is exact for a model that computes in that type; so a float32 model first rounds its cache.
def rounded(cache: KVCache) -> KVCache:
    layers = tuple(
        replace(layer, keys=layer.keys.bfloat16().float(), values=layer.values.bfloat16().float())
        for layer in cache.layers
    )
    return KVCache(layers, cache.length)


@each_architecture
def test_placed_cache_gives_native_logits_and_tokens(arch: str) -> None:
    lm = tiny_lm(arch)
    context, prompt = lm.encode(TEXT), lm.encode(PROMPT)
    assert len(context) > 4 * WINDOW
    cache = lm.prefill([context]).attendable(lm.spec)
    logits = lm.logits([prompt], lm.place([[Prefix.of(cache)]], head=False))[0]
    assert (logits - native_logits(lm, context + prompt, len(prompt))).abs().max() < TOLERANCE
    made = lm.generate([prompt], lm.place([[Prefix.of(cache)]], head=False), max_new_tokens=24)[0]
    assert made.ids == native_generation(lm, context + prompt, 24)


@each_architecture
def test_bf16_packet_equals_native_generation_from_the_same_cache(arch: str) -> None:
    lm = tiny_lm(arch)
    context, prompt = lm.encode(TEXT), lm.encode(PROMPT)
    cache = rounded(lm.prefill([context]))
    native = cache.to_transformers(lm.spec)
    ids = torch.tensor([context + prompt])
    with torch.no_grad():
        expected = lm.model.generate(ids, past_key_values=native, max_new_tokens=24, do_sample=False, pad_token_id=0)[
            0, ids.shape[1] :
        ]
    placed = lm.place([[through_packet(lm, cache, Plan("bf16", "bf16"))]], head=False)
    assert lm.generate([prompt], placed, max_new_tokens=24)[0].ids == tuple(expected.tolist())


@each_architecture
def test_ragged_batch_equals_each_row_alone(arch: str) -> None:
    lm = tiny_lm(arch)
    texts = [TEXT, LONGER, TEXT[:20], TEXT[:9]]
    prompts = [lm.encode(text) for text in (PROMPT, " Why?", PROMPT + " And when?", " Who?")]
    caches = list(lm.prefill([lm.encode(text) for text in texts]).rows())
    contexts = [[through_packet(lm, rounded(cache), Plan())] for cache in caches]
    made = lm.generate(prompts, lm.place(contexts, head=False), max_new_tokens=16)
    for cache, prompt, generation in zip(caches, prompts, made, strict=True):
        alone = lm.place([[Prefix.of(rounded(cache))]], head=False)
        assert generation.ids == lm.generate([prompt], alone, max_new_tokens=16)[0].ids


@each_architecture
def test_batched_prefill_equals_each_row_alone(arch: str) -> None:
    lm = tiny_lm(arch)
    batch = [lm.encode(text) for text in (TEXT, TEXT[:20], LONGER)]
    for ids, row in zip(batch, lm.prefill(batch).rows(), strict=True):
        alone = lm.prefill([ids])
        for together, single in zip(row.attendable(lm.spec).layers, alone.attendable(lm.spec).layers, strict=True):
            assert torch.equal(together.positions, single.positions)
            assert (together.keys - single.keys).abs().max() < TOLERANCE
            assert (together.values - single.values).abs().max() < TOLERANCE


@each_architecture
@pytest.mark.parametrize("offset", [1, 37, 1000])
def test_prefix_moved_by_any_offset_equals_native_at_those_positions(arch: str, offset: int) -> None:
    lm = tiny_lm(arch)
    context, prompt = lm.encode(TEXT), lm.encode(PROMPT)
    moved = lm.prefill([context]).moved(offset, lm.spec)
    placed = lm.place([[Prefix(moved.layers, 0, moved.length[0], len(context), True)]], head=False)
    logits = lm.logits([prompt], placed)[0]
    assert (logits - native_logits(lm, context + prompt, len(prompt), offset)).abs().max() < TOLERANCE


@each_architecture
@pytest.mark.parametrize("rope", ["after", "before"])
def test_fp32_packet_gives_native_logits_and_tokens(arch: str, rope: str) -> None:
    """Through real bytes, at the sharer's positions and moved behind a head that the sharer did not read."""
    lm = tiny_lm(arch)
    context, prompt = lm.encode(TEXT), lm.encode(PROMPT)
    cache = lm.prefill([context])
    plan = Plan("fp32", "fp32", rope)  # type: ignore[arg-type]
    placed = lm.place([[through_packet(lm, cache, plan)]], head=False)
    logits = lm.logits([prompt], placed)[0]
    assert (logits - native_logits(lm, context + prompt, len(prompt))).abs().max() < TOLERANCE
    again = lm.place([[through_packet(lm, cache, plan)]], head=False)
    assert lm.generate([prompt], again, max_new_tokens=24)[0].ids == native_generation(lm, context + prompt, 24)


@each_architecture
def test_packet_lands_after_a_head_of_another_length(arch: str) -> None:
    """What was read at one position is answered from at another: the keys turn with it."""
    lm = tiny_lm(arch)
    head, context, prompt = lm.encode("Read this. "), lm.encode(TEXT), lm.encode(PROMPT)
    cache = lm.prefill([context])
    moved = cache.moved(len(head), lm.spec)
    for plan in (Plan("fp16", "fp16"), Plan("fp16", "fp16", rope="before")):
        placed = _placed_after(lm, head, through_packet(lm, cache, plan))
        layers = placed.to_cache().row(0).since(len(head)).attendable(lm.spec).layers
        for got, expected in zip(layers, moved.attendable(lm.spec).layers, strict=True):
            assert torch.equal(got.positions, expected.positions)
            assert torch.allclose(got.keys, expected.keys, rtol=2e-3, atol=2e-2)
            assert torch.allclose(got.values, expected.values, rtol=2e-3, atol=2e-2)
    assert lm.logits([prompt], placed).shape[1] == len(prompt)


def _placed_after(lm: LM, head: list[int], prefix: Prefix) -> PlacedCache:
    return place(lm.spec, lm.prefill([head]), [[prefix]])


@each_architecture
def test_head_taken_off_and_put_on_again_changes_nothing(arch: str) -> None:
    lm = tiny_lm(arch)
    head, context, prompt = lm.encode("Read this. "), lm.encode(TEXT), lm.encode(PROMPT)
    cache = lm.prefill([head + context])
    placed = _placed_after(lm, head, Prefix.of(cache.attendable(lm.spec), len(head)))
    logits = lm.logits([prompt], placed)[0]
    assert (logits - native_logits(lm, head + context + prompt, len(prompt))).abs().max() < TOLERANCE


@each_architecture
@pytest.mark.parametrize("parts", [2, 4])
def test_stream_of_packets_equals_one_packet(arch: str, parts: int) -> None:
    lm = tiny_lm(arch)
    cache = lm.prefill([lm.encode(TEXT)])
    plan = Plan("int8:channel", "int8:token", "before", "value_norm", 0.5)
    whole, stream = (through_packet(lm, cache, plan, parts=count).layers for count in (1, parts))
    for one, other in zip(whole, stream, strict=True):
        assert torch.equal(one.positions, other.positions)
        for side in ("keys_into", "values_into"):
            kv_heads, head_dim = one.shape
            decoded = [torch.empty(1, kv_heads, one.positions.shape[1], head_dim) for _ in range(2)]
            getattr(one, side)(decoded[0])
            getattr(other, side)(decoded[1])
            assert torch.equal(*decoded)


@each_architecture
def test_several_packets_in_a_row_continue_one_sequence(arch: str) -> None:
    """A later turn sends only what is new."""
    lm = tiny_lm(arch)
    first, second, prompt = lm.encode(TEXT), lm.encode(" It was foggy."), lm.encode(PROMPT)
    exact = Plan("fp32", "fp32")
    early, both = lm.prefill([first]), lm.prefill([first + second])
    prefixes = [through_packet(lm, early, exact), through_packet(lm, both, exact, start=len(first))]
    # What of the first text a sliding layer no longer needs is in the first packet all the same, and masked.
    logits = lm.logits([prompt], lm.place([prefixes], head=False))[0]
    assert (logits - native_logits(lm, first + second + prompt, len(prompt))).abs().max() < TOLERANCE


@pytest.mark.parametrize("arch", [name for name in ARCHITECTURES if name not in WINDOWED])
def test_dropped_tokens_are_as_if_masked_in_the_native_model(arch: str) -> None:
    """Nothing else changes: the native cache with the same columns masked agrees."""
    lm = tiny_lm(arch)
    context, prompt = lm.encode(TEXT), lm.encode(PROMPT)
    cache = lm.prefill([context])
    kept = torch.tensor([index for index in range(len(context)) if index % 3])
    placed = lm.place([[Prefix.of(cache.take([kept] * len(cache.layers)))]], head=False)
    logits = lm.logits([prompt], placed)[0]
    native = cache.to_transformers(lm.spec)
    mask = torch.ones(1, len(context) + len(prompt))
    mask[0, : len(context)] = 0
    mask[0, kept] = 1
    positions = torch.arange(len(context), len(context) + len(prompt))[None]
    with torch.no_grad():
        expected = lm.model(
            torch.tensor([prompt]), past_key_values=native, attention_mask=mask, position_ids=positions
        ).logits[0]
    assert (logits - expected).abs().max() < TOLERANCE


def test_eager_attention_agrees_with_sdpa() -> None:
    lm = tiny_lm("gemma3")
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(tiny_config("gemma3"), attn_implementation="eager")
    eager.load_state_dict(lm.model.state_dict())
    other = LM(eager, lm.tokenizer, "eager", lm.prompt)
    prompt = lm.encode(PROMPT)
    rows = [Prefix.of(row) for row in lm.prefill([lm.encode(TEXT), lm.encode(TEXT[:30])]).rows()]
    again = [Prefix.of(row) for row in lm.prefill([lm.encode(TEXT), lm.encode(TEXT[:30])]).rows()]
    one = lm.logits([prompt] * 2, lm.place([[row] for row in rows], head=False))
    two = other.logits([prompt] * 2, other.place([[row] for row in again], head=False))
    assert (one - two).abs().max() < TOLERANCE


def test_the_buffer_grows_when_the_room_is_used_up() -> None:
    lm = tiny_lm("llama")
    context, prompt = lm.encode(TEXT), lm.encode(PROMPT)
    cache = lm.prefill([context])
    made = lm.generate([prompt], lm.place([[Prefix.of(cache)]], head=False, room=1), max_new_tokens=40)[0]
    assert made.ids == native_generation(lm, context + prompt, 40)


def test_sampling_through_generate_is_seeded() -> None:
    lm = tiny_lm("qwen3")
    context, prompt = lm.encode(TEXT), lm.encode(PROMPT)
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        placed = lm.place([[Prefix.of(lm.prefill([context]))]], head=False)
        made.append(lm.generate([prompt], placed, max_new_tokens=12, do_sample=True, temperature=1.5)[0].ids)
    assert made[0] == made[1] != native_generation(lm, context + prompt, 12)


def test_rewinding_forgets_what_was_read_since_the_mark() -> None:
    lm = tiny_lm("gemma3")
    prompts = [lm.encode(PROMPT), lm.encode(" Why so?")]
    rows = [[Prefix.of(row)] for row in lm.prefill([lm.encode(TEXT), lm.encode(TEXT[:30])]).rows()]
    placed = lm.place(rows, head=False)
    mark = placed.mark()
    first = lm.logits(prompts, placed)
    placed.rewind(mark)
    assert torch.equal(lm.logits(prompts, placed), first)


def test_beams_and_several_samples_of_one_prompt() -> None:
    lm = tiny_lm("gemma3")
    context, prompt = lm.encode(TEXT), lm.encode(PROMPT)
    ids = torch.tensor([context + prompt])
    with torch.no_grad():
        native = lm.model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False, pad_token_id=0)
    placed = lm.place([[Prefix.of(lm.prefill([context]).attendable(lm.spec))]], head=False)
    made = lm.generate([prompt], placed, max_new_tokens=8, num_beams=3)
    assert [one.ids for one in made] == [tuple(native[0, ids.shape[1] :].tolist())]
    placed = lm.place([[Prefix.of(lm.prefill([context]))]], head=False)
    assert len(lm.generate([prompt], placed, max_new_tokens=4, do_sample=True, num_return_sequences=3)) == 3


def test_a_multimodal_gemma_answers_from_a_cache() -> None:
    """Its outer model hands the text model one mask per kind of layer."""
    text = {**tiny_config("gemma3").to_dict()}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 14, "patch_size": 14}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_index=255)
    model = Gemma3ForConditionalGeneration(config)
    lm = LM(model, tiny_lm("gemma3").tokenizer, "multimodal", tiny_lm("gemma3").prompt)
    context, prompt = lm.encode(TEXT), lm.encode(PROMPT)
    cache = lm.prefill([context]).attendable(lm.spec)
    logits = lm.logits([prompt], lm.place([[Prefix.of(cache)]], head=False))[0]
    assert (logits - native_logits(lm, context + prompt, len(prompt))).abs().max() < TOLERANCE


@pytest.mark.parametrize("gaps", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
@each_architecture
def test_keys_turned_at_once_are_those_turned_layer_by_layer(arch, rotated, gaps):
    lm = tiny_lm(arch)
    cache, _ = lm.read_whole([lm.encode(TEXT)])
    cache = cache if rotated else cache.unrotated(lm.spec)

    def contexts(in_memory: bool) -> list[list[Prefix]]:
        """Two rows of two texts and of one, of other lengths."""
        return [[prefix(3, in_memory), prefix(2, in_memory)], [prefix(2, in_memory)]]

    def prefix(step: int, in_memory: bool) -> Prefix:
        kept = cache.take([torch.arange(0, cache.length[0], step)] * 4)
        positions = kept.layers[0].positions
        layers = tuple(replace(layer, positions=positions) for layer in kept.layers)
        return Prefix(layers if in_memory else iter(layers), 0, cache.length[0], positions.shape[1], rotated)

    head = lm.prefill([[1, 5, 7]])
    at_once, single = (place(lm.spec, head, contexts(in_memory), gaps=gaps) for in_memory in (True, False))
    for got, expected in zip(at_once.to_cache().layers, single.to_cache().layers, strict=True):
        assert torch.equal(got.keys, expected.keys)
        assert torch.equal(got.values, expected.values)
        assert torch.equal(got.positions, expected.positions)
    assert torch.equal(at_once.next_positions, single.next_positions)
    assert len({layer.keys.untyped_storage().data_ptr() for layer in at_once.layers}) == 1
    assert len({layer.keys.untyped_storage().data_ptr() for layer in single.layers}) == len(single.layers)
    one, other = (lm.logits([[4, 9], [6]], placed, keep=1) for placed in (at_once, single))
    assert torch.equal(one, other)


def test_more_layers_are_turned_by_no_more_operators():
    spec = bare_spec(layers=8)

    def turns(layers: int) -> int:
        cut = replace(spec, layers=spec.layers[:layers])
        cache = replace(random_cache(replace(spec, layers=(spec.layers[1],) * layers), 9), rotated=False)
        held = tuple(replace(layer, positions=cache.layers[0].positions) for layer in cache.layers)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            place(cut, None, [[Prefix(held, 0, 9, 9, rotated=False)]])
        return sum(event.name == "aten::addcmul" for event in seen.events())

    assert turns(8) == turns(2) == 2
