"""Adapters go to the hub and come back; what cannot be pushed is refused in one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_hf_hub_args

from conftest import tiny_lm
from kvtalk.adapters import hub
from kvtalk.adapters.cards import CARD, PARTS, Party, read_card
from kvtalk.adapters.hub import push_adapter
from kvtalk.adapters.store import save_adapter
from kvtalk.adapters.translator import Geometry, Translator
from kvtalk.adapters.weights import load_encoder, load_fuser
from test_cli import in_process, refused
from test_fuser import geometry_of, other_lm, random_fuser

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Stands in for the hub: what is uploaded lies where a download would have put it."""

    cache: Path
    public: bool = False
    error: Exception | None = None

    @validate_hf_hub_args
    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
        if self.error is not None:
            raise self.error
        assert exist_ok
        return f"https://huggingface.co/{repo_id}"

    def repo_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=not self.public)

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        assert exist_ok

    def upload_folder(self, *, repo_id: str, folder_path: Path, revision: str | None, commit_message: str) -> None:
        repo = self.cache / f"models--{repo_id.replace('/', '--')}"
        shutil.copytree(folder_path, repo / "snapshots" / COMMIT)
        (repo / "refs").mkdir()
        (repo / "refs" / (revision or "main")).write_text(COMMIT)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a user who is logged in."""
    monkeypatch.setattr(Hub, "cache", tmp_path / "hub", raising=False)
    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(params=["translator", "fuser"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    sharer, receiver = other_lm(), tiny_lm("gemma3")
    sizes = sharer.spec.values_per_token, len(receiver.spec.layers), receiver.spec.values_per_token
    made = (
        Translator(Geometry(*sizes, width=64, latent=64, bottleneck=64))
        if request.param == "translator"
        else random_fuser(geometry_of(sharer, receiver))
    )
    parties = (Party(lm.name, lm.spec.fingerprint) for lm in (sharer, receiver))
    facts = {"steps": 10, "data": {"SQuAD v1.1": "CC BY-SA 4.0"}, "terms": "the Gemma Terms of Use", "license": "gemma"}
    save_adapter(made, *parties, tmp_path / "adapter", "nf4:1x16", facts)
    (tmp_path / "adapter" / "checkpoint.pt").write_bytes(b"what a run leaves")
    return tmp_path / "adapter"


@pytest.mark.parametrize("revision", [None, "second"])
def test_a_pushed_adapter_loads_by_its_hub_id_bit_for_bit(adapter: Path, revision: str | None, cache: Path) -> None:
    options = () if revision is None else ("--revision", revision)
    run = in_process("push", adapter, "me/pushed", "--private", *options)
    assert run.returncode == 0, run.stderr
    name = "me/pushed" if revision is None else f"me/pushed@{revision}"
    assert f"https://huggingface.co/me/pushed: load it as {name}" in run.stdout
    card, folder = read_card(name)
    assert folder.is_relative_to(cache)
    assert card == read_card(adapter)[0]
    load = load_encoder if card.kind == "translator" else load_fuser
    for got, expected in zip(
        load(card, folder).state_dict().values(), load(card, adapter).state_dict().values(), strict=True
    ):
        assert torch.equal(got, expected)
    uploaded = {file.name for file in folder.iterdir()}
    assert uploaded == {CARD, "README.md", *(f"{part}.safetensors" for part in PARTS[card.kind])}


def test_its_page_says_what_it_is_and_how_to_use_it(adapter: Path, cache: Path) -> None:
    push_adapter(adapter, "me/pushed")
    card, folder = read_card("me/pushed")
    page = (folder / "README.md").read_text("utf-8")
    head, body = page.removeprefix("---\n").split("\n---\n", 1)
    assert {"library_name: kvtalk", "license: gemma", f"- {card.kind}"} <= set(head.splitlines())
    option = {"translator": "--adapter", "fuser": "--fuser"}[card.kind]
    for command in ("kvtalk ask", "kvtalk eval --task"):
        line = next(line for line in body.splitlines() if line.startswith(command))
        assert f"--sharer sharer --receiver gemma3 {option} me/pushed" in line
    assert "- data:\n  - SQuAD v1.1: CC BY-SA 4.0\n- terms: the Gemma Terms of Use" in body
    assert card.sharer.fingerprint.weights in body
    assert " MB. " in body
    assert str(card.space) in body or card.kind == "fuser"


def test_what_cannot_be_pushed_is_one_line(adapter: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(in_process("push", cache.parent, "me/pushed"), "not an adapter")
    for name in ("pushed", "me/pushed/again", "me/pu shed", "me/-pushed"):
        refused(in_process("push", adapter, name), "no name for the hub", "OWNER/NAME")
    request = httpx2.Request("POST", "https://huggingface.co/api/repos/create")
    for error, words in (
        (OfflineModeIsEnabled("offline mode\nis on"), ("out of reach (offline mode is on)", "connection")),
        (httpx2.ConnectError("no route"), ("out of reach (no route)",)),
        (HfHubHTTPError("Forbidden", response=httpx2.Response(403, request=request)), ("403", "hf auth login")),
        (HfHubHTTPError("Broken", response=httpx2.Response(500, request=request)), ("500", "try again")),
    ):
        monkeypatch.setattr(Hub, "error", error)
        refused(in_process("push", adapter, "me/pushed"), "me/pushed: the hub", *words)
    monkeypatch.setattr(Hub, "error", None)
    monkeypatch.setattr(Hub, "public", True)
    refused(in_process("push", adapter, "me/pushed", "--private"), "is there already, and public")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    refused(in_process("push", adapter, "me/pushed"), "not logged in", "hf auth login", "HF_TOKEN")
    (adapter / f"{PARTS[read_card(adapter)[0].kind][0]}.safetensors").write_bytes(b"x")
    refused(in_process("push", adapter, "me/pushed"), "damaged")
    assert not cache.exists()
