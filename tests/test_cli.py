"""The command: mistakes are one line and exit code 2; two processes do what one does."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from kvtalk import cli
from kvtalk.adapters import cards
from kvtalk.adapters.store import Half
from kvtalk.evaluation.summary import read_records
from kvtalk.models import LM
from test_fuser import other_lm

CONTEXT = "The harbour master of Ostrevik was called Berthe, and she kept eels in the old mill."


def kvtalk(*arguments: object, text: str | None = None, **options: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "kvtalk.cli", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(command, input=text, env=environment, capture_output=True, text=True, check=False, **options)


def in_process(*arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """The same in this process, without the seconds that importing takes."""
    stdout, stderr, argv, stdin = io.StringIO(), io.StringIO(), sys.argv, sys.stdin
    sys.argv, sys.stdin = ["kvtalk", *map(str, arguments)], io.StringIO(text or "")
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        sys.argv, sys.stdin = argv, stdin
    return subprocess.CompletedProcess(arguments, end.value.code, stdout.getvalue(), stderr.getvalue())


def refused(run: subprocess.CompletedProcess[str], *words: str) -> None:
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, run.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def context(tmp_path: Path) -> Path:
    file = tmp_path / "context.txt"
    file.write_text(CONTEXT, "utf-8")
    return file


@pytest.fixture(scope="session")
def translator(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Trained by the command, for ten steps."""
    folder = tmp_path_factory.mktemp("translator")
    texts = folder / "texts.jsonl"
    rows = [{"context": f"{CONTEXT} Number {n}.", "question": "Who?", "answers": ["Berthe"]} for n in range(300)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    sizes = ("--steps", 10, "--tokens", 128, "--width", 64, "--latent", 64, "--longest", 400)
    both = ("--sharer", tiny_folder, "--receiver", tiny_folder, "--teacher", tiny_folder)
    made = in_process("train", "translator", *both, "--data", texts, "--out", folder, *sizes)
    assert made.returncode == 0, made.stderr
    teacher = json.loads((folder / "adapter.json").read_text("utf-8"))["facts"]["teacher"]
    assert teacher["weights"] == LM.load(str(tiny_folder)).spec.fingerprint.weights
    again = in_process("train", "translator", *both, "--data", texts, "--out", folder, *sizes, "--rate", 1)
    refused(again, "other settings", "recipe")
    return folder


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with another tokenizer, saved as users save theirs."""
    folder = tmp_path_factory.mktemp("models") / "other"
    other_lm().model.save_pretrained(folder)
    other_lm().tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def fusers(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, other_folder: Path) -> tuple[Path, Path]:
    """Trained by the command, for ten steps: between two models, with a plan in the loop, and for one as its own."""
    folder = tmp_path_factory.mktemp("fusers")
    rows = [{"prompt": f"Who keeps the eels in mill {number}?", "response": "Berthe"} for number in range(8)]
    rows += [{"question": f"Which is mill {number}?", "choices": ["old", "new"], "answer": 0} for number in range(8)]
    rows += [{"context": f"{CONTEXT} {number}.", "question": "Who?", "answers": ["Berthe"]} for number in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    sizes = ("--steps", 10, "--rows", 4, "--hidden", 64, "--check-every", 5)
    packed = ("--codec", "int4", "--keep", 0.25)
    for name, sharer, plan in (("between", other_folder, packed), ("own", tiny_folder, ("--alignment", "mean"))):
        both = ("-s", sharer, "-r", tiny_folder, "--data", folder / "rows.jsonl", "--out", folder / name)
        made = in_process("train", "fuser", *both, *sizes, *plan)
        assert made.returncode == 0, made.stderr
        assert f"--fuser {folder / name}" in made.stdout.replace("\n", "")
        refused(in_process("train", "fuser", *both, *sizes, *plan, "--rate", 1), "other settings", "recipe")
        refused(in_process("train", "fuser", *both, *sizes, *plan, "--share", "mills=1"), "mills=1", "KIND=NUMBER")
    return folder / "between", folder / "own"


@pytest.fixture
def shared(tmp_path: Path, context: Path, tiny_folder: Path) -> Path:
    file = tmp_path / "cache.kvt"
    run = in_process("share", "--context", context, "--out", file, "--sharer", tiny_folder, "--budget", "40%")
    assert run.returncode == 0, run.stderr
    return file


def test_help_teaches_the_first_step() -> None:
    run = in_process("--help")
    assert run.returncode == 0
    assert "kvtalk ask --context" in run.stdout
    for command in ("ask", "share", "answer", "inspect", "eval", "curve", "report", "demo", "models"):
        assert in_process(command, "--help").returncode == 0


def test_ask_answers_and_compares(context: Path, tiny_folder: Path) -> None:
    run = in_process(
        "ask", "-c", context, "-q", "Who?", "-s", tiny_folder, "-b", "50%", "--max-new-tokens", 4, "--json"
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert list(rows) == ["cache", "no context", "context as text", "another text's cache"]
    assert rows["context as text"]["bytes"] == len(CONTEXT)
    assert 0 < rows["cache"]["bytes"] <= 0.5 * len(CONTEXT) * 2 * 2 * 2 * 32 * 4
    table = in_process("ask", "-c", "-", "-q", "Who?", "-s", tiny_folder, "--max-new-tokens", 2, text=CONTEXT)
    assert "zstd" in table.stdout
    assert "first token" in table.stdout


def test_two_processes_across_a_file(shared: Path, tiny_folder: Path, context: Path) -> None:
    report = json.loads(in_process("inspect", shared, "--json").stdout)[0]
    assert report["bytes"] == shared.stat().st_size
    assert report["context_tokens"] == len(CONTEXT)
    assert "bits per value" in in_process("inspect", shared).stdout
    options = ["-q", "Who?", "--max-new-tokens", 6, "--json"]
    apart = json.loads(kvtalk("answer", "--cache", shared, "-r", tiny_folder, *options).stdout)
    ask = ("ask", "-c", context, "-s", tiny_folder, "-b", "40%", "--no-compare")
    together = json.loads(in_process(*ask, *options).stdout)
    assert apart["answer"] == together["cache"]["answer"]
    assert apart["bytes"] == together["cache"]["bytes"]


def test_a_trained_translator_serves_both_sides(
    translator: Path, tiny_folder: Path, context: Path, tmp_path: Path
) -> None:
    steps = [json.loads(line) for line in (translator / "log.jsonl").read_text("utf-8").splitlines()]
    assert {"kl text", "kl text wrong", "kl text zeroed", "nll"} <= steps[-1].keys()
    file = tmp_path / "latents.kvt"
    sent = in_process("share", "-c", context, "-o", file, "-s", tiny_folder, "-a", translator, "-p", "int8 width=32")
    assert "plan: int8:token width=32" in sent.stdout
    options = ("-q", "Who?", "--max-new-tokens", 3, "--json")
    apart = json.loads(in_process("answer", "--cache", file, "-r", tiny_folder, "-a", translator, *options).stdout)
    plan = ("-p", "int8 width=32", "--no-compare")
    together = in_process("ask", "-c", context, "-s", tiny_folder, "-a", translator, *plan, *options)
    assert apart["answer"] == json.loads(together.stdout)["cache"]["answer"]
    refused(in_process("answer", "--cache", file, "-r", tiny_folder, *options), "adapter", "load that adapter")
    assert "latent" in in_process("inspect", file).stdout


def test_halves_of_one_space_are_joined_and_serve(
    translator: Path, tiny_folder: Path, other_folder: Path, context: Path, tmp_path: Path
) -> None:
    """A further sharer learns to write for a decoder that is there, and stands beside the first one's receiver."""
    sizes = ("--steps", 10, "--tokens", 128, "--width", 64, "--latent", 64, "--longest", 400)
    command = ("train", "translator", "-s", other_folder, "-r", tiny_folder, "-d", translator / "texts.jsonl", *sizes)
    made = in_process(*command, "-o", tmp_path / "further", "--decoder", translator)
    assert made.returncode == 0, made.stderr
    decoders = [(folder / "decoder.safetensors").read_bytes() for folder in (translator, tmp_path / "further")]
    assert decoders[0] == decoders[1]
    halves = ("--encoder", tmp_path / "further", "--decoder", translator)
    joined = in_process("join", *halves, "--out", tmp_path / "joined")
    assert joined.returncode == 0, joined.stderr
    further = in_process(
        *command, "-o", tmp_path / "y", "--from", tmp_path / "joined", "--averaged", 0.5, "--rounded", 1
    )
    assert further.returncode == 0, further.stderr
    refused(in_process(*command, "-o", tmp_path / "x", "--from", tmp_path / "further"), "another frozen")
    refused(in_process(*command, "-o", tmp_path / "x", "--from", tmp_path / "nothing"), "no adapter")
    asks = f"--sharer {other_folder} --receiver {tiny_folder} --adapter {tmp_path / 'joined'}"
    assert f"next: kvtalk ask --context notes.txt --question '...' {asks}" in joined.stdout
    options = ("-c", context, "-q", "Who?", "-s", other_folder, "-r", tiny_folder, "--max-new-tokens", 3, "--json")
    answers = [
        json.loads(in_process("ask", *options, "--no-compare", "-a", tmp_path / name).stdout)["cache"]["answer"]
        for name in ("joined", "further")
    ]
    assert answers[0] == answers[1]
    refused(in_process("join", *halves, "--out", tmp_path / "joined"), "holds an adapter already")
    assert in_process(*command, "-o", tmp_path / "again", "--decoder", translator, "--seed", 1).returncode == 0
    mean = in_process("average", tmp_path / "further", tmp_path / "again", "-o", tmp_path / "mean")
    assert f"--adapter {tmp_path / 'mean'}" in mean.stdout, mean.stderr
    again = in_process("ask", *options, "--no-compare", "-a", tmp_path / "mean")
    assert again.returncode == 0, again.stderr
    refused(in_process("average", tmp_path / "further", "nothing", "-o", tmp_path / "x"), "no adapter")
    run = torch.load(tmp_path / "y" / "checkpoint.pt", weights_only=True)
    before = Half.of(tmp_path / "joined", "encoder").load().state_dict()
    for flags, learned in (((), run["mean"]["module"]), (("--last",), run["module"])):
        folder = tmp_path / f"mean{len(flags)}"
        both = (tmp_path / "joined", tmp_path / "y")
        made = in_process("average", *both, "--packing", "bf16", *flags, "-o", folder)
        assert f"of {both[1]}: the run's exact" in made.stdout, made.stderr
        assert json.loads((folder / "adapter.json").read_text("utf-8"))["facts"]["mean of"][1].endswith(", exact")
        for name, value in Half.of(folder, "encoder").load().state_dict().items():
            expected = (before[name].float() + learned[f"encoder.{name}"].float()) / 2
            torch.testing.assert_close(value.float(), expected, atol=1e-6, rtol=1e-2)
    refused(in_process("average", tmp_path / "joined", translator.parent, "--last", "-o", tmp_path / "x"), "--last")
    refused(in_process("join", "--encoder", "nothing", "--decoder", translator, "-o", tmp_path / "x"), "no adapter")
    refused(in_process(*command, "-o", tmp_path / "x", *halves), "nothing is left to train", "kvtalk join")
    refused(in_process(*command, "-o", tmp_path / "x", "--encoder", translator), "this adapter's sharer is", "weights")
    refused(in_process(*command, "-o", tmp_path / "further", "--rate", 1e-3), "other settings", "recipe", "frozen")
    own = in_process(*command, "-o", translator, "--decoder", translator)
    refused(own, "lies in the run's own folder")


def test_a_trained_fuser_answers_without_a_context(
    fusers: tuple[Path, Path], tiny_folder: Path, other_folder: Path, context: Path
) -> None:
    lines = [json.loads(line) for line in (fusers[0] / "log.jsonl").read_text("utf-8").splitlines()]
    kinds = ("choices", "oracle", "instructions", "accuracy")
    assert {f"{kind}{way}" for kind in kinds for way in ("", " wrong", " zeroed", " alone")} <= lines[-1].keys()
    facts = json.loads((fusers[0] / "adapter.json").read_text("utf-8"))["facts"]
    assert (facts["steps"], facts["plan"]) == (10, "int4 value_norm@25%")
    models = ("-s", other_folder, "-r", tiny_folder, "--fuser", fusers[0])
    options = ("-q", "Who keeps the eels?", "--max-new-tokens", 3, "--json")
    run = in_process("ask", *models, *options, "-p", "int4 value_norm@25%")
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert list(rows) == ["fused", "receiver alone"]
    assert rows["fused"]["plan"] == "int4:token before value_norm@25%"
    assert rows["fused"]["bytes"] > rows["receiver alone"]["bytes"] == 0
    whole = json.loads(in_process("ask", *models, *options).stdout)["fused"]
    assert whole["bytes"] > rows["fused"]["bytes"]
    longer = json.loads(in_process("ask", *models, *options, "-c", context).stdout)["fused"]
    assert longer["context_tokens"] > whole["context_tokens"] > 5
    known = json.loads(in_process("ask", *models, *options, "-c", context, "--private").stdout)
    assert known["fused"]["context_tokens"] == whole["context_tokens"]
    assert known["receiver alone"]["answer"] == rows["receiver alone"]["answer"]
    assert list(known) == ["fused", "receiver alone", "context as text", "another text's cache"]
    assert (
        known["context as text"]["answer"]
        == json.loads(in_process("ask", *models, *options, "-c", context, "--no-compare").stdout)["receiver alone"][
            "answer"
        ]
    )
    assert known["another text's cache"]["plan"] == known["fused"]["plan"]
    short = json.loads(in_process("ask", *models, *options, "-c", context, "--private", "--no-compare").stdout)
    assert short["fused"]["answer"] == known["fused"]["answer"]
    assert list(short) == ["fused", "receiver alone"]
    refused(in_process("ask", *models, *options, "--adapter", "a+b"), "give one")
    refused(in_process("ask", *models, *options, "--private"), "--private is for a --context")
    refused(in_process("ask", "-s", other_folder, "-q", "Who?", "-c", context, "--private"), "give both")
    foretold = json.loads(in_process("ask", *models, *options, "-p", "int4 delta_proj_vnorm@25%").stdout)["fused"]
    assert foretold["plan"] == "int4:token before delta_proj_vnorm@25%"
    assert foretold["bytes"] <= rows["fused"]["bytes"]
    table = in_process("ask", *models, "-q", "Who?", "-b", "50%", "--max-new-tokens", 2)
    assert "receiver alone" in table.stdout
    assert "first token" in table.stdout


def test_a_predictor_is_fitted_by_the_command(
    fusers: tuple[Path, Path], tiny_folder: Path, other_folder: Path, context: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(fusers[0], tmp_path / "fuser")
    (folder / "predictor.safetensors").unlink()
    card = json.loads((folder / "adapter.json").read_text())
    del card["weights"]["predictor"], card["facts"]["predictor"]
    (folder / "adapter.json").write_text(json.dumps(card))
    plan = ("-p", "int4 proj_vnorm_topk@25%")
    ask = ("ask", "-s", other_folder, "-r", tiny_folder, "-q", "Who?", "--max-new-tokens", 2, *plan)
    refused(in_process(*ask, "--fuser", folder), "proj_vnorm_topk", "kvtalk train predictor --fuser")
    refused(in_process(*ask[:3], *ask[5:], "-c", context), "proj_vnorm_topk", "use it with --fuser")
    rows = fusers[0].parent / "rows.jsonl"
    made = in_process("train", "predictor", "--fuser", folder, "--data", rows)
    assert made.returncode == 0, made.stderr
    assert f"--fuser {folder}" in made.stdout.replace("\n", "")
    assert json.loads((folder / "adapter.json").read_text())["facts"]["predictor"] == {"data": ["rows.jsonl"]}
    asked = in_process(*ask, "--fuser", folder)
    assert asked.returncode == 0, asked.stderr
    refused(in_process("train", "predictor", "--fuser", "me/pushed", "--data", rows), "me/pushed: no folder")
    refused(in_process("train", "predictor", "--fuser", tmp_path, "--data", rows), "not an adapter")


def test_several_sharers_have_a_fuser_and_a_budget_each(
    fusers: tuple[Path, Path], tiny_folder: Path, other_folder: Path, context: Path
) -> None:
    options = ("-r", tiny_folder, "-q", "Who keeps the eels?", "--max-new-tokens", 2)
    both = ("ask", "-s", other_folder, "-s", tiny_folder, *options)
    fused = (*both, "--fuser", fusers[0], "--fuser", fusers[1])

    def sizes(*budgets: str) -> list[int]:
        run = in_process(*fused, "--json", *(word for budget in budgets for word in ("-b", budget)))
        assert run.returncode == 0, run.stderr
        fused_row, alone = json.loads(run.stdout).values()
        assert sum(fused_row["each"]) == fused_row["bytes"] > alone["bytes"] == 0
        assert fused_row["plan"].count(" + ") == 1
        return fused_row["each"]

    one, other = sizes("4KB", "3KB")
    assert one <= 4000 < sizes("8KB")[0]
    assert other <= 3000 < sizes("8KB", "8KB")[1]
    shown = in_process(*fused, "-b", "4KB").stdout
    assert f"({' + '.join(f'{size:,}' for size in sizes('4KB'))})" in shown
    refused(in_process(*both, "--fuser", fusers[0]), "1 fusers for 2 sharers: give one for each")
    refused(in_process(*fused, "-b", "1KB", "-b", "1KB", "-b", "1KB"), "3 budgets for 2 sharers: give one for each, or")
    refused(in_process(*both, "-c", context), "need a --fuser for each sharer")
    refused(in_process("ask", *options, "-c", context, "-b", "1KB", "-b", "2KB"), "need a --fuser for each sharer")


def test_a_fuser_goes_on_from_another_run_with_other_rows_and_a_packet(
    fusers: tuple[Path, Path], tiny_folder: Path, other_folder: Path, tmp_path: Path
) -> None:
    both = ("-s", other_folder, "-r", tiny_folder, "--data", fusers[0].parent / "rows.jsonl", "--out", tmp_path)
    sizes = ("--steps", 10, "--rows", 4, "--hidden", 64, "--check-every", 5, "--codec", "int8", "--share", "oracle=5")
    made = in_process("train", "fuser", *both, *sizes, "--from", fusers[0])
    assert made.returncode == 0, made.stderr
    lines = [
        [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (fusers[0], tmp_path)
    ]
    assert lines[1][0]["oracle"] == pytest.approx(lines[0][-1]["oracle"], abs=0.05)  # what it ended with
    assert lines[1][-1]["gates open"] == lines[1][0]["gates open"] == lines[0][-1]["gates open"]
    refused(in_process("train", "fuser", *both, *sizes, "--from", tmp_path / "none"), "holds no checkpoint")


def test_a_trained_fuser_is_evaluated_with_its_controls(
    fusers: tuple[Path, Path], tiny_folder: Path, other_folder: Path, tmp_path: Path
) -> None:
    rows = [{"id": str(n), "question": f"Which is mill {n}?", "choices": ["old", "new"], "answer": 0} for n in range(4)]
    (tmp_path / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    models = ("-s", other_folder, "-r", tiny_folder, "--fuser", fusers[0], "--self-fuser", fusers[1])
    arms = ("--arms", "receiver,fused,wrong,zeroed,self", "-p", "int4 value_norm@25%")
    asked = ("--task", "arc_easy", "--data", tmp_path / "arc.jsonl", "--protocol", "likelihood")
    run = in_process("eval", *models, *arms, *asked, "--out", tmp_path / "arc")
    assert run.returncode == 0, run.stderr
    found = {row["kind"]: row for row in json.loads((tmp_path / "arc" / "summary.json").read_text())["arms"]}
    assert list(found) == ["receiver", "fused", "wrong", "zeroed", "self"]
    assert [kind for kind, row in found.items() if "gain" in row] == ["fused"]
    invented = ("--task", "invented", "--limit", 8, "--metrics", "f1,nll", "--time", 1)
    run = in_process("eval", *models, *arms, *invented, "--out", tmp_path / "invented")
    assert run.returncode == 0, run.stderr
    timed = {row["arm"] for row in json.loads((tmp_path / "invented" / "timings.json").read_text())}
    assert timed == {"receiver", "fused int4:token value_norm@25%", "self int4:token value_norm@25%"}
    page = in_process("report", tmp_path / "arc", "-o", tmp_path / "report.html")
    assert page.returncode == 0, page.stderr


def test_mistakes_with_fusers_are_one_line(
    fusers: tuple[Path, Path], translator: Path, tiny_folder: Path, other_folder: Path, tmp_path: Path, context: Path
) -> None:
    models = ("-s", other_folder, "-r", tiny_folder)
    ask = ("ask", *models, "-q", "Who?", "--max-new-tokens", 2)
    refused(in_process(*ask), "give --context")
    refused(in_process(*ask, "--fuser", translator), "a translator, no fuser: give it by --adapter")
    refused(in_process(*ask, "-c", context, "--adapter", fusers[0]), "a fuser, no translator: give it by --fuser")
    refused(in_process(*ask, "--fuser", tmp_path / "none"), "no adapter")
    refused(in_process(*ask, "--fuser", fusers[1]), "this adapter's sharer is", "kvtalk train fuser")
    refused(in_process(*ask[:-4], "-q", " ", "--fuser", fusers[0]), "the question is empty")
    refused(in_process(*ask, "--fuser", fusers[0], "-b", "50"), "too small")
    refused(in_process(*ask, "--fuser", fusers[0], "-p", "int8 layers=0"), "a fuser chooses the layers itself")
    evaluate = ("eval", *models, "--limit", 8, "--out", tmp_path / "run")
    fused = "the arm fused needs a fuser, and a fuser the arm fused"
    refused(in_process(*evaluate, "--arms", "receiver,fused"), fused)
    refused(in_process(*evaluate, "--arms", "receiver,text", "--fuser", fusers[0]), fused)
    refused(in_process(*evaluate, "--arms", "fused,self", "--fuser", fusers[0]), "--self-fuser")
    refused(in_process(*evaluate, "--arms", "fused,cache", "--fuser", fusers[0]), "run them apart")
    refused(in_process(*evaluate, "--arms", "fused", "--fuser", translator), "a translator, no fuser")
    refused(in_process(*evaluate, "--arms", "fused", "--fuser", fusers[0], "--self-fuser", fusers[0]), "sharer is")
    assert not (tmp_path / "run").exists()


def test_a_fuser_that_comes_along_is_given_by_name(
    fusers: tuple[Path, Path], tiny_folder: Path, other_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "SHIPPED", tmp_path)
    shutil.copytree(fusers[0], tmp_path / "other+tiny.fuser")
    ask = ("ask", "-s", other_folder, "-r", tiny_folder, "-q", "Who?", "--max-new-tokens", 2, "--json")
    named, given = (in_process(*ask, "--fuser", fuser) for fuser in ("other+tiny", fusers[0]))
    assert named.returncode == 0, named.stderr
    assert json.loads(named.stdout)["fused"]["bytes"] == json.loads(given.stdout)["fused"]["bytes"]
    refused(in_process(*ask, "--fuser", "tiny+other"), "no adapter 'tiny+other'", "a hub id, or one of other+tiny")


def test_mistakes_in_training_a_fuser_are_one_line(tiny_folder: Path, other_folder: Path, tmp_path: Path) -> None:
    texts, rows = tmp_path / "texts.jsonl", tmp_path / "rows.jsonl"
    texts.write_text("".join(json.dumps({"text": CONTEXT}) + "\n" for _ in range(20)), "utf-8")
    told = ({"prompt": f"{CONTEXT} {number}?", "response": f"{number}"} for number in range(20))
    rows.write_text("".join(json.dumps(row) + "\n" for row in told), "utf-8")
    words = tmp_path / "words.jsonl"
    words.write_text("".join(json.dumps({"words": CONTEXT}) + "\n" for _ in range(20)), "utf-8")
    out = ("--out", tmp_path / "out", "--hidden", 64)
    start = ("train", "fuser", "-s", "/no/model", "-r", "/no/model", *out)
    refused(in_process(*start, "--data", words), "row 1 has words; a fuser learns answers: expected prompt, response")
    refused(in_process(*start, "--data", texts), "no text is long enough", "give texts of 400 characters or more")
    refused(in_process(*start, "--data", tmp_path / "absent.jsonl"), "absent.jsonl")
    refused(in_process(*start, "--data", rows), "no model")
    start = ("train", "fuser", "-s", other_folder, "-r", tiny_folder, *out, "--data", rows)
    refused(in_process(*start, "--codec", "zip"), "no codec 'zip'")
    refused(in_process(*start, "--keep", 0.5, "--policy", "magic"), "no token policy 'magic'")
    refused(in_process(*start, "--keep", 0.5, "--policy", "proj_vnorm_topk"), "is fitted to a trained fuser")
    refused(in_process(*start, "--alignment", "most"), "there are first, last, coverage, mean")
    refused(in_process(*start, "--layers", "upside-down"), "upside-down")
    refused(in_process(*start, "--packing", "int9"), "no codec 'int9'")
    assert not (tmp_path / "out").exists()


def test_a_stream_of_parts_reads_like_one_packet(tmp_path: Path, context: Path, tiny_folder: Path) -> None:
    file = tmp_path / "stream.kvt"
    assert in_process("share", "-c", context, "-o", file, "-s", tiny_folder, "--parts", 2).returncode == 0
    assert len(json.loads(in_process("inspect", file, "--json").stdout)) == 2
    assert in_process("answer", "--cache", file, "-r", tiny_folder, "-q", "Who?", "--max-new-tokens", 2).returncode == 0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda blob: blob[:-1], "truncated"),
        (lambda blob: blob[:100], "truncated"),
        (lambda blob: b"", "truncated"),
        (lambda blob: b"PNG" + blob[3:], "not"),
        (lambda blob: blob[:-1] + bytes([blob[-1] ^ 1]), "damaged"),
        (lambda blob: blob + b"tail", "truncated"),
    ],
    ids=["last byte", "header", "empty", "magic", "flipped", "tail"],
)
def test_damaged_files_are_refused_before_a_model_is_loaded(shared: Path, damage, words: str) -> None:  # type: ignore[no-untyped-def]
    shared.write_bytes(damage(shared.read_bytes()))
    refused(in_process("inspect", shared), "packet", words)
    refused(in_process("answer", "--cache", shared, "-q", "Who?", "-r", "/no/model"), "packet", words)


def test_mistakes_are_one_line(tmp_path: Path, context: Path, shared: Path, tiny_folder: Path) -> None:
    out = tmp_path / "new.kvt"
    share = ["share", "-o", out, "-s", tiny_folder]
    refused(in_process(*share, "-c", tmp_path / "absent.txt"), "cannot read", "No such file")
    refused(in_process(*share, "-c", "-", text=" \n"), "context is empty")
    refused(in_process(*share, "-c", "-", text="x" * 2100), "reads at most 2048")
    refused(in_process(*share, "-c", context, "-b", "plenty"), "is not a size")
    refused(in_process(*share, "-c", context, "-b", "700"), "smallest possible")
    refused(in_process(*share, "-c", context, "-p", "zip"), "no codec 'zip'", "bf16")
    refused(in_process(*share, "-c", context, "-p", "bf16 magic@50%"), "no token policy 'magic'")
    refused(in_process(*share, "-c", context, "-p", "bf16 layers=9"), "layers 0 to 3")
    refused(in_process("share", "-o", out, "-c", context, "-s", tmp_path / "nothing"), "no model")
    refused(in_process("share", "-o", tmp_path / "no" / "x.kvt", "-c", context, "-s", tiny_folder), "cannot write")
    refused(in_process("answer", "--cache", shared, "-r", tiny_folder, "-q", " "), "question is empty")
    refused(in_process("answer", "--cache", tmp_path / "absent.kvt", "-q", "Who?"), "No such file")
    refused(in_process("models", "pull", "gpt-5"), "no bundled model")
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.kvt", "context.txt"]
    assert in_process("ask", "--nonsense").returncode == 2


def test_a_full_disk_leaves_no_partial_file(tmp_path: Path, context: Path, tiny_folder: Path) -> None:
    """The system itself refuses to let the file grow."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    out = tmp_path / "new.kvt"
    refused(
        kvtalk("share", "-o", out, "-c", context, "-s", tiny_folder, preexec_fn=limit), "cannot write", "left behind"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["context.txt"]


def test_an_evaluation_that_is_interrupted_goes_on(tmp_path: Path, tiny_folder: Path) -> None:
    """Ctrl-C in the middle: exit 130, finished items kept, and the second start counts none of them twice."""
    out = tmp_path / "run"
    plans = ["bf16", "int8", "int4:channel/int4:token before", "nf4"]
    arguments = ["eval", "--sharer", tiny_folder, "--batch", 2, "--limit", 12, "--metrics", "f1,em,nll", "--out", out]
    arguments += ["--arms", "receiver,text,cache,wrong,zeroed"]
    arguments += [option for plan in plans for option in ("--plan", plan)]
    command = [sys.executable, "-m", "kvtalk.cli", *map(str, arguments)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    log = out / "items.partial.jsonl"
    deadline = time.time() + 90
    while time.time() < deadline and not (log.exists() and log.read_text().count("\n") >= 20):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    kept = log.read_text().count("\n")
    assert 20 <= kept < 12 * 14
    with log.open("a") as file:
        file.write('{"id": "cut off in the mid')
    again = kvtalk(*arguments)
    assert again.returncode == 0, again.stderr
    assert not log.exists()
    records = list(read_records(out))
    assert len(records) == len({(record.id, record.arm) for record in records}) == 12 * 14
    refused(in_process(*arguments[:5], "--limit", 11, *arguments[7:]), "holds another run", "items")
    before = (out / "summary.json").read_text()
    (out / "summary.json").unlink()
    assert in_process("eval", "--recompute", out).returncode == 0
    assert (out / "summary.json").read_text() == before
    page = tmp_path / "report.html"
    assert in_process("report", out, "-o", page).returncode == 0
    assert "another text" in page.read_text()


def test_a_curve_prints_its_front(tmp_path: Path, tiny_folder: Path) -> None:
    out = tmp_path / "run"
    options = ["--sharer", tiny_folder, "--limit", 4, "--batch", 4, "--out", out, "--metrics", "f1,nll"]
    run = in_process("curve", *options, "--codecs", "fp16,int4", "--keep", "100%,30%", "--budget", "20%")
    assert run.returncode == 0, run.stderr
    rows = json.loads((out / "summary.json").read_text())["arms"]
    caches = [row["plan"] for row in rows if row["kind"] == "cache"]
    assert caches == ["fp16", "fp16 value_norm@30%", "int4:token", "int4:token value_norm@30%", "budget=20%"]
    wrong = [row["plan"] for row in rows if row["kind"] == "wrong"]
    assert wrong == ["fp16", "fp16 value_norm@30%", "int4:token value_norm@30%"]
    assert (out / "picture.png").stat().st_size > 10_000
    refused(in_process("curve", *options, "--controls", "nf4"), "no plan 'nf4:token' in this curve")


def test_a_curve_tries_what_fits_what_crosses(
    tmp_path: Path, tiny_folder: Path, translator: Path, fusers: tuple[Path, Path], other_folder: Path
) -> None:
    options = ["--receiver", tiny_folder, "--limit", 2, "--batch", 2, "--metrics", "f1", "--arms", "cache"]
    options += ["--sharer", tiny_folder, "--adapter", translator]
    run = in_process("curve", *options, "--out", tmp_path / "latents")
    assert run.returncode == 0, run.stderr
    plans = [row["plan"] for row in json.loads((tmp_path / "latents" / "summary.json").read_text())["arms"]]
    assert plans[:2] == ["bf16", "int8:token width=64"]
    assert plans[-1] == "int2:token width=16"
    wrong = in_process("curve", *options, "--codecs", "bf16", "--layers", "last:50%", "--out", tmp_path / "none")
    refused(wrong, "latents have one codec and no layers")
    unfit = ["--sharer", tiny_folder, "--receiver", tiny_folder, "--adapter", translator, "--limit", 4]
    run = in_process("eval", *unfit, "--plan", "int8/int4", "--out", tmp_path / "none")
    refused(run, "latents have one codec and no layers")
    assert not (tmp_path / "none").exists()
    pair = ("--sharer", other_folder, "--receiver", tiny_folder, "--fuser", fusers[0])
    options = [*pair, "--limit", 2, "--arms", "fused"]
    run = in_process("curve", *options, "--metrics", "f1", "--out", tmp_path / "fused")
    assert run.returncode == 0, run.stderr
    assert len(json.loads((tmp_path / "fused" / "summary.json").read_text())["arms"]) == 17
    wide = in_process("curve", *options, "--plan", "int8 width=32", "--out", tmp_path / "none")
    refused(wide, "a fuser chooses the layers itself")


def test_mistakes_in_an_evaluation_are_found_before_a_model_is_loaded(tmp_path: Path) -> None:
    start = ["eval", "--sharer", "/no/model", "--out", tmp_path / "run"]
    refused(in_process(*start, "--task", "sqad"), "no task 'sqad'; there are squad")
    curve = ["curve", *start[1:]]
    refused(in_process(*curve, "--plan", "zip"), "zip")
    refused(in_process(*curve, "--arms", "caches"), "caches")
    refused(in_process(*curve, "--metrics", "f2"), "f2")
    refused(in_process(*curve, "--controls", "zip"), "zip")
    refused(in_process(*start, "--arms", "text,chache"), "no arm 'chache'; there are receiver")
    refused(in_process(*start, "--plan", "zip"), "no codec 'zip'; there are")
    refused(in_process(*start, "--budget", "lots"), "is not a size")
    refused(in_process(*start, "--metrics", "bleu"), "no metric 'bleu'; there are f1")
    refused(in_process(*start, "--protocol", "letter"), "no protocol 'letter'; there are free")
    refused(in_process(*start, "--data", tmp_path / "absent"), "cannot read")
    refused(in_process(*start, "--limit", 2), "two different contexts")
    refused(in_process(*start, "--dtype", "int8"), "no dtype 'int8'; there are float32")
    refused(in_process("eval", "--recompute", tmp_path), "no run in this folder")
    refused(in_process("report", tmp_path), "no run in this folder")
    assert not (tmp_path / "run").exists()


def test_a_lora_learns_what_a_fuser_learns(tiny_folder: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "lora"
    rows = [{"question": f"Which is number {n}?", "choices": ["red", "a long blue"], "answer": n % 2} for n in range(9)]
    rows += [{"prompt": f"Say {n}.", "response": f"It is {n}."} for n in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ("--steps", 10, "--rows", 4, "--rank", 2, "--check-every", 10, "--checks", 4)
    made = in_process("train", "lora-fuser", "--receiver", tiny_folder, "--data", data, "--out", out, *sizes)
    assert made.returncode == 0, made.stderr
    measured = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figures = next(row for row in measured if row["step"] == 10 and "total" not in row)
    assert figures.keys() >= {"choices", "accuracy", "preference", "instructions"}
    assert "--arms receiver" in made.stdout


def test_a_trained_lora_is_a_model_of_its_own(tiny_folder: Path, tmp_path: Path) -> None:
    texts, out = tmp_path / "texts.jsonl", tmp_path / "lora"
    rows = [{"context": f"{CONTEXT} Number {n}.", "question": "Who?", "answers": ["Berthe"]} for n in range(300)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    sizes = ("--steps", 10, "--tokens", 128, "--rank", 4, "--rate", 0.005, "--longest", 400, "--check-every", 5)
    made = in_process("train", "lora", "--receiver", tiny_folder, "--data", texts, "--out", out, *sizes)
    assert made.returncode == 0, made.stderr
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    checked = [step for step in steps if "nll" in step]
    assert checked[-1]["nll"] < checked[0]["nll"]
    base, tuned = LM.load(str(tiny_folder)), LM.load(f"{tiny_folder}+{out}")
    assert base.spec.fingerprint.differences(tuned.spec.fingerprint) == ["weights"]
    refused(in_process("ask", "-c", texts, "-q", "Who?", "-s", f"{tiny_folder}+{tmp_path}"), "no LoRA for this model")
