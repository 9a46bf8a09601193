"""Fused arms: an untrained fuser changes no score, every control reads what it says, and each packet is counted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import tiny_lm
from kvtalk import Link, Plan
from kvtalk.adapters import fusing
from kvtalk.adapters.cards import Party
from kvtalk.adapters.fuser import Fuser
from kvtalk.adapters.fusing import SharerSide
from kvtalk.adapters.store import save_adapter
from kvtalk.cache import KVCache
from kvtalk.errors import InputError
from kvtalk.evaluation import report, timing
from kvtalk.evaluation.arms import make_arms
from kvtalk.evaluation.batch import Batch, Settings
from kvtalk.evaluation.data import Choice, Item, Passage, samples
from kvtalk.evaluation.protocols import Protocol, protocol_for
from kvtalk.evaluation.runner import run
from kvtalk.evaluation.summary import Record, read_records, summarize, table
from kvtalk.evaluation.tasks import task_named
from kvtalk.fusion import FusedLink
from kvtalk.models import LM
from kvtalk.shared_prompts import Prompt
from test_fuser import geometry_of, other_lm, random_fuser

ARC = task_named("arc_easy")
PROTOCOLS: dict[str, Protocol] = {
    "likelihood": protocol_for(ARC, "likelihood"),
    "letter": protocol_for(ARC, "letter"),
    "free": protocol_for(replace(task_named("invented"), max_new_tokens=6), metrics=("f1", "em", "nll")),
}
KINDS = ("receiver", "fused", "wrong", "zeroed", "self")
SETTINGS = Settings(batch=3, relay_tokens=5)


@pytest.fixture(scope="module", autouse=True)
def short_letters() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvtalk.evaluation.protocols.LETTER_TOKENS", 4)
        yield


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FusedLink]]:
    """The same two models with fusers that were never trained, and with fusers whose every weight matters."""
    receiver, sharer, folder = tiny_lm("gemma3"), other_lm(), tmp_path_factory.mktemp("fusers")
    names = {lm.name: lm.tokenizer for lm in (sharer, receiver)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusing, "tokenizer_of", names.__getitem__)
        for name, lm in (("between", sharer), ("own", receiver)):
            parties = [Party(one.name, one.spec.fingerprint) for one in (lm, receiver)]
            geometry = geometry_of(lm, receiver)
            save_adapter(Fuser(geometry), *parties, folder / f"untrained {name}", "fp32")
            save_adapter(random_fuser(geometry), *parties, folder / f"random {name}", "fp32")
        yield {
            **{
                kind: FusedLink(sharer, receiver, folder / f"{kind} between", folder / f"{kind} own")
                for kind in ("untrained", "random")
            },
            "without self": FusedLink(sharer, receiver, folder / "random between"),
            "another self": FusedLink(sharer, receiver, folder / "random between", folder / "untrained own"),
        }


def items_of(name: str, count: int = 5) -> list[Item]:
    if name == "free":
        return [
            item.model_copy(update={"context": item.context[: 60 + 9 * i]}) for i, item in enumerate(samples()[:count])
        ]
    words = ["one", "two", "three"]
    return [
        Choice(id=str(i), question=f"Which {'is ' * (i % 3)}number {i}?", choices=words[: 2 + i % 2], answer=i % 2)
        for i in range(count)
    ]


def evaluated(
    link: Link, name: str, out: Path, kinds: Sequence[str] = KINDS, ways: Sequence[str] = ("fp32",), batch: int = 3
) -> dict[str, dict[str, Record]]:
    run(link, PROTOCOLS[name], items_of(name), make_arms(kinds, ways), out, replace(SETTINGS, batch=batch))
    found: dict[str, dict[str, Record]] = {}
    for record in read_records(out):
        found.setdefault(record.arm, {})[record.id] = record
    return found


def figures(record: Record) -> list[float]:
    return [*record.likelihoods, record.scores.get("nll", 0.0), record.confidence]


@pytest.fixture(scope="module")
def finished(links: dict[str, FusedLink], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in PROTOCOLS:
        found[name] = tmp_path_factory.mktemp(name)
        evaluated(links["random"], name, found[name])
    return found


@pytest.mark.parametrize("name", PROTOCOLS)
def test_with_an_untrained_fuser_every_arm_answers_as_the_receiver_alone(
    links: dict[str, FusedLink], name: str, tmp_path: Path
) -> None:
    arms = evaluated(links["untrained"], name, tmp_path, ways=("fp32", "int4 value_norm@25%"))
    assert len(arms) == 1 + 2 * 4
    for arm, records in arms.items():
        for key, record in records.items():
            alone = arms["receiver"][key]
            assert record.answer == alone.answer, arm
            assert figures(record) == pytest.approx(figures(alone), abs=1e-4), arm
            assert record.scores == pytest.approx(alone.scores, abs=1e-4)
            assert (record.bytes > 0) == (arm != "receiver")


@pytest.mark.parametrize("name", ["likelihood", "free"])
def test_every_arm_is_another_one_when_the_fuser_matters(finished: dict[str, Path], name: str) -> None:
    arms: dict[str, dict[str, Record]] = {}
    for record in read_records(finished[name]):
        arms.setdefault(record.arm, {})[record.id] = record
    for arm, other in (
        ("fused fp32", "receiver"),
        ("wrong fp32", "fused fp32"),
        ("zeroed fp32", "fused fp32"),
        ("self fp32", "fused fp32"),
        ("zeroed fp32", "receiver"),
    ):
        for key in arms[arm]:
            pairs = zip(figures(arms[arm][key]), figures(arms[other][key]), strict=True)
            assert max(abs(one - another) for one, another in pairs) > 1e-3, (arm, other)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_batch_answers_as_single_items(
    links: dict[str, FusedLink], finished: dict[str, Path], name: str, tmp_path: Path
) -> None:
    alone = evaluated(links["random"], name, tmp_path, batch=1)
    for record in read_records(finished[name]):
        other = alone[record.arm][record.id]
        assert figures(record) == pytest.approx(figures(other), abs=2e-3), record.arm
        assert (record.bytes, record.plan) == (other.bytes, other.plan)


# What the wrong arm reads


Read = list[tuple[str, list[Prompt]]]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    """What sharers are given: their name and prompts, call by call."""
    seen: Read = []
    honest = SharerSide.read

    def watched(self: SharerSide, prompts: Sequence[Prompt], *rest: object) -> KVCache:
        seen.append((self.lm.name, list(prompts)))
        return honest(self, prompts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(SharerSide, "read", watched)
    return seen


@pytest.mark.parametrize("name", ["likelihood", "letter"])
def test_the_wrong_arm_reads_another_question(
    links: dict[str, FusedLink], name: str, tmp_path: Path, read: Read
) -> None:
    twins = [item.model_copy(update={"id": f"twin {item.id}"}) for item in items_of(name)[:3]]
    both = [*items_of(name), *twins]
    run(links["random"], PROTOCOLS[name], both, make_arms(["fused", "wrong"]), tmp_path, SETTINGS)
    assert len(read) == 6
    questions = [item.question for item in both]
    for (_, own), (_, wrong) in zip(read[::2], read[1::2], strict=True):
        for mine, theirs in zip(own, wrong, strict=True):
            assert mine.shared != theirs.shared
            assert any(question in theirs.shared for question in questions)


def test_the_wrong_arm_reads_the_question_after_another_context(
    links: dict[str, FusedLink], tmp_path: Path, read: Read
) -> None:
    items = items_of("free", 3)
    run(links["random"], PROTOCOLS["free"], items, make_arms(["fused", "wrong"]), tmp_path, SETTINGS)
    contexts = [item.context for item in items if isinstance(item, Passage)]
    (_, own), (_, wrong) = read
    for mine, theirs in zip(own, wrong, strict=True):
        assert mine.shared == theirs.shared
        assert mine.before != theirs.before
        assert any(context in theirs.before for context in contexts)


def test_another_items_text_reaches_the_wrong_answer_and_no_other(links: dict[str, FusedLink], tmp_path: Path) -> None:
    arms = make_arms(KINDS, ["fp32"])
    found = []
    for word in ("north", "south"):  # of the same length, so that the order stays
        second = Choice(id="second", question=f"What lies {word} of here?", choices=["a", "b"], answer=0)
        items = [*items_of("likelihood", 1), second]
        run(links["random"], PROTOCOLS["likelihood"], items, arms, tmp_path / word, SETTINGS)
        found.append({record.arm: figures(record) for record in read_records(tmp_path / word) if record.id == "0"})
    for arm in found[0]:
        same = found[0][arm] == pytest.approx(found[1][arm], abs=1e-5)
        assert same == (arm != "wrong fp32")


# What it gains


def test_a_gain_is_over_the_best_of_three_controls() -> None:
    right = {"fused": [1, 1, 1, 1], "wrong": [0, 1, 0, 0], "zeroed": [0, 0, 0, 0], "self": [0, 1, 1, 1]}
    for worst in ("wrong", "zeroed", "self"):
        scores = {**right, worst: [0, 1, 1, 1], **({"self": [0, 0, 0, 0]} if worst != "self" else {})}
        arms = make_arms(list(scores), ["int8"])
        records = [
            Record(str(row), f"{kind} int8", "", {"acc_norm": float(value)}, 0.5, 10, 8.0, "")
            for kind, values in scores.items()
            for row, value in enumerate(values)
        ]
        rows = {row["kind"]: row for row in summarize(records, arms, ["acc_norm"], 4, contexts=False)["arms"]}
        assert rows["fused"]["control"] == f"{worst} int8"
        assert rows["fused"]["gain"][0] == 25
        assert not any("gain" in rows[kind] for kind in ("wrong", "zeroed", "self"))
        for missing in ("wrong", "zeroed", "self"):
            fewer = summarize(records, [arm for arm in arms if arm.kind != missing], ["acc_norm"], 4, contexts=False)
            assert not any("gain" in row for row in fewer["arms"])
            assert "gain" not in table(fewer)[0]


def test_a_finished_run_says_what_the_sharer_bought(finished: dict[str, Path], tmp_path: Path) -> None:
    for name, out in finished.items():
        rows = {row["kind"]: row for row in json.loads((out / "summary.json").read_text())["arms"]}
        # Of a context the receiver as its own sharer reads more than alone: that is a transfer too, and no control.
        controls, gaining = ({"wrong", "zeroed"}, ["fused", "self"]) if name == "free" else (set(KINDS[2:]), ["fused"])
        assert rows["fused"]["control"] in {f"{kind} fp32" for kind in controls}
        assert [kind for kind, row in rows.items() if "gain" in row] == gaining
        report.write([out], tmp_path / "report.html", "Fused")
        said = (tmp_path / "report.html").read_text().partition('class="verdict">')[2].partition("</p>")[0]
        for words in ("the sharer&#39;s cache (fp32", "the cache of another text", "a zeroed one"):
            assert words in said
        assert ("the receiver&#39;s own in its place" in said) == (name != "free")


# What is refused


def test_cache_and_fused_are_run_apart() -> None:
    with pytest.raises(InputError, match="cache and fused are two placements.*run them apart"):
        make_arms(["receiver", "cache", "fused"])


def test_fused_needs_a_fuser_and_a_fuser_needs_fused(links: dict[str, FusedLink], tmp_path: Path) -> None:
    def refused(link: Link, kinds: Sequence[str], words: str) -> None:
        with pytest.raises(InputError, match=words):
            run(link, PROTOCOLS["free"], items_of("free"), make_arms(kinds), tmp_path / "run", SETTINGS)

    lm, fused = tiny_lm("gemma3"), "the arm fused needs a fuser, and a fuser the arm fused"
    refused(Link(lm, lm), ["receiver", "fused"], fused)
    refused(Link(other_lm(), lm), ["receiver", "fused"], fused)
    for kinds in (["receiver"], ["receiver", "wrong", "zeroed"], ["receiver", "text", "cache"]):
        refused(links["random"], kinds, fused)
    refused(links["without self"], ["fused", "self"], "--self-fuser")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="with a fuser fused, wrong, zeroed, self"):
        run(links["random"], PROTOCOLS["likelihood"], items_of("likelihood"), make_arms(["wrong"]), tmp_path, SETTINGS)


# What crosses, and what is kept


@pytest.mark.parametrize("name", ["likelihood", "free"])
def test_bytes_are_those_of_the_packets(links: dict[str, FusedLink], name: str, tmp_path: Path) -> None:
    link, ways = links["random"], ("bf16", "int4 value_norm@25%", "budget=40%")
    arms = evaluated(link, name, tmp_path, ("receiver", "fused", "zeroed", "self"), ways)
    for item in items_of(name):
        assert arms["receiver"][item.id].bytes == 0
        for fusion, kind in ((link.fusion, "fused"), (link.own, "self")):
            assert fusion is not None
            sharer = fusion.sharers[0]
            prompt = PROTOCOLS[name].fused_prompts(sharer.side.lm, link.receiver.lm, item)[0]
            cache = sharer.read(prompt)
            for way in ways:
                given = (way.removeprefix("budget="), None) if "=" in way else (None, Plan.parse(way))
                plan = sharer.plan(cache, *given)
                blob = sharer.encode_rows([prompt], cache, [plan])[0]
                record = arms[f"{kind} {way}"][item.id]
                assert (record.bytes, record.plan) == (len(blob), str(plan))
                assert record.bits_per_value == pytest.approx(sharer.bits(blob, cache.length[0]), abs=1e-3)
        assert arms["zeroed bf16"][item.id].bytes == arms["fused bf16"][item.id].bytes
        assert arms["fused budget=40%"][item.id].bits_per_value <= 6.4


def test_an_interrupted_run_goes_on_and_gets_the_arm_self_later(
    links: dict[str, FusedLink], finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, answered = Batch.run, []

    def counted(self: Batch, arm: object) -> list[Record]:
        if len(answered) == 5:
            raise KeyboardInterrupt
        answered.append(arm)
        return honest(self, arm)  # type: ignore[arg-type]

    monkeypatch.setattr(Batch, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(links["without self"], "likelihood", tmp_path, KINDS[:4])
    monkeypatch.undo()
    assert (tmp_path / "items.partial.jsonl").read_text().count("\n") == 3 * 4 + 2
    evaluated(links["without self"], "likelihood", tmp_path, KINDS[:4])
    assert not any("gain" in row for row in json.loads((tmp_path / "summary.json").read_text())["arms"])
    evaluated(links["random"], "likelihood", tmp_path)
    ours, whole = (
        sorted(read_records(out), key=lambda one: (one.arm, one.id)) for out in (tmp_path, finished["likelihood"])
    )
    assert ours == whole
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["adapter"]["identity"] == links["random"].card.identity
    assert manifest["self_adapter"]["identity"] != manifest["adapter"]["identity"]
    for link, words in (("another self", "self_adapter differ"), ("untrained", "adapter, self_adapter differ")):
        with pytest.raises(InputError, match=f"holds another run \\({words}"):
            evaluated(links[link], "likelihood", tmp_path)


@pytest.mark.parametrize("name", ["letter", "free"])
def test_fused_arms_are_timed_with_all_their_phases(
    links: dict[str, FusedLink], name: str, tmp_path: Path, read: Read
) -> None:
    link = links["random"]
    kinds = ("receiver", "sharer", "relay", *KINDS[1:])
    items = items_of(name, 2)
    timing.time_arms(link, PROTOCOLS[name], items, make_arms(kinds, ["int8", "budget=40%"]), SETTINGS, tmp_path)
    medians = timing.medians(tmp_path)
    sent = ["fused int8", "self int8", "fused budget=40%", "self budget=40%"]
    assert set(medians) == {"receiver", "sharer", "relay", *sent}
    for arm in sent:
        row = medians[arm]
        assert all(row[phase] > 0 for phase in ("prefill", "encode", "decode", "place", "first_token"))
        assert row["receiver_first_token"] < row["to_first_token"] <= row["total"]
    assert medians["receiver"]["prefill"] == medians["receiver"]["place"] == 0
    lms = {"fused": other_lm(), "self": tiny_lm("gemma3")}
    wanted = [
        (lm.name, [PROTOCOLS[name].fused_prompts(lm, tiny_lm("gemma3"), item)[0]])
        for lm in (lms[arm.split()[0]] for arm in sent)
        for item in (items[0], *items)  # once to warm up
    ]
    assert read == wanted


def test_the_timed_answer_is_the_evaluated_one(links: dict[str, FusedLink], finished: dict[str, Path]) -> None:
    for name in ("letter", "free"):
        records = {record.id: record for record in read_records(finished[name]) if record.arm == "fused fp32"}
        arm = make_arms(["fused"], ["fp32"])[0]
        for item in items_of(name):
            made = timing._fused(links["random"], PROTOCOLS[name], item, arm)
            assert (made.text, made.cost.bytes) == (records[item.id].answer, records[item.id].bytes)


def test_the_same_model_reads_for_itself_in_the_arm_self(links: dict[str, FusedLink]) -> None:
    own: LM | None = links["random"].own and links["random"].own.sharers[0].side.lm
    assert own is links["random"].receiver.lm is tiny_lm("gemma3")
