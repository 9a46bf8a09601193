"""Adapters to the hub: the files of one, and a page that says what it is and how to use it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from kvtalk.adapters.cards import CARD, OPTIONS, Card, read_card
from kvtalk.adapters.weights import checked
from kvtalk.errors import AdapterError

_READ = {
    "translator": "The sharer alone reads the context; its cache becomes one of the receiver's, which answers from it.",
    "fuser": "Both models read the question, and the sharer's cache enriches the receiver's.",
}
_TASKS = {
    "translator": "--task squad {models} --arms receiver,text,cache,wrong,zeroed",
    "fuser": "--task arc_easy {models} --arms receiver,sharer,fused,wrong,zeroed",
}


def push_adapter(name: str | Path, repo: str, private: bool = False, revision: str | None = None) -> str:
    """Upload an adapter: its card, its weights, and a page made from the card; nothing else that lies beside them.

    Args:
        name: as for :func:`kvtalk.adapters.cards.read_card`.
        repo: ``OWNER/NAME`` on the hub, created if need be. It loads the adapter afterwards.
        private: nobody else may see it.
        revision: branch to upload to, created if need be; ``OWNER/NAME@REVISION`` loads it.

    Returns:
        its address.

    Raises:
        AdapterError: not an adapter, damaged, a name that the hub does not take, not logged in, or the hub refuses or
            is out of reach.
    """
    card, folder = read_card(name)
    files = [checked(card, folder, part) for part in card.parts]
    if repo.count("/") != 1:
        raise AdapterError(f"{repo!r:.120}: no name for the hub: give OWNER/NAME")
    if get_token() is None:
        raise AdapterError("not logged in to the hub: run hf auth login, or set HF_TOKEN to a token that may write")
    where = repo if revision is None else f"{repo}@{revision}"
    with tempfile.TemporaryDirectory() as scratch:
        for file in (folder / CARD, *files):
            shutil.copy(file, scratch)
        (Path(scratch) / "README.md").write_text(page(card, where, sum(file.stat().st_size for file in files)), "utf-8")
        try:
            return _upload(Path(scratch), repo, private, revision)
        except AdapterError:
            raise
        except HFValidationError as error:
            raise AdapterError(f"{repo!r:.120}: no name for the hub ({_line(error)}): give OWNER/NAME") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            to_do = "log in with a token that may write there (hf auth login)" if status in (401, 403) else "try again"
            raise AdapterError(f"{repo}: the hub refuses ({status}, {_line(error)}): {to_do}") from error
        except Exception as error:  # whatever the hub's client raises
            raise AdapterError(f"{repo}: the hub is out of reach ({_line(error)}): check the connection") from error


def _upload(folder: Path, repo: str, private: bool, revision: str | None) -> str:
    api = HfApi()
    address = str(api.create_repo(repo, private=private or None, exist_ok=True))
    if private and not api.repo_info(repo).private:
        raise AdapterError(f"{repo}: is there already, and public: make it private on the hub, or give another name")
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message="Upload with kvtalk push")
    return address


def page(card: Card, where: str, size: int) -> str:
    """The adapter's page on the hub.

    Args:
        card: of the adapter.
        where: by which hub id it loads.
        size: bytes of its weights.
    """
    licence = card.facts.get("license")
    about = ModelCardData(
        library_name="kvtalk",
        tags=["kvtalk", "kv-cache", card.kind],
        license=licence if isinstance(licence, str) else None,
    )
    models = f"--sharer {card.sharer.name} --receiver {card.receiver.name} {OPTIONS[card.kind]} {where}"
    asked = "--context notes.txt --question '...'" if card.kind == "translator" else "--question '...'"
    lines = [
        "---",
        about.to_yaml(),
        "---",
        "",
        f"# {card.kind}: {card.sharer.name} → {card.receiver.name}",
        "",
        f"A {card.kind} of kvtalk, {size / 1e6:.1f} MB. {_READ[card.kind]}",
        "",
        "| | model | weights | tokenizer |",
        "| --- | --- | --- | --- |",
        *(
            f"| {role} | {party.name} | {party.fingerprint.weights} | {party.fingerprint.tokenizer} |"
            for role, party in (("sharer", card.sharer), ("receiver", card.receiver))
        ),
        "",
        "It fits these two models only, and is refused beside any other; the last two columns are their digests.",
        *([f"Its latent space is `{card.space}`: `kvtalk join` takes halves of one space."] if card.space else []),
        "",
        "```",
        f"kvtalk ask {asked} {models}",
        f"kvtalk eval {_TASKS[card.kind].format(models=models)}",
        "```",
        "",
        *(["## How it was made", "", *_listed(card.facts)] if card.facts else []),
    ]
    return "\n".join(lines) + "\n"


def _listed(facts: Any, indent: str = "") -> Iterator[str]:
    """Facts as a nested list."""
    for key, value in facts.items():
        if isinstance(value, dict):
            yield f"{indent}- {key}:"
            yield from _listed(value, indent + "  ")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{indent}- {key}: {text}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
