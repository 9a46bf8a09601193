"""`kvtalk align`: tokenizers of any kind, from the command line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from conftest import byte_tokenizer
from kvtalk.models import LM
from test_alignment import wordpiece_tokenizer
from test_cli import in_process, kvtalk, refused

TEXT = "The naïve fox 北京"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Folders with nothing but a tokenizer: word pieces read, bytes are to be matched."""
    folder = tmp_path_factory.mktemp("tokenizers")
    wordpiece_tokenizer().save_pretrained(folder / "pieces")
    byte_tokenizer().save_pretrained(folder / "bytes")
    return "--sharer", folder / "pieces", "--receiver", folder / "bytes"


def test_bytes_against_word_pieces(two: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LM, "load", lambda *args: pytest.fail("a model was loaded"))
    shown = in_process("align", *two, TEXT, "--limit", 5)
    assert shown.returncode == 0, shown.stderr
    assert "the first 5 of the receiver's 21 tokens" in shown.stdout
    assert "they share 13 of 16 characters" in shown.stdout
    assert "decoded and re-encoded, longest piece" in shown.stdout
    file = tmp_path / "text.txt"
    file.write_text(TEXT, "utf-8")
    whole, piped = (
        json.loads(in_process("align", *two, given, "--json", "--limit", 99, text=TEXT).stdout) for given in (file, "-")
    )
    assert whole == piped
    assert whole["coverage"]["aligned"] == 18
    assert whole["coverage"]["characters"] == len(TEXT)
    assert len(whole["tokens"]) == whole["coverage"]["receiver_tokens"] == len(TEXT.encode())
    last = whole["tokens"][-1]
    assert (last["characters"], [one["characters"] for one in last["sharer"]]) == ("京", ["京"])
    assert whole["reencoded"]["first"]["share"] < 1
    summary = in_process("align", *two, TEXT, "--limit", 0, "--strategy", "mean").stdout
    assert summary.startswith("aligned: 18 of 21")


def test_the_same_tokenizer_agrees_with_itself_and_marks_what_is_passed_over(two: tuple[object, ...]) -> None:
    same = json.loads(in_process("align", "-s", two[3], "-r", two[3], "plain text", "--json").stdout)
    assert same["coverage"]["one_to_one"] == same["coverage"]["used"] == 10
    assert same["reencoded"]["first"] == {"equal": 10, "share": 1.0, "text": "plain text"}
    turned = ("-s", two[3], "-r", two[1])
    assert "(ä) (º) ¬" in in_process("align", *turned, "京", "--strategy", "last").stdout
    assert "(" not in in_process("align", *turned, "京", "--strategy", "mean").stdout.split("aligned")[0]


@pytest.mark.models
def test_the_example_of_the_page_is_what_the_command_prints() -> None:
    page = (Path(__file__).parents[1] / "docs" / "alignment.md").read_text("utf-8")
    command, _, printed = page.partition("$ kvtalk ")[2].partition("```")[0].partition("\n")
    made = kvtalk(*shlex.split(command)).stdout.splitlines()
    assert [line.rstrip() for line in made] == printed.strip("\n").splitlines()


def test_help_teaches_align() -> None:
    shown = in_process("align", "--help").stdout
    assert "kvtalk align --sharer smollm2-135m --receiver gemma3-270m" in shown
    assert "--strategy" in shown


def test_mistakes_are_one_line(two: tuple[object, ...], tmp_path: Path) -> None:
    refused(in_process("align", *two, "notes.txt"), "no file notes.txt", "standard input")
    refused(in_process("align", *two, tmp_path), "no file")
    refused(in_process("align", *two, ""), "empty")
    refused(in_process("align", *two, " \n "), "align on nothing")
    refused(in_process("align", *two, TEXT, "--strategy", "best"), "first, last, coverage, mean")
    refused(in_process("align", *two[:3], "nonsense", TEXT), "no model 'nonsense'", "models list")
    refused(in_process("align", *two[:3], "there-is-no.gguf", TEXT), "no model", "models list")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfd")
    refused(in_process("align", *two, tmp_path / "latin.txt"), "not UTF-8")
