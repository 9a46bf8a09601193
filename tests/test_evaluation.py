"""Scores are the official ones, arms are what they say, and every control is in its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from conftest import tiny_lm
from kvtalk import Link, Plan
from kvtalk.errors import InputError, KVTalkError
from kvtalk.evaluation.arms import DEFAULT, parse_arms
from kvtalk.evaluation.items import Item, load_items, samples, unrelated_text
from kvtalk.evaluation.metrics import bootstrap, contains_answer, exact_match, f1
from kvtalk.evaluation.runner import read_records, recompute, run


def test_metrics_are_those_of_squad() -> None:
    assert exact_match("The Eiffel-Tower!", ["eiffeltower"]) == 1
    assert f1("in the year 1889", ["1889"]) == pytest.approx(2 * (1 / 3) / (1 / 3 + 1))
    assert f1("Paris", ["London", "Paris, France"]) == pytest.approx(2 / 3)
    assert f1("", ["x"]) == 0
    assert f1("the", [""]) == 1
    assert contains_answer("It was built by Berthe Quillard in 1388.", ["berthe quillard"]) == 1
    assert contains_answer("in 13889", ["1388"]) == 0


def test_bootstrap_interval_holds_the_mean_and_is_seeded() -> None:
    values = [0.0, 1.0] * 50
    interval = bootstrap(values)
    assert interval == bootstrap(values)
    assert interval.low < interval.mean == 0.5 < interval.high
    assert 0.08 < interval.high - interval.mean < 0.12


def test_samples_are_invented_passages_with_two_questions_each() -> None:
    items = samples()
    assert len(items) == 80
    contexts = {item.context for item in items}
    assert len(contexts) == 40
    for item in items:
        assert item.answers[0] in item.context
        assert not any(answer.lower() in item.question.lower() for answer in item.answers)
        assert not any(item.answers[0].lower() in other.lower() for other in contexts - {item.context})


def test_unrelated_text_is_as_long_and_never_the_text_itself() -> None:
    for text in ("short", samples()[0].context, "x" * 5000):
        other = unrelated_text(text)
        assert len(other) == len(text)
        assert text not in other


def test_items_come_from_plain_and_packed_files(tmp_path: Path) -> None:
    rows = "".join(item.model_dump_json() + "\n" for item in samples()[:3])
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    assert load_items(tmp_path / "a.jsonl") == load_items(tmp_path / "a.jsonl.gz") == samples()[:3]
    assert len(load_items(tmp_path / "a.jsonl", limit=2)) == 2
    (tmp_path / "b.jsonl").write_text('{"id": "1", "context": "c", "question": "q"}\n')
    with pytest.raises(InputError, match="line 1: answers.*expected the fields id, context, question, answers"):
        load_items(tmp_path / "b.jsonl")
    with pytest.raises(InputError, match="no items"):
        (tmp_path / "c.jsonl").write_text("")
        load_items(tmp_path / "c.jsonl")
    with pytest.raises(InputError, match="cannot read"):
        load_items(tmp_path / "absent.jsonl")


def test_arms_from_text() -> None:
    arms = parse_arms(["none", "  # a comment", "wrong int8", "zeroed", "fp16 back@50% contiguous", "budget=5KB int4"])
    assert [arm.kind for arm in arms] == ["none", "wrong", "zeroed", "cache", "cache"]
    assert arms[1].plan == Plan.parse("int8")
    assert arms[3].gaps is False
    assert (arms[4].budget, arms[4].plan) == ("5KB", Plan.parse("int4"))
    assert [arm.name for arm in parse_arms([])] == list(DEFAULT)
    for wrong in (["text", "text"], ["sideways"], ["budget=much"]):
        with pytest.raises(KVTalkError):
            parse_arms(wrong)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lm = tiny_lm("gemma3")
    out = tmp_path_factory.mktemp("run")
    items = [Item(id=i.id, context=i.context[:120], question=i.question, answers=i.answers) for i in samples()[:5]]
    arms = parse_arms(["none", "text", "wrong", "zeroed", "fp16", "int4 value_norm@50%", "budget=20%"])
    run(Link(lm, lm), items, arms, out, batch=2, max_new_tokens=6)
    return out


def test_every_item_is_in_every_arm(finished: Path) -> None:
    records = read_records(finished)
    assert len({(record.id, record.arm) for record in records}) == len(records) == 5 * 7


def test_a_cache_of_16_bits_scores_like_the_text(finished: Path) -> None:
    by_arm = {arm: [r for r in read_records(finished) if r.arm == arm] for arm in ("text", "fp16", "wrong", "zeroed")}

    def distance(arm: str) -> float:
        return max(abs(a.nll - b.nll) for a, b in zip(by_arm["text"], by_arm[arm], strict=True))

    assert distance("fp16") < 0.01
    assert min(distance("wrong"), distance("zeroed")) > 5 * distance("fp16")


def test_bytes_and_plans_are_recorded(finished: Path) -> None:
    for record in read_records(finished):
        if record.arm in ("none", "text"):
            assert (record.plan, record.bits_per_value) == ("", 0)
        else:
            assert record.bytes > 0
            assert record.plan
    budgeted = [r for r in read_records(finished) if r.arm == "budget=20%"]
    assert all(record.bits_per_value <= 3.2 for record in budgeted)


def test_manifest_names_everything_that_a_reader_needs(finished: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    assert {"command", "sharer", "receiver", "prompt", "items", "arms", "dtype", "device", "versions"} <= set(manifest)
    assert manifest["items"]["count"] == 5
    assert len(manifest["sharer"]["weights"]) == 16


def test_summary_can_be_recomputed_and_an_unfinished_run_cannot(finished: Path, tmp_path: Path) -> None:
    before = (finished / "summary.json").read_text()
    recompute(finished)
    assert (finished / "summary.json").read_text() == before
    rows = {row["arm"]: row for row in json.loads(before)["arms"]}
    assert "f1_bought" in rows["fp16"]
    assert "f1_minus_text" in rows["fp16"]
    with pytest.raises(InputError, match="no run"):
        recompute(tmp_path)
    (tmp_path / "manifest.json").write_text((finished / "manifest.json").read_text())
    with pytest.raises(InputError, match="not finished"):
        recompute(tmp_path)


def test_the_wrong_cache_needs_a_second_context(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    with pytest.raises(InputError, match="two different contexts"):
        run(Link(lm, lm), samples()[:2], parse_arms(["wrong"]), tmp_path)


def test_odd_characters_in_answers_and_files_break_no_line(tmp_path: Path) -> None:
    odd = "a\u2028b\u0085c"
    rows = [item.model_copy(update={"question": odd}) for item in samples()[:2]]
    (tmp_path / "a.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows), "utf-8")
    assert [item.question for item in load_items(tmp_path / "a.jsonl")] == [odd, odd]
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 500)[:-20])
    with pytest.raises(InputError, match="cannot read"):
        load_items(tmp_path / "cut.jsonl.gz")
