"""Running text gathered from folders of books and manuals."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
prose = importlib.import_module("prose")
FERRY = "The old ferry at Marrow Point was painted green in 1902 by the sons of a baker."
EELS = "Nobody in the village of Harlow knew why it carried timber and eels until then."


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("txt", f"1. FERRIES\n\n{FERRY[:30]}\n  {FERRY[30:]}\r\n\r\n{EELS}\n"),
        (
            "md",
            f"---\ntitle: x\n---\n# Ferries\n{FERRY.replace('ferry', '[ferry](a.md)')}\n```\ncode\n```\n- **{EELS}**\n",
        ),
        ("html", f"<title>{EELS}</title><dl><dt>Ferry<dd>{FERRY}</dl><pre>{EELS}</pre><p>{EELS}<sup>1</sup></p>"),
        (
            "xml",
            f"<para>{FERRY.replace('green', '<emphasis>green</emphasis>')}</para><screen>a</screen><para>{EELS}</para>",
        ),
    ],
)
def test_prose_is_read_from_every_kind_of_file(tmp_path: Path, kind: str, text: str) -> None:
    plain, packed = tmp_path / f"a.{kind}", tmp_path / f"a.{kind}.gz"
    plain.write_text(text, newline="")
    packed.write_bytes(gzip.compress(text.encode()))
    assert [*prose.paragraphs(plain)] == [*prose.paragraphs(packed)] == [FERRY, EELS]


@pytest.mark.parametrize(
    "paragraph",
    [
        "It is not.",
        "A list of the ferries that there are in Harlow",
        "Nobody may redistribute the ferry, for it is the property of the village of Harlow.",
        "Niemand im Dorf Harlow wusste, warum die Fähre bis dahin Holz und Aale beförderte.",
        "Ferries are to be called with ferry(1902) or for the sons of a baker with baker().",
    ],
)
def test_what_is_no_prose_is_left_out(paragraph: str) -> None:
    assert not prose.is_prose(paragraph)
    assert prose.is_prose(FERRY)


def test_every_paragraph_stands_in_one_text_of_bounded_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prose, "LEAST", 3 * len(FERRY))
    monkeypatch.setattr(prose, "MOST", 6 * len(FERRY))
    numbered = [FERRY.replace("1902", str(year)) for year in range(1902, 1922)]
    for source in ("books", "manuals"):
        (tmp_path / source).mkdir()
        (tmp_path / source / "long.txt").write_text("\n\n".join(numbered))
    for number, line in enumerate([EELS, EELS.replace("eels", "coal"), EELS.replace("eels", "hay"), EELS]):
        (tmp_path / "manuals" / f"short{number}.txt").write_text(line)
    made = []
    for out in (tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"):
        monkeypatch.setattr(sys, "argv", ["prose", str(tmp_path / "books"), str(tmp_path / "manuals"), str(out)])
        prose.main()
        with gzip.open(out, "rt", encoding="utf-8") as file:
            made.append([json.loads(line) for line in file])
    assert made[0] == made[1]
    texts = [row["text"] for row in made[0]]
    assert all(prose.LEAST <= len(text) <= prose.MOST for text in texts)
    found = [paragraph for text in texts for paragraph in text.split("\n\n")]
    assert len(found) == len({*found}) == 20 + 3
