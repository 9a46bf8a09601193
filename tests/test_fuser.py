"""Fusers: what they change and what not, what crosses, what is refused, and how they are stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from conftest import ARCHITECTURES, byte_tokenizer, tiny_lm
from kvtalk import Budget, Link, Plan
from kvtalk.adapters import fusing, store
from kvtalk.adapters.fuser import Fuser, FuserGeometry, Shape, narrowed
from kvtalk.adapters.fusing import Own, Prompt, ReceiverSide, SharerSide
from kvtalk.adapters.store import (
    CARD,
    Party,
    load_decoder,
    load_encoder,
    load_fuser,
    open_slots,
    read_card,
    save_adapter,
)
from kvtalk.adapters.translator import Geometry, Translator
from kvtalk.alignment.layers import layer_map
from kvtalk.alignment.tokens import NONE, align, tokenize
from kvtalk.errors import AdapterError, BudgetError, InputError, PacketError
from kvtalk.fusion import FusedReceiver, FusedSharer, Fusion
from kvtalk.link import Receiver
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
        self.sharer = FusedSharer(SharerSide(card, fuser.opened().slots, sharer, receiver.tokenizer))
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
        SharerSide(card, fuser.slots, receiver, receiver.tokenizer)
    with pytest.raises(AdapterError, match="this adapter's receiver is gemma3"):
        ReceiverSide(card, fuser, tiny_lm("gemma3", 1), tokenizer)
    with pytest.raises(AdapterError, match="needs the tokenizer of sharer"):
        ReceiverSide(card, fuser, receiver, byte_tokenizer())
    with pytest.raises(AdapterError, match="needs the tokenizer of gemma3"):
        SharerSide(card, fuser.slots, other_lm(), tokenizer)


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
        ({"alignment": "mean"}, "alignment 'mean': must be one of first, last, coverage"),
        ({"gated": "yes"}, "gated 'yes': must be true or false"),
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
    monkeypatch.setattr(store, "codec", None)  # nothing is unpacked; of the packings the sizes alone are compared
    monkeypatch.setattr(store._Stored, "check", lambda self: None)
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
    shared = f"{TEXT}\nQuestion: Who built the ferry?"
    assert made.text == Receiver(receiver).answer_text(TEXT, "Who built the ferry?", max_new_tokens=6).text
    assert made.cost.context_tokens == len(other_lm().encode(shared))
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
