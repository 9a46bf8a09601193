"""Fusers: what they change and what not, what crosses, what is refused, and how they are stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedTokenizerFast

from conftest import ARCHITECTURES, byte_tokenizer, tiny_lm
from kvtalk import Budget, Link, Plan
from kvtalk.adapters import cards, fusing, weights
from kvtalk.adapters.cards import CARD, Party, read_card
from kvtalk.adapters.enriched import Addition, Own, enrich
from kvtalk.adapters.fuser import Fuser, FuserGeometry, Shape, narrowed
from kvtalk.adapters.fusing import ReceiverSide, SharerSide
from kvtalk.adapters.pairs import Pairs, paired
from kvtalk.adapters.slots import Slots, own_vectors
from kvtalk.adapters.store import save_adapter
from kvtalk.adapters.translator import Geometry, Translator
from kvtalk.adapters.weights import load_decoder, load_encoder, load_fuser, open_slots
from kvtalk.alignment.layers import layer_map
from kvtalk.alignment.readings import readings
from kvtalk.cache import PADDING, Prefix
from kvtalk.device import sent_together
from kvtalk.errors import AdapterError, AlignmentError, BudgetError, InputError, PacketError
from kvtalk.fusion import FusedReceiver, FusedSharer, Fusion
from kvtalk.link import Receiver
from kvtalk.models import LM
from kvtalk.packet import Packet
from kvtalk.packet_writing import predict
from kvtalk.placed import PlacedCache
from kvtalk.prompts import BARE
from kvtalk.shared_prompts import Prompt, prompt_of

TEXT = "The ferry was built in 1931 by the Harlow yard; naïve people call it 北京 😀."
PROMPTS = [
    Prompt("Q: ", TEXT, " A:"),
    Prompt("", "Who sells the rye bread?"),
    Prompt("Say it: ", "naïve 北京 😀 of the old yard", "\nAnswer:"),
]
AFTER = {PROMPTS[0].shared: "<end> \nThe other: ", PROMPTS[1].shared: "\nReply:", PROMPTS[2].shared: " the"}
"""What the sharer reads after each text: of more tokens than the receiver, where that reads nothing, and of fewer."""
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


def at_sharer(prompt: Prompt) -> Prompt:
    """The same text in the sharer's words."""
    return Prompt("<user> ", prompt.shared, AFTER[prompt.shared])


THEIRS = [at_sharer(prompt) for prompt in PROMPTS]


def tokens_of(lm: LM, prompt: Prompt) -> list[list[int]]:
    """Before the text, of it, and after it."""
    return [lm.encode(part) for part in (prompt.before, prompt.shared, prompt.after)]


def all_of(lm: LM, prompt: Prompt) -> list[int]:
    return [token for part in tokens_of(lm, prompt) for token in part]


def partners(theirs: Prompt, ours: Prompt, *, roles: bool = True, last: bool = True) -> Tensor:
    """Which sharer token, counted from the text's first one on, each token of the receiver's prompt is given; −1: none.

    A token of the receiver's is a byte; in the text it is given the token that holds this byte.
    """
    _, text, end = tokens_of(other_lm(), theirs)
    pieces = other_lm().tokenizer.convert_ids_to_tokens(text)
    holder = [number for number, piece in enumerate(pieces) for _ in piece]  # a letter of a piece is a byte
    assert len(holder) == len(ours.shared.encode())
    given = [-1] * len(ours.before.encode()) + holder + [-1] * len(ours.after.encode())
    for back in range(1, 1 + min(len(end), len(ours.after.encode())) * roles):
        given[-back] = len(text) + len(end) - back
    if not last:
        given[-1] = -1
    return torch.tensor(given)


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


def _fails(*_: object, **__: object) -> None:
    raise RuntimeError("broken")


class Pair:
    """A fuser between two models, joined by real packets."""

    def __init__(self, fuser: Fuser, sharer: LM, receiver: LM, folder: Path) -> None:
        parties = [Party(lm.name, lm.spec.fingerprint) for lm in (sharer, receiver)]
        card, self.fuser = save_adapter(fuser, *parties, folder, "fp32"), fuser
        self.sharer = FusedSharer(SharerSide(card, fuser.opened().slots, sharer, receiver.tokenizer))
        self.side = ReceiverSide(card, fuser, receiver, sharer.tokenizer)
        self.receiver = FusedReceiver(receiver, [self.side])

    def packets(self, plan: str = "fp32", prompts: Sequence[Prompt] = THEIRS) -> list[memoryview]:
        return self.sharer.encode_rows(prompts, self.sharer.read(*prompts), [Plan.parse(plan)] * len(prompts))

    def fuse(self, plan: str = "fp32", prompts: Sequence[Prompt] = PROMPTS) -> tuple[list[list[int]], PlacedCache]:
        return self.receiver.fuse(prompts, [self.received(plan, prompts)])

    def received(self, plan: str = "fp32", prompts: Sequence[Prompt] = PROMPTS) -> list[Prefix]:
        return [self.receiver.unpack(0, blob) for blob in self.packets(plan, [at_sharer(prompt) for prompt in prompts])]


def without_padding(tensor: Tensor, lengths: Tensor) -> Tensor:
    """Keys or values with zeros beyond each row's length."""
    beyond = torch.arange(tensor.shape[2]) >= lengths[:, None]
    return tensor.masked_fill(beyond[:, None, :, None], 0)


def tensors(placed: PlacedCache) -> list[Tensor]:
    """Keys, values, keys, ... of every layer: of every token of the prompts, the awaited one at its place.

    Of every token but the last where nothing awaits it.
    """
    ends = placed.next_positions
    rows = range(len(ends))
    found = []
    for layer in placed.layers:
        if layer.awaited is None:
            found += [without_padding(tensor, ends) for tensor in (layer.keys, layer.values)]
            continue
        for tensor, awaited in zip((layer.keys, layer.values), layer.awaited, strict=True):
            whole = torch.cat([tensor, torch.full_like(tensor[:, :, :1], torch.nan)], dim=2)
            assert awaited.shape == whole[:, :, 0].shape
            for row in rows:
                whole[row, :, ends[row]] = awaited[row]
            found.append(without_padding(whole, ends + 1))
    return found


def own_tensors(lm: LM, last: bool = True) -> list[Tensor]:
    """The same of the receiver's own cache, with or without the last tokens."""
    own = Own(lm, PROMPTS).cache
    lengths = torch.tensor([length - (not last) for length in own.length])
    both = [tensor[:, :, : lengths.max()] for layer in own.layers for tensor in (layer.keys, layer.values)]
    return [without_padding(tensor, lengths) for tensor in both]


@pytest.fixture(scope="module")
def receiver() -> LM:
    return tiny_lm("gemma3")


@pytest.fixture(scope="module")
def joined(receiver: LM, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    fuser = random_fuser(geometry_of(other_lm(), receiver))
    return Pair(fuser, other_lm(), receiver, tmp_path_factory.mktemp("fuser"))


@pytest.mark.parametrize("parts", [{}, {"residual": False}, {"projects": True}, {"weighted": False, "gated": False}])
@torch.no_grad()
def test_a_folded_fuser_adds_what_it_added(receiver: LM, parts: dict[str, bool]) -> None:
    fuser = random_fuser(geometry_of(other_lm(), receiver, **parts))
    geometry, tokens = fuser.geometry, 7
    fuser.standardise(
        *(3 + 2 * torch.randn(geometry.slots, 40, shape.width) for shape in (geometry.sharer, geometry.receiver))
    )
    read = [torch.randn(geometry.slots, tokens, shape.width) for shape in (geometry.sharer, geometry.receiver)]
    added = fuser(*read)
    folded = fuser.opened().fold()
    torch.testing.assert_close(folded(*read), added, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(folded.fold()(*read), folded(*read), atol=0, rtol=0)  # a second time nothing happens
    both = [
        part(*(one[rows] for one in read))
        for part, rows in zip(folded.split(3), torch.arange(geometry.slots).split(3), strict=True)
    ]
    torch.testing.assert_close(torch.cat(both), added, atol=1e-4, rtol=1e-4)
    assert torch.equal(fuser(*read), added)  # the one that it was made from stays


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


@pytest.mark.parametrize("last", [True, False], ids=["last", "but the last"])
@pytest.mark.parametrize("roles", [True, False], ids=["roles", "text alone"])
def test_a_trained_one_changes_tokens_of_the_text_and_no_others(
    receiver: LM, roles: bool, last: bool, tmp_path: Path
) -> None:
    """But for those after it, which are given the sharer's from the last one on."""
    fuser = random_fuser(geometry_of(other_lm(), receiver, roles=roles, last=last))
    pair = Pair(fuser, other_lm(), receiver, tmp_path)
    counts = [[len(lm.encode(one.after)) for one in side] for lm, side in ((other_lm(), THEIRS), (receiver, PROMPTS))]
    assert counts[0][0] > counts[1][0] > 0 == counts[1][1] < counts[0][1] < counts[1][2] > counts[0][2] > 0
    assert len(other_lm().encode(TEXT)) < len(receiver.encode(TEXT))
    for blob, prompt in zip(pair.packets(), THEIRS, strict=True):
        _, text, after = tokens_of(other_lm(), prompt)
        read = len(text) + len(after) * roles
        packet = Packet.parse(blob)
        assert packet.manifest.end == read
        for layer in packet.layers():
            assert torch.equal(layer.positions[0], torch.arange(read))
    _, placed = pair.fuse()
    assert [layer.awaited is not None for layer in placed.layers] == [last] * len(placed.layers)
    given = [partners(*both, roles=roles, last=last) for both in zip(THEIRS, PROMPTS, strict=True)]
    if not last:
        given = [one[:-1] for one in given]
    for got, own in zip(tensors(placed), own_tensors(receiver, last), strict=True):
        assert got.shape[2] == max(map(len, given))
        for row, expected in enumerate(given):
            changed = (got[row] != own[row]).any(dim=(0, 2))
            assert torch.equal(changed[: len(expected)], expected != -1)
            assert not changed[len(expected) :].any()


@pytest.mark.parametrize("last", [True, False], ids=["last", "but the last"])
@pytest.mark.parametrize("roles", [True, False], ids=["roles", "text alone"])
@torch.no_grad()
def test_every_token_is_given_its_partner(receiver: LM, roles: bool, last: bool, tmp_path: Path) -> None:
    """What is added is computed again, of the sharer's own cache."""
    sharer = other_lm()
    fuser = random_fuser(geometry_of(sharer, receiver, roles=roles, last=last, rope="after"))
    _, placed = Pair(fuser, sharer, receiver, tmp_path).fuse()
    layers = fuser.geometry.layers
    for row, (theirs, ours) in enumerate(zip(THEIRS, PROMPTS, strict=True)):
        given = partners(theirs, ours, roles=roles, last=last)
        which = (given != -1).nonzero()[:, 0]
        begin = len(sharer.encode(theirs.before))
        lent = sharer.read_whole([all_of(sharer, theirs)])[0].layers
        own = receiver.read_whole([all_of(receiver, ours)])[0].layers

        def flat(tensor: Tensor, columns: Tensor) -> Tensor:
            return tensor[0].transpose(0, 1).flatten(1)[columns]

        slots = [(layer, kind) for layer in range(len(layers)) for kind in ("keys", "values")]
        added = fuser(
            torch.stack([flat(getattr(lent[layers[at]], kind), given[which] + begin) for at, kind in slots]),
            torch.stack([flat(getattr(own[at], kind), which) for at, kind in slots]),
        )
        for got, (at, kind), one in zip(tensors(placed), slots, added, strict=True):
            expected = getattr(own[at], kind)[0].clone()
            expected[:, which] += one.unflatten(1, (len(expected), -1)).transpose(0, 1)
            read = len(given) - (not last)
            torch.testing.assert_close(got[row, :, :read], expected[:, :read], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("plan", ["fp32", "fp32 front@60%"])
@torch.no_grad()
def test_the_mean_is_of_all_tokens_that_overlap_and_were_sent(plan: str, tmp_path: Path) -> None:
    """What is added is computed again, of the sharer's own cache; a token of the sharer's is a byte."""
    sharer, receiver = tiny_lm("gemma3"), other_lm()
    fuser = random_fuser(geometry_of(sharer, receiver, rope="after", alignment="mean"))
    pair = Pair(fuser, sharer, receiver, tmp_path)
    ours = Prompt("Q: ", TEXT, " A:")
    theirs = Prompt("<user> ", TEXT, "\nReply:")
    read = pair.sharer.read(theirs)
    blob = pair.sharer.encode_rows([theirs], read, [Plan.parse(plan)])[0]
    own = Own(receiver, [ours])
    (addition,) = pair.side.additions(own, [ours], [pair.receiver.unpack(0, blob)])
    packed = list(Packet.parse(blob).layers())
    _, shared, after = tokens_of(sharer, theirs)
    assert packed[0].layout.span == len(shared) + len(after)
    begin, end = len(receiver.encode(ours.before)), len(receiver.encode(ours.after))
    pieces = receiver.tokenizer.convert_ids_to_tokens(receiver.encode(TEXT))
    edges = [0, *accumulate(map(len, pieces))]  # a letter of a piece is a byte
    characters = [at for at, letter in enumerate(TEXT) for _ in letter.encode()]
    whole = [
        [at for at, letter in enumerate(characters) if letter in characters[first:stop]]
        for first, stop in pairwise(edges)
    ]  # every byte of a character covers it
    tokens = {begin + at: some for at, some in enumerate(whole)}
    tokens |= {begin + len(whole) + end - back: [len(shared) + len(after) - back] for back in range(1, end + 1)}
    lent = sharer.read_whole([all_of(sharer, theirs)])[0].layers
    held = receiver.read_whole([all_of(receiver, ours)])[0].layers
    start = len(sharer.encode(theirs.before))
    sent = [set(layer.positions[0].tolist()) for layer in packed]
    given = {at: [one for one in some if one in sent[0]] for at, some in tokens.items()}
    given = {at: some for at, some in given.items() if some}
    assert max(map(len, given.values())) > 3
    assert (len(given) < len(tokens)) == ("front" in plan)
    assert addition.pairs.ours.tolist() == sorted(given)
    means, mine = [], []
    for slot in addition.slots[:, 0].tolist():
        kind = ("keys", "values")[slot % 2]
        source, target = (
            getattr(some[at], kind)[0].transpose(0, 1).flatten(1)
            for some, at in ((lent, fuser.geometry.layers[slot // 2]), (held, slot // 2))
        )
        means.append(torch.stack([source[[start + one for one in given[at]]].mean(0) for at in sorted(given)]))
        mine.append(target[sorted(given)])
    expected = fuser(torch.stack(means), torch.stack(mine))
    torch.testing.assert_close(addition.added, expected, atol=1e-4, rtol=1e-4)


def test_words_after_the_text_have_no_partners_where_only_it_crosses(receiver: LM) -> None:
    """Training knows the sharer's whole prompt, so it is not for the packet to say so."""
    theirs, ours = (readings(lm.tokenizer, side) for lm, side in ((other_lm(), THEIRS), (receiver, PROMPTS)))
    counts = [len(one.ids) - one.begin for one in theirs]
    for roles in (True, False):
        geometry = geometry_of(other_lm(), receiver, roles=roles)
        pairs = paired([one.shared for one in theirs], counts, ours, geometry)
        for row, both in enumerate(zip(THEIRS, PROMPTS, strict=True)):
            given = partners(*both, roles=roles)
            here = pairs.at(pairs.rows == row)
            assert torch.equal(here.ours, (given != -1).nonzero()[:, 0])
            assert torch.equal(here.theirs, given[given != -1])


class Swapped(DynamicCache):  # type: ignore[misc]
    """The model's native cache of a prompt but for its last token, whose keys and values are given."""

    def __init__(self, held: Sequence[Tensor], times: int = 1) -> None:
        """``held``: keys, values, keys, ... of every token of one row."""
        super().__init__()
        self.coming: dict[int, tuple[Tensor, Tensor]] = {}
        rows = [tensor.expand(times, *tensor.shape[1:]) for tensor in held]
        for layer, (keys, values) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
            self.update(keys[:, :, :-1].clone(), values[:, :, :-1].clone(), layer)
        self.coming = dict(enumerate((k[:, :, -1:], v[:, :, -1:]) for k, v in zip(rows[::2], rows[1::2], strict=True)))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple:
        if layer_idx in self.coming:
            keys, values = self.coming.pop(layer_idx)
            key_states = torch.cat([keys, key_states[:, :, 1:]], dim=2)
            value_states = torch.cat([values, value_states[:, :, 1:]], dim=2)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def rows_of(placed: PlacedCache) -> list[list[Tensor]]:
    """Keys, values, keys, ... of each row, without padding; of the last token where it is awaited."""
    held, ends = tensors(placed), placed.next_positions + int(placed.layers[0].awaited is not None)
    return [[one[row : row + 1, :, : ends[row]] for one in held] for row in range(len(ends))]


def native_logits(lm: LM, held: Sequence[Tensor], tokens: Sequence[int]) -> Tensor:
    start = held[0].shape[2] - 1
    positions = torch.arange(start, start + len(tokens))[None]
    return lm.model(torch.tensor([tokens]), position_ids=positions, past_key_values=Swapped(held)).logits[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_the_last_tokens_keys_await_it(name: str, tmp_path: Path) -> None:
    """Wherever the padding puts it, in rows named again, after a rewind; against the model's own cache, row by row."""
    receiver = tiny_lm(name)
    pair = Pair(random_fuser(geometry_of(other_lm(), receiver)), other_lm(), receiver, tmp_path)
    last, placed = pair.fuse()
    tails = [last[0] + receiver.encode(" the yard"), last[1], last[2] + receiver.encode("So")]
    which = [2, 0, 0, 1, 2]
    again = [last[2], last[0] + receiver.encode("No"), last[0], last[1] + receiver.encode("It is"), tails[2]]
    held_alone = rows_of(placed)
    for cached, prompts, origin in ((placed, tails, [0, 1, 2]), (placed.rows(which), again, which)):
        alone = [held_alone[row] for row in origin]
        for row, source in enumerate(origin):  # tokens of the prompts: nothing is held of the awaited one yet
            there = cached.to_cache().layers[0].positions[row]
            ids = all_of(receiver, PROMPTS[source])
            assert there[there != PADDING].tolist() == list(range(len(ids) - 1))
            assert int(cached.next_positions[row]) == len(ids) - 1
        mark, columns = cached.mark(), cached.columns
        logits = receiver.logits(prompts, cached)
        longest = max(map(len, prompts))
        for row, (tail, held) in enumerate(zip(prompts, alone, strict=True)):
            expected = native_logits(receiver, held, tail)
            torch.testing.assert_close(logits[row, longest - len(tail) :], expected, atol=1e-4, rtol=1e-4)
            column = columns + longest - len(tail)
            for layer, keys, values in zip(cached.layers, held[::2], held[1::2], strict=True):
                assert torch.equal(layer.keys[row, :, column], keys[0, :, -1])
                assert torch.equal(layer.values[row, :, column], values[0, :, -1])
            for layer in cached.to_cache().layers:
                there = layer.positions[row]
                assert there[there != PADDING].tolist() == list(range(held[0].shape[2] + len(tail) - 1))
        further = receiver.logits([[tail[-1], 7] for tail in prompts], cached)  # no first token: nothing awaits it
        for row, (tail, held) in enumerate(zip(prompts, alone, strict=True)):
            expected = native_logits(receiver, held, [*tail, tail[-1], 7])[-2:]
            torch.testing.assert_close(further[row], expected, atol=1e-4, rtol=1e-4)
        cached.rewind(mark)
        assert torch.equal(receiver.logits(prompts, cached), logits)
        cached.rewind(mark)
        step = receiver.logits([tail[:1] for tail in prompts], cached)  # the first token alone, each at the same place
        for row, (tail, held) in enumerate(zip(prompts, alone, strict=True)):
            torch.testing.assert_close(step[row], native_logits(receiver, held, tail[:1]), atol=1e-4, rtol=1e-4)
        cached.rewind(mark)


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_beams_find_the_awaited_keys(joined: Pair, receiver: LM, beams: int) -> None:
    last, placed = joined.fuse()
    alone = rows_of(placed)
    made = receiver.generate(last, placed, max_new_tokens=8, num_beams=beams, stop=())
    for prompt, held, got in zip(PROMPTS, alone, made, strict=True):
        ids = torch.tensor([all_of(receiver, prompt)])
        native = receiver.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=Swapped(held, beams),
            max_new_tokens=8,
            num_beams=beams,
            do_sample=False,
            pad_token_id=0,
        )
        assert got.ids == tuple(native[0, ids.shape[1] :].tolist())


@torch.no_grad()
def test_what_the_last_token_is_given_matters(joined: Pair, receiver: LM) -> None:
    own = Own(receiver, PROMPTS)
    (addition,) = joined.side.additions(own, PROMPTS, joined.received())
    ends = torch.tensor(own.cache.length) - 1
    is_last = addition.pairs.ours == ends[addition.pairs.rows]
    assert addition.pairs.rows[is_last].tolist() == [0, 1, 2]
    logits = receiver.logits(own.last, own.placed([addition]))[:, -1]
    for row in range(3):
        added = addition.added.clone()
        added[:, is_last & (addition.pairs.rows == row)] *= -1
        placed = own.placed([replace(addition, added=added)])
        for got, before in zip(tensors(placed), tensors(own.placed([addition])), strict=True):
            changed = (got != before).any(dim=(1, 3)).nonzero().tolist()
            assert changed == [[row, int(ends[row])]]
        others = receiver.logits(own.last, placed)[:, -1]
        moved = (others - logits).abs().amax(dim=1)
        assert moved[row] > 0.1
        assert (moved != 0).nonzero()[:, 0].tolist() == [row]


def test_gradients_reach_what_the_last_token_is_given(joined: Pair, receiver: LM) -> None:
    with torch.no_grad():
        own = Own(receiver, PROMPTS)
        (addition,) = joined.side.additions(own, PROMPTS, joined.received())
        expected = receiver.states(own.last, own.placed([addition]))
    added = addition.added.clone().requires_grad_()
    states = receiver.states(own.last, own.placed([replace(addition, added=added)]))
    torch.testing.assert_close(states.detach(), expected, atol=1e-4, rtol=1e-4)
    states.sum().backward()
    is_last = addition.pairs.ours == torch.tensor(own.cache.length)[addition.pairs.rows] - 1
    assert added.grad[:, is_last].abs().amax(dim=2).gt(0).all()


def read_natively(lm: LM, held: Sequence[Tensor], tokens: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """What a model makes of tokens after one row's keys, values, keys, ...: logits, and its cache of them all."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(held[::2], held[1::2], strict=True)):
        cache.update(keys.clone(), values.clone(), layer)
    start = held[0].shape[2]
    positions = torch.arange(start, start + len(tokens))[None]
    logits = lm.model(torch.tensor([tokens]), position_ids=positions, past_key_values=cache).logits[0]
    return logits, [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("roles", [True, False], ids=["roles", "text alone"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_the_last_token_may_stay_the_models_own(name: str, roles: bool, tmp_path: Path) -> None:
    """It is read on the fused cache as any other, wherever the padding puts it; against the model's own cache."""
    receiver = tiny_lm(name)
    fuser = random_fuser(geometry_of(other_lm(), receiver, roles=roles, last=False))
    pair = Pair(fuser, other_lm(), receiver, tmp_path)
    own = Own(receiver, PROMPTS)
    (addition,) = pair.side.additions(own, PROMPTS, pair.received())
    ends = torch.tensor(own.cache.length) - 1
    assert not (addition.pairs.ours >= ends[addition.pairs.rows]).any()
    placed = own.placed([addition])
    assert [layer.awaited for layer in placed.layers] == [None] * len(placed.layers)
    assert torch.equal(placed.next_positions, ends)
    alone = rows_of(placed)
    assert [held[0].shape[2] for held in alone] == ends.tolist()
    mark, columns = placed.mark(), placed.columns
    for prompts in (own.last, [own.last[0] + receiver.encode(" the yard"), own.last[1], own.last[2] + [7]]):
        logits = receiver.logits(prompts, placed)
        longest = max(map(len, prompts))
        for row, (tail, held) in enumerate(zip(prompts, alone, strict=True)):
            expected, made = read_natively(receiver, held, tail)
            torch.testing.assert_close(logits[row, longest - len(tail) :], expected, atol=1e-4, rtol=1e-4)
            layers = [tensor for layer in placed.layers for tensor in (layer.keys, layer.values)]
            for got, one in zip(layers, made, strict=True):
                there = got[row, :, columns + longest - len(tail) :]
                torch.testing.assert_close(there, one[0, :, -len(tail) :], atol=1e-4, rtol=1e-4)
            here = columns + longest - len(tail)
            clean = own.cache.layers[-1].keys[row, :, ends[row]]
            assert (placed.layers[-1].keys[row, :, here] - clean).abs().max() > 1e-3  # of the fused cache, not before
            for layer in placed.to_cache().layers:
                there = layer.positions[row]
                assert there[there != PADDING].tolist() == list(range(int(ends[row]) + len(tail)))
        placed.rewind(mark)


@torch.no_grad()
def test_nothing_awaits_the_last_token_where_nothing_is_added(receiver: LM) -> None:
    own = Own(receiver, PROMPTS)
    placed = own.placed([])
    assert [layer.awaited for layer in placed.layers] == [None] * len(placed.layers)
    for got, expected in zip(tensors(placed), own_tensors(receiver, last=False), strict=True):
        assert torch.equal(got, expected)
    logits = receiver.logits(own.last, placed)[:, -1]
    for row, prompt in enumerate(PROMPTS):
        expected = receiver.model(torch.tensor([all_of(receiver, prompt)])).logits[0, -1]
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)


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


@pytest.mark.parametrize("plan", ["fp32", "bf16 front@50%", "int4:channel/int8"])
@torch.no_grad()
def test_of_a_layer_only_what_a_gate_reads_crosses(joined: Pair, receiver: LM, plan: str, tmp_path: Path) -> None:
    """The keys of the second sharer layer, the values of the third, both of the fourth; what is fused is the same."""
    fuser = random_fuser(joined.side.geometry)
    with torch.no_grad():
        fuser.gates[[0, 1, 3, 4]] = -1
    assert fuser.geometry.layers == (0, 1, 2, 3)
    part = Pair(fuser, other_lm(), receiver, tmp_path)
    read = part.sharer.read(*THEIRS)
    planned = part.sharer.side.plan(Plan.parse(plan))
    blobs = part.sharer.encode_rows(THEIRS, read, [planned] * len(THEIRS))
    for row, blob in enumerate(blobs):
        codecs = [(layer.layout.keys, layer.layout.values) for layer in Packet.parse(blob).layers()]
        keys, values = planned.keys, planned.values
        assert codecs == [("none", "none"), (keys, "none"), ("none", values), (keys, values)]
        assert len(blob) == predict(read.row(row), planned, part.sharer.side.spec, text="0" * 16)
        whole = Packet.parse(joined.packets(plan)[row])
        assert sum(Packet.parse(blob).layout.section_sizes().values()) < 0.6 * whole.size
        assert Packet.parse(blob).size - sum(Packet.parse(blob).layout.section_sizes().values()) < 1000
    own = Own(receiver, PROMPTS)
    (less,) = part.side.additions(own, PROMPTS, [part.receiver.unpack(0, blob) for blob in blobs])
    (more,) = joined.side.additions(own, PROMPTS, joined.received(plan))
    torch.testing.assert_close(less.added, more.added[[2, 5, 6, 7]], atol=1e-5, rtol=1e-5)
    with pytest.raises(PacketError, match="keys or values that the receiver reads did not cross"):
        joined.receiver.fuse(PROMPTS, [[joined.receiver.unpack(0, blob) for blob in blobs]])
    fitted = part.sharer.plan(read.row(0), "12%", None)
    assert len(part.sharer.encode_rows(THEIRS[:1], read.row(0), [fitted])[0]) <= Budget.parse("12%").bytes_for(
        read.length[0], other_lm().spec
    )


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


class Operators(TorchDispatchMode):
    """Counts the operators that would be a kernel each on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.count += not func.is_view and "split" not in func.name() and "unbind" not in func.name()
        return made


@pytest.mark.parametrize("rope", ["before", "after"])
@torch.no_grad()
def test_more_layers_take_no_more_operators(rope: str) -> None:
    """All are gathered, rotated and added to at once."""
    receiver = tiny_lm("qwen2")
    cache = Own(receiver, PROMPTS).cache
    pairs = Pairs(torch.tensor([0, 0, 2]), torch.tensor([3, 5, 1]), torch.tensor([0, 1, 2]))
    both = cache.stacked()

    def operators(slots: Sequence[int]) -> int:
        held = Slots(slots, receiver.spec, rope, receiver.device)
        with Operators() as counted:
            angles = held.angles(pairs.ours)
            own = own_vectors(both, pairs, held, angles)
            added = held.turned(own, angles)
            enrich(both, Addition(pairs, held.places, added, last=True))
        return counted.count

    assert operators(range(8)) == operators([2, 3]) < 24


@torch.no_grad()
def test_what_is_added_leaves_the_own_cache_as_it_was(joined: Pair, receiver: LM) -> None:
    own = Own(receiver, PROMPTS)
    before = own.held.clone()
    additions = joined.side.additions(own, PROMPTS, joined.received())
    placed = [own.placed(additions) for _ in range(2)]
    assert torch.equal(own.held, before)
    for index, layer in enumerate(own.cache.layers):
        assert layer.keys.data_ptr() == own.held[2 * index].data_ptr()
        assert layer.values.data_ptr() == own.held[2 * index + 1].data_ptr()
    first, second = (one.to_cache().stacked() for one in placed)
    assert torch.equal(first, second)


def test_tensors_sent_together_arrive_as_they_were() -> None:
    given = [torch.arange(6).view(2, 3).T, torch.arange(4).expand(3, -1), torch.empty(0, dtype=torch.long)]
    found = sent_together(given, "cpu")
    assert len({one.untyped_storage().data_ptr() for one in found}) == 1
    for one, other in zip(found, given, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 3])
def test_a_packet_without_a_layer_that_is_read_is_refused(
    joined: Pair, receiver: LM, layer: int, tmp_path: Path
) -> None:
    fuser = random_fuser(joined.side.geometry)
    with torch.no_grad():
        fuser.gates[2 * layer : 2 * layer + 2] = -1
    less = Pair(fuser, other_lm(), receiver, tmp_path)
    with pytest.raises(PacketError, match="layers: .*a layer that this fuser reads did not cross"):
        joined.receiver.fuse(PROMPTS, [less.received()])


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
    card, fuser = joined.side.card, joined.fuser
    tokenizer = other_lm().tokenizer
    with pytest.raises(AdapterError, match="this adapter's sharer is sharer; .*kvtalk train fuser"):
        SharerSide(card, fuser.slots, receiver, receiver.tokenizer)
    with pytest.raises(AdapterError, match="this adapter's receiver is gemma3"):
        ReceiverSide(card, fuser, tiny_lm("gemma3", 1), tokenizer)
    with pytest.raises(AdapterError, match="needs the tokenizer of sharer"):
        ReceiverSide(card, fuser, receiver, byte_tokenizer())
    with pytest.raises(AdapterError, match="needs the tokenizer of gemma3"):
        SharerSide(card, fuser.slots, other_lm(), tokenizer)


def test_a_fuser_that_comes_along_is_found_by_the_names_of_its_models(
    joined: Pair, receiver: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the name of the pair lie a translator and a fuser; the option says which is meant."""
    monkeypatch.setattr(cards, "SHIPPED", tmp_path)
    parties = [Party(lm.name, lm.spec.fingerprint) for lm in (other_lm(), receiver)]
    with pytest.raises(AdapterError, match="no adapter 'sharer.gemma3': give its folder or a hub id$"):
        read_card("sharer+gemma3", "fuser")
    values = [lm.spec.values_per_token for lm in (other_lm(), receiver)]
    translator = Translator(Geometry(values[0], 4, values[1], width=64, latent=64, decoder_blocks=1, bottleneck=8))
    save_adapter(translator, *parties, tmp_path / "sharer+gemma3")
    with pytest.raises(AdapterError, match="a translator, no fuser: give it by --adapter"):
        read_card("sharer+gemma3", "fuser")
    card = save_adapter(joined.fuser, *parties, tmp_path / "sharer+gemma3.fuser")
    assert read_card("sharer+gemma3", "fuser")[1] == tmp_path / "sharer+gemma3.fuser"
    assert read_card("sharer+gemma3", "translator")[1] == read_card("sharer+gemma3")[1] == tmp_path / "sharer+gemma3"
    assert read_card("sharer+gemma3.fuser")[0].kind == "fuser"
    with pytest.raises(AdapterError, match="a fuser, no translator: give it by --fuser"):
        read_card("sharer+gemma3.fuser", "translator")
    for kind, names in (("fuser", ""), ("translator", ""), (None, ", sharer.gemma3.fuser")):
        with pytest.raises(AdapterError, match=f"no adapter 'other': .* or one of sharer.gemma3{names}$"):
            read_card("other", kind)
    monkeypatch.setattr(fusing, "tokenizer_of", {lm.name: lm.tokenizer for lm in (other_lm(), receiver)}.__getitem__)
    named, found = (Fusion(receiver, [other_lm()], fusers) for fusers in (["sharer+gemma3"], []))
    for fusion in (named, found):
        assert fusion.sharers[0].side.card == card
    with pytest.raises(AdapterError, match="no fuser from gemma3 to gemma3 .* kvtalk train fuser"):
        Fusion(receiver, [receiver])


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


@pytest.fixture
def stored(joined: Pair, receiver: LM, tmp_path: Path) -> Path:
    """The folder of a fuser whose matrices are packed."""
    fuser = Fuser(replace(joined.side.geometry, hidden=64, middle=64, weighing=64))
    with torch.no_grad():
        fuser.gates[[0, 3, 6]] = torch.tensor([-1.0, 0.0, -0.1])
    save_adapter(fuser, *(Party(lm.name, lm.spec.fingerprint) for lm in (other_lm(), receiver)), tmp_path, "nf4:1x64")
    return tmp_path


def on_card(folder: Path, **changes: object) -> None:
    """Change sizes on a card; ``...`` takes one away."""
    content = json.loads((folder / CARD).read_text())
    content["geometry"].update(changes)
    content["geometry"] = {name: value for name, value in content["geometry"].items() if value is not ...}
    (folder / CARD).write_text(json.dumps(content))


def in_file(folder: Path, name: str = "fuser", **changes: Tensor | None) -> None:
    """Change a file's tensors, None takes one away, and give the card the right checksum."""
    file = folder / f"{name}.safetensors"
    tensors = {**load(file.read_bytes()), **changes}
    file.write_bytes(save({key: tensor for key, tensor in tensors.items() if tensor is not None}))
    content = json.loads((folder / CARD).read_text())
    content["weights"][name] = xxhash.xxh3_64_hexdigest(file.read_bytes())
    (folder / CARD).write_text(json.dumps(content))


def shape_of(layers: object = 4, kv_heads: object = 2, head_dim: object = 16) -> dict[str, object]:
    return {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden": 10**6}, "hidden 1000000: must be a whole number from 1 to 65,536"),
        ({"hidden": -64}, "hidden -64"),
        ({"hidden": 0}, "hidden 0"),
        ({"hidden": "64"}, "hidden '64'"),
        ({"hidden": True}, "hidden True"),
        ({"middle": 64.0}, "middle 64.0"),
        ({"weighing": None}, "weighing None"),
        ({"blocks": 10**9}, "blocks 1000000000"),
        ({"blocks": -1}, "blocks -1"),
        ({"layers": [0, 1, 2]}, "3 layers are mapped, the receiver has 4"),
        ({"layers": [0, 1, 2, 3, 3]}, "5 layers are mapped"),
        ({"layers": [0, 1, 2, 4]}, "mapped layer 4: must be a whole number from 0 to 3"),
        ({"layers": [0, 1, 2, -1]}, "mapped layer -1"),
        ({"layers": "0123"}, "mapped layer '0'"),
        ({"layers": 4}, "not iterable"),
        ({"layers": ...}, "'layers'"),
        ({"rope": "never"}, "rope 'never': must be one of before, after"),
        ({"rope": ["before"]}, "rope"),
        ({"alignment": "most"}, "alignment 'most': must be one of first, last, coverage, mean"),
        ({"gated": "yes"}, "gated 'yes': must be true or false"),
        ({"roles": 1}, "roles 1: must be true or false"),
        ({"last": None}, "last None: must be true or false"),
        ({"sharer": ...}, "'sharer'"),
        ({"sharer": [4, 2, 16]}, "mapping"),
        ({"sharer": shape_of(head_dim="x")}, "sharer head_dim 'x'"),
        ({"sharer": shape_of(kv_heads=-2)}, "sharer kv_heads -2"),
        ({"receiver": shape_of(layers=10**6)}, "receiver layers 1000000"),
        ({"receiver": {**shape_of(), "more": 1}}, "more"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_the_card(changes: dict[str, object], words: str, stored: Path) -> None:
    on_card(stored, **changes)
    with pytest.raises(AdapterError, match=r"not an adapter \(adapter.json is missing or damaged: ") as error:
        read_card(stored, "fuser")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", [(one.name,) for one in fields(FuserGeometry)] + [("roles", "last")], ids="+".join)
def test_cards_that_do_not_say_everything_are_refused(missing: tuple[str, ...], stored: Path) -> None:
    """Those of earlier versions say nothing of roles and the last token, and mean what this one does not do."""
    assert read_card(stored, "fuser")[0].kind == "fuser"
    on_card(stored, **dict.fromkeys(missing, ...))
    with pytest.raises(AdapterError, match=r"not an adapter \(adapter.json is missing or damaged: ") as error:
        read_card(stored, "fuser")
    assert f"damaged: {missing[0]!r} is missing, as in an earlier version's: train or import it" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expansion": "2"}, "expansion '2'"),
        ({"expansion": 1e300}, "expansion 1e"),
        ({"expansion": float("nan")}, "expansion nan"),
        ({"decoder_blocks": 1 << 20}, "more than 256 blocks"),
        ({"width": 63}, "width 63"),
        ({"latent": "x"}, "latent 'x'"),
    ],
)
def test_a_translators_sizes_too(changes: dict[str, object], words: str, receiver: LM, tmp_path: Path) -> None:
    values = [lm.spec.values_per_token for lm in (other_lm(), receiver)]
    translator = Translator(Geometry(values[0], 4, values[1], width=64, latent=64, decoder_blocks=1, bottleneck=8))
    save_adapter(translator, *(Party(lm.name, lm.spec.fingerprint) for lm in (other_lm(), receiver)), tmp_path)
    card, folder = read_card(tmp_path)
    for name, part in (("encoder", load_encoder), ("decoder", load_decoder)):
        for key, expected in getattr(translator, name).state_dict().items():
            torch.testing.assert_close(part(card, folder).state_dict()[key], expected, atol=0.01, rtol=0.01)
    card.check("sharer", other_lm().spec)
    card.check("receiver", receiver.spec)
    on_card(tmp_path, **changes)
    with pytest.raises(AdapterError, match="not an adapter") as error:
        read_card(tmp_path)
    assert words in str(error.value)
    on_card(tmp_path, **translator.geometry.__dict__ | {"width": 1 << 19, "sharer_values": 1 << 20})
    card, folder = read_card(tmp_path)
    with pytest.raises(AdapterError, match="encoder.safetensors: its weights do not have the sizes"):
        load_encoder(card, folder)
    with pytest.raises(AdapterError, match=r"card gives its sharer other sizes \(1048576 values a token\)"):
        card.check("sharer", other_lm().spec)


@pytest.mark.parametrize("size", ["hidden", "middle", "weighing"])
def test_nothing_is_made_of_a_cards_sizes_before_they_are_the_files(size: str, stored: Path) -> None:
    """Of a width of 65,536 it would be hundreds of gigabytes."""
    on_card(stored, **{size: 1 << 16})
    card, folder = read_card(stored, "fuser")
    for reading in (load_fuser, open_slots):
        with pytest.raises(AdapterError, match="fuser.safetensors: its weights do not have the sizes") as error:
            reading(card, folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inward.weight.shape": torch.tensor([8, 96, 1 << 40])}, "inward.weight.shape"),
        ({"inward.weight.shape": torch.tensor([8, 96, -64])}, "inward.weight.shape"),
        ({"inward.weight.shape": torch.tensor([8.0, 96, 64])}, "inward.weight.shape"),
        ({"inward.weight.shape": torch.tensor([8 * 96, 64])}, "inward.weight.shape"),
        ({"inward.weight.shape": None}, "inward.weight.shape"),
        ({"inward.weight.codes": torch.zeros(1, 768, 31, dtype=torch.uint8)}, "inward.weight.codes"),
        ({"inward.weight.scales": torch.zeros(3, dtype=torch.uint8)}, "inward.weight.scales"),
        ({"inward.weight.scales": None}, "inward.weight.scales"),
        ({"inward.weight": torch.zeros(8, 96, 64)}, "inward.weight"),
        ({"inward.weight.codec:nf4:1x64": None}, "inward.weight"),
        ({"inward.weight.codec:int4:1x64": torch.empty(0)}, "inward.weight"),
        ({"inward.weight.codec:nf4:1x64": None, "inward.weight.codec:none": torch.empty(0)}, "packed by 'none'"),
        ({"inward.weight.codec:nf4:1x64": None, "inward.weight.codec:nf4:1x63": torch.empty(0)}, "do not divide"),
        ({"inward.weight.codec:nf4:1x64": None, "inward.weight.codec:zip": torch.empty(0)}, "packed by 'zip'"),
        ({"gates.codec:fp32": torch.empty(0)}, "gates cannot be packed"),
        ({"gates": torch.zeros(8, dtype=torch.int64)}, "gates"),
        ({"gates": torch.zeros(9)}, "gates"),
        ({"gates": None}, "gates"),
        ({"more": torch.zeros(1)}, "more"),
    ],
)
def test_files_that_do_not_hold_what_the_card_says_are_refused(
    changes: dict[str, Tensor | None], words: str, stored: Path
) -> None:
    in_file(stored)
    load_fuser(*read_card(stored, "fuser"))
    in_file(stored, **changes)
    card, folder = read_card(stored, "fuser")
    for reading in (load_fuser, open_slots):
        with pytest.raises(AdapterError, match="fuser.safetensors: (its weights do not have|damaged)") as error:
            reading(card, folder)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_a_file_that_is_no_safetensors_is_refused(stored: Path) -> None:
    for blob in (b"", b"x" * 40, (1 << 60).to_bytes(8, "little") + b"{}"):
        (stored / "fuser.safetensors").write_bytes(blob)
        content = json.loads((stored / CARD).read_text())
        content["weights"]["fuser"] = xxhash.xxh3_64_hexdigest(blob)
        (stored / CARD).write_text(json.dumps(content))
        card, folder = read_card(stored, "fuser")
        with pytest.raises(AdapterError, match="fuser.safetensors: damaged"):
            load_fuser(card, folder)


def test_open_slots_are_read_alone(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card, folder = read_card(stored, "fuser")
    fuser = load_fuser(card, folder)
    assert fuser.gates.faster > 1  # type: ignore[attr-defined]
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in fuser.parameters())
    monkeypatch.setattr(weights, "codec", None)  # nothing is unpacked; of the packings the sizes alone are compared
    monkeypatch.setattr(weights._Stored, "check", lambda self: None)
    assert open_slots(card, folder) == fuser.opened().slots == (1, 2, 4, 5, 7)
    file = stored / "fuser.safetensors"
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(blob)
    with pytest.raises(AdapterError, match="checksum"):
        open_slots(card, folder)


def test_every_slot_is_open_without_gates(joined: Pair, receiver: LM, tmp_path: Path) -> None:
    fuser = Fuser(replace(joined.side.geometry, gated=False))
    card = save_adapter(fuser, *(Party(lm.name, lm.spec.fingerprint) for lm in (other_lm(), receiver)), tmp_path)
    assert open_slots(card, tmp_path) == fuser.opened().slots == tuple(range(8))
    (tmp_path / "fuser.safetensors").unlink()
    with pytest.raises(AdapterError, match="missing"):
        open_slots(card, tmp_path)


@pytest.mark.parametrize("role", ["sharer", "receiver"])
def test_a_cards_sizes_are_those_of_the_model_beside_it(joined: Pair, receiver: LM, role: str) -> None:
    geometry = joined.side.geometry
    shape = getattr(geometry, role)
    wrong = replace(geometry, **{role: replace(shape, kv_heads=2 * shape.kv_heads, head_dim=shape.head_dim // 2)})
    card = replace(joined.side.card, geometry=wrong)
    with pytest.raises(AdapterError, match=f"card gives its {role} other sizes .*4 layers of {2 * shape.kv_heads} KV"):
        if role == "sharer":
            SharerSide(card, joined.side.fuser.slots, other_lm(), receiver.tokenizer)
        else:
            ReceiverSide(card, joined.side.fuser, receiver, other_lm().tokenizer)


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card["sharer"].update(name=["a"]),
        lambda card: card["sharer"]["fingerprint"].update(weights=3),
        lambda card: card.update(facts=[1]),
        lambda card: card.update(geometry=[1]),
        lambda card: card.update(kind=["fuser"]),
    ],
)
def test_cards_of_other_types_are_refused(change: Callable[[dict[str, object]], None], stored: Path) -> None:
    content = json.loads((stored / CARD).read_text())
    change(content)
    (stored / CARD).write_text(json.dumps(content))
    with pytest.raises(AdapterError, match="not an adapter"):
        read_card(stored)


def test_another_text_at_the_sharer_is_refused(joined: Pair) -> None:
    blob = joined.packets(prompts=[Prompt("", TEXT + " No.")])[0]
    with pytest.raises(InputError, match="give both the same text"):
        joined.receiver.fuse(PROMPTS[:1], [[joined.receiver.unpack(0, blob)]])
    with pytest.raises(InputError, match="empty"):
        joined.sharer.read(Prompt("Q: ", " "))


@pytest.mark.parametrize("roles", [True, False], ids=["roles", "text alone"])
def test_packets_of_more_or_fewer_tokens_than_the_text_has_are_refused(
    joined: Pair, receiver: LM, roles: bool, tmp_path: Path
) -> None:
    """Though they carry its digest; real packets where a sharer would make them."""
    pair = Pair(random_fuser(geometry_of(other_lm(), receiver, roles=roles)), other_lm(), receiver, tmp_path)
    text = len(other_lm().encode(TEXT))

    def packet(after: int) -> Prefix:  # of a sharer that sends the words after the text, too
        blob = joined.packets(prompts=[Prompt("<user> ", TEXT, "x" * after)])[0]
        prefix = pair.receiver.unpack(0, blob)
        assert prefix.length == text + after
        return prefix

    most = 256 if roles else 0
    for after in {0, most}:
        _, placed = pair.receiver.fuse(PROMPTS[:1], [[packet(after)]])
        assert all(tensor.isfinite().all() for tensor in tensors(placed))
    with pytest.raises(AlignmentError, match="257 tokens after the text: a fuser takes at most 256"):
        packet(257)
    wrong = [replace(packet(most), length=text + most + 1)]
    wrong += [replace(packet(0), length=text - 1), replace(packet(0), length=0)]
    wrong += [replace(packet(0), length=1 << 40), replace(packet(0), length=-1)]
    for prefix in wrong:
        words = f"the sharer read {prefix.length} tokens, the receiver's text has {text} of them: give both the same"
        with pytest.raises(InputError, match=words):
            pair.receiver.fuse(PROMPTS[:1], [[prefix]])
        with pytest.raises(InputError, match=words):  # nor in a batch
            others = [pair.receiver.unpack(0, blob) for blob in pair.packets()[1:]]
            pair.receiver.fuse(PROMPTS, [[prefix, *others]])


@pytest.mark.parametrize("policy", ["value_norm", "front", "random"])
def test_a_token_policy_changes_only_the_tokens_that_it_sends(joined: Pair, receiver: LM, policy: str) -> None:
    prompt, whole = PROMPTS[:1], joined.packets(prompts=THEIRS[:1])[0]
    blob = joined.packets(f"fp32 {policy}@50%", THEIRS[:1])[0]
    assert len(blob) < 0.6 * len(whole)
    _, placed = joined.receiver.fuse(prompt, [[joined.receiver.unpack(0, blob)]])
    given = partners(THEIRS[0], PROMPTS[0])
    packed = list(Packet.parse(blob).layers())
    own = [tensor[:1, :, : placed.columns + 1] for tensor in own_tensors(receiver)]
    for slot, (got, before) in enumerate(zip(tensors(placed), own, strict=True)):
        sent = packed[joined.side.geometry.layers[slot // 2]].positions[0]
        changed = (got[0] != before[0]).any(dim=(0, 2))
        assert torch.equal(changed, torch.isin(given, sent))
        assert 0 < changed.sum() < (given != -1).sum()


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
    shared = f"{TEXT}\nQuestion: Who built the ferry?"
    assert made.text == Receiver(receiver).answer_text(TEXT, "Who built the ferry?", max_new_tokens=6).text
    assert made.cost.context_tokens == len(other_lm().encode(shared)) + len(other_lm().encode("\nAnswer:"))
    assert 0 < made.cost.bits_per_value <= 4
    with pytest.raises(InputError, match="empty"):
        fusion.ask(" ")


@pytest.mark.parametrize(
    ("trained", "roles", "last"),
    [(trained, roles, last) for trained in (False, True) for roles in (True, False) for last in (True, False)],
)
def test_turns_are_fused_one_after_the_other(
    receiver: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: bool, roles: bool, last: bool
) -> None:
    names = {"sharer": other_lm().tokenizer, receiver.name: receiver.tokenizer}
    monkeypatch.setattr(fusing, "tokenizer_of", names.__getitem__)
    geometry = geometry_of(other_lm(), receiver, roles=roles, last=last)
    fuser = random_fuser(geometry) if trained else Fuser(geometry)
    save_adapter(fuser, *(Party(lm.name, lm.spec.fingerprint) for lm in (other_lm(), receiver)), tmp_path, "fp32")
    fusion = Fusion(receiver, [other_lm()], [tmp_path])
    talk = fusion.conversation()
    first = talk.ask("Who built the ferry in 1931?", max_new_tokens=6)
    assert first.text == fusion.ask("Who built the ferry in 1931?", max_new_tokens=6).text
    held = talk.turns.ours.placed.to_cache()
    before = [(layer.keys.clone(), layer.values.clone()) for layer in held.layers]
    asked = prompt_of(BARE, "Who built the ferry in 1931?")
    sharer = fusion.sharers[0]
    blob = sharer.encode_rows([asked], sharer.read(asked), [first.plan])[0]
    whole = tensors(fusion.receiver.fuse([asked], [[fusion.receiver.unpack(0, blob)]])[1])
    for (keys, values), *fused in zip(before, whole[::2], whole[1::2], strict=True):  # the last token's where awaited
        assert torch.equal(keys[:, :, : fused[0].shape[2]], fused[0])
        assert torch.equal(values[:, :, : fused[1].shape[2]], fused[1])
    prompt = receiver.encode("\nQuestion: Who built the ferry in 1931?\nAnswer:")
    assert whole[0].shape[2] == len(prompt) - (not last)
    if not last:  # what the model makes of it and of the answer on what is fused
        with torch.no_grad():
            _, made = read_natively(receiver, whole, prompt[-1:] + list(first.generation.ids[:-1]))
        for (keys, values), *native in zip(before, made[::2], made[1::2], strict=True):
            torch.testing.assert_close(keys, native[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(values, native[1], atol=1e-4, rtol=1e-4)
    assert before[0][0].shape[2] == len(prompt) + len(first.generation.ids) - 1
    read = [one.tokens for one in (talk.turns.ours, *talk.turns.theirs)]
    with pytest.raises(BudgetError):
        talk.ask("And when?", budget="10")
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="broken"):
        broken.setattr(receiver, "generate", _fails)
        talk.ask("And when?")
    assert [one.tokens for one in (talk.turns.ours, *talk.turns.theirs)] == read
    second = talk.ask("And when?", max_new_tokens=6)
    assert second.cost.bytes < first.cost.bytes
    after = other_lm().encode("\nAnswer:")
    assert second.cost.context_tokens == len(other_lm().encode(" And when?")) + len(after) * roles
    parts = ["\nQuestion:", " Who built the ferry in 1931?", "\nAnswer:"]
    parts += [f" {first.text}\nQuestion:", " And when?", "\nAnswer:"]
    theirs = [token for part in parts for token in other_lm().encode(part)]
    assert talk.turns.theirs[0].tokens == len(theirs)
    for got, expected in zip(
        talk.turns.theirs[0].placed.to_cache().layers, other_lm().read_whole([theirs])[0].layers, strict=True
    ):
        torch.testing.assert_close(got.keys, expected.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got.values, expected.values, atol=1e-4, rtol=1e-4)
        assert torch.equal(got.positions, expected.positions)
    now = talk.turns.ours.placed.to_cache()
    end = "" if receiver.tokenizer.decode(first.generation.ids[-1:]).endswith("\n") else "\n"
    ids = prompt + list(first.generation.ids)
    whole = [ids + receiver.encode(f"{end}Question: And when?\nAnswer:")]
    assert now.length == (len(whole[0]) + len(second.generation.ids) - 1,)
    for (keys, values), earlier, layer in zip(before, held.layers, now.layers, strict=True):
        assert torch.equal(keys, layer.keys[:, :, : keys.shape[2]])
        assert torch.equal(values, layer.values[:, :, : keys.shape[2]])
        assert torch.equal(earlier.positions[0], torch.arange(keys.shape[2]))
        assert torch.equal(layer.positions[0], torch.arange(now.length[0]))
        assert layer.keys.shape[2] == layer.values.shape[2] == now.length[0]
    alone = receiver.generate(whole, max_new_tokens=6)[0]
    if not trained:
        assert second.generation.ids == alone.ids
        return
    own, fused = receiver.read_whole(whole)[0].layers[0].keys, now.layers[0].keys  # of a first layer, so of the token
    changed = [not torch.allclose(own[:, :, at], fused[:, :, at], atol=1e-4) for at in range(len(whole[0]))]
    turns = [asked, Prompt(f"{end}Question:", " And when?", "\nAnswer:")]
    given = [partners(turn, turn, roles=roles, last=last) for turn in turns]
    nothing = torch.full((len(first.generation.ids),), -1)
    expected = torch.cat([given[0], nothing, given[1]]) != -1
    assert len(after) < len("\nAnswer:")  # so its first token stays as it is
    assert changed == expected.tolist()
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
