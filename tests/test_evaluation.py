"""Runs keep every answer, lose nothing when killed, and put every control in its place."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import tiny_lm
from kvtalk import Link, Plan
from kvtalk.adapters.cards import Card, Party
from kvtalk.adapters.translator import Geometry
from kvtalk.errors import AdapterError, InputError, KVTalkError
from kvtalk.evaluation import folder, protocols, report, timing
from kvtalk.evaluation.arms import KINDS, Arm, make_arms
from kvtalk.evaluation.batch import Batch, Settings
from kvtalk.evaluation.curve import DEFAULT_PLANS, NARROWEST, controlled, default_plans, grid, normalized, pareto
from kvtalk.evaluation.data import Choice, Item, samples
from kvtalk.evaluation.protocols import protocol_for
from kvtalk.evaluation.runner import recompute, rescore, run
from kvtalk.evaluation.summary import Record, floor, read_records, route, summarize, table
from kvtalk.evaluation.tasks import task_named
from kvtalk.models import LM

PREFIX = [kind for kind in KINDS if kind != "fused"]
WAYS = ("fp16", "int4:token/int4:token value_norm@50%")
FREE = protocol_for(replace(task_named("invented"), max_new_tokens=6), metrics=("f1", "em", "contains", "nll"))
SETTINGS = Settings(batch=2, relay_tokens=5)


def few(count: int = 5) -> list[Item]:
    return [item.model_copy(update={"context": item.context[:120]}) for item in samples()[:count]]


def choices(count: int = 4) -> list[Item]:
    return [
        Choice(id=str(i), question=f"Which is number {i}?", choices=["one", "two", "three"][: 2 + i % 2], answer=i % 2)
        for i in range(count)
    ]


def link() -> Link:
    return Link(tiny_lm("gemma3"), tiny_lm("gemma3"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    arms = make_arms(PREFIX, [*WAYS, "budget=20%"], WAYS[:1])
    run(link(), FREE, few(), arms, out, SETTINGS)
    timing.time_arms(link(), FREE, few()[:2], arms[:4] + arms[5:6], SETTINGS, out)
    return out


def by_arm(out: Path) -> dict[str, dict[str, Record]]:
    found: dict[str, dict[str, Record]] = {}
    for record in read_records(out):
        found.setdefault(record.arm, {})[record.id] = record
    return found


def test_arms_from_names_and_plans() -> None:
    arms = make_arms(["zeroed", "receiver", "cache", "wrong"], ["int8", "budget=5KB int4", "bf16 contiguous"], ["int8"])
    assert [arm.name for arm in arms] == [
        "receiver",
        "cache int8",
        "wrong int8",
        "zeroed int8",
        "cache budget=5KB int4",
        "cache bf16 contiguous",
    ]
    assert arms[1].plan == Plan.parse("int8")
    assert (arms[4].budget, arms[4].plan) == ("5KB", Plan.parse("int4"))
    assert [arm.gaps for arm in arms] == [True] * 5 + [False]
    for kinds, ways, words in (
        (["caches"], [], "no arm 'caches'; there are receiver, sharer, text"),
        ([], [], "no arm to run"),
        (["cache", "cache"], [], "listed twice"),
        (["cache"], ["int8", "int8"], "listed twice"),
        (["routing", "receiver"], [], "add receiver and sharer"),
        (["cache"], ["budget=much"], "not a size"),
        (["cache"], ["zip"], "no codec 'zip'; there are fp32, bf16"),
    ):
        with pytest.raises(KVTalkError, match=words):
            make_arms(kinds, ways)


def test_protocols_and_metrics_are_named_when_unknown() -> None:
    with pytest.raises(InputError, match="squad has no protocol 'letter'; there are free"):
        protocol_for(task_named("squad"), "letter")
    with pytest.raises(InputError, match="no metric 'f1' in the protocol letter; there are acc, parsed"):
        protocol_for(task_named("arc_easy"), "letter", ["f1"])


def test_a_task_without_context_has_no_cache_to_send(tmp_path: Path) -> None:
    protocol = protocol_for(task_named("arc_easy"))
    with pytest.raises(InputError, match="no context.*use receiver, sharer, relay, routing"):
        run(link(), protocol, choices(), make_arms(["cache"]), tmp_path)


def test_every_item_is_in_every_arm_once(finished: Path) -> None:
    records = list(read_records(finished))
    arms = json.loads((finished / "manifest.json").read_text())["arms"]
    assert len(arms) == 5 + 4 + 1 + 1
    assert len({(record.id, record.arm) for record in records}) == len(records) == 5 * len(arms)


def test_the_same_model_on_both_sides_makes_these_arms_equal(finished: Path) -> None:
    arms = by_arm(finished)
    for one, other in (("sharer", "text"), ("cache fp16", "self fp16")):
        for key in arms[one]:
            assert arms[one][key].scores == arms[other][key].scores


def test_a_cache_of_16_bits_scores_like_the_text_and_destroyed_ones_do_not(finished: Path) -> None:
    arms = by_arm(finished)

    def distance(arm: str) -> float:
        return max(abs(arms["text"][key].scores["nll"] - arms[arm][key].scores["nll"]) for key in arms[arm])

    assert distance("cache fp16") < 0.01
    assert min(distance("wrong fp16"), distance("zeroed fp16")) > 5 * distance("cache fp16")


def test_a_batch_answers_like_single_items(finished: Path, tmp_path: Path) -> None:
    arms = [arm for arm in make_arms(PREFIX, [*WAYS, "budget=20%"], WAYS[:1]) if arm.kind != "routing"]
    run(link(), FREE, few(), arms, tmp_path, replace(SETTINGS, batch=1))
    together, alone = by_arm(finished), by_arm(tmp_path)
    for arm, records in alone.items():
        for key, record in records.items():
            assert record.scores["nll"] == pytest.approx(together[arm][key].scores["nll"], abs=2e-3), arm
            assert record.confidence == pytest.approx(together[arm][key].confidence, abs=2e-3), arm
            assert (record.bytes, record.plan) == (together[arm][key].bytes, together[arm][key].plan)


def test_bytes_and_plans_are_those_of_the_packets(finished: Path) -> None:
    arms = by_arm(finished)
    sharer = link().sharer
    for item in few():
        for way in WAYS:
            shared = sharer.share(item.context, plan=Plan.parse(way))
            record = arms[f"cache {way}"][item.id]
            assert record.bytes == len(shared.blob)
            assert record.bits_per_value == pytest.approx(shared.cost.bits_per_value, abs=1e-3)
        assert arms["text"][item.id].bytes == len(item.context.encode())
        assert arms["relay"][item.id].bytes == len(arms["relay"][item.id].sent.encode())
        assert arms["receiver"][item.id].bytes == 0
        assert arms["cache budget=20%"][item.id].bits_per_value <= 3.2


def test_the_wrong_cache_is_that_of_another_context(finished: Path) -> None:
    items = few()
    lengths = {len(item.context) for item in items}
    assert lengths == {120}
    following = {items[0].context: items[2].context, items[2].context: items[0].context}
    batch = Batch(link(), FREE, [items[0], items[2]], following, SETTINGS)
    swapped = Batch(link(), FREE, [items[2], items[0]], following, SETTINGS)
    wrong, right = Arm("wrong fp16", "wrong", Plan.parse("fp16")), Arm("cache fp16", "cache", Plan.parse("fp16"))
    ours = {record.id: record.scores["nll"] for record in batch.run(right)}
    theirs = {record.id: record.scores["nll"] for record in swapped.run(wrong)}
    assert all(abs(ours[key] - theirs[key]) > 1e-3 for key in ours)


def test_routing_takes_the_more_confident_answer(finished: Path) -> None:
    arms = by_arm(finished)
    for key, record in arms["routing"].items():
        chosen = arms[record.plan][key]
        assert chosen.confidence == max(arms["receiver"][key].confidence, arms["sharer"][key].confidence)
        assert record.answer == chosen.answer
    row = next(row for row in json.loads((finished / "summary.json").read_text())["arms"] if row["arm"] == "routing")
    assert row["sharer_share"] == sum(record.plan == "sharer" for record in arms["routing"].values()) / 5


def test_manifest_names_everything_that_a_reader_needs(finished: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    wanted = {"command", "task", "sharer", "receiver", "prompt", "items", "arms", "metrics", "dtype", "device"}
    assert wanted | {"versions", "decoding", "seed", "answer_tokens", "relay_tokens", "started"} <= set(manifest)
    assert manifest["items"]["count"] == 5
    assert len(manifest["sharer"]["weights"]) == 16


def test_summary_can_be_recomputed_and_an_unfinished_run_cannot(finished: Path, tmp_path: Path) -> None:
    before = (finished / "summary.json").read_text()
    recompute(finished)
    assert (finished / "summary.json").read_text() == before
    rows = {row["arm"]: row for row in json.loads(before)["arms"]}
    assert rows["cache fp16"]["control"] in ("wrong fp16", "zeroed fp16")
    assert {"gain", "gain_p", "minus_text"} <= set(rows["cache fp16"])
    assert "gain" not in rows["cache budget=20%"]  # its controls were not run
    with pytest.raises(InputError, match="no run"):
        recompute(tmp_path)
    shutil.copy(finished / "manifest.json", tmp_path)
    with pytest.raises(InputError, match="not finished"):
        recompute(tmp_path)


def test_gains_are_paired_differences_against_the_better_control() -> None:
    arms = make_arms(["cache", "wrong", "zeroed"], ["int8"])
    right = {"cache": [1, 1, 1, 0], "wrong": [0, 1, 0, 0], "zeroed": [0, 0, 0, 0]}
    records = [
        Record(str(row), f"{kind} int8", "", {"em": float(value)}, 0.5, 10, 8.0, "")
        for kind, values in right.items()
        for row, value in enumerate(values)
    ]
    row = summarize(records, arms, ["em"], 4)["arms"][0]
    assert row["control"] == "wrong int8"
    assert row["gain"][0] == 50
    assert row["gain_p"] == 0.5


@pytest.mark.parametrize("kinds", [["cache"], ["cache", "wrong"], ["cache", "zeroed", "text"]])
def test_a_run_without_both_controls_prints_no_gain(kinds: list[str]) -> None:
    arms = make_arms(kinds, ["int8"])
    records = [Record("1", arm.name, "", {"f1": 1.0}, 0.5, 10, 8.0, "") for arm in arms]
    summary = summarize(records, arms, ["f1"], 1)
    assert not any("gain" in row for row in summary["arms"])
    assert "gain" not in table(summary)[0]


def test_the_surer_of_two_is_the_receiver_when_they_are_level() -> None:
    records = [Record("1", arm, arm, {"acc": 1.0}, 0.5, 0, 0.0, "") for arm in ("receiver", "sharer")]
    assert [record.plan for record in route(records)] == ["receiver"]


def test_an_interrupted_run_goes_on_at_the_same_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = make_arms(["receiver", "cache", "wrong", "zeroed"])
    answered: list[tuple[str, int]] = []
    honest = Batch.run

    def counted(self: Batch, arm: Arm) -> list[Record]:
        if len(answered) == 5:
            raise KeyboardInterrupt
        answered.append((arm.name, len(self.items)))
        return honest(self, arm)

    monkeypatch.setattr(Batch, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        run(link(), FREE, few(), arms, tmp_path, SETTINGS)
    log = tmp_path / "items.partial.jsonl"
    assert log.read_text().count("\n") == 10
    with log.open("a") as file:
        file.write('{"id": "cut off in the mid')
    monkeypatch.setattr(Batch, "run", honest)
    run(link(), FREE, few(), arms, tmp_path, SETTINGS)
    records = list(read_records(tmp_path))
    assert len(records) == len({(record.id, record.arm) for record in records}) == 20
    assert not log.exists()


def test_another_run_in_the_folder_is_refused_and_the_same_one_is_done(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    arms = make_arms(PREFIX, [*WAYS, "budget=20%"], WAYS[:1])
    before = (out / "items.jsonl.gz").read_bytes()
    run(link(), FREE, few(), arms, out, SETTINGS)
    assert gzip.decompress((out / "items.jsonl.gz").read_bytes()) == gzip.decompress(before)
    for other, words in (
        (lambda: run(link(), FREE, few(4), arms, out, SETTINGS), "items differ"),
        (lambda: run(link(), FREE, few(), arms[:3], out, SETTINGS), "arms differ"),
        (lambda: run(Link(tiny_lm("llama"), tiny_lm("llama")), FREE, few(), arms, out, SETTINGS), "sharer, receiver"),
        (lambda: run(link(), FREE, few(), arms, out, replace(SETTINGS, seed=1)), "seed differ"),
    ):
        with pytest.raises(InputError, match=words):
            other()


def test_a_run_gets_further_arms_and_keeps_its_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(link(), FREE, few(), make_arms(["receiver", "cache"]), tmp_path, SETTINGS)
    asked: list[str] = []
    honest = Batch.run
    monkeypatch.setattr(Batch, "run", lambda self, arm: asked.append(arm.name) or honest(self, arm))
    summary = run(link(), FREE, few(), make_arms(["receiver", "cache", "wrong", "zeroed"]), tmp_path, SETTINGS)
    assert set(asked) == {"wrong bf16", "zeroed bf16"}
    assert "gain" in {key for row in summary["arms"] for key in row}
    assert len(json.loads((tmp_path / "manifest.json").read_text())["earlier"]) == 1


def test_the_wrong_cache_needs_a_second_context(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two different contexts"):
        run(link(), FREE, samples()[:2], make_arms(["wrong"]), tmp_path)


def test_what_the_controls_need_is_asked_for_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(InputError, match=r"needs scipy: pip install 'kvtalk\[eval\]'"):
        run(link(), FREE, few(), make_arms(["cache", "wrong", "zeroed"]), tmp_path / "run", SETTINGS)
    assert not (tmp_path / "run").exists()


def test_metrics_of_words_are_added_without_a_model(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    summary = rescore(out, FREE, few(), ["kvcomm", "coherence_published"], "")
    assert summary["metrics"] == ["f1", "em", "contains", "nll", "kvcomm", "coherence_published"]
    with pytest.raises(InputError, match="other items"):
        rescore(out, FREE, few(4), ["kvcomm"], "")


def test_added_metrics_and_added_arms_do_not_mix(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    rescore(out, FREE, few(), ["kvcomm"], "")
    with pytest.raises(InputError, match="metrics differ"):
        run(link(), FREE, few(), make_arms(PREFIX, [*WAYS, "budget=20%", "int8"], WAYS[:1]), out, SETTINGS)
    (out / "items.partial.jsonl").write_text("")
    with pytest.raises(InputError, match="not finished"):
        rescore(out, FREE, few(), ["kvcomm"], "")


def test_two_processes_do_not_share_a_folder(finished: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    with folder.claimed(finished, manifest), pytest.raises(InputError, match="another process"):
        run(link(), FREE, few(), make_arms(PREFIX, [*WAYS, "budget=20%"], WAYS[:1]), finished, SETTINGS)


def test_items_that_are_too_long_are_left_out_and_named(tmp_path: Path) -> None:
    long = few()[0].model_copy(update={"id": "long", "context": "x" * 2000})
    run(link(), FREE, [*few(), long], make_arms(["receiver", "text"]), tmp_path, SETTINGS)
    assert json.loads((tmp_path / "manifest.json").read_text())["items"]["left_out"] == ["long"]
    assert len(list(read_records(tmp_path))) == 10
    with pytest.raises(InputError, match="every item is longer"):
        run(link(), FREE, [long], make_arms(["receiver"]), tmp_path / "none", SETTINGS)


def test_another_models_cache_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    pair = Link(tiny_lm("llama"), tiny_lm("gemma3"))
    with pytest.raises(AdapterError, match="does not fit gemma3.*kvtalk train translator"):
        run(pair, FREE, few(), make_arms(["receiver", "cache"]), tmp_path, SETTINGS)
    run(pair, FREE, few(), make_arms(["receiver", "sharer", "text", "relay", "routing"]), tmp_path, SETTINGS)


@pytest.mark.parametrize("word", ["", "a"])
def test_a_batch_without_any_answer_is_told(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [item.model_copy(update={"id": f"{row}-{item.id}"}) for row in range(7) for item in few()]

    def run_batch(batch: Batch, arm: Arm) -> list[Record]:
        return [Record(item.id, arm.name, word, dict.fromkeys(FREE.metrics, 0.0), 0, 0, 0, "") for item in batch.items]

    monkeypatch.setattr(Batch, "run", run_batch)
    run(link(), FREE, items, make_arms(["receiver"]), tmp_path, replace(SETTINGS, batch=35))
    assert ("receiver: all 35 answers of a batch are empty" in capsys.readouterr().out) == (not word)


def test_nan_is_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = protocol_for(task_named("arc_easy"), "likelihood")
    monkeypatch.setattr(LM, "logits", lambda self, rows, placed, keep=0: torch.full((len(rows), 8, 258), torch.nan))
    with pytest.raises(InputError, match="gives NaN or infinity in torch.float32 for item"):
        run(link(), protocol, choices(), make_arms(["receiver"]), tmp_path, SETTINGS)


def test_a_damaged_file_of_answers_says_so(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    (out / "items.jsonl.gz").write_bytes((out / "items.jsonl.gz").read_bytes()[:-30])
    with pytest.raises(InputError, match="damaged"):
        recompute(out)
    (out / "summary.json").write_text("{}")
    with pytest.raises(InputError, match="not finished"):
        report.write([out], tmp_path / "report.html", "")
    (out / "manifest.json").write_text("[]")
    with pytest.raises(InputError, match="no run"):
        recompute(out)


def test_letters_and_likelihoods_of_options(tmp_path: Path) -> None:
    for name in ("letter", "likelihood"):
        protocol = protocol_for(task_named("arc_easy"), name)
        run(
            link(),
            protocol,
            choices(),
            make_arms(["receiver", "sharer", "relay", "routing"]),
            tmp_path / name,
            SETTINGS,
        )
    for record in read_records(tmp_path / "letter"):
        assert set(record.scores) == {"acc", "parsed", "acc_published"}
    lm = tiny_lm("gemma3")
    for record in read_records(tmp_path / "likelihood"):
        if record.arm != "receiver":
            continue
        item = next(item for item in choices() if item.id == record.id)
        prompt = lm.encode(f"Question: {item.question}\nAnswer:")
        for choice, found in zip(item.choices, record.likelihoods, strict=True):
            ids = lm.encode(f" {choice}")
            logits = lm.logits([prompt + ids], lm.place([[]], head=False))[0].log_softmax(-1)
            wanted = sum(float(logits[len(prompt) - 1 + step, token]) for step, token in enumerate(ids))
            assert found == pytest.approx(wanted, abs=1e-3)


def test_options_are_compared_alike_however_few_are_taken_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = protocol_for(task_named("arc_easy"), "likelihood")
    found = []
    for name, limit in (("whole", None), ("parts", 1)):
        if limit is not None:
            monkeypatch.setattr(protocols, "_LOGITS", limit)
            monkeypatch.setattr(protocols, "_WIDENED", limit)
        run(link(), protocol, choices(), make_arms(["receiver"]), tmp_path / name, SETTINGS)
        found.append({record.id: record.likelihoods for record in read_records(tmp_path / name)})
    for key, likelihoods in found[0].items():
        assert found[1][key] == pytest.approx(likelihoods, abs=1e-4)


@pytest.mark.parametrize(("latent", "count"), [(1024, 15), (104, 5), (64, 8), (24, 3)])
def test_plans_of_a_curve_of_latents(latent: int, count: int) -> None:
    geometry = Geometry(sharer_values=8, receiver_layers=1, receiver_values=8, latent=latent)
    party = Party("model", link().sharer.lm.spec.fingerprint)
    ways = normalized(default_plans(Card("translator", party, party, geometry, {}, None, {})))
    assert len(set(ways)) == len(ways) == count
    plans = [Plan.parse(way) for way in ways]
    assert all(plan.width is None or NARROWEST <= plan.width <= latent for plan in plans)
    largest, *others = controlled(ways)
    assert largest == "bf16"
    if latent == 1024:
        assert others == ["int4:token width=256", "int4:token width=32"]


def test_plans_of_a_curve() -> None:
    assert len(DEFAULT_PLANS) >= 24
    ways = normalized(DEFAULT_PLANS)
    assert len(set(ways)) == len(ways)
    assert controlled(ways)[0] == "bf16"
    assert grid(["int8", "bf16"], ["front"], ["50%", "100%"], ["all", "last:50%"]) == [
        "int8:token front@50%",
        "int8:token front@50% layers=last:50%",
        "int8:token",
        "int8:token layers=last:50%",
        "bf16 front@50%",
        "bf16 front@50% layers=last:50%",
        "bf16",
        "bf16 layers=last:50%",
    ]
    assert controlled(["int4", "bf16", "int8"]) == ["bf16", "int8", "int4"]
    assert controlled(["int4"]) == ["int4"]
    assert controlled(["int4", "budget=10%", "bf16"]) == ["bf16", "int4"]


def test_the_front_is_what_no_smaller_packet_matches() -> None:
    rows = [
        {"kind": "cache", "bytes": size, "f1": [score, score - 1, score + 1], "plan": name}
        for name, size, score in (("a", 10, 5.0), ("b", 20, 4.0), ("c", 20, 9.0), ("d", 30, 9.0), ("e", 40, 11.0))
    ]
    assert [row["plan"] for row in pareto(rows, "f1")] == ["a", "c", "e"]
    assert floor(rows, "f1") is None
    assert floor([{**rows[0], "kind": "wrong"}, {**rows[2], "kind": "zeroed"}], "f1") == (4.0, 10.0)


def test_phases_are_timed_one_by_one(finished: Path) -> None:
    medians = timing.medians(finished)
    assert set(medians) == {"receiver", "sharer", "text", "relay", "cache fp16"}
    assert all(medians["cache fp16"][phase] > 0 for phase in ("prefill", "encode", "decode", "place", "first_token"))
    assert medians["relay"]["relay"] > 0
    assert medians["text"]["prefill"] == 0


def test_a_report_holds_every_run_and_nothing_from_elsewhere(finished: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    report.write([finished], page, "A <title>")
    text = page.read_text()
    assert "A &lt;title&gt;" in text
    for words in ("Invented passages", "cache fp16", "zeroed fp16", "median milliseconds", "kvtalk eval --recompute"):
        assert words in text
    for item in json.loads((finished / "sample.json").read_text()):
        assert item["question"].replace("'", "&#39;") in text
    assert "src=" not in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    with pytest.raises(InputError, match="no run"):
        report.write([tmp_path], page, "")


def test_questions_of_a_closed_licence_stay_out_of_results(tmp_path: Path) -> None:
    protocol = protocol_for(task_named("ceval"), "likelihood")
    run(link(), protocol, choices(), make_arms(["receiver"]), tmp_path, SETTINGS)
    assert all(set(item) == {"id"} for item in json.loads((tmp_path / "sample.json").read_text()))
    report.write([tmp_path], tmp_path / "report.html", "C-Eval")
    assert "Which is number" not in (tmp_path / "report.html").read_text()
