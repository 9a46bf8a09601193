"""The tables of README.md and docs/, from the files under results/.

python benchmarks/tables.py [NAME ...], of those in TABLES
"""

from __future__ import annotations

import gzip
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from translator_ablations import CHOICES

from kvtalk.evaluation import timing
from kvtalk.evaluation.letters import read_as_published
from kvtalk.evaluation.statistics import bootstrap
from kvtalk.evaluation.summary import figure, read_records, signed

RESULTS = Path("results")
MODELS = ("gemma3-270m", "smollm2-135m")
ARMS = {
    "nothing": "receiver",
    "another text's cache": "wrong bf16",
    "its cache with all values zero": "zeroed bf16",
    "**the context as text**": "text",
    "a text that the sharer wrote for it": "relay",
    "its cache, bf16": "cache bf16",
    "its cache, int8": "cache int8:channel/int8:token before",
    "its cache, int4, scales per key channel": "cache int4:channel/int4:token before",
    "its cache, int4, scales per token": "cache int4:token",
    "its cache, 2 bits": "cache int2:32x1/int2:token before",
    "its cache, budget 25%": "cache budget=25%",
    "its cache, budget 10%": "cache budget=10%",
}
CACHES = ("cache bf16", "cache int8:channel/int8:token before", "cache int4:channel/int4:token before")
CONTEXT_TASKS = {"squad": "f1", "hotpotqa": "f1", "narrativeqa": "f1", "countries": "contains"}
ACROSS = {
    "nothing": "receiver",
    "another text's cache of SmolLM2": "wrong bf16",
    "its latents, all zero": "zeroed bf16",
    "**the context as text**": "text",
    "SmolLM2's cache, 1,024 numbers a token": "cache bf16",
    "256 numbers a token in 4 bits": "cache int4:token width=256",
    "128 numbers a token in 4 bits": "cache int4:token width=128",
}
PAIRS = ("smollm2-135m+gemma3-270m", "gemma3-270m+smollm2-135m")
SELF = RESULTS / "translator" / "self"
"""Translators of a receiver as its own sharer, of 1,500 steps."""
TRANSLATOR = RESULTS / "translator"
SLOTS, POOLS = TRANSLATOR / "slots", (1, 2, 4)
SPACE = {
    "gemma3-270m+gemma3-270m": "the encoder, to the decoder shipped then",
    "smollm2-135m+gemma3-270m.lora": "the decoder, to the encoder shipped then",
    "gemma3-270m+gemma3-270m.lora": "never together: both joined",
}
"""Pairs of three models, and what of their adapters was trained to what."""
VERSIONS = {
    "4,050 steps": "4050",
    "5,500 steps": "5500",
    "5,500 steps, mean": "mean",
    "8,000 steps": "8000",
    "10,300 steps": "10300",
}
"""Of translators that shipped before: title and folder; the mean went into Gemma alone, what follows into SmolLM2."""
CANDIDATES = {
    "fifth": "fifth: mean of third and fourth",
    "sixth.last": "sixth, its last weights",
    "sixth": "sixth: mean of its last 1,500 steps",
    "sixth.bf16": "sixth, matrices in bf16",
    "fifth+sixth": "mean of fifth and sixth",
    "fifth+sixth.bf16": "mean of fifth and sixth, matrices in bf16",
    "rounded": "mean of fifth and sixth, 150 steps more in NF4",
    "fourth+sixth": "mean of fourth and sixth",
    "third+sixth": "mean of third and sixth",
    "third+fourth+sixth": "mean of third, fourth and sixth: shipped, 8,000 steps",
    "seventh.last": "seventh, its last weights",
    "seventh": "seventh: mean of its last 920 steps",
    "seventh.bf16": "the same, matrices in bf16",
    "shipped+seventh": "mean of that and of the 8,000 steps: shipped, 10,300 steps",
    "eighth.last": "eighth, its last weights",
    "shipped+eighth.last": "mean of these and of the 10,300 steps",
    "eighth": "eighth: mean of its last 1,296 steps",
    "eighth.bf16": "the same, matrices in bf16",
    "shipped+eighth.70": "7 parts of that mean, 3 of the 10,300 steps",
    "shipped+eighth": "half of each: ships, 13,540 steps",
    "shipped+eighth.bf16": "the same, matrices in bf16",
}
INTO_GEMMA = {
    "ninth.last": "ninth, its last weights",
    "fifth+ninth.last": "mean of these and of the fifth: ships, 6,872 steps",
    "ninth": "ninth: mean of its last 549 steps",
    "ninth.bf16": "the same, matrices in bf16",
    "fifth+ninth.70": "7 parts of that mean, 3 of the fifth",
    "fifth+ninth": "half of each",
    "fifth+ninth.bf16": "the same, matrices in bf16",
}
READ_BY = {"gemma3-270m+gemma3-270m.lora": "smollm2-135m+gemma3-270m.lora"}
"""Where the same receiver read the same text."""

TABLES = (
    "squad",
    "tasks",
    "routing",
    "choice",
    "speed",
    "latency",
    "across",
    "translator",
    "ceilings",
    "own",
    "learned",
    "further",
    "elsewhere",
    "candidates",
    "into_gemma",
    "lora",
    "latents",
    "narrowed",
    "text",
    "choices",
    "pooled",
    "joined",
    "decoding",
    "shipped",
    "thinned",
    "fused",
    "five",
    "accuracy",
    "controlled",
    "all_controls",
    "oracle",
    "gaps",
    "policies",
    "known",
    "sent",
    "taught",
    "worth",
    "fusing",
    "waiting",
)
FUSED = RESULTS / "fuser"
FUSED_ARMS = ("receiver", "sharer", "relay", "routing", "fused bf16", "wrong bf16", "zeroed bf16", "self bf16")
LORA = "LoRA"
SET_ARMS = (*FUSED_ARMS[:4], LORA, *FUSED_ARMS[4:])
"""Of the multiple-choice sets; a LoRA of a fuser's size has no sharer."""
CONTROLS = ("wrong bf16", "zeroed bf16", "self bf16")
FUSED_PAIRS = PAIRS[::-1]
FUSED_METRICS = {"likelihood": "acc_norm", "letter": "acc"}
RESAMPLES = 2000
ITEMS = "items.jsonl.gz"
CHOICE_TASKS = ("openbookqa", "arc_challenge", "arc_easy", "mmlu_redux", "ceval")
CURVED = CHOICE_TASKS[:2]


def rows_of(folder: Path) -> dict[str, dict]:
    """A summary's rows by arm."""
    return {row["arm"]: row for row in json.loads((folder / "summary.json").read_text("utf-8"))["arms"]}


def squad() -> Iterator[str]:
    """SQuAD, both models, the arms of README.md."""
    gemma, smollm = (rows_of(RESULTS / "squad" / model) for model in MODELS)
    yield "| the receiver gets | bytes (Gemma) | Gemma-3-270M F1 | SmolLM2-135M F1 |"
    yield "| --- | --- | --- | --- |"
    for title, arm in ARMS.items():
        cells = [figure("f1", rows[arm]["f1"]) for rows in (gemma, smollm)]
        yield f"| {title} | {gemma[arm]['bytes']:,} | {cells[0]} | {cells[1]} |"


def tasks() -> Iterator[str]:
    """Every task with a context: the ceiling, the cache in three codecs, its controls, what each of them bought."""
    columns = ("receiver", "text", "relay", *CACHES, "wrong bf16", "zeroed bf16")
    titles = "alone | text | relay | cache, bf16 | int8 | int4 | wrong | zeroed | gain, bf16 | gain, int8 | gain, int4"
    yield f"| task, model | {titles} |"
    yield "| --- " * 12 + "|"
    for task, metric in CONTEXT_TASKS.items():
        for model in MODELS:
            rows = rows_of(RESULTS / task / model)
            cells = [f"{rows[name][metric][0]:.1f}" for name in columns]
            cells += [signed(rows[name]["gain"]) for name in CACHES]
            yield f"| {task}, {model} | {' | '.join(cells)} |"


def routing() -> Iterator[str]:
    """Query routing between the receiver without and the sharer with the context; its lot has the same share."""
    yield "| task, model | receiver alone | sharer alone | routing | minus sharer | takes the sharer's | by lot |"
    yield "| --- " * 7 + "|"
    for task, metric in CONTEXT_TASKS.items():
        for model in MODELS:
            rows = rows_of(RESULTS / task / model)
            ours, theirs, routed = (rows[name] for name in ("receiver", "sharer", "routing"))
            assert theirs["minus_text"] == [0, 0, 0]  # so that "minus text" is "minus sharer"
            share = routed["sharer_share"]
            cells = [f"{ours[metric][0]:.1f}", f"{theirs[metric][0]:.1f}", figure(metric, routed[metric])]
            cells += [signed(routed["minus_text"]), f"{100 * share:.0f}%"]
            cells.append(f"{share * theirs[metric][0] + (1 - share) * ours[metric][0]:.1f}")
            yield f"| {task}, {model} | {' | '.join(cells)} |"


def choice() -> Iterator[str]:
    """Multiple choice, each model alone, both protocols, and how often they name the same option."""
    yield "| task | model | acc_norm | acc | letter, strict | found | letter, C2C's reading | found | same option |"
    yield "| --- " * 9 + "|"
    for task in CHOICE_TASKS:
        for model in MODELS:
            weighed, written = (rows_of(RESULTS / task / model / name)["receiver"] for name in ("likelihood", "letter"))
            found, same = agreement(task, model)
            cells = [figure("acc_norm", weighed["acc_norm"]), f"{weighed['acc'][0]:.1f}"]
            cells += [f"{written[name][0]:.1f}" for name in ("acc", "parsed", "acc_published")]
            yield f"| {task} | {model} | {' | '.join(cells)} | {found:.1f} | {same:.1f} |"


def agreement(task: str, model: str) -> tuple[float, float]:
    """Percent of items in which C2C's reading finds a letter, and of these, where it is the likeliest option's."""
    named: dict[str, list[str]] = {}
    for record in read_records(RESULTS / task / model / "likelihood"):
        named.setdefault(record.id, []).append(record.answer)
    for record in read_records(RESULTS / task / model / "letter"):
        named[record.id].append(read_as_published(record.answer))
    both = [pair for pair in named.values() if pair[1]]
    return 100 * len(both) / len(named), 100 * sum(a == b for a, b in both) / len(both)


def speed() -> Iterator[str]:
    """Items a second with all arms, and what an evaluation takes beyond the model calls."""
    yield "| machine | items | batch | items a second | seconds / model's seconds | peak memory: one batch, all |"
    yield "| --- " * 6 + "|"
    for machine, name in (("H200", "h200"), ("2 CPU cores", "cpu")):
        found = json.loads((RESULTS / "bench" / f"eval_overhead_{name}.json").read_text())
        one, every = found["one batch"], found["all"]
        memory = " and ".join(f"{run['peak_memory_bytes'] / 1e9:.2f} GB" for run in (one, every))
        figures = f"{every['items']:,} | {every['batch']:,} | {every['items_per_second']:.2f} | {every['ratio']:.2f}"
        yield f"| {machine} | {figures} | {memory} |"


def latency() -> Iterator[str]:
    """One question at a time on the GPU."""
    phases = (*timing.PHASES, "receiver_first_token", "to_first_token")
    yield f"| model, arm | {' | '.join(phase.replace('_', ' ') for phase in phases)} |"
    yield "| --- " * (len(phases) + 1) + "|"
    for model in ("smollm2-135m",):
        for arm, row in timing.medians(RESULTS / "latency" / "h200" / model).items():
            yield f"| {model}, {arm} | {' | '.join(f'{row[phase]:.1f}' if row[phase] else '' for phase in phases)} |"


def translator() -> Iterator[str]:
    """Across models: what the receiver answers from a translated cache, and the controls."""
    yield "| task | sharer+receiver | questions | alone | frozen, text | translated | wrong | zeroed | gain |"
    yield "| --- " * 9 + "|"
    for task, metric in CONTEXT_TASKS.items():
        for pair in PAIRS:
            folder = RESULTS / task / pair
            if folder.exists():
                rows = rows_of(folder)
                count = json.loads((folder / "manifest.json").read_text())["items"]["count"]
                names = ("receiver", "text", "cache bf16", "wrong bf16", "zeroed bf16")
                cells = [figure(metric, rows[name][metric]) for name in names]
                yield f"| {task} | {pair} | {count:,} | {' | '.join(cells)} | {signed(rows['cache bf16']['gain'])} |"


def ceilings() -> Iterator[str]:
    """Across models: the translated cache against the receiver's own, through a translator of the same sizes."""
    yield "| task | sharer+receiver | frozen, text | self | translated | translated / self | / text |"
    yield "| --- " * 7 + "|"
    for task, metric in CONTEXT_TASKS.items():
        for pair in PAIRS:
            ours, own = rows_of(RESULTS / task / pair), rows_of(SELF / task / pair.partition("+")[2])
            figures = [ours["text"][metric], own["cache bf16"][metric], ours["cache bf16"][metric]]
            shares = [f"{100 * figures[2][0] / other[0]:.0f}%" for other in (figures[1], figures[0])]
            cells = [*(figure(metric, value) for value in figures), *shares]
            yield f"| {task} | {pair} | {' | '.join(cells)} |"


def own() -> Iterator[str]:
    """Across models, SQuAD: what was translated when a translator shipped, against the receiver's own cache by an
    encoder trained to the same decoder."""
    yield "| sharer+receiver | shipped then | translated | own, by an encoder to the same decoder | translated / own |"
    yield "| --- " * 5 + "|"
    for pair in PAIRS:
        for title, version in VERSIONS.items():
            folders = (
                TRANSLATOR / "versions" / version / place for place in (f"squad/{pair}", f"own/{pair.split('+')[1]}")
            )
            translated, ceiling = folders
            if ceiling.exists():
                both = [_scores(folder, "f1")["cache bf16"] for folder in (translated, ceiling)]
                cells = [figure("f1", bootstrap(list(scores.values())).rounded()) for scores in both]
                yield f"| {pair} | {title} | {' | '.join(cells)} | {_share(*both)} |"


def _share(part: dict[str, float], whole: dict[str, float]) -> str:
    """One mean in percent of another one's of the same items, drawn anew together."""
    both = np.array([[part[key], whole[key]] for key in part])
    drawn = both[np.random.default_rng(0).integers(len(both), size=(RESAMPLES, len(both)))].mean(axis=1)
    low, high = np.percentile(100 * drawn[:, 0] / drawn[:, 1], (2.5, 97.5))
    mean = both.mean(axis=0)
    return f"{100 * mean[0] / mean[1]:.0f}% [{low:.0f}, {high:.0f}]"


def learned() -> Iterator[str]:
    """Across models: F1 on questions about the training paragraphs and about others, by what shipped when; both
    controls are of the translator that ships now."""
    yield f"| sharer+receiver | SQuAD's questions | number | {' | '.join(VERSIONS)} | now | wrong | zeroed |"
    yield "| --- " * (6 + len(VERSIONS)) + "|"
    for pair in PAIRS:
        known = [TRANSLATOR / "learned" / when / pair for when in (*VERSIONS.values(), "now")]
        for title, folders in (("trained on, every sixth", known), ("test", _versions("squad", pair))):
            found = [_scores(folder, "f1") if folder.exists() else {} for folder in folders]
            cells = [
                figure("f1", bootstrap(list(scores["cache bf16"].values())).rounded()) if scores else ""
                for scores in found
            ]
            cells += [f"{bootstrap(list(found[-1][f'{kind} bf16'].values())).mean:.1f}" for kind in ("wrong", "zeroed")]
            yield f"| {pair} | {title} | {len(found[-1]['cache bf16']):,} | {' | '.join(cells)} |"


def further() -> Iterator[str]:
    """Across models: F1 on SQuAD before and now, by what crosses."""
    yield "| sharer+receiver | what crosses | before | now | more |"
    yield "| --- " * 5 + "|"
    for pair in PAIRS:
        old, new = (_scores(folder, "f1") for folder in _last_two("squad", pair))
        for arm in ("cache bf16", *(f"cache int4:token width={width}" for width in (256, 112, 64))):
            yield f"| {pair} | {arm.removeprefix('cache ')} | {' | '.join(_compared(old[arm], new[arm]))} |"


def elsewhere() -> Iterator[str]:
    """Across models: all tasks before and now; F1 (Countries: right answers) and nats a token of the right answer,
    whole latents."""
    yield "| task | sharer+receiver | before | now | more | answer NLL, before | now | more |"
    yield "| --- " * 8 + "|"
    for task, metric in CONTEXT_TASKS.items():
        for pair in PAIRS:
            folders = _last_two(task, pair)
            old, new = (_scores(folder, metric)["cache bf16"] for folder in folders)
            nats = [_scores(folder, "nll")["cache bf16"] for folder in folders]
            cells = [*_compared(old, new), *(f"{bootstrap(list(scores.values())).mean:.2f}" for scores in nats)]
            more = bootstrap([nats[1][key] - nats[0][key] for key in nats[0]])
            cells.append(f"{more.mean:+.2f} [{more.low:+.2f}, {more.high:+.2f}]")
            yield f"| {task} | {pair} | {' | '.join(cells)} |"


def candidates() -> Iterator[str]:
    """Into SmolLM2: runs and means of them, of which what ships was chosen by the first half of SQuAD's questions."""
    folders = [*zip(("third", "fourth"), _versions("squad", PAIRS[1]), strict=False)]
    folders += [(title, TRANSLATOR / "candidates" / name) for name, title in CANDIDATES.items()]
    yield from _candidates(folders, TRANSLATOR / "candidates" / "fifth")


def into_gemma() -> Iterator[str]:
    """The same into Gemma."""
    versions = _versions("squad", PAIRS[0])
    folders = [*zip(("third", "fourth", "fifth: mean of both, shipped before"), versions, strict=False)]
    folders += [(title, TRANSLATOR / "candidates" / name) for name, title in INTO_GEMMA.items()]
    yield from _candidates(folders, versions[2])


def _candidates(folders: Sequence[tuple[str, Path]], fifth: Path) -> Iterator[str]:
    yield "| weights | F1, first 1,024 | F1, the other 1,025 | F1, all | above the fifth's | answer NLL |"
    yield "| --- " * 6 + "|"
    below = _scores(fifth, "f1")["cache bf16"]
    first = set((TRANSLATOR / "candidates" / "chosen_on.txt").read_text("utf-8").split())
    for title, place in folders:
        f1, nll = (_scores(place, metric)["cache bf16"] for metric in ("f1", "nll"))
        halves = ([f1[key] for key in f1 if (key in first) == chosen_on] for chosen_on in (True, False))
        cells = [f"{statistics.mean(half):.1f}" for half in halves]
        whole, more = _compared(below, f1)[1:]
        yield f"| {title} | {' | '.join(cells)} | {whole} | {more} | {bootstrap(list(nll.values())).mean:.2f} |"


def _versions(task: str, pair: str) -> list[Path]:
    """What the translators that shipped answered, the present one last."""
    return [*(TRANSLATOR / "versions" / steps / task / pair for steps in VERSIONS.values()), RESULTS / task / pair]


def _last_two(task: str, pair: str) -> list[Path]:
    """What the translator that shipped before answered, and the present one."""
    return [folder for folder in _versions(task, pair) if folder.exists()][-2:]


def _compared(one: dict[str, float], other: dict[str, float]) -> list[str]:
    """Means of two ways of answering the same questions, and of their differences."""
    means = [figure("f1", bootstrap(list(scores.values())).rounded()) for scores in (one, other)]
    return [*means, signed(bootstrap([other[key] - one[key] for key in one]).rounded())]


def lora() -> Iterator[str]:
    """Across models: beside a receiver that was fine-tuned and reads the text, on the questions of that run."""
    yield "| sharer+receiver | questions | frozen, text | translated | self | LoRA, text |"
    yield "| --- " * 6 + "|"
    for pair in PAIRS:
        receiver = pair.partition("+")[2]
        folders = (
            RESULTS / "squad" / pair,
            SELF / "squad" / receiver,
            RESULTS / "translator" / "lora" / "squad" / receiver,
        )
        arms = ("text", "cache bf16", "cache bf16", "text")
        scores = [_scores(folder, "f1")[arm] for folder, arm in zip((folders[0], *folders), arms, strict=True)]
        cells = [figure("f1", bootstrap([one[key] for key in scores[-1]]).rounded()) for one in scores]
        yield f"| {pair} | {len(scores[-1]):,} | {' | '.join(cells)} |"


def shipped() -> Iterator[str]:
    """The fusers that come along: the sharer reads a text, the receiver a question about it; F1."""
    names = ("receiver", "text", "fused bf16", "wrong bf16", "zeroed bf16")
    yield from _fused_head("sharer+receiver, questions", names)
    for title, place, pairs in (
        ("gaps", "qat/parent/gaps", FUSED_PAIRS),
        ("names and numbers", "shipped/names", FUSED_PAIRS),
        ("SQuAD", "shipped/squad", FUSED_PAIRS),
    ):
        for pair in pairs:
            read = rows_of(FUSED / "gaps" / "text" / pair.partition("+")[2]) if title == "gaps" else {}
            yield _fused_row(f"{pair}, {title}", FUSED / place / pair, "f1", names, read)


def thinned() -> Iterator[str]:
    """Gaps, by what crosses, for the fusers that come along and for those that went on with the packet in the loop."""
    yield "| sharer+receiver | what crosses | bytes | F1 | gain | F1, packet in the loop | gain | more gain | in nats |"
    yield "| --- " * 9 + "|"
    for pair in FUSED_PAIRS:
        folders = [FUSED / "qat" / way / "gaps" / pair for way in ("parent", "trained")]
        both, records = [rows_of(folder) for folder in folders], [_records(folder / ITEMS) for folder in folders]
        for name, row in both[0].items():
            if row["kind"] == "fused":
                cells = [f"{figure('f1', rows[name]['f1'])} | {signed(rows[name]['gain'])}" for rows in both]
                for metric, scale in (("f1", 100), ("nll", -1)):
                    without, packed = (_gains(found, name, metric, scale) for found in records)
                    more = bootstrap([packed[key] - value for key, value in without.items()])
                    digits = 1 if metric == "f1" else 2
                    cells.append(f"{more.mean:+.{digits}f} [{more.low:+.{digits}f}, {more.high:+.{digits}f}]")
                yield f"| {pair} | {name.removeprefix('fused ')} | {row['bytes']:,} | {' | '.join(cells)} |"


def _gains(records: dict[str, list[dict]], arm: str, metric: str, scale: float) -> dict[str, float]:
    """Of each item, above the better of the controls of a fused arm; more is better."""
    arms = [arm, *(arm.replace("fused", control, 1) for control in ("wrong", "zeroed"))]
    ours, *controls = ({row["id"]: scale * row["scores"][metric] for row in records[name]} for name in arms)
    best = max(controls, key=lambda scores: statistics.mean(scores.values()))
    return {key: value - best[key] for key, value in ours.items()}


def fused() -> Iterator[str]:
    """Fused caches: what the fuser makes of the sharer's, and of what else stands in its place."""
    yield from _fused_head("sharer+receiver, task, protocol", SET_ARMS)
    for pair in FUSED_PAIRS:
        for protocol, metric in FUSED_METRICS.items():
            for task in CHOICE_TASKS:
                tuned = {LORA: rows_of(_lora(pair, task, protocol))["receiver"]}
                folder = FUSED / task / protocol / pair
                if folder.exists():
                    yield _fused_row(f"{pair}, {task}, {protocol}", folder, metric, SET_ARMS, tuned)


def five() -> Iterator[str]:
    """Means over the sets, each counting alike; the gain is against the best control of that mean."""
    names = tuple(name for name in SET_ARMS if name != "routing")
    titles = " | ".join(name.removesuffix(" bf16") for name in names)
    yield f"| sharer+receiver, protocol | {titles} | gain | fused − LoRA |"
    yield "| --- " * (len(names) + 3) + "|"
    for pair in FUSED_PAIRS:
        for protocol in FUSED_METRICS:
            sets = [_fused_scores(pair, task, protocol) for task in CHOICE_TASKS]
            means = [statistics.mean(statistics.mean(one[name]) for one in sets) for name in names]
            cells = " | ".join(f"{mean:.1f}" for mean in means)
            yield f"| {pair}, {protocol} | {cells} | {_gain(sets, CONTROLS)} | {_gain(sets, [LORA])} |"


def _gain(sets: Sequence[dict[str, list[float]]], controls: Sequence[str]) -> str:
    """Fused above the best of the controls, mean of the sets, each counting alike; drawn anew within each."""

    def mean(name: str) -> float:
        return statistics.mean(statistics.mean(one[name]) for one in sets)

    best = max(controls, key=mean)
    rng = np.random.default_rng(0)
    drawn = np.zeros(RESAMPLES)
    for one in sets:
        gained = np.array(one["fused bf16"]) - np.array(one[best])
        drawn += gained[rng.integers(len(gained), size=(RESAMPLES, len(gained)))].mean(axis=1) / len(sets)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return signed([mean("fused bf16") - mean(best), float(low), float(high)])


def accuracy() -> Iterator[str]:
    """Accuracy by likelihood against what crosses, of OpenBookQA and ARC-Challenge."""
    titles = " | ".join(f"{pair}: bytes | {' | '.join(CURVED)}" for pair in FUSED_PAIRS)
    yield f"| what crosses | {titles} |"
    yield "| --- " * (1 + len(FUSED_PAIRS) * (1 + len(CURVED))) + "|"
    found = [[rows_of(FUSED / "curve" / task / pair) for task in CURVED] for pair in FUSED_PAIRS]
    for name, row in sorted(found[0][0].items(), key=lambda item: (-item[1]["bytes"], item[0])):
        if row["kind"] in ("receiver", "fused"):
            cells: list[str] = []
            for sets in found:
                cells += [f"{sets[0][name]['bytes']:,}", *(f"{one[name]['acc_norm'][0]:.1f}" for one in sets)]
            yield f"| {name.removeprefix('fused ')} | {' | '.join(cells)} |"


def controlled() -> Iterator[str]:
    """The same beside the controls, for the plans that have them."""
    names = ("fused", "wrong", "zeroed", "self")
    yield f"| sharer+receiver, task | what crosses | bytes | {' | '.join(names)} | gain |"
    yield "| --- " * (len(names) + 4) + "|"
    for pair in FUSED_PAIRS:
        for task in CURVED:
            rows = rows_of(FUSED / "curve" / task / pair)
            for name, row in rows.items():
                if row["kind"] == "fused" and row.get("gain"):
                    cells = [figure("acc_norm", rows[name.replace("fused", one, 1)]["acc_norm"]) for one in names]
                    sent = f"{name.removeprefix('fused ')} | {row['bytes']:,}"
                    yield f"| {pair}, {task} | {sent} | {' | '.join(cells)} | {signed(row['gain'])} |"


def all_controls() -> Iterator[str]:
    """All thinned plans on OpenBookQA beside wrong and zeroed caches: how many gains are surely above or below zero."""
    yield "| sharer+receiver | plans | gain, from, to | surely above zero | surely below |"
    yield "| --- " * 5 + "|"
    for pair in FUSED_PAIRS:
        scores = _scores(FUSED / "curve" / "controls" / pair, "acc_norm")
        gains = []
        for plan in (name.removeprefix("fused ") for name in scores if name.startswith("fused ")):
            ours, *controls = (scores[f"{kind} {plan}"] for kind in ("fused", "wrong", "zeroed"))
            best = max(controls, key=lambda one: statistics.mean(one.values()))
            gains.append(bootstrap([value - best[key] for key, value in ours.items()]).rounded())
        means = [gain[0] for gain in gains]
        sure = [sum(gain[1] > 0 for gain in gains), sum(gain[2] < 0 for gain in gains)]
        yield f"| {pair} | {len(gains)} | {min(means):+.1f}, {max(means):+.1f} | {sure[0]} | {sure[1]} |"


def oracle() -> Iterator[str]:
    """The sharer reads the context, too, the receiver the question alone; F1."""
    names = ("receiver", "text", "fused bf16", "wrong bf16", "zeroed bf16")
    yield from _fused_head("sharer+receiver, questions", names)
    for title, place in (("SQuAD", "oracle/squad"), ("gaps", "cloze")):
        for pair in FUSED_PAIRS:
            yield _fused_row(f"{pair}, {title}", FUSED / place / pair, "f1", names)


def gaps() -> Iterator[str]:
    """What crosses against what it is worth where one name or number is missing."""
    pair = FUSED_PAIRS[1]
    rows = rows_of(FUSED / "cloze" / pair)
    yield "| what crosses | bytes | F1 | exact, % | NLL |"
    yield "| --- " * 5 + "|"
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["bytes"]):
        if row["kind"] in ("fused", "wrong", "zeroed"):
            figures = f"{figure('f1', row['f1'])} | {row['em'][0]:.1f} | {row['nll']:.2f}"
            yield f"| {name.removeprefix('fused ')} | {row['bytes']:,} | {figures} |"


def policies() -> Iterator[str]:
    """Gaps, nats a token by the policy that chose what crossed; what foretelling loses against the exact scores."""
    (row,) = json.loads((FUSED / "policies.json").read_text("utf-8"))["measured"]
    names = list(row["kept"]["25%"]["loss"])
    yield f"| kept | {' | '.join(names)} | lost by foretelling delta |"
    yield "| --- " * (len(names) + 2) + "|"
    for keep, found in row["kept"].items():
        lost = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*found["lost"]["delta_proj_vnorm"])
        cells = [f"{found['loss'][name][0]:.2f}" for name in names]
        yield f"| {keep} | {' | '.join(cells)} | {lost} |"


def known() -> Iterator[str]:
    """The same with options to choose from (accuracy), and in nats."""
    names = ("none", "right", "wrong", "zeroed")
    yield "| sharer+receiver, questions | measure | questions | alone | fused | wrong | zeroed | gain |"
    yield "| --- " * 8 + "|"
    for pair in FUSED_PAIRS:
        for row in json.loads((FUSED / "oracle" / f"known.{pair}.json").read_text("utf-8"))["measured"]:
            title = {"known": "SQuAD, options", "oracle": "SQuAD"}[row["kind"]]
            digits = 1 if row["measure"] == "accuracy" else 3
            cells = [f"{row[name][0]:.{digits}f}" for name in names]
            mean, low, high = (f"{value:+.{digits}f}" for value in row["gain"])
            measured = f"{row['measure']} | {row['rows']:,} | {' | '.join(cells)}"
            yield f"| {pair}, {title} | {measured} | {mean} [{low}, {high}] |"


def sent() -> Iterator[str]:
    """What crosses against what it is worth, with the context at the sharer alone."""
    yield "| what crosses | " + " | ".join(f"{pair}: bytes | NLL | F1" for pair in FUSED_PAIRS) + " |"
    yield "| --- " * (1 + 3 * len(FUSED_PAIRS)) + "|"
    both = [_records(FUSED / "oracle" / "curve" / f"{pair}.jsonl.gz") for pair in FUSED_PAIRS]
    first = {arm: statistics.mean(row["bytes"] for row in rows) for arm, rows in both[0].items()}
    for arm in sorted(first, key=lambda arm: (-first[arm], arm)):
        cells = [arm.removeprefix("fused ")]
        for found in both:
            rows = found[arm]
            means = [statistics.mean(row["scores"][name] for row in rows) for name in ("nll", "f1")]
            cells += [
                f"{statistics.mean(row['bytes'] for row in rows):,.0f}",
                f"{means[0]:.2f}",
                f"{100 * means[1]:.1f}",
            ]
        yield f"| {' | '.join(cells)} |"


def taught() -> Iterator[str]:
    """What the logs of fusers' trainings say at their last validation."""
    figures = ("accuracy", "preference", "instructions", "running", "oracle")
    yield f"| run | steps | {' | '.join(figures)} |"
    yield "| --- " * (len(figures) + 2) + "|"
    for file in sorted((RESULTS / "fuser" / "logs").glob("*.jsonl")):
        last = [row for row in map(json.loads, file.read_text("utf-8").splitlines()) if "gates open" in row][-1]
        cells = []
        for name in figures:
            percent, digits = (100, 1) if name == "accuracy" else (1, 3)
            ways = (last[f"{name}{way}"] for way in ("", " wrong", " zeroed", " alone"))
            cells.append(" / ".join(f"{percent * value:.{digits}f}" for value in ways))
        yield f"| {file.stem} | {last['step']} | {' | '.join(cells)} |"


def _scores(folder: Path, metric: str) -> dict[str, dict[str, float]]:
    """By arm and item, in percent or nats; items in the order of their ids, as summaries take them."""
    found: dict[str, dict[str, float]] = {}
    for record in sorted(read_records(folder), key=lambda record: record.id):
        found.setdefault(record.arm, {})[record.id] = record.scores[metric] * (1 if metric == "nll" else 100)
    return found


def worth() -> Iterator[str]:
    """What a sharer adds to the answers that a receiver is taught, in nats."""
    names = ("right", "wrong", "zeroed", "none", "self")
    yield f"| kind of row | rows | {' | '.join(names)} | gain |"
    yield "| --- " * (len(names) + 3) + "|"
    for row in json.loads((FUSED / "gain.json").read_text("utf-8"))["measured"]:
        cells = [f"{row[name][0]:.3f}" for name in names]
        mean, low, high = row["gain"]
        yield f"| {row['kind']} | {row['rows']} | {' | '.join(cells)} | {mean:+.3f} [{low:+.3f}, {high:+.3f}] |"


def _fused_head(first: str, names: Sequence[str]) -> Iterator[str]:
    yield f"| {first} | items | {' | '.join(name.removesuffix(' bf16') for name in names)} | gain |"
    yield "| --- " * (len(names) + 3) + "|"


def _fused_row(
    title: str, folder: Path, metric: str, names: Sequence[str] = FUSED_ARMS, further: dict[str, dict] | None = None
) -> str:
    rows = {**(further or {}), **rows_of(folder)}
    cells = [figure(metric, rows[name][metric]) for name in names]
    return f"| {title} | {rows['receiver']['items']:,} | {' | '.join(cells)} | {signed(rows['fused bf16']['gain'])} |"


def _fused_scores(pair: str, task: str, protocol: str) -> dict[str, list[float]]:
    """In percent, by arm, items in the same order."""
    rows = _records(FUSED / task / protocol / pair / ITEMS)
    rows[LORA] = _records(_lora(pair, task, protocol) / ITEMS)["receiver"]
    metric = FUSED_METRICS[protocol]
    scores = {arm: {row["id"]: 100 * row["scores"][metric] for row in listed} for arm, listed in rows.items()}
    assert all(found.keys() == scores["receiver"].keys() for found in scores.values())
    return {arm: [found[key] for key in scores["receiver"]] for arm, found in scores.items()}


def _lora(pair: str, task: str, protocol: str) -> Path:
    """The run of the receiver with a LoRA that was trained on the fuser's rows."""
    return FUSED / "lora" / task / protocol / pair.partition("+")[2]


def _records(file: Path) -> dict[str, list[dict]]:
    """Of every arm."""
    found: dict[str, list[dict]] = {}
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            found.setdefault(row["arm"], []).append(row)
    return found


def fusing() -> Iterator[str]:
    """Time to fuse against a fuser of the published size, computed layer by layer."""
    yield "| where, type | published size, by layer | the same, stacked | ours | by layer / ours, median [range] |"
    yield "| --- " * 5 + "|"
    for where, device, digits in (("2 CPU cores", "cpu", 0), ("H200", "cuda", 1)):
        measured = json.loads((RESULTS / "bench" / f"fuser_{device}.json").read_text())["measured"]
        for row in (row for row in measured if row["device"] == device):
            times = " | ".join(f"{row[name + '_ms']:,.{digits}f} ms" for name in ("layers", "stacked", "ours"))
            ratio = "{median:.1f} [{range[0]:.1f}, {range[1]:.1f}]".format(**row["layers_over_ours"])
            yield f"| {where}, {row['dtype']} | {times} | {ratio} |"


def waiting() -> Iterator[str]:
    """Time to the first token of a fused answer against that of an answer to what the sharer writes."""
    yield "| where, task | sharer+receiver | alone | relay | of it writing | fused | fused / relay, median [range] |"
    yield "| --- " * 7 + "|"
    for where, folder in (
        ("2 CPU cores, OpenBookQA", FUSED / "latency"),
        ("H200, OpenBookQA", FUSED / "latency" / "h200" / "openbookqa"),
        ("H200, gaps", FUSED / "latency" / "h200" / "gaps"),
    ):
        for pair in FUSED_PAIRS:
            if not (folder / pair).exists():
                continue
            arms = {row["arm"]: row["seconds"] for row in json.loads((folder / pair / "timings.json").read_text())}
            total = {arm: [one["to_first_token"] for one in arms[arm]] for arm in ("receiver", "relay", "fused bf16")}
            ratios = [ours / theirs for ours, theirs in zip(total["fused bf16"], total["relay"], strict=True)]
            cells = [f"{1000 * statistics.median(total[arm]):.0f} ms" for arm in ("receiver", "relay", "fused bf16")]
            cells.insert(2, f"{1000 * statistics.median(one['relay'] for one in arms['relay']):.0f} ms")
            ratio = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
            yield f"| {where} | {pair} | {' | '.join(cells)} | {ratio} |"


def across() -> Iterator[str]:
    """SQuAD across models, the arms of README.md."""
    rows = rows_of(RESULTS / "squad" / PAIRS[0])
    yield "| Gemma gets | bytes | F1 |"
    yield "| --- | --- | --- |"
    for title, arm in ACROSS.items():
        yield f"| {title} | {rows[arm]['bytes']:,} | {figure('f1', rows[arm]['f1'])} |"


def latents() -> Iterator[str]:
    """SQuAD across models, score against what crosses."""
    rows = rows_of(RESULTS / "squad" / PAIRS[0])
    tokens = rows["cache bf16"]["bytes"] / 2048
    yield "| latents | bytes a context | bytes a token, about | F1 | answer NLL |"
    yield "| --- " * 5 + "|"
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["bytes"]):
        if row["kind"] == "cache":
            each = f"{row['bytes']:,} | {row['bytes'] / tokens:,.0f}"
            yield f"| {name.removeprefix('cache ')} | {each} | {figure('f1', row['f1'])} | {row['nll']:.2f} |"


def choices() -> Iterator[str]:
    """One choice of the recipe changed at a time: F1 on SQuAD's questions, KL on plain text."""
    plans = ("bf16", "int4:token width=112")
    titles = " | ".join(f"F1, {plan} | above that" for plan in plans)
    yield f"| changed | {titles} | gain, bf16 | KL, bf16 | KL, 128 in int4 |"
    yield "| --- " * 8 + "|"
    base = _scores(TRANSLATOR / "choices" / "base", "f1")
    for name, choice in CHOICES.items():
        folder = TRANSLATOR / "choices" / name
        rows, scores, cells = rows_of(folder), _scores(folder, "f1"), []
        for arm in (f"cache {plan}" for plan in plans):
            more = bootstrap([scores[arm][key] - base[arm][key] for key in base[arm]]).rounded()
            cells += [f"{rows[arm]['f1'][0]:.1f}", "" if name == "base" else signed(more)]
        kl = json.loads((TRANSLATOR / "choices" / f"{name}.text.json").read_text())["kl"]
        cells += [signed(rows["cache bf16"]["gain"])]
        cells += ["{:.2f} [{:.2f}, {:.2f}]".format(*kl[way]) for way in ("1024 bf16", "128 int4")]
        yield f"| {choice.said} | {' | '.join(cells)} |"


def narrowed() -> Iterator[str]:
    """What narrow latents cost: F1 above that of whole ones, question by question."""
    plans = ("512", "256", "128", "112", "64")
    names = [f"int4:token width={width}" for width in plans]
    yield f"| sharer+receiver | {' | '.join(names)} |"
    yield "| --- " * (len(names) + 1) + "|"
    for pair in PAIRS:
        scores = _scores(RESULTS / "squad" / pair, "f1")
        more = [[scores[f"cache {name}"][key] - whole for key, whole in scores["cache bf16"].items()] for name in names]
        yield f"| {pair} | {' | '.join(signed(bootstrap(one).rounded()) for one in more)} |"


def pooled() -> Iterator[str]:
    """Fewer latents than tokens, trained alike: F1 on SQuAD's questions and KL on plain text, by bytes a token."""
    titles = "bytes a token, about | F1 | wrong | zeroed | gain | answer NLL | F1 above 1 a latent in as many bytes"
    yield f"| tokens a latent | latents | {titles} |"
    yield "| --- " * 9 + "|"
    tokens = rows_of(SLOTS / "pool1")["cache bf16"]["bytes"] / 2048
    single = _scores(SLOTS / "pool1", "f1")
    for pool in POOLS:
        rows, scores = rows_of(SLOTS / f"pool{pool}"), _scores(SLOTS / f"pool{pool}", "f1")
        for name, row in rows.items():
            if row["kind"] == "cache":
                width = int(name.partition("width=")[2] or 1024) // pool
                alike = single.get(f"{name.partition(' width')[0]} width={width}", {}) if pool > 1 else {}
                more = [value - alike[key] for key, value in scores[name].items()] if alike else []
                controls = [f"{rows[name.replace('cache', kind, 1)]['f1'][0]:.1f}" for kind in ("wrong", "zeroed")]
                cells = [figure("f1", row["f1"]), *controls, signed(row["gain"]), f"{row['nll']:.2f}"]
                cells.append(signed(bootstrap(more).rounded()) if more else "")
                sent = f"{name.removeprefix('cache ')} | {row['bytes'] / tokens:,.0f}"
                yield f"| {pool} | {sent} | {' | '.join(cells)} |"
    yield ""
    found = [json.loads((SLOTS / f"pool{pool}.text.json").read_text())["kl"] for pool in POOLS]
    yield f"| plain text, KL | {' | '.join(f'{pool} a latent' for pool in POOLS)} |"
    yield "| --- " * (len(POOLS) + 1) + "|"
    ways = {"whole latents, bf16": ["1024 bf16"] * len(POOLS)}
    for size in (512, 256, 128, 64, 32, 16, 8, 4):
        ways[f"4 bits, {size} bytes a token"] = [f"{2 * size * pool} int4" for pool in POOLS]
    for title, names in {**ways, **{way: [way] * len(POOLS) for way in ("another passage", "zeroed")}}.items():
        cells = [
            "{:.2f} [{:.2f}, {:.2f}]".format(*one[way]) if way in one else ""
            for one, way in zip(found, names, strict=True)
        ]
        yield f"| {title} | {' | '.join(cells)} |"


def joined() -> Iterator[str]:
    """Three models in one latent space; the first 1,024 questions of SQuAD's test, F1."""
    yield "| sharer → receiver | trained | latents | alone | text | translated | wrong | zeroed | gain |"
    yield "| --- " * 9 + "|"
    first = {record.id for record in read_records(SLOTS / "pool1")}
    for name, how in SPACE.items():
        rows = rows_of(RESULTS / "translator" / "space" / name)
        read = rows if "text" in rows else rows_of(RESULTS / "translator" / "space" / READ_BY[name])
        text = figure("f1", read["text"]["f1"])
        for plan in ("bf16", "int4:token width=256"):
            ours, *controls = (rows[f"{kind} {plan}"] for kind in ("cache", "wrong", "zeroed"))
            cells = [f"{rows['receiver']['f1'][0]:.1f}", text, figure("f1", ours["f1"])]
            cells += [f"{row['f1'][0]:.1f}" for row in controls] + [signed(ours["gain"])]
            yield f"| {name.replace('+', ' → ')} | {how} | {plan} | {' | '.join(cells)} |"
    for folder, name, how in (
        (TRANSLATOR / "space" / PAIRS[0], PAIRS[0].replace("+", " → "), "both halves, as shipped then"),
        (SELF / "squad" / MODELS[0], f"{MODELS[0]} → {MODELS[0]}", "both halves, *self* above"),
    ):
        for plan in ("bf16", "int4:token width=256"):
            arms = ("receiver", "text", *(f"{kind} {plan}" for kind in ("cache", "wrong", "zeroed")))
            every = {arm: found for arm, found in _scores(folder, "f1").items() if arm in arms}
            if arms[2] not in every:
                continue
            scores = {arm: {key: found[key] for key in found if key in first} for arm, found in every.items()}
            means = {arm: bootstrap(list(found.values())).rounded() for arm, found in scores.items()}
            cells = [f"{means[arms[0]][0]:.1f}", *(figure("f1", means[arm]) for arm in arms[1:3])]
            cells += [f"{means[arm][0]:.1f}" if arm in means else "" for arm in arms[3:]]
            controls = [arm for arm in arms[3:] if arm in means]
            if controls:
                best = max(controls, key=lambda arm: means[arm][0])
                more = [value - scores[best][key] for key, value in scores[arms[2]].items()]
            cells.append(signed(bootstrap(more).rounded()) if controls else "")
            yield f"| {name} | {how} | {plan} | {' | '.join(cells)} |"


def decoding() -> Iterator[str]:
    """Decoding and placing latents against the receiver's own reading."""
    yield "| where | sharer, receiver | tokens | prefill | decode | place | ratio, median [range] |"
    yield "| --- " * 7 + "|"
    for where, device, digits in (("2 CPU cores", "cpu", 0), ("H200", "cuda", 1)):
        for row in json.loads((RESULTS / "bench" / f"translator_{device}.json").read_text())["measured"]:
            times = " | ".join(f"{row[name]:,.{digits}f} ms" for name in ("prefill_ms", "decode_ms", "place_ms"))
            ratio = "{:.2f} [{:.2f}, {:.2f}]".format(row["ratio"], *row["ratio_range"])
            yield f"| {where} | {row['sharer']}, {row['receiver']} | {row['tokens']:,} | {times} | {ratio} |"


def text() -> Iterator[str]:
    """Plain text across models: KL from the receiver that reads it."""
    files = [RESULTS / "translator" / f"{pair}.text.json" for pair in PAIRS]
    files += [SELF / f"{pair.partition('+')[2]}.text.json" for pair in PAIRS]
    found = [json.loads(file.read_text())["kl"] for file in files]
    yield f"| what crosses | {' | '.join((*PAIRS, *(pair.partition('+')[2] + ', self' for pair in PAIRS)))} |"
    yield "| --- " * 5 + "|"
    for way in found[0]:
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*one[way]) for one in found]
        yield f"| {way} | {' | '.join(cells)} |"


if __name__ == "__main__":
    for name in sys.argv[1:] or TABLES:
        print(*globals()[name](), "", sep="\n")
