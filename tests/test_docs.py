"""What README and docs say is what the code has and what the results hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kvtalk.codecs import CODECS
from kvtalk.layout import SECTIONS
from kvtalk.manifest import Manifest
from kvtalk.selection.tokens import TOKEN_POLICIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
ROWS = {
    "nothing": "none",
    "another text's cache": "wrong fp16",
    "its cache with all values zero": "zeroed fp16",
    "**the context as text**": "text",
    "its cache, fp16": "fp16",
    "its cache, int8": "int8:channel/int8:token before",
    "its cache, int4, scales per key channel": "int4:channel/int4:token before",
    "its cache, int4, scales per token": "int4:token/int4:token",
    "its cache, budget 25%": "budget=25%",
    "its cache, budget 10%": "budget=10%",
}


def summary(model: str) -> dict[str, dict[str, object]]:
    rows = json.loads((ROOT / "results" / "same_model" / model / "summary.json").read_text())["arms"]
    return {row["arm"]: row for row in rows}


def test_readme_lists_every_method() -> None:
    for name in (*TOKEN_POLICIES, *CODECS):
        assert f"`{name}`" in README


@pytest.mark.parametrize("title", list(ROWS))
def test_readme_figures_are_those_of_the_results(title: str) -> None:
    line = next(line for line in README.splitlines() if line.startswith(f"| {title} |"))
    cells = [cell.strip().replace("*", "") for cell in line.split("|")[2:-1]]
    gemma, smollm = (summary(model)[ROWS[title]] for model in ("gemma3-270m", "smollm2-135m"))
    figures = ["{:.1f} [{:.1f}, {:.1f}]".format(*row["f1"]) for row in (gemma, smollm)]  # type: ignore[misc]
    assert cells == [f"{gemma['bytes']:,}", *figures]


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
