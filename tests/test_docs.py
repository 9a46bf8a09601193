"""What README and docs say is what the code has and what the results hold."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from kvtalk.adapters.cards import read_card
from kvtalk.codecs import CODECS
from kvtalk.evaluation.arms import KINDS
from kvtalk.evaluation.metrics import METRICS
from kvtalk.evaluation.protocols import PROTOCOLS
from kvtalk.evaluation.runner import recompute
from kvtalk.evaluation.tasks import TASKS
from kvtalk.layout import SECTIONS
from kvtalk.manifest import Manifest
from kvtalk.selection.tokens import TOKEN_POLICIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
sys.path.insert(0, str(ROOT / "benchmarks"))
tables = importlib.import_module("tables")
RESULTS = (ROOT / "docs" / "results.md").read_text("utf-8")
FUSER = (ROOT / "docs" / "fuser.md").read_text("utf-8")
FUSERS = (ROOT / "docs" / "fuser_results.md").read_text("utf-8")
TRANSLATOR = (ROOT / "docs" / "translator.md").read_text("utf-8")
TRAINING = (ROOT / "docs" / "translator_training.md").read_text("utf-8")
EVALUATION = (ROOT / "docs" / "evaluation.md").read_text("utf-8")


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def headings(page: Path) -> set[str]:
    """As links name them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not link.startswith("http"):
            path, _, heading = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not heading or heading in headings(target), link


def test_readme_lists_every_method() -> None:
    for name in (*TOKEN_POLICIES, *CODECS):
        assert f"`{name}`" in README


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("squad", README),
        ("tasks", RESULTS),
        ("routing", RESULTS),
        ("choice", RESULTS),
        ("speed", RESULTS),
        ("latency", RESULTS),
        ("across", README),
        ("translator", TRANSLATOR),
        ("ceilings", TRANSLATOR),
        ("own", TRANSLATOR),
        ("learned", TRAINING),
        ("further", TRAINING),
        ("elsewhere", TRAINING),
        ("candidates", TRAINING),
        ("into_gemma", TRAINING),
        ("narrowed", TRANSLATOR),
        ("choices", TRAINING),
        ("lora", TRANSLATOR),
        ("latents", TRANSLATOR),
        ("text", TRANSLATOR),
        ("pooled", TRANSLATOR),
        ("joined", TRANSLATOR),
        ("decoding", TRANSLATOR),
        ("shipped", FUSER),
        ("thinned", FUSER),
        ("fused", FUSERS),
        ("five", FUSERS),
        ("accuracy", FUSERS),
        ("controlled", FUSERS),
        ("all_controls", FUSERS),
        ("oracle", FUSERS),
        ("gaps", FUSERS),
        ("policies", FUSERS),
        ("known", FUSERS),
        ("sent", FUSERS),
        ("taught", FUSERS),
        ("worth", FUSERS),
        ("fusing", FUSER),
        ("waiting", FUSER),
    ],
)
def test_figures_in_tables_are_those_of_the_results(name: str, page: str) -> None:
    lines = list(getattr(tables, name)())
    assert len(lines) > 3
    for line in lines:
        assert line in page


@pytest.mark.parametrize("pair", tables.PAIRS)
def test_what_was_measured_is_what_ships(pair: str) -> None:
    card = read_card(pair)[0]
    runs = [ROOT / "results" / task / pair for task in (*tables.CONTEXT_TASKS, "demo", "translator/learned/now")]
    for run in runs:
        assert json.loads((run / "manifest.json").read_text("utf-8"))["adapter"]["identity"] == card.identity, run
    text = json.loads((ROOT / "results" / "translator" / f"{pair}.text.json").read_text("utf-8"))
    assert text["adapter"] == card.identity


def test_every_results_folder_gives_its_summary_again(tmp_path: Path) -> None:
    """Small ones; the summaries of large runs take a while."""
    for folder in (ROOT / "results" / "countries").iterdir():
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy)
        recompute(copy)
        assert json.loads((copy / "summary.json").read_text()) == json.loads((folder / "summary.json").read_text())


def test_manifests_say_how_to_run_again_on_any_machine() -> None:
    for file in (ROOT / "results").rglob("manifest.json"):
        manifest = json.loads(file.read_text("utf-8"))
        for start in (manifest, *manifest.get("earlier", ())):
            words = shlex.split(start["command"])
            assert words[0] == "kvtalk"
            assert not any(word.startswith("/") for word in words)
        assert manifest["seed"] == 0
        assert manifest["prompt"]


def test_evaluation_page_names_every_task_protocol_arm_and_metric() -> None:
    for name in (*TASKS, *PROTOCOLS, *KINDS, *METRICS):
        assert f"`{name}`" in EVALUATION


def test_readme_benchmark_is_that_of_the_results() -> None:
    for row in json.loads((ROOT / "results" / "bench" / "cpu.json").read_text())["rows"]:
        assert (
            f"| {row['tokens']:,} | {row['text_ms']:,.0f} ms | {row['packet_ms']:,.0f} ms | {row['ratio']:.3f} |"
            in README
        )


def test_packet_page_names_every_field_and_section() -> None:
    page = (ROOT / "docs" / "packet.md").read_text("utf-8")
    for name in (*Manifest.model_fields, *SECTIONS):
        assert f"`{name}`" in page


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
