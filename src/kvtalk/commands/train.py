"""The command ``kvtalk train``."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvtalk.commands.console import loading, out
from kvtalk.commands.options import PackingOption

if TYPE_CHECKING:
    from kvtalk.models import LM
    from kvtalk.training.loop import Loop

app = typer.Typer(no_args_is_help=True, help="Fit adapters between two models.")

_FUSER_PARAMETERS = 27_000_000
"""A tenth of the official size for the bundled pair; 14 MB in NF4."""

DataOption = Annotated[
    list[str],
    typer.Option(
        "--data",
        "-d",
        help="Texts to train on: .jsonl or .txt, also .gz, or a hub data set; rows with text, with prompt and "
        "response, or with context, question and answers. Repeat for several.",
    ),
]

FusedDataOption = Annotated[
    list[str],
    typer.Option(
        "--data",
        "-d",
        help="What to learn: .jsonl, also .gz, or a hub data set; rows with prompt and response; with question, "
        "choices and answer (index of the right one); with context, question and answers (or choices and answer), "
        "where only the sharer reads the context; or with text, of which only the sharer reads the beginning. "
        "Repeat for several.",
    ),
]

SharesOption = Annotated[
    list[str] | None,
    typer.Option(
        help="How often a step has rows of a kind: choices=0.6, known=0.1 (choices of which the sharer alone knows a "
        "context), oracle=0.1 (the same without choices), running=0.1, instructions=0.2 unless given, in proportion. "
        "Repeat for several."
    ),
]


@app.command()
def translator(
    sharer: Annotated[str, typer.Option("--sharer", "-s", help="Model that reads.")],
    receiver: Annotated[str, typer.Option("--receiver", "-r", help="Model that answers.")],
    data: DataOption,
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for checkpoints, log and the adapter.")],
    steps: Annotated[int, typer.Option(min=10, help="Optimizer steps.")] = 2000,
    tokens: Annotated[int, typer.Option(min=64, help="Context tokens in a step, about.")] = 20_480,
    rate: Annotated[float, typer.Option(help="Learning rate at its peak.")] = 2e-3,
    optimizer: Annotated[str, typer.Option(help="muon or adamw.")] = "muon",
    questions: Annotated[float, typer.Option(min=0, max=1, help="Share of later steps that ask questions.")] = 0.5,
    quotes: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the other later steps that read the context again, as text.")
    ] = 0.0,
    regression: Annotated[float, typer.Option(min=0, max=1, help="Share of steps that only regress.")] = 0.1,
    averaged: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Share of the steps, the last ones, whose weights' mean is kept; 0 for the last weights."
        ),
    ] = 0.0,
    longest: Annotated[int, typer.Option(min=200, help="Characters of the longest plain contexts.")] = 4000,
    width: Annotated[int, typer.Option(min=64, help="Channels of the adapter, a multiple of 64.")] = 576,
    latent: Annotated[int, typer.Option(min=16, help="Numbers of a whole latent.")] = 1024,
    pool: Annotated[
        int,
        typer.Option(
            min=1, max=64, help="Receiver tokens that give one latent, which takes one place in the receiver's cache."
        ),
    ] = 1,
    packing: PackingOption = "nf4:1x64",
    rounded: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the steps, the last ones, with matrices as the file will hold them."),
    ] = 0.2,
    trained: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Folder of an earlier run of this pair, or an adapter (folder, hub id, or the name of one that comes "
            "with kvtalk): start from its weights.",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The receiver with a LoRA that `kvtalk train lora` made, NAME+FOLDER: it reads the text, and half of "
            "the loss of answers is the divergence from what it answers."
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Adapter with this sharer (folder, hub id, or the name of one that comes with kvtalk) whose encoder "
            "stays as it is: only a decoder is trained, to its latents."
        ),
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(
            help="Adapter with this receiver whose decoder stays as it is: only an encoder is trained, to write for it."
        ),
    ] = None,
    check_every: Annotated[int, typer.Option(min=1, help="Steps between validations and checkpoints.")] = 250,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
) -> None:
    """Train a translator: the sharer's cache becomes a cache of a receiver of another kind.

    Both models stay frozen. A stopped run goes on from its last checkpoint when the same command is given again.

    With --encoder or --decoder, the new half joins the latent space of an adapter that is there; `kvtalk join` then
    makes the adapter of any encoder and any decoder of that space.
    """
    from kvtalk.adapters.cards import Party
    from kvtalk.adapters.store import Half, save_adapter
    from kvtalk.adapters.translator import Geometry, Translator
    from kvtalk.errors import TrainingError
    from kvtalk.training.batches import Recipe
    from kvtalk.training.loop import Schedule
    from kvtalk.training.texts import Texts
    from kvtalk.training.translator import training

    if encoder is not None and decoder is not None:
        raise TrainingError("nothing is left to train with --encoder and --decoder: use kvtalk join, or give one")
    frozen = Half.of(encoder, "encoder") if encoder else Half.of(decoder, "decoder") if decoder else None
    texts = Texts.load(data)
    reads, answers = _loaded(sharer, receiver)
    teaches = None if teacher is None else _loaded(teacher, teacher)[0]
    parties = (Party(reads.name, reads.spec.fingerprint), Party(answers.name, answers.spec.fingerprint))
    geometry = Geometry(
        sharer_values=reads.spec.values_per_token,
        receiver_layers=len(answers.spec.layers),
        receiver_values=answers.spec.values_per_token,
        width=width,
        latent=latent,
        pool=pool,
    )
    if frozen is not None:
        geometry = frozen.fitted(geometry, reads.spec, answers.spec)
    pack = None if packing == "bf16" else packing
    with tempfile.TemporaryDirectory() as scratch:  # what cannot be saved is found before it is trained
        save_adapter(Translator(geometry), *parties, Path(scratch), pack, frozen=frozen)
    recipe = Recipe(
        schedule=Schedule(steps=steps, rate=rate, optimizer=optimizer, averaged=averaged),
        tokens=tokens,
        questions=questions,
        quotes=quotes,
        longest=longest,
        regression=regression,
        widths=tuple(size for size in Recipe.widths if size < latent),
        packing=pack,
        packed=rounded,
        seed=seed,
    )
    run = training(reads, answers, texts, geometry, recipe, out_folder, trained, frozen, teaches)
    made = _go(run, steps, check_every)
    facts: dict[str, Any] = {"data": [Path(name).name for name in data], "steps": steps}
    if teaches is not None:
        facts["teacher"] = {"of": receiver, "weights": teaches.spec.fingerprint.weights}
    if not run.accelerator.is_main_process:
        return
    save_adapter(made, *parties, out_folder, pack, facts, frozen)
    out.print(
        f"next: kvtalk eval --task squad --sharer {sharer} --receiver {receiver} --adapter {out_folder}",
        highlight=False,
    )


@app.command()
def fuser(
    sharer: Annotated[str, typer.Option("--sharer", "-s", help="Model that lends its cache.")],
    receiver: Annotated[str, typer.Option("--receiver", "-r", help="Model that answers.")],
    data: FusedDataOption,
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for checkpoints, log and the fuser.")],
    steps: Annotated[int, typer.Option(min=10, help="Optimizer steps.")] = 1500,
    rows: Annotated[int, typer.Option(min=4, help="Prompts in a step.")] = 96,
    rate: Annotated[float, typer.Option(help="Learning rate at its peak.")] = 5e-4,
    optimizer: Annotated[str, typer.Option(help="adamw or muon.")] = "adamw",
    hidden: Annotated[
        int | None, typer.Option(min=16, help="Width of a layer's network; by default what 27 million parameters give.")
    ] = None,
    share: SharesOption = None,
    layers: Annotated[str, typer.Option(help="Which sharer layer for which: terminal or normalised.")] = "terminal",
    alignment: Annotated[
        str, typer.Option(help="Which sharer token for which: coverage, first, last, or the mean of all that overlap.")
    ] = "coverage",
    projects: Annotated[bool, typer.Option("--c2c-c", help="Project the sharer's vectors before both meet.")] = False,
    residual: Annotated[bool, typer.Option(help="Add to the receiver's own cache, or take its place.")] = True,
    gated: Annotated[bool, typer.Option(help="A switch for each layer's keys and values.")] = True,
    weighted: Annotated[bool, typer.Option(help="A weight for each token and head.")] = True,
    roles: Annotated[bool, typer.Option(help="Align the words after the shared text (a template's), too.")] = True,
    last: Annotated[bool, typer.Option(help="Enrich the prompt's last token, too.")] = True,
    codec: Annotated[
        str | None, typer.Option(help="Pack the sharer's cache so in every step, such as int4 or int8:channel.")
    ] = None,
    keep: Annotated[float, typer.Option(min=0.001, max=1, help="Share of its tokens to keep in every step.")] = 1.0,
    policy: Annotated[str, typer.Option(help="Token policy for that.")] = "value_norm",
    packing: PackingOption = "nf4:1x64",
    trained: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Folder of an earlier run of this fuser: start from its weights, with gates as at inference and "
            "matrices as the file holds them from the first step on. Give the same rows: what is kept back of others "
            "may be what that run learned.",
        ),
    ] = None,
    check_every: Annotated[int, typer.Option(min=1, help="Steps between validations and checkpoints.")] = 250,
    checks: Annotated[int, typer.Option(min=4, help="Kept-back rows of each kind to validate on.")] = 64,
    patience: Annotated[
        int,
        typer.Option(
            min=0,
            help="Validations without more gain of the sharer's own after which the run ends and keeps what was best; "
            "0 to go on to the last step and keep that.",
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
) -> None:
    """Train a fuser: both models read a prompt, and the sharer's cache enriches the receiver's.

    Both models stay frozen. A stopped run goes on from its last checkpoint when the same command is given again.
    """
    from kvtalk.adapters.cards import Party
    from kvtalk.adapters.fuser import Fuser, FuserGeometry, Shape, narrowed
    from kvtalk.adapters.store import save_adapter
    from kvtalk.alignment.layers import layer_map
    from kvtalk.training.exchanges import Exchanges, Mixture
    from kvtalk.training.fuser import KEPT_BACK, FuserRecipe, training
    from kvtalk.training.loop import Schedule
    from kvtalk.training.predictor import fit_predictor

    mixture = Mixture(rows=rows).shared(share or ())
    exchanges = Exchanges.load(data)
    reads, answers = _loaded(sharer, receiver)
    parties = (Party(reads.name, reads.spec.fingerprint), Party(answers.name, answers.spec.fingerprint))
    shapes = Shape.of(reads.spec), Shape.of(answers.spec)
    mapped = layer_map(shapes[0].layers, shapes[1].layers, layers)
    geometry = FuserGeometry(
        *shapes,
        mapped,
        projects=projects,
        residual=residual,
        gated=gated,
        weighted=weighted,
        alignment=alignment,
        roles=roles,
        last=last,
    )
    if hidden is None:
        geometry = narrowed(geometry, _FUSER_PARAMETERS)
    else:
        geometry = replace(geometry, hidden=hidden, middle=hidden)
    pack = None if packing == "bf16" else packing
    with tempfile.TemporaryDirectory() as scratch:  # what cannot be saved is found before it is trained
        save_adapter(Fuser(geometry), *parties, Path(scratch), pack)
    plan = None if codec is None and keep == 1 else f"{codec or 'bf16'} {policy}@{100 * keep:g}%"
    recipe = FuserRecipe(
        schedule=Schedule(steps=steps, rate=rate, optimizer=optimizer),
        mixture=mixture,
        plan=plan,
        packing=pack,
        settled=FuserRecipe.settled if trained is None else 1.0,
        seed=seed,
    )
    run = training(reads, answers, exchanges, geometry, recipe, out_folder, checks, patience, trained)
    made = _go(run, steps, check_every)
    if not run.accelerator.is_main_process:
        return
    facts = {"data": [Path(name).name for name in data], "steps": steps, "plan": plan}
    save_adapter(made, *parties, out_folder, pack, facts)
    with out.status("fitting the predictor of its token policies ..."):
        fit_predictor(out_folder, reads, answers, exchanges.split(KEPT_BACK)[0], {"data": facts["data"]})
    out.print(
        f"next: kvtalk eval --task arc_easy --sharer {sharer} --receiver {receiver} --fuser {out_folder} "
        "--arms receiver,sharer,fused,wrong,zeroed",
        highlight=False,
    )


@app.command()
def predictor(
    fuser: Annotated[Path, typer.Option(help="Folder of the fuser, where the predictor is put.")],
    data: FusedDataOption,
    sharer: Annotated[str | None, typer.Option("--sharer", "-s", help="By default by its name on the card.")] = None,
    receiver: Annotated[str | None, typer.Option("--receiver", "-r", help="Likewise.")] = None,
) -> None:
    """Fit what foretells at the sharer what a fuser makes of each token, for proj_vnorm_topk and delta_proj_vnorm.

    `kvtalk train fuser` does so at its end; this is for other fusers, or other data.
    """
    from kvtalk.adapters.cards import read_card
    from kvtalk.errors import AdapterError
    from kvtalk.training.exchanges import Exchanges
    from kvtalk.training.predictor import fit_predictor

    if not fuser.is_dir():
        raise AdapterError(f"{fuser}: no folder: a predictor is put beside its fuser's files, so give their folder")
    card, _ = read_card(fuser, "fuser")
    exchanges = Exchanges.load(data)
    both = _loaded(sharer or card.sharer.name, receiver or card.receiver.name)
    with out.status("fitting ..."):
        fit_predictor(fuser, *both, exchanges, {"data": [Path(name).name for name in data]})
    out.print(
        f"next: kvtalk ask --question '...' --sharer {both[0].name} --receiver {both[1].name} --fuser {fuser} "
        "--plan 'int4 delta_proj_vnorm@25%'",
        highlight=False,
    )


@app.command()
def lora(
    receiver: Annotated[str, typer.Option("--receiver", "-r", help="Model that reads the text itself.")],
    data: DataOption,
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for checkpoints, log and the LoRA.")],
    steps: Annotated[int, typer.Option(min=10, help="Optimizer steps.")] = 1000,
    tokens: Annotated[int, typer.Option(min=64, help="Context tokens in a step, about.")] = 20_480,
    rank: Annotated[int, typer.Option(min=1, help="Of the matrices.")] = 32,
    rate: Annotated[float, typer.Option(help="Learning rate at its peak.")] = 5e-4,
    questions: Annotated[float, typer.Option(min=0, max=1, help="Share of steps that ask questions.")] = 0.5,
    longest: Annotated[int, typer.Option(min=200, help="Characters of the longest plain contexts.")] = 4000,
    check_every: Annotated[int, typer.Option(min=1, help="Steps between validations and checkpoints.")] = 250,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
) -> None:
    """Train a LoRA of the receiver on the same texts: the baseline beside a translator.

    Use it as a model of its own: --receiver 'NAME+FOLDER'.
    """
    from kvtalk.models import LM
    from kvtalk.training.batches import Recipe
    from kvtalk.training.loop import Schedule
    from kvtalk.training.lora import training
    from kvtalk.training.texts import Texts

    texts = Texts.load(data)
    with loading():
        lm = LM.load(receiver, device=_device())
    schedule = Schedule(steps=steps, rate=rate, optimizer="adamw")
    recipe = Recipe(schedule, regression=0.0, tokens=tokens, questions=questions, longest=longest, seed=seed)
    run = training(lm, texts, rank, recipe, out_folder)
    _save_lora(run, steps, check_every, f"--task squad --receiver '{receiver}+{out_folder}' --arms text ...")


@app.command("lora-fuser")
def lora_fuser(
    receiver: Annotated[str, typer.Option("--receiver", "-r", help="Model that answers, without a sharer.")],
    data: FusedDataOption,
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for checkpoints, log and the LoRA.")],
    steps: Annotated[int, typer.Option(min=10, help="Optimizer steps.")] = 1500,
    rows: Annotated[int, typer.Option(min=4, help="Prompts in a step.")] = 96,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of the matrices; by default what has as many parameters as a fuser.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Learning rate at its peak.")] = 2e-4,
    share: SharesOption = None,
    check_every: Annotated[int, typer.Option(min=1, help="Steps between validations and checkpoints.")] = 250,
    checks: Annotated[int, typer.Option(min=4, help="Kept-back rows of each kind to validate on.")] = 64,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
) -> None:
    """Train a LoRA of the receiver on a fuser's rows, with its loss: the baseline beside a fuser.

    Contexts that are for a sharer alone are not read. Use it as a model of its own: --receiver 'NAME+FOLDER'.
    """
    from kvtalk.models import LM
    from kvtalk.training.exchanges import Exchanges, Mixture
    from kvtalk.training.loop import Schedule
    from kvtalk.training.lora import answering, rank_of

    mixture = Mixture(rows=rows).shared(share or ())
    exchanges = Exchanges.load(data)
    with loading():
        lm = LM.load(receiver, device=_device())
    schedule = Schedule(steps=steps, rate=rate, optimizer="adamw")
    size = rank_of(lm, _FUSER_PARAMETERS) if rank is None else rank
    run = answering(lm, exchanges, size, schedule, out_folder, mixture, checks, seed)
    _save_lora(run, steps, check_every, f"--task arc_easy --receiver '{receiver}+{out_folder}' --arms receiver ...")


def _save_lora(run: Loop, steps: int, check_every: int, next_options: str) -> None:
    """Train to the end and write what was trained."""
    trained = _go(run, steps, check_every)
    if run.accelerator.is_main_process:
        trained.save_pretrained(run.out)
        out.print(f"next: kvtalk eval {next_options}", highlight=False)


def _loaded(sharer: str, receiver: str) -> tuple[LM, LM]:
    """Both models on this process's device; a name given twice is loaded once."""
    from kvtalk.models import LM

    with loading():
        device = _device()
        reads = LM.load(sharer, device=device)
        return reads, reads if receiver == sharer else LM.load(receiver, device=device)


def _device() -> str:
    """Of this process."""
    import torch
    from accelerate import PartialState

    return str(PartialState(cpu=not torch.cuda.is_available()).device)


def _go(run: Loop, steps: int, check_every: int) -> Any:
    """To the end, with a bar; returns what was trained."""
    with _bar(run.accelerator.is_main_process) as bar:
        task = bar.add_task("training", total=steps, completed=run.step, shown="")

        def report(step: int, measured: dict[str, float]) -> None:
            text = "  ".join(f"{name} {value:.3f}" for name, value in measured.items())
            checked = "total" not in measured
            bar.update(task, completed=step, shown="" if checked else text)
            if checked:
                bar.console.print(f"step {step}: {text}", highlight=False)

        return run.run(report, check_every)


def _bar(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
        disable=not shown,
    )
