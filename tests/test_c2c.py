"""Checkpoints of C2C's published code: imported, they compute what that code computes; broken ones are refused."""

from __future__ import annotations

import json
import resource
import zipfile
from collections import OrderedDict
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import bare_spec, byte_tokenizer, tiny_lm
from kvtalk import Plan
from kvtalk.adapters.c2c import LAYERS, Sizes, import_c2c, load_c2c
from kvtalk.adapters.cards import read_card
from kvtalk.adapters.fuser import Fuser
from kvtalk.adapters.fusing import ReceiverSide, SharerSide
from kvtalk.adapters.weights import load_fuser
from kvtalk.errors import AdapterError
from kvtalk.fusion import FusedReceiver, FusedSharer
from kvtalk.models import LM
from kvtalk.shared_prompts import Prompt
from test_cli import in_process, refused

State = dict[str, Tensor]
TEXT = "The ferry was built in 1931 by the Harlow yard; people call it the old lady."
SMALL = Sizes(16, 32, 2, 2, intermediate_dim=24, hidden_dim=40)
"""Of the tiny models llama and gemma3."""


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every tensor of the official module, in words of the paper's figure: in, shared MLP, two branches, two heads."""
    theirs, ours = sizes.source_dim * sizes.source_num_heads, sizes.target_dim * sizes.target_num_heads
    hidden, middle = sizes.hidden_dim, sizes.intermediate_dim
    found: dict[str, tuple[int, ...]] = {"gate_temperature": ()}
    for kind in ("key", "value"):
        linear = {
            "in": (hidden, theirs + ours),
            "proj_out": (ours, hidden),
            "scalar_head": (sizes.target_num_heads, hidden),
        }
        for name, shape in linear.items():
            found[f"{kind}_{name}.weight"], found[f"{kind}_{name}.bias"] = shape, shape[:1]
        inner = [f"proj_mlp2.blocks.{number}" for number in range(sizes.num_layers - 2)]
        for name, width in [
            ("mlp1.blocks.0", middle),
            ("scalar_mlp2.blocks.0", hidden),
            *((one, middle) for one in inner),
        ]:
            found[f"{kind}_{name}.norm.weight"] = (hidden,)
            found[f"{kind}_{name}.w1.weight"] = (width, hidden)
            found[f"{kind}_{name}.w2.weight"] = (hidden, width)
        found[f"{kind}_gate_logit"] = ()
    return found


def random_state(sizes: Sizes, seed: int, gates: tuple[float, float]) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(sizes).items():
        state[name] = torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.3)
        if name.endswith("norm.weight"):
            state[name] += 1
    state["key_gate_logit"], state["value_gate_logit"] = torch.tensor(gates[0]), torch.tensor(gates[1])
    return state


def write(
    folder: Path,
    sizes: Sizes,
    mapping: dict[int, tuple[int, int]],
    gates: dict[int, tuple[float, float]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[int, State]:
    """A checkpoint folder; ``mapping`` gives each receiver layer a sharer layer and a projector."""
    folder.mkdir(parents=True, exist_ok=True)
    states = {}
    for number in sorted({number for _, number in mapping.values()}):
        state = random_state(sizes, number, (gates or {}).get(number, (0.5, 0.5)))
        states[number] = {name: tensor.to(dtype) for name, tensor in state.items()}
        torch.save(states[number], folder / f"projector_{number}.pt")
        arguments = {**asdict(sizes), "dropout": 0.1, "dtype": {"__type__": "torch.dtype", "value": "bfloat16"}}
        content = {"class": "C2CProjector", "init_args": arguments}
        (folder / f"projector_{number}.json").write_text(json.dumps(content))
    layers = {str(ours): [[theirs, number]] for ours, (theirs, number) in mapping.items()}
    (folder / LAYERS).write_text(json.dumps({"0": {"1": layers}}))
    return states


def official(state: State, kind: str, source: Tensor, target: Tensor) -> Tensor:
    """One layer's keys or values as the official module makes them, ``[batch, heads, tokens, head_dim]`` each."""

    def block(name: str, hidden: Tensor) -> Tensor:
        normal = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.norm.weight"]
        return hidden + F.linear(F.gelu(F.linear(normal, state[f"{name}.w1.weight"])), state[f"{name}.w2.weight"])

    def linear(name: str, inputs: Tensor) -> Tensor:
        return F.linear(inputs, state[f"{kind}_{name}.weight"], state[f"{kind}_{name}.bias"])

    both = torch.cat([source.transpose(1, 2).flatten(2), target.transpose(1, 2).flatten(2)], dim=-1)
    hidden = block(f"{kind}_mlp1.blocks.0", linear("in", both))
    branch, number = hidden, 0
    while f"{kind}_proj_mlp2.blocks.{number}.norm.weight" in state:
        branch, number = block(f"{kind}_proj_mlp2.blocks.{number}", branch), number + 1
    projected = linear("proj_out", branch).unflatten(2, (target.shape[1], -1)).transpose(1, 2)
    weights = linear("scalar_head", block(f"{kind}_scalar_mlp2.blocks.0", hidden)).sigmoid()
    gate = float(state[f"{kind}_gate_logit"] > 0)
    return target + gate * weights.transpose(1, 2)[..., None] * projected


def fused(fuser: Fuser, caches: list[Tensor], own: list[Tensor]) -> list[Tensor]:
    """Keys and values of every receiver layer by our fuser; both lists hold keys, values, keys, values, ..."""
    flat = [tensor[0].transpose(0, 1).flatten(1) for tensor in own]
    given = [caches[2 * fuser.geometry.layers[slot // 2] + slot % 2] for slot in fuser.slots]
    added = fuser(torch.stack([tensor[0].transpose(0, 1).flatten(1) for tensor in given]), torch.stack(flat))
    return [
        tensor + one.unflatten(1, (tensor.shape[1], -1)).transpose(0, 1)[None]
        for tensor, one in zip(own, added, strict=True)
    ]


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(Sizes(16, 32, 2, 4, 24, 40), id="several heads on both sides"),
        pytest.param(Sizes(64, 256, 3, 1, 64, 64), id="SmolLM2 to Gemma"),
        pytest.param(Sizes(128, 64, 1, 8, 48, 32, 6), id="four blocks, eight heads"),
    ],
)
@torch.no_grad()
def test_an_imported_fuser_computes_what_the_official_module_does(sizes: Sizes, tmp_path: Path) -> None:
    sharer = bare_spec(5, sizes.source_num_heads, sizes.source_dim)
    receiver = bare_spec(4, sizes.target_num_heads, sizes.target_dim)
    mapping = {0: (1, 0), 1: (2, 1), 3: (4, 12)}
    states = write(tmp_path, sizes, mapping, {1: (0.0, 0.1), 12: (-0.2, -1e-6)})
    fuser, facts = load_c2c(tmp_path, sharer, receiver)
    assert fuser.is_open.tolist() == [True, True, False, True, False, False, False, False]
    assert (facts["layers"], facts["open"], fuser.geometry.rope) == (3, 3, "after")
    generator = torch.Generator().manual_seed(5)
    made = [
        [torch.randn(1, shape.kv_heads, 9, shape.head_dim, generator=generator) for shape in spec.layers for _ in "kv"]
        for spec in (sharer, receiver)
    ]
    for index, got in enumerate(fused(fuser.eval(), *made)):
        layer, expected = index // 2, made[1][index]
        if layer in mapping:
            source = made[0][2 * mapping[layer][0] + index % 2]
            expected = official(states[mapping[layer][1]], ("key", "value")[index % 2], source, expected)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        assert torch.equal(got, made[1][index]) != bool(fuser.is_open[index])


@pytest.fixture(scope="module")
def models() -> tuple[LM, LM]:
    return tiny_lm("llama"), tiny_lm("gemma3")


@torch.no_grad()
def test_from_checkpoint_to_fused_cache(models: tuple[LM, LM], tmp_path: Path) -> None:
    """All the way: imported, saved, loaded, the sharer's cache through a packet, added to the receiver's own."""
    mapping = {0: (0, 0), 1: (0, 1), 2: (2, 2), 3: (3, 3)}
    states = write(tmp_path / "theirs" / "final", SMALL, mapping, {2: (1.0, -1.0)})
    import_c2c(tmp_path / "theirs", *models, tmp_path / "ours")
    card, folder = read_card(tmp_path / "ours", "fuser")
    fuser = load_fuser(card, folder)
    sharer = FusedSharer(SharerSide(card, fuser.slots, models[0], byte_tokenizer()))
    receiver = FusedReceiver(models[1], [ReceiverSide(card, fuser, models[1], byte_tokenizer())])
    theirs, ours = Prompt("<user> ", TEXT, " <model>"), Prompt("Q: ", TEXT, " A:")
    cache = sharer.read(theirs)
    blob = sharer.encode_rows([theirs], cache, [Plan.parse("fp32")])[0]
    last, placed = receiver.fuse([ours], [[receiver.unpack(0, blob)]])

    read = models[0].read_whole([models[0].encode("<user> " + TEXT)])[0]
    whole = models[1].encode("Q: " + TEXT + " A:")
    own = models[1].read_whole([whole[:-1]])[0]
    assert last == [whole[-1:]]
    count = len(TEXT.encode())
    source, target = slice(7, 7 + count), slice(3, 3 + count)
    for layer, state in ((layer, states[mapping[layer][1]]) for layer in mapping):
        for kind, name in (("key", "keys"), ("value", "values")):
            expected = getattr(own.layers[layer], name).clone()
            sent = getattr(read.layers[mapping[layer][0]], name)[:, :, source]
            expected[:, :, target] = official(state, kind, sent, expected[:, :, target])
            torch.testing.assert_close(getattr(placed.layers[layer], name), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_saved_is_as_exact_as_the_checkpoint(models: tuple[LM, LM], dtype: torch.dtype, tmp_path: Path) -> None:
    states = write(tmp_path / "theirs", SMALL, {3: (3, 0)}, dtype=dtype)
    card = import_c2c(tmp_path / "theirs", *models, tmp_path / "ours")
    fuser = load_fuser(card, tmp_path / "ours")
    assert torch.equal(fuser.inward.weight[6], states[0]["key_in.weight"].T.float())
    assert torch.equal(fuser.weighing.norm[7, 0], states[0]["value_scalar_mlp2.blocks.0.norm.weight"].float())
    assert fuser.is_open.tolist() == [False] * 6 + [True] * 2


@pytest.mark.parametrize(
    ("model", "strategy"),
    [
        (None, "first"),
        ({"is_do_alignment": False, "alignment_strategy": "longest"}, "first"),
        ({"is_do_alignment": True, "alignment_strategy": "longest", "base_model": "B"}, "coverage"),
    ],
)
def test_alignment_is_that_of_the_recipe(model: object, strategy: str, models: tuple[LM, LM], tmp_path: Path) -> None:
    write(tmp_path / "final", SMALL, {0: (0, 0)})
    if model:
        (tmp_path / "config.json").write_text(json.dumps({"model": model}))
    fuser, facts = load_c2c(tmp_path, *(lm.spec for lm in models))
    assert fuser.geometry.alignment == strategy
    assert facts.get("base_model") == (model or {}).get("base_model")


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def test_pickled_code_is_not_run(models: tuple[LM, LM], tmp_path: Path) -> None:
    states = write(tmp_path, SMALL, {0: (0, 0)})
    torch.save({**states[0], "key_in.weight": Payload(tmp_path / "run")}, tmp_path / "projector_0.pt")
    with pytest.raises(AdapterError, match="projector_0.pt: damaged, or it holds more than tensors"):
        load_c2c(tmp_path, *(lm.spec for lm in models))
    assert not (tmp_path / "run").exists()


def _state(**changes: object) -> object:
    """A change of the first projector's weights; None takes a tensor away."""

    def change(folder: Path) -> None:
        state = {**torch.load(folder / "projector_0.pt", weights_only=True), **changes}
        torch.save({name: value for name, value in state.items() if value is not None}, folder / "projector_0.pt")

    return change


def _sizes(number: int = 0, **changes: object) -> object:
    def change(folder: Path) -> None:
        file = folder / f"projector_{number}.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "init_args": {**content["init_args"], **changes}}))

    return change


def _text(name: str, text: str) -> object:
    return lambda folder: (folder / name).write_text(text)


def _gone(name: str) -> object:
    return lambda folder: (folder / name).unlink()


def _cut(folder: Path) -> None:
    blob = (folder / "projector_0.pt").read_bytes()
    (folder / "projector_0.pt").write_bytes(blob[: len(blob) // 2])


def _legacy(folder: Path) -> None:
    state = torch.load(folder / "projector_0.pt", weights_only=True)
    torch.save(state, folder / "projector_0.pt", _use_new_zipfile_serialization=False)


def _zipped(compression: int, claimed: int = 0, longer: int = 0) -> object:
    """The first projector's zip written again; its largest record claims a size, or is longer."""

    def change(folder: Path) -> None:
        file = folder / "projector_0.pt"
        with zipfile.ZipFile(file) as archive:
            records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        largest = max(records, key=lambda name: len(records[name]))
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, record in records.items():
                archive.writestr(name, record[:longer] if name == largest and longer else record)
            if claimed:
                archive.getinfo(largest).file_size = claimed

    return change


def _pickled(blob: bytes) -> object:
    """The first projector with another pickle."""

    def change(folder: Path) -> None:
        with zipfile.ZipFile(folder / "projector_0.pt", "w") as archive:
            archive.writestr("projector_0/data.pkl", blob)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_gone("projector_1.pt"), "projector_1.pt: missing"),
        (_gone("projector_1.json"), "projector_1.json: missing"),
        (_gone(LAYERS), f"{LAYERS}: missing"),
        (_cut, "projector_0.pt: damaged"),
        (_state(key_gate_logit=None), "projector_0.pt: key_gate_logit is missing"),
        (_state(lora=torch.ones(1)), "projector_0.pt: 'lora' is no part"),
        (_state(**{"key_in.bias": torch.ones(3)}), "projector_0.pt: key_in.bias is \\[3\\], its sizes say \\[40\\]"),
        (_state(**{"key_in.bias": torch.full((40,), torch.nan)}), "key_in.bias holds what is no finite number"),
        (_state(**{"key_in.bias": torch.ones(40, dtype=torch.int64)}), "no finite number"),
        (_state(**{"key_in.bias": torch.ones(1).expand(1 << 40)}), "key_in.bias is \\[1099511627776\\], its sizes say"),
        (_state(**{"key_in.weight": torch.ones(1).expand(40, 96)}), "larger than the file"),
        (_state(**{"key_in.bias": torch.ones(1 << 20)}), "bytes, more than it is long or than its sizes say"),
        (_state(**{"key_in.bias": torch.ones(40).to_sparse()}), "holds more than tensors"),
        (_state(**{"key_in.bias": bytearray(9)}), "holds more than tensors"),
        (_pickled(b"\x80\x02}r\xff\xff\xff\xff."), "holds more than tensors"),
        (_pickled(b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."), "holds more than tensors"),
        (_zipped(zipfile.ZIP_DEFLATED), "projector_0.pt: compressed"),
        (_zipped(zipfile.ZIP_STORED, claimed=1 << 40), "bytes, more than it is long or than its sizes say"),
        (_zipped(zipfile.ZIP_STORED, longer=-4), "projector_0.pt: damaged"),
        (_legacy, "projector_0.pt: damaged, or of before torch 1.6"),
        (_state(**{"key_in.bias": 3}), "projector_0.pt: not a state dict"),
        (_text("projector_0.json", "{"), "projector_0.json: not JSON"),
        (_text("projector_0.json", "[]"), "projector_0.json: not a JSON object"),
        (_text("projector_0.json", '{"class": "AllInOneProjector"}'), "of the class 'AllInOneProjector'"),
        (_text("projector_0.json", '{"class": "C2CProjector"}'), "no init_args"),
        (_text("projector_0.json", '{"class": "C2CProjector", "init_args": {}}'), "source_dim is missing"),
        (_sizes(hidden_dim=64), "projector_1.json: other sizes|key_in.weight is"),
        (_sizes(1, intermediate_dim=25), "projector_1.json: other sizes"),
        (_sizes(hidden_dim=-1), "hidden_dim is -1"),
        (_sizes(hidden_dim=10**12), "hidden_dim is 1000000000000"),
        (_sizes(hidden_dim="wide"), "hidden_dim is 'wide'"),
        (_sizes(num_layers=2), "num_layers is 2"),
        (_sizes(num_layers=60_000), "projector_0.json: blocks 59998"),
        (_sizes(num_layers=60), "projector_0.pt: key_proj_mlp2.blocks.1.norm.weight is missing"),
        (_sizes(hidden_dim=1 << 16), "projector_0.pt: key_in.weight is \\[40, 96\\], its sizes say \\[65536, 96\\]"),
        (_sizes(activation="silu"), "activation, which this version does not know"),
        (_sizes(source_dim=32), "for a sharer with 2 KV heads of 32, the given one has 2 of 16"),
        (_sizes(target_num_heads=4), "for a receiver with 4 KV heads of 32"),
        (_text(LAYERS, '{"0": {"1": {"4": [[0, 0]]}}}'), "sharer layer 0 for receiver layer 4"),
        (_text(LAYERS, '{"0": {"1": {"0": [[4, 0]]}}}'), "sharer layer 4 for receiver layer 0"),
        (_text(LAYERS, '{"0": {"1": {"0": [[0, 9]]}}}'), "projector_9.json: missing"),
        (_text(LAYERS, '{"0": {"1": {"0": []}}}'), "layer '0' is not mapped"),
        (_text(LAYERS, '{"0": {"1": {"0": [[-1, 0]]}}}'), "layer '0' is not mapped"),
        (_text(LAYERS, '{"0": {"1": {"0": {"a": 1}}}}'), "layer '0' is not mapped"),
        (_text(LAYERS, '{"0": {"1": {}}}'), "maps no layer"),
        (_text(LAYERS, '{"0": {"1": {}, "2": {}}}'), "import each sharer's by itself"),
        (_text("config.json", '{"model": {"is_do_alignment": true, "alignment_strategy": "x"}}'), "alignment 'x'"),
        (
            _text("config.json", '{"model": {"is_do_alignment": true, "alignment_strategy": ["first"]}}'),
            r"config.json: alignment \['first'\]; kvtalk knows first, longest",
        ),
    ],
)
def test_broken_checkpoints_are_refused_in_one_line(
    change: object, words: str, models: tuple[LM, LM], tmp_path: Path
) -> None:
    write(tmp_path, SMALL, {0: (0, 0), 1: (1, 1)})
    load_c2c(tmp_path, *(lm.spec for lm in models))
    change(tmp_path)  # type: ignore[operator]
    with pytest.raises(AdapterError, match=words) as error:
        load_c2c(tmp_path, *(lm.spec for lm in models))
    assert "\n" not in str(error.value)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_small_file_does_not_become_a_large_one(models: tuple[LM, LM], tmp_path: Path) -> None:
    """One MB of zeros, deflated, stands for 1 GB."""
    write(tmp_path, SMALL, {0: (0, 0)})
    with (
        zipfile.ZipFile(tmp_path / "projector_0.pt", "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("projector_0/data/99", "w", force_zip64=True) as stream,
    ):
        for _ in range(256):
            stream.write(bytes(1 << 22))
    assert (tmp_path / "projector_0.pt").stat().st_size < 2 << 20
    before = _peak()
    with pytest.raises(AdapterError, match="projector_0.pt: compressed"):
        load_c2c(tmp_path, *(lm.spec for lm in models))
    assert _peak() - before < 1 << 26


def test_one_value_in_the_place_of_many_makes_nothing(models: tuple[LM, LM], tmp_path: Path) -> None:
    """Sizes and tensors agree, but each tensor is one number, over and over: 618 GB of them."""
    write(tmp_path, SMALL, {0: (0, 0)})
    sizes = replace(SMALL, hidden_dim=1 << 16)
    state = {name: torch.ones(()).expand(shape) for name, shape in shapes(sizes).items()}
    torch.save(state, tmp_path / "projector_0.pt")
    _sizes(hidden_dim=1 << 16)(tmp_path)  # type: ignore[operator]
    before = _peak()
    with pytest.raises(AdapterError, match="projector_0.pt: its tensors are larger than the file"):
        load_c2c(tmp_path, *(lm.spec for lm in models))
    assert _peak() - before < 1 << 26


def test_tensors_that_share_or_skip_memory_are_read_as_they_are(models: tuple[LM, LM], tmp_path: Path) -> None:
    states = write(tmp_path, SMALL, {0: (0, 0)})
    wide = torch.randn(96, 80)
    state = OrderedDict({**states[0], "key_in.weight": wide.T[::2], "key_in.bias": torch.nn.Parameter(torch.ones(40))})
    state["key_mlp1.blocks.0.norm.weight"] = state["key_scalar_mlp2.blocks.0.norm.weight"]
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "projector_0.pt")
    fuser, _ = load_c2c(tmp_path, *(lm.spec for lm in models))
    assert torch.equal(fuser.inward.weight[0], wide[:, ::2])
    assert torch.equal(fuser.inward.bias[0, 0], torch.ones(40))
    assert torch.equal(fuser.shared.norm[0], fuser.weighing.norm[0])


def test_the_command(tiny_folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "theirs", Sizes(32, 32, 2, 2, 24, 40), {0: (0, 0), 1: (1, 1)}, {1: (0.0, 0.5)})
    both = ("--sharer", tiny_folder, "--receiver", tiny_folder, "--out", tmp_path / "ours")
    made = in_process("import-c2c", tmp_path / "theirs", *both)
    assert made.returncode == 0, made.stderr
    assert "2 layers from 2 projectors, 3 of 4 gates open" in made.stdout
    assert read_card(tmp_path / "ours", "fuser")[0].facts["imported"] == "C2C"
    refused(in_process("import-c2c", tmp_path / "nowhere", *both), "nowhere: no such folder")
