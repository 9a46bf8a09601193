"""Fusers: what they change and what not, what crosses, what is refused, and how they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from conftest import ARCHITECTURES, byte_tokenizer, tiny_lm
from kvtalk import Budget, Link, Plan
from kvtalk.adapters import fusing
from kvtalk.adapters.fuser import Fuser, FuserGeometry, Shape, narrowed
from kvtalk.adapters.fusing import Own, Prompt, ReceiverSide, SharerSide
from kvtalk.adapters.store import Party, load_fuser, read_card, save_adapter
from kvtalk.adapters.translator import Geometry, Translator
from kvtalk.alignment.layers import layer_map
from kvtalk.alignment.tokens import NONE, align, tokenize
from kvtalk.errors import AdapterError, BudgetError, InputError, PacketError
from kvtalk.fusion import FusedReceiver, FusedSharer, Fusion
from kvtalk.models import LM
from kvtalk.packet import Packet
from kvtalk.placement import PlacedCache
from kvtalk.prompts import BARE

TEXT = "The ferry was built in 1931 by the Harlow yard; naïve people call it 北京 😀."
PROMPTS = [Prompt("Q: ", TEXT, " A:"), Prompt("", "Who sells the rye bread?")]
THEIRS = [Prompt("<user> ", prompt.shared) for prompt in PROMPTS]
MERGES = [("e", "r"), ("Ġ", "b"), ("t", "h"), ("Ġ", "th"), ("l", "l"), ("a", "r"), ("Ġth", "e")]


@cache
def other_lm() -> LM:
    """The sharer: a random model whose tokens are not the receiver's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["".join(merge) for merge in MERGES]
    unused = [letter for letter in alphabet if 256 < ord(letter) < 256 + 9][: len(words)]  # control characters
    letters = [letter for letter in alphabet if letter not in unused]
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<bos>", *letters, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>")
    return LM(tiny_lm("llama").model, fast, "sharer", BARE)


def geometry_of(sharer: LM, receiver: LM, **changes: object) -> FuserGeometry:
    shapes = [Shape.of(lm.spec) for lm in (sharer, receiver)]
    layers = layer_map(shapes[0].layers, shapes[1].layers, "terminal")
    small = {"hidden": 48, "middle": 32, "weighing": 16, **changes}
    return FuserGeometry(*shapes, layers, **small)  # type: ignore[arg-type]


def random_fuser(geometry: FuserGeometry, seed: int = 0) -> Fuser:
    """Never trained, but every weight matters; all gates open."""
    torch.manual_seed(seed)
    fuser = Fuser(geometry)
    with torch.no_grad():
        for name, parameter in fuser.named_parameters():
            if name != "gates":
                parameter.add_(0.2 * torch.randn_like(parameter))
    return fuser.eval()


class Pair:
    """A fuser between two models, joined by real packets."""

    def __init__(self, fuser: Fuser, sharer: LM, receiver: LM, folder: Path) -> None:
        parties = [Party(lm.name, lm.spec.fingerprint) for lm in (sharer, receiver)]
        card = save_adapter(fuser, *parties, folder, "fp32")
        self.sharer = FusedSharer(SharerSide(card, fuser.opened(), sharer, receiver.tokenizer))
        self.side = ReceiverSide(card, fuser, receiver, sharer.tokenizer)
        self.receiver = FusedReceiver(receiver, [self.side])

    def packets(self, plan: str = "fp32", prompts: Sequence[Prompt] = THEIRS) -> list[memoryview]:
        return self.sharer.encode_rows(prompts, self.sharer.read(*prompts), [Plan.parse(plan)] * len(prompts))

    def fuse(self, plan: str = "fp32", prompts: Sequence[Prompt] = PROMPTS) -> tuple[list[list[int]], PlacedCache]:
        theirs = [Prompt("<user> ", prompt.shared) for prompt in prompts]
        return self.receiver.fuse(prompts, [[self.receiver.unpack(0, blob) for blob in self.packets(plan, theirs)]])


def tensors(placed: PlacedCache) -> list[Tensor]:
    """Keys, values, keys, ... of every layer."""
    return [tensor for layer in placed.layers for tensor in (layer.keys, layer.values)]


def own_tensors(lm: LM) -> list[Tensor]:
    return [tensor for layer in Own(lm, PROMPTS).cache.layers for tensor in (layer.keys, layer.values)]


@pytest.fixture(scope="module")
def receiver() -> LM:
    return tiny_lm("gemma3")


@pytest.fixture(scope="module")
def joined(receiver: LM, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    fuser = random_fuser(geometry_of(other_lm(), receiver))
    return Pair(fuser, other_lm(), receiver, tmp_path_factory.mktemp("fuser"))


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_an_untrained_fuser_changes_nothing(name: str, tmp_path: Path) -> None:
    receiver = tiny_lm(name)
    fuser = Fuser(geometry_of(other_lm(), receiver, rope="after" if name == "qwen2" else "before"))
    last, placed = Pair(fuser, other_lm(), receiver, tmp_path).fuse()
    for got, expected in zip(tensors(placed), own_tensors(receiver), strict=True):
        assert torch.equal(got, expected)
    logits = receiver.logits(last, placed)[:, -1]
    for prompt, got in zip(PROMPTS, logits, strict=True):
        ids = receiver.encode(prompt.before) + receiver.encode(prompt.shared) + receiver.encode(prompt.after)
        expected = receiver.model(torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_trained_one_changes_tokens_of_the_text_and_no_others(joined: Pair, receiver: LM) -> None:
    _, placed = joined.fuse()
    assert len(other_lm().encode(TEXT)) < len(receiver.encode(TEXT))
    texts = [tokenize(lm.tokenizer, [prompt.shared for prompt in PROMPTS]) for lm in (other_lm(), receiver)]
    for got, own in zip(tensors(placed), own_tensors(receiver), strict=True):
        for row, (theirs, ours) in enumerate(zip(*texts, strict=True)):
            changed = (got[row] != own[row]).any(dim=(0, 2))
            begin = len(receiver.encode(PROMPTS[row].before))
            there = torch.zeros_like(changed)
            aligned = torch.from_numpy(align(theirs, ours)) != NONE
            there[begin : begin + len(ours.ids)] = aligned[: len(changed) - begin]
            there[len(receiver.encode("".join(vars(PROMPTS[row]).values()))) - 1 :] = False
            assert torch.equal(changed, there)


def test_prompts_together_are_fused_as_each_alone(joined: Pair) -> None:
    last, placed = joined.fuse()
    for row, prompt in enumerate(PROMPTS):
        alone_last, alone = joined.fuse(prompts=[prompt])
        assert alone_last == last[row : row + 1]
        for got, expected in zip(tensors(placed), tensors(alone), strict=True):
            torch.testing.assert_close(got[row : row + 1, :, : expected.shape[2]], expected, atol=1e-4, rtol=1e-4)


def test_closed_gates_change_nothing_and_cost_no_bytes(joined: Pair, receiver: LM, tmp_path: Path) -> None:
    fuser = random_fuser(joined.side.geometry)
    with torch.no_grad():
        fuser.gates[:4] = -0.1
        fuser.gates[5] = 0  # not above zero: closed
    closed = Pair(fuser, other_lm(), receiver, tmp_path)
    _, placed = closed.fuse()
    unchanged = [torch.equal(*pair) for pair in zip(tensors(placed), own_tensors(receiver), strict=True)]
    assert unchanged == [True, True, True, True, False, True, False, False]
    whole, fewer = (pair.packets(prompts=THEIRS[:1])[0] for pair in (joined, closed))
    kept = [layer.kept for layer in Packet.parse(fewer).layout.layers]
    assert kept[:2] == [0, 0]
    assert kept[2] == kept[3] > 0
    assert len(fewer) < 0.6 * len(whole)


def test_without_its_closed_slots_it_is_the_same(joined: Pair) -> None:
    fuser = random_fuser(joined.side.geometry)
    with torch.no_grad():
        fuser.gates[[0, 3, 6]] = -1
    opened = fuser.opened()
    assert opened.slots == (1, 2, 4, 5, 7)
    sharer, receiver = (torch.randn(8, 11, shape.width) for shape in (fuser.geometry.sharer, fuser.geometry.receiver))
    added = fuser(sharer, receiver)
    assert not added[[0, 3, 6]].any()
    which = list(opened.slots)
    torch.testing.assert_close(opened.eval()(sharer[which], receiver[which]), added[which], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_what_several_sharers_add_is_summed_over_the_clean_cache(joined: Pair, receiver: LM, tmp_path: Path) -> None:
    second = Pair(random_fuser(geometry_of(tiny_lm("qwen3"), receiver), 1), tiny_lm("qwen3"), receiver, tmp_path)
    received = [[pair.receiver.unpack(0, blob) for blob in pair.packets()] for pair in (joined, second)]
    both = FusedReceiver(receiver, [joined.side, second.side])
    turned = FusedReceiver(receiver, [second.side, joined.side])
    _, together = both.fuse(PROMPTS, received)
    received = [[pair.receiver.unpack(0, blob) for blob in pair.packets()] for pair in (second, joined)]
    _, reversed_ = turned.fuse(PROMPTS, received)
    alone = [tensors(pair.fuse()[1]) for pair in (joined, second)]
    every = zip(tensors(together), tensors(reversed_), own_tensors(receiver), *alone, strict=True)
    for got, other, own, first, last in every:
        torch.testing.assert_close(got, other, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got, first + last - own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("packing", "tolerance"), [(None, 0.005), ("nf4:1x64", 0.16), ("fp32", 0.0)])
def test_stored_weights_come_back(
    joined: Pair, receiver: LM, packing: str | None, tolerance: float, tmp_path: Path
) -> None:
    fuser = random_fuser(replace(joined.side.geometry, hidden=64, middle=64, weighing=64, projects=True, blocks=2))
    fuser.standardise(torch.randn(8, 30, 32) * 3 + 1, torch.randn(8, 30, 64) * 3 + 1)
    parties = [Party(lm.name, lm.spec.fingerprint) for lm in (other_lm(), receiver)]
    save_adapter(fuser, *parties, tmp_path, packing)
    card, folder = read_card(tmp_path, "fuser")
    assert card.geometry == fuser.geometry
    loaded = load_fuser(card, folder).state_dict()
    for name, expected in fuser.state_dict().items():
        assert (loaded[name] - expected).abs().max() <= tolerance * expected.abs().max(), name
    for name in ("gates", "sharer_mean", "receiver_scale", "shared.norm"):
        assert torch.equal(loaded[name], fuser.state_dict()[name])


def test_wrong_models_and_tokenizers_are_refused(joined: Pair, receiver: LM) -> None:
    card, fuser = joined.side.card, joined.side.fuser
    tokenizer = other_lm().tokenizer
    with pytest.raises(AdapterError, match="this adapter's sharer is sharer; .*kvtalk train fuser"):
        SharerSide(card, fuser, receiver, receiver.tokenizer)
    with pytest.raises(AdapterError, match="this adapter's receiver is gemma3"):
        ReceiverSide(card, fuser, tiny_lm("gemma3", 1), tokenizer)
    with pytest.raises(AdapterError, match="needs the tokenizer of sharer"):
        ReceiverSide(card, fuser, receiver, byte_tokenizer())
    with pytest.raises(AdapterError, match="needs the tokenizer of gemma3"):
        SharerSide(card, fuser, other_lm(), tokenizer)


def test_damaged_and_other_adapters_are_refused(joined: Pair, receiver: LM, tmp_path: Path) -> None:
    parties = [Party(lm.name, lm.spec.fingerprint) for lm in (other_lm(), receiver)]
    save_adapter(Fuser(joined.side.geometry), *parties, tmp_path / "fuser")
    values = [lm.spec.values_per_token for lm in (other_lm(), receiver)]
    translator = Translator(Geometry(values[0], 4, values[1], width=64, latent=64, decoder_blocks=1, bottleneck=8))
    save_adapter(translator, *parties, tmp_path / "translator")
    with pytest.raises(AdapterError, match="a fuser, no translator: give it by --fuser"):
        Link(other_lm(), receiver, adapter=tmp_path / "fuser")
    with pytest.raises(AdapterError, match="a translator, no fuser: give it by --adapter"):
        Fusion(receiver, [other_lm()], [tmp_path / "translator"])
    with pytest.raises(AdapterError, match="no fuser from sharer to gemma3 .* kvtalk train fuser"):
        Fusion(receiver, [other_lm()])
    with pytest.raises(AdapterError, match="give a sharer"):
        Fusion(receiver)
    with pytest.raises(AdapterError, match="1 fusers for 2 sharers"):
        Fusion(receiver, [other_lm(), other_lm()], [tmp_path / "fuser"])
    file = tmp_path / "fuser" / "fuser.safetensors"
    blob = bytearray(file.read_bytes())
    blob[len(blob) // 2] ^= 1
    file.write_bytes(blob)
    card, folder = read_card(tmp_path / "fuser", "fuser")
    with pytest.raises(AdapterError, match="fuser.safetensors: damaged"):
        load_fuser(card, folder)
    file.unlink()
    with pytest.raises(AdapterError, match="fuser.safetensors: missing"):
        load_fuser(card, folder)
    (tmp_path / "fuser" / "adapter.json").write_text("{}")
    with pytest.raises(AdapterError, match="not an adapter"):
        read_card(tmp_path / "fuser", "fuser")


def test_another_text_at_the_sharer_is_refused(joined: Pair) -> None:
    blob = joined.packets(prompts=[Prompt("", TEXT + " No.")])[0]
    with pytest.raises(InputError, match="give both the same text"):
        joined.receiver.fuse(PROMPTS[:1], [[joined.receiver.unpack(0, blob)]])
    with pytest.raises(InputError, match="empty"):
        joined.sharer.read(Prompt("Q: ", " "))


@pytest.mark.parametrize("policy", ["value_norm", "front", "random"])
def test_a_token_policy_changes_only_the_tokens_that_it_sends(joined: Pair, receiver: LM, policy: str) -> None:
    prompt, whole = PROMPTS[:1], joined.packets(prompts=THEIRS[:1])[0]
    blob = joined.packets(f"fp32 {policy}@50%", THEIRS[:1])[0]
    assert len(blob) < 0.6 * len(whole)
    _, placed = joined.receiver.fuse(prompt, [[joined.receiver.unpack(0, blob)]])
    theirs, ours = (tokenize(lm.tokenizer, [TEXT])[0] for lm in (other_lm(), receiver))
    index, begin = torch.from_numpy(align(theirs, ours)), len(receiver.encode(prompt[0].before))
    packed = list(Packet.parse(blob).layers())
    own = [tensor[:1, :, : placed.columns] for tensor in own_tensors(receiver)]
    for slot, (got, before) in enumerate(zip(tensors(placed), own, strict=True)):
        sent = packed[joined.side.geometry.layers[slot // 2]].positions[0]
        changed = (got[0] != before[0]).any(dim=(0, 2))[begin : begin + len(index)]
        assert torch.equal(changed, torch.isin(index, sent))
        assert 0 < changed.sum() < len(changed)


@pytest.mark.parametrize("plan", ["int8 layers=first:2", "int8 width=8"])
def test_plans_that_a_fuser_has_no_use_for_are_refused(joined: Pair, plan: str) -> None:
    with pytest.raises(AdapterError, match="a fuser chooses the layers itself"):
        joined.sharer.plan(joined.sharer.read(THEIRS[0]), None, Plan.parse(plan))


@pytest.mark.parametrize("rope", ["before", "after"])
def test_budgets_are_kept(receiver: LM, rope: str, tmp_path: Path) -> None:
    pair = Pair(random_fuser(geometry_of(other_lm(), receiver, rope=rope)), other_lm(), receiver, tmp_path)
    read = pair.sharer.read(THEIRS[0])
    sizes = []
    for budget in ("40KB", "25%", "4bits", "2800"):
        plan = pair.sharer.plan(read, budget, None)
        blob = pair.sharer.encode_rows(THEIRS[:1], read, [plan])[0]
        assert plan.rope == rope
        assert len(blob) <= Budget.parse(budget).bytes_for(read.length[0], other_lm().spec)
        pair.receiver.fuse(PROMPTS[:1], [[pair.receiver.unpack(0, blob)]])
        sizes.append(len(blob))
    assert sizes == sorted(sizes, reverse=True)
    thinned = pair.sharer.plan(read, "25%", Plan.parse("bf16 front@90%"))
    assert (thinned.keys, thinned.tokens) == ("bf16", "front")
    assert len(pair.sharer.encode_rows(THEIRS[:1], read, [thinned])[0]) <= Budget.parse("25%").bytes_for(
        read.length[0], other_lm().spec
    )
    with pytest.raises(BudgetError, match="too small"):
        pair.sharer.plan(read, "100", None)


def test_corrupted_and_foreign_packets_are_refused(joined: Pair, receiver: LM) -> None:
    blob = bytes(joined.packets("int4", THEIRS[:1])[0])
    for place in (0, 9, 300, len(blob) // 2, len(blob) - 1):
        broken = bytearray(blob)
        broken[place] ^= 0x40
        with pytest.raises(PacketError):
            joined.receiver.fuse(PROMPTS[:1], [[joined.receiver.unpack(0, memoryview(broken))]])
    for wrong in (blob[:-1], blob + b"x", b""):
        with pytest.raises(PacketError):
            joined.receiver.fuse(PROMPTS[:1], [[joined.receiver.unpack(0, memoryview(wrong))]])
    foreign = Link(receiver, receiver).sharer.share(TEXT).blob
    with pytest.raises(PacketError, match="made by another model"):
        joined.receiver.unpack(0, foreign)


@torch.no_grad()
def test_asking_in_one_process(joined: Pair, receiver: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {lm.name: lm.tokenizer for lm in (other_lm(), receiver)}
    monkeypatch.setattr(fusing, "tokenizer_of", names.__getitem__)
    fuser = Fuser(joined.side.geometry)
    save_adapter(fuser, *(Party(lm.name, lm.spec.fingerprint) for lm in (other_lm(), receiver)), tmp_path)
    fusion = Fusion(receiver, [other_lm()], [tmp_path])
    made = fusion.ask("Who built the ferry?", TEXT, budget="4bits", max_new_tokens=6)
    shared = f"{TEXT}\nWho built the ferry?"
    ids = receiver.encode(f"\nQuestion: {shared}\nAnswer:")
    assert made.text == receiver.generate([ids], max_new_tokens=6)[0].text
    assert made.cost.context_tokens == len(other_lm().encode(fusing.prompt_of(BARE, shared).shared))
    assert 0 < made.cost.bits_per_value <= 4
    with pytest.raises(InputError, match="empty"):
        fusion.ask(" ")


@pytest.mark.parametrize("trained", [False, True])
def test_turns_are_fused_one_after_the_other(
    receiver: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: bool
) -> None:
    names = {"sharer": other_lm().tokenizer, receiver.name: receiver.tokenizer}
    monkeypatch.setattr(fusing, "tokenizer_of", names.__getitem__)
    geometry = geometry_of(other_lm(), receiver)
    fuser = random_fuser(geometry) if trained else Fuser(geometry)
    save_adapter(fuser, *(Party(lm.name, lm.spec.fingerprint) for lm in (other_lm(), receiver)), tmp_path, "fp32")
    fusion = Fusion(receiver, [other_lm()], [tmp_path])
    talk = fusion.conversation()
    first = talk.ask("Who built the ferry in 1931?", max_new_tokens=6)
    assert first.text == fusion.ask("Who built the ferry in 1931?", max_new_tokens=6).text
    held = talk.turns.ours.placed.to_cache()
    before = [(layer.keys.clone(), layer.values.clone()) for layer in held.layers]
    read = talk.turns.theirs[0].tokens
    second = talk.ask("And when?", max_new_tokens=6)
    assert second.cost.bytes < first.cost.bytes
    assert second.cost.context_tokens == len(other_lm().encode(" And when?"))
    assert talk.turns.theirs[0].tokens > read
    now = talk.turns.ours.placed.to_cache()
    for (keys, values), layer in zip(before, now.layers, strict=True):
        assert torch.equal(keys, layer.keys[:, :, : keys.shape[2]])
        assert torch.equal(values, layer.values[:, :, : keys.shape[2]])
        assert torch.equal(layer.positions[0], torch.arange(layer.tokens))
    ids = receiver.encode("\nQuestion: Who built the ferry in 1931?\nAnswer:") + list(first.generation.ids)
    end = "" if receiver.tokenizer.decode(first.generation.ids[-1:]).endswith("\n") else "\n"
    whole = [ids + receiver.encode(f"{end}Question: And when?\nAnswer:")]
    alone = receiver.generate(whole, max_new_tokens=6)[0]
    if not trained:
        assert second.generation.ids == alone.ids
        return
    own, fused = receiver.read_whole(whole)[0].layers[0].keys, now.layers[0].keys  # of a first layer, so of the token
    changed = [not torch.allclose(own[:, :, at], fused[:, :, at], atol=1e-4) for at in range(len(whole[0]))]
    turn = len(receiver.encode(f"{end}Question:"))
    text = range(len(ids) + turn, len(ids) + turn + len(receiver.encode(" And when?")))
    assert all(changed[at] for at in text)
    assert not any(changed[at] for at in range(len(ids), len(changed)) if at not in text)
    with pytest.raises(InputError, match="empty"):
        talk.ask(" ")


@pytest.mark.parametrize(
    "changes",
    [{"gated": False}, {"weighted": False}, {"projects": True}, {"residual": False}, {"blocks": 0}],
    ids=lambda changes: next(iter(changes)),
)
def test_parts_can_be_left_out(receiver: LM, changes: dict[str, bool]) -> None:
    fuser = random_fuser(geometry_of(other_lm(), receiver, **changes))
    sharer, own = torch.randn(8, 5, 32), torch.randn(8, 5, 64)
    added = fuser(sharer, own)
    assert added.shape == own.shape
    if changes.get("residual") is False:  # nothing of the receiver's own is left but through the projection
        shifted = fuser(sharer, own + 1e-4)
        assert (added + own - shifted - own - 1e-4).abs().max() < 1e-2
    assert fuser.opened().slots == tuple(range(8))


def test_gates_are_drawn_while_training_and_switches_after(receiver: LM) -> None:
    fuser = random_fuser(geometry_of(other_lm(), receiver))
    sharer, own = torch.randn(8, 4000, 32), torch.randn(8, 4000, 64)
    whole = fuser(sharer, own)
    with torch.no_grad():
        fuser.gates.copy_(torch.tensor([0.0, 1.0, -1.0, 0, 0, 0, 0, 0]))
    fuser.train()
    fuser.temperature = 1e-3
    drawn = fuser(sharer, own) / whole
    assert torch.equal(drawn[..., :32].amax(dim=2) > 0.5, drawn[..., :32].amin(dim=2) > 0.5)  # of each head one gate
    shares = (drawn > 0.5).float().mean(dim=(1, 2))
    torch.testing.assert_close(shares[:3], torch.tensor([0.0, 1.0, -1.0]).sigmoid(), atol=0.03, rtol=0)
    fuser.temperature = 0
    added = fuser(sharer[:, :9], own[:, :9])
    added.square().sum().backward()
    assert fuser.gates.grad is not None
    assert float(fuser.gates.grad[1]) != 0
    assert torch.equal(added.detach(), fuser.eval()(sharer[:, :9], own[:, :9]))
    assert fuser.is_open.tolist() == [False, True] + [False] * 6


def test_examples_standardise(receiver: LM) -> None:
    fuser = Fuser(geometry_of(other_lm(), receiver))
    sharer, own = 5 * torch.randn(8, 400, 32) + 2, 0.1 * torch.randn(8, 400, 64) - 3
    fuser.standardise(sharer, own)
    standard = (own - fuser.receiver_mean) / fuser.receiver_scale
    assert standard.mean(dim=1).abs().max() < 1e-3
    torch.testing.assert_close(standard.std(dim=1), torch.ones(8, 64))
    assert not fuser(sharer, own).any()


def test_the_widest_network_within_a_number_of_parameters() -> None:
    geometry = FuserGeometry(Shape(30, 3, 64), Shape(18, 1, 256), layer_map(30, 18, "terminal"))

    def parameters(size: FuserGeometry) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in Fuser(size).parameters())

    found = narrowed(geometry, 25_000_000)
    assert parameters(found) <= 25_000_000
    assert parameters(replace(found, hidden=found.hidden + 64, middle=found.middle + 64)) > 25_000_000
    assert narrowed(geometry, 1).hidden == 64
