"""The whole way on a tiny model: what crosses is the cache, all of it and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from conftest import tiny_lm
from kvtalk import Budget, Link, Plan
from kvtalk.errors import BudgetError, InputError, PacketError
from kvtalk.link import Receiver, Sharer
from kvtalk.models import LM
from kvtalk.packet import Packet, read_stream, to_cache
from kvtalk.packet_writing import encode
from kvtalk.prompts import EXAMPLES
from kvtalk.transport import file, http

CONTEXT = "The harbour master of Ostrevik was called Berthe, and she kept eels in the old mill."
QUESTION = "Who was the harbour master?"


def with_examples(name: str) -> LM:
    lm = tiny_lm(name)
    return LM(lm.model, lm.tokenizer, name, type(EXAMPLES)("Read. Text: ", "\nQ: ", "\nA:"))


def test_answer_from_a_16_bit_packet_is_the_answer_from_the_text() -> None:
    lm = with_examples("llama")
    link = Link(lm, lm)
    answer = link.ask(CONTEXT, QUESTION, plan=Plan("fp16", "fp16"), max_new_tokens=12)
    text = link.receiver.answer_text(CONTEXT, QUESTION, max_new_tokens=12)
    assert answer.generation.ids == text.generation.ids
    assert answer.generation.ids != link.receiver.answer_text(None, QUESTION, max_new_tokens=12).generation.ids


def test_costs_are_those_of_the_packet() -> None:
    lm = with_examples("gemma3")
    link = Link(lm, lm)
    answer = link.ask(CONTEXT, QUESTION, budget="30%", max_new_tokens=4)
    shared = link.sharer.share(CONTEXT, budget="30%")
    assert answer.cost.bytes == len(shared.blob)
    assert answer.cost.context_tokens == len(CONTEXT)
    full = len(CONTEXT) * lm.spec.bytes_per_token
    assert answer.cost.bytes <= 0.3 * full
    assert answer.cost.bits_per_value == pytest.approx(16 * answer.cost.bytes / full)
    phases = [getattr(answer.cost, name) for name in ("prefill", "encode", "decode", "place", "first_token", "rest")]
    assert all(seconds > 0 for seconds in phases)


def test_the_receivers_prompt_does_not_hold_the_context() -> None:
    """Changing what is in the packet changes the answers; the text plays no part."""
    lm = with_examples("llama")
    link = Link(lm, lm)
    shared = link.sharer.share(CONTEXT, plan=Plan("fp16", "fp16"))
    prompt = lm.tokenizer.decode(lm.head_ids() + link.receiver.prompt(QUESTION))
    assert not any(word in prompt for word in ("Ostrevik", "Berthe", "eels"))
    right = link.receiver.answer(shared.blob, QUESTION, max_new_tokens=12).generation.ids
    cache = to_cache([Packet.parse(shared.blob)], lm.spec)
    for layer in cache.layers:
        layer.keys.mul_(-1)
        layer.values.mul_(-1)
    corrupted = encode(cache, Plan("fp16", "fp16"), lm.spec, link.sharer.start)
    assert link.receiver.answer(corrupted, QUESTION, max_new_tokens=12).generation.ids != right
    other = link.sharer.share("Nobody lives in this town any more, says the letter.", plan=Plan("fp16", "fp16"))
    assert link.receiver.answer(other.blob, QUESTION, max_new_tokens=12).generation.ids != right


def test_the_sharers_half_needs_nothing_of_the_receiver() -> None:
    shared = Sharer(with_examples("llama")).share(CONTEXT, budget="200%")
    answer = Receiver(with_examples("llama")).answer(shared.blob, QUESTION, max_new_tokens=4)
    assert len(answer.generation.ids) == 4


def test_another_model_is_refused_with_what_to_do() -> None:
    shared = Sharer(with_examples("llama")).share(CONTEXT)
    with pytest.raises(PacketError, match="made by another model.*load the model that made it"):
        Receiver(with_examples("qwen2")).answer(shared.blob, QUESTION)


def test_a_receiver_with_another_head_moves_the_cache() -> None:
    shared = Sharer(with_examples("llama")).share(CONTEXT)
    lm = with_examples("llama")
    lm.prompt = type(lm.prompt)("A much longer head than that of the sharer. Text: ", "\nQ: ", "\nA:")
    receiver = Receiver(lm)
    placed = lm.place([[receiver.prefix(shared.blob)]])
    positions = placed.to_cache().layers[0].positions[0]
    assert positions.tolist() == list(range(len(lm.head_ids()) + len(CONTEXT)))


@pytest.mark.parametrize("gaps", [True, False])
def test_dropped_tokens_leave_gaps_or_not(gaps: bool) -> None:
    lm = with_examples("llama")
    shared = Sharer(lm).share(CONTEXT, plan=Plan("fp16", "fp16", tokens="random", keep=10))
    placed = lm.place([[Receiver(lm).prefix(shared.blob)]], gaps=gaps)
    head = len(lm.head_ids())
    positions = placed.to_cache().layers[0].positions[0].tolist()
    assert len(positions) == head + 10
    assert int(placed.next_positions) == head + (len(CONTEXT) if gaps else 10)
    assert (positions == list(range(head + 10))) is not gaps


def test_closing_the_gaps_turns_the_keys() -> None:
    """Keys packed before RoPE and keys packed after it land alike."""
    lm = with_examples("llama")
    plans = [Plan("fp16", "fp16", rope, "random", 10) for rope in ("before", "after")]
    placed = [
        lm.place([[Receiver(lm).prefix(Sharer(lm).share(CONTEXT, plan=plan).blob)]], gaps=False) for plan in plans
    ]
    for one, other in zip(*(cache.to_cache().layers for cache in placed), strict=True):
        assert torch.allclose(one.keys, other.keys, atol=0.02, rtol=2e-3)


@pytest.mark.parametrize("parts", [1, 4])
def test_across_a_file_and_across_http(tmp_path: Path, parts: int) -> None:
    import functools
    import threading
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    lm = with_examples("gemma3")
    with file.saving(tmp_path / "a.kvt") as target:
        Sharer(lm).write(target, CONTEXT, budget="40%", parts=parts)
    expected = Receiver(lm).answer(file.load(tmp_path / "a.kvt"), QUESTION, max_new_tokens=8)
    assert expected.cost.bytes <= 0.4 * len(CONTEXT) * lm.spec.bytes_per_token

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/a.kvt"
    try:
        got = Receiver(lm).answer(http.fetch(address), QUESTION, max_new_tokens=8)
        with pytest.raises(InputError, match="at most 100"):
            http.fetch(address, max_bytes=100)
        with pytest.raises(InputError, match="cannot fetch"):
            http.fetch(address + "x")
    finally:
        server.shutdown()
    assert got.generation.ids == expected.generation.ids


def test_addresses_that_are_no_http_are_refused() -> None:
    with pytest.raises(InputError, match="only http"):
        http.fetch("file:///etc/hostname")


def test_bad_contexts_questions_and_budgets() -> None:
    lm = with_examples("llama")
    link = Link(lm, lm)
    with pytest.raises(InputError, match="context is empty"):
        link.ask(" \n", QUESTION)
    with pytest.raises(InputError, match="question is empty"):
        link.ask(CONTEXT, "  ")
    with pytest.raises(InputError, match="reads at most 2048"):
        link.ask("x" * 2100, QUESTION)
    with pytest.raises(BudgetError, match="smallest possible packet of this context takes"):
        link.ask(CONTEXT, QUESTION, budget="900")
    with pytest.raises(BudgetError, match="is not a size"):
        link.ask(CONTEXT, QUESTION, budget="a lot")
    with pytest.raises(BudgetError, match="keep fewer tokens"):
        link.ask(CONTEXT, QUESTION, budget=Budget.parse("2KB"), plan=Plan(keep=0.9))


def test_a_codec_given_with_a_budget_is_kept_and_thinned() -> None:
    lm = with_examples("llama")
    shared = Sharer(lm).share(CONTEXT, budget="20%", plan=Plan.parse("int8:token"))
    assert shared.plan.keys == "int8:1x*"
    assert isinstance(shared.plan.keep, int)
    assert shared.cost.bytes <= 0.2 * len(CONTEXT) * lm.spec.bytes_per_token


def test_an_interrupted_or_failed_write_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "a.kvt"
    target.write_bytes(b"before")
    for failure in (KeyboardInterrupt(), OSError(28, os.strerror(28)), RuntimeError("bug")):
        expected = InputError if isinstance(failure, OSError) else type(failure)
        with pytest.raises(expected) as caught, file.saving(target) as stream:
            stream.write(b"half")
            raise failure
        if isinstance(failure, OSError):
            assert "No space left on device; nothing was left behind" in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["a.kvt"]
        assert target.read_bytes() == b"before"


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        file.load(tmp_path / "absent.kvt")
    with pytest.raises(InputError, match="cannot write"), file.saving(tmp_path / "absent" / "a.kvt"):
        pass
    (tmp_path / "big").write_bytes(bytes(100))
    with pytest.raises(InputError, match="at most 10 are read"):
        file.load(tmp_path / "big", max_bytes=10)
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(PacketError, match="truncated"):
        list(read_stream(file.load(tmp_path / "empty")))
