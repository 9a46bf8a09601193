"""Tasks read the same rows from a file, from the hub's layout and from ourselves; answers are scored officially."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from kvtalk.errors import InputError
from kvtalk.evaluation import data, metrics
from kvtalk.evaluation.data import Choice, Passage, samples, unrelated_text
from kvtalk.evaluation.letters import read_as_published, read_strictly
from kvtalk.evaluation.metrics import METRICS, check_metrics, coherence, contains_answer, exact_match, f1, kvcomm
from kvtalk.evaluation.statistics import bootstrap, mcnemar
from kvtalk.evaluation.tasks import TASKS, task_named

ABCD = {"text": ["w", "x", "y", "z"], "label": ["A", "B", "C", "D"]}
HUB_ROWS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "openbookqa": {"main": [{"id": "7-1", "question_stem": "Q?", "choices": ABCD, "answerKey": "C"}]},
    "arc_challenge_letters": {
        "ARC-Challenge": [
            {"id": "1", "question": "Q?", "choices": ABCD, "answerKey": "B"},
            {"id": "2", "question": "Q?", "choices": {"text": ["v", "w"], "label": ["1", "2"]}, "answerKey": "2"},
        ]
    },
    "mmlu_redux": {
        "anatomy": [
            {"question": "Q1", "choices": list("wxyz"), "answer": 1, "error_type": "ok", "correct_answer": None},
            {"question": "Q2", "choices": list("wxyz"), "answer": 1, "error_type": "expert", "correct_answer": None},
        ],
        "virology": [
            {
                "question": "Q3",
                "choices": list("wxyz"),
                "answer": 1,
                "error_type": "wrong_groundtruth",
                "correct_answer": "3",
            }
        ],
    },
    "ceval": {
        "law": [{"id": 0, "question": "问", "A": "w", "B": "x", "C": "y", "D": "z", "answer": "D"}],
        "physics": [{"id": 0, "question": "问", "A": "w", "B": "x", "C": "y", "D": "z", "answer": "A"}],
    },
    "cmmlu": {"law": [{"id": 0, "Question": "问", "A": "w", "B": "x", "C": "y", "D": "z", "Answer": "D"}]},
    "squad": {
        "plain_text": [
            {
                "id": "s",
                "context": "C",
                "question": "Q?",
                "answers": {"text": ["a", "a", "b"], "answer_start": [0, 0, 1]},
            }
        ]
    },
    "hotpotqa": {
        "distractor": [
            {
                "id": "h",
                "question": "Q?",
                "answer": "yes",
                "context": {"title": ["T", "U"], "sentences": [["One. ", "Two."], ["Three."]]},
                "supporting_facts": {"title": ["T", "U"], "sent_id": [1, 0]},
            }
        ]
    },
    "narrativeqa": {
        "default": [
            {
                "document": {"summary": {"text": " A tale. "}},
                "question": {"text": f"Q{number}?"},
                "answers": [{"text": "x"}, {"text": "y"}],
            }
            for number in range(8)
        ]
    },
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders laid out as data sets on the hub are."""
    root = tmp_path_factory.mktemp("hub")
    for name, configs in HUB_ROWS.items():
        hub = TASKS[name].hub
        assert hub is not None
        lines = ["---", "configs:"]
        for config, rows in configs.items():
            file = f"{config}/{hub.split}-00000-of-00001.parquet"
            (root / name / config).mkdir(parents=True)
            Dataset.from_list(rows).to_parquet(root / name / file)
            lines += [f"- config_name: {config}", "  data_files:", f"  - split: {hub.split}", f"    path: {file}"]
        (root / name / "README.md").write_text("\n".join([*lines, "---", ""]))
    return root


@pytest.mark.parametrize("name", list(HUB_ROWS))
def test_every_hub_data_set_is_read_in_its_own_layout(name: str, hub: Path) -> None:
    items = TASKS[name].load(hub_id=str(hub / name))
    for item in items:
        assert isinstance(item, Passage if TASKS[name].has_context else Choice)
    by_task = {
        "openbookqa": lambda: items[0].answer == 2,
        "arc_challenge_letters": lambda: [item.id for item in items] == ["1"],
        "mmlu_redux": lambda: (
            [(item.question, item.answer, item.subject) for item in items]
            == [("Q1", 1, "anatomy"), ("Q3", 3, "virology")]
        ),
        "ceval": lambda: [(item.answer, item.subject) for item in items] == [(3, "law"), (0, "physics")],
        "cmmlu": lambda: items[0].question == "问",
        "squad": lambda: items[0].answers == ["a", "b"],
        "hotpotqa": lambda: items[0].context == "T: One. Two.\n\nU: Three." and items[0].support == ["Two.", "Three."],
        "narrativeqa": lambda: (
            [item.question for item in items] == [f"Q{number}?" for number in range(8)]
            and items[0].context == "A tale."
        ),
    }
    assert by_task[name]()


def test_a_hub_data_set_of_another_form_says_where(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: plain_text\n  data_files:\n  - split: validation\n    path: a.parquet\n---\n"
    )
    Dataset.from_list([{"id": "1", "passage": "c"}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"plain_text, row 0: KeyError\('answers'\); another revision"):
        TASKS["squad"].load(hub_id=str(tmp_path))
    with pytest.raises(InputError, match="could not be loaded"):
        TASKS["openbookqa"].load(hub_id=str(tmp_path))


def test_what_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(data.ENVIRONMENT, raising=False)
    with pytest.raises(InputError, match=r"give a local file with --data or KVTALK_DATA"):
        TASKS["squad"].load()
    with pytest.raises(InputError, match=r"not on the hub: give a folder with kvcomm_countries.jsonl"):
        TASKS["countries"].load()
    with pytest.raises(InputError, match=r"neither a file nor a folder with squad_v1_test.jsonl or"):
        TASKS["squad"].load(tmp_path)
    with pytest.raises(InputError, match="no task 'sqad'; there are squad, hotpotqa"):
        task_named("sqad")


def test_local_files_are_found_by_folder_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "".join(item.model_dump_json() + "\n" for item in samples()[:3])
    (tmp_path / "squad_v1_test.jsonl").write_text(rows)
    (tmp_path / "mine.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path))
    for source in (tmp_path, tmp_path / "mine.jsonl.gz", None):
        assert TASKS["squad"].load(source) == samples()[:3]
    assert len(TASKS["squad"].load(tmp_path, limit=2)) == 2
    assert TASKS["invented"].load() == samples()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"id": "1", "context": "c", "question": "q"}, "line 1: answers.*expected the fields id, question, context"),
        ({"id": "1", "context": "", "question": "q", "answers": ["a"]}, "line 1: context"),
        ({"id": "1", "context": "c", "question": "q", "answers": []}, "line 1: answers"),
        ([1], "line 1"),
    ],
)
def test_a_row_that_breaks_the_format_is_named_by_line(row: object, words: str, tmp_path: Path) -> None:
    (tmp_path / "squad_v1_test.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=words):
        TASKS["squad"].load(tmp_path)


def test_files_that_are_no_files_of_rows(tmp_path: Path) -> None:
    for name, content, words in (
        ("empty.jsonl", b"", "no items"),
        ("cut.jsonl.gz", gzip.compress(b"{}" * 500)[:-20], "cannot read"),
        ("latin.jsonl", b'{"id": "\xe9"}', "cannot read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words):
            TASKS["squad"].load(tmp_path / name)
    choice = {"id": "1", "question": "q", "choices": ["a", "b"], "answer": 2}
    (tmp_path / "choice.jsonl").write_text(json.dumps(choice) + "\n")
    with pytest.raises(InputError, match="answer 2 of 2 choices"):
        TASKS["openbookqa"].load(tmp_path / "choice.jsonl")
    (tmp_path / "blank.jsonl").write_text(json.dumps({**choice, "answer": 1, "choices": ["a", ""]}) + "\n")
    with pytest.raises(InputError, match="line 1: choices.1"):
        TASKS["openbookqa"].load(tmp_path / "blank.jsonl")
    twice = json.dumps({**choice, "answer": 1}) + "\n"
    (tmp_path / "twice.jsonl").write_text(twice * 2)
    with pytest.raises(InputError, match="same id"):
        TASKS["openbookqa"].load(tmp_path / "twice.jsonl")


def test_odd_characters_break_no_line(tmp_path: Path) -> None:
    odd = "a\u2028b\u0085c"
    rows = [item.model_copy(update={"question": odd}) for item in samples()[:2]]
    (tmp_path / "a.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows), "utf-8")
    assert [item.question for item in TASKS["squad"].load(tmp_path / "a.jsonl")] == [odd, odd]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("openbookqa", 500),
        ("arc_challenge", 1172),
        ("arc_challenge_letters", 1152),  # two digit keys cannot be told from the file
        ("arc_easy", 2376),
        ("ceval", 1346),
        ("cmmlu", 11_582),
        ("squad", 2049),
        ("hotpotqa", 488),
        ("hotpotqa_gold", 488),
        ("narrativeqa", 500),
        ("countries", 200),
    ],
)
def test_public_sets_have_their_size(name: str, count: int, shared_data: Path) -> None:
    assert len(TASKS[name].load(shared_data)) == count


def test_redux_rules_on_the_public_set(shared_data: Path) -> None:
    items = TASKS["mmlu_redux"].load(shared_data)
    assert 5330 < len(items) < 5700
    assert not {item.error_type for item in items} & {"no_correct_answer", "expert"}


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


def test_metrics_are_those_of_squad() -> None:
    assert exact_match("The Eiffel-Tower!", ["eiffeltower"]) == 1
    assert f1("in the year 1889", ["1889"]) == pytest.approx(2 * (1 / 3) / (1 / 3 + 1))
    assert f1("Paris", ["London", "Paris, France"]) == pytest.approx(2 / 3)
    assert f1("", ["x"]) == 0
    assert f1("the", [""]) == 1
    assert contains_answer("It was built by Berthe Quillard in 1388.", ["berthe quillard"]) == 1
    assert contains_answer("in 13889", ["1388"]) == 0


def test_kvcomm_counts_an_f1_above_one_half() -> None:
    assert kvcomm("the Republic of France", ["France", "Republic of France"]) == 1
    assert kvcomm("France or maybe Spain", ["France"]) == 0
    assert kvcomm("France maybe", ["France"]) == 1  # 2/3
    assert kvcomm("France or maybe", ["France"]) == 0  # exactly 1/2 is not above it
    assert kvcomm("", ["France"]) == 0


def test_rouge_is_the_best_over_references() -> None:
    item = Passage(id="1", context="c", question="q", answers=["the cat sat", "a dog ran away"])
    assert METRICS["rouge_l"].score(["a dog ran"], [item], "") == [pytest.approx(2 * 3 / 7)]


def test_published_coherence_rewards_form_alone() -> None:
    assert coherence("The capital is Rome.") == pytest.approx(1.0)
    assert coherence("ok") == 0
    assert coherence("rome rome rome") == pytest.approx(0.3 + 0.1)
    assert coherence("x y") == pytest.approx(0.3)  # two words: no points for length
    assert coherence("A. " + "b " * 160) == pytest.approx(0.1 + 0.2 + 0.2 + 0.3 * 2 / 161)


def test_a_metric_whose_extra_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(InputError, match=r"pip install 'kvtalk\[eval\]'"):
        check_metrics(["relevance"])
    with pytest.raises(InputError, match="no metric 'bleu'; there are f1, em"):
        check_metrics(["bleu"])
    with pytest.raises(InputError, match="nll cannot lead"):
        check_metrics(["nll", "f1"])
    metrics._rouge.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(InputError, match=r"rouge_l needs rouge_score: pip install 'kvtalk\[eval\]'"):
        check_metrics(["rouge_l"])


@pytest.mark.parametrize(
    ("text", "strict", "published"),
    [
        ("B", "B", "B"),
        ("B. the control", "B", "B"),
        ("(C)", "C", "C"),
        ("The correct answer is D.", "D", "D"),
        ("The correct answer is: **A**", "A", "A"),
        (" answer: B\nbecause", "B", "B"),
        ("A/B/C/D", "", ""),
        ("The correct answer is A/B/C/D.", "", "A"),
        ("The correct answer is an apple", "", ""),
        ("A cat sat", "", "A"),
        ("b", "", "B"),
        ("E", "", ""),
        ("It may be C or so", "", "C"),
        ("", "", ""),
        ("2 + 2 = D", "", ""),
        ("A, B or C", "", "C"),
        ("A.B.C.D", "", "D"),
        ("B: because", "B", "B"),
        ("The answer is C\nas I said", "C", "C"),
    ],
)
def test_letters_are_read_strictly_and_as_published(text: str, strict: str, published: str) -> None:
    assert read_strictly(text, 4) == strict
    assert read_as_published(text) == published


def test_a_fifth_option_is_a_letter_where_there_is_one() -> None:
    assert read_strictly("E.", 5) == "E"


def test_bootstrap_interval_holds_the_mean_and_is_seeded() -> None:
    values = [0.0, 1.0] * 50
    interval = bootstrap(values)
    assert interval == bootstrap(values)
    assert interval.low < interval.mean == 0.5 < interval.high
    assert 0.08 < interval.high - interval.mean < 0.12


def test_mcnemar_is_exact_and_looks_at_disagreements_only() -> None:
    assert mcnemar([1] * 6 + [0] * 94, [0] * 6 + [0] * 94) == pytest.approx(2 * 0.5**6)
    assert mcnemar([1, 0, 1], [1, 0, 1]) == 1.0
    assert mcnemar([1, 1, 0, 0], [0, 0, 1, 1]) == 1.0
