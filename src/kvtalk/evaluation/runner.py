"""Run arms on the same items and keep every answer.

An arm is one way for the receiver to get at the context. All arms of a batch share one prefill of the sharer. What
is written is enough to recompute any figure without a model; a run that is killed goes on where it stopped.
"""

from __future__ import annotations

import gzip
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import kvtalk
from kvtalk.cache import KVCache, LayerCache, Prefix
from kvtalk.errors import InputError
from kvtalk.evaluation.items import Item, digest
from kvtalk.evaluation.metrics import Interval, bootstrap, contains_answer, exact_match, f1
from kvtalk.link import Link, bits_per_value
from kvtalk.placement import PlacedCache
from kvtalk.planning import Budget, Plan
from kvtalk.transport.file import saving

Kind = Literal["none", "text", "cache", "wrong", "zeroed"]


@dataclass(frozen=True)
class Arm:
    """One way to get at the context.

    Attributes:
        name: in tables and files.
        kind: ``none``: the question alone. ``text``: the context before it. ``cache``: a packet of it.
            ``wrong``: a packet of another item's context. ``zeroed``: its packet, all keys and values set to zero.
        plan: of the packet.
        budget: of the packet; with it, the plan may be None.
        gaps: see :func:`kvtalk.placement.place`.
    """

    name: str
    kind: Kind
    plan: Plan | None = None
    budget: str | None = None
    gaps: bool = True


@dataclass(frozen=True)
class Record:
    """One item in one arm."""

    id: str
    arm: str
    answer: str
    em: float
    f1: float
    contains: float
    nll: float
    bytes: int
    bits_per_value: float
    plan: str


def run(
    link: Link,
    items: Sequence[Item],
    arms: Sequence[Arm],
    out: Path,
    *,
    batch: int = 16,
    max_new_tokens: int = 24,
) -> dict[str, Any]:
    """Evaluate and write ``manifest.json``, ``items.jsonl.gz``, ``summary.json`` and ``table.md`` into a folder.

    Args:
        link: sharer and receiver.
        items: what is asked; items next to each other may share a context.
        arms: names must differ.
        out: created if need be; a run of the same items, arms and models in it is continued.
        batch: items at a time.
        max_new_tokens: of each answer.

    Returns:
        the summary.

    Raises:
        InputError: the folder holds another run.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into {out}: {error.strerror}") from error
    manifest = _manifest(link, items, arms, max_new_tokens)
    _claim(out / "manifest.json", manifest)
    log = out / "items.partial.jsonl"
    records = _read_log(log) if log.exists() else read_records(out)
    _write(log, "".join(_line(record) for record in records).encode())
    done = {(record.id, record.arm) for record in records}
    others = _other_contexts(items)
    with log.open("a", encoding="utf-8") as file, _bar() as bar:
        task = bar.add_task("items x arms", total=len(items) * len(arms), completed=len(done))
        for start in range(0, len(items), batch):
            group = items[start : start + batch]
            wanted = [arm for arm in arms if any((item.id, arm.name) not in done for item in group)]
            for made in _run_batch(link, group, others[start : start + batch], wanted, max_new_tokens):
                fresh = [record for record in made if (record.id, record.arm) not in done]
                file.writelines(map(_line, fresh))
                file.flush()
                records += fresh
                bar.advance(task, len(fresh))
    _write(out / "items.jsonl.gz", gzip.compress("".join(map(_line, records)).encode(), mtime=0))
    summary = summarize(records, arms)
    _write_summary(out, summary)
    log.unlink()
    return summary


COLUMNS = ("arm", "F1", "EM", "contains", "NLL", "bytes", "bits/value", "F1 bought", "F1 - text")


def cells(row: dict[str, Any]) -> list[str]:
    """An arm of a summary as text, under :data:`COLUMNS`."""
    differences = [row.get("f1_bought"), row.get("f1_minus_text")]
    return [
        row["arm"],
        "{:.1f} [{:.1f}, {:.1f}]".format(*row["f1"]),
        f"{row['em'][0]:.1f}",
        f"{row['contains'][0]:.1f}",
        f"{row['nll']:.3f}",
        f"{row['bytes']:,}",
        f"{row['bits_per_value']:.2f}",
        *("{:+.1f} [{:+.1f}, {:+.1f}]".format(*x) if x else "" for x in differences),
    ]


def recompute(out: Path) -> dict[str, Any]:
    """The summary of a finished run from its manifest and records, without a model.

    Raises:
        InputError: there is no finished run in the folder.
    """
    try:
        manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{out}: no run to recompute ({error})") from error
    arms = [Arm(**{**arm, "plan": arm["plan"] and Plan(**arm["plan"])}) for arm in manifest["arms"]]
    records = read_records(out)
    if len(records) != len(arms) * manifest["items"]["count"]:
        raise InputError(f"{out}: the run is not finished: give the command of its manifest.json again")
    summary = summarize(records, arms)
    _write_summary(out, summary)
    return summary


def read_records(out: Path) -> list[Record]:
    """Every record of a finished run; none if there is none."""
    file = out / "items.jsonl.gz"
    if not file.exists():
        return []
    return [Record(**json.loads(line)) for line in gzip.decompress(file.read_bytes()).decode().split("\n") if line]


def summarize(records: Sequence[Record], arms: Sequence[Arm]) -> dict[str, Any]:
    """Figures per arm: means with 95% bootstrap intervals, and paired differences in F1.

    ``f1_bought`` is the figure minus that of the best destroyed cache, wrong or zeroed: what the sharer bought.
    """
    by_arm: dict[str, dict[str, Record]] = {arm.name: {} for arm in arms}
    for record in records:
        by_arm[record.arm][record.id] = record
    text = next((arm.name for arm in arms if arm.kind == "text"), None)
    destroyed = [arm.name for arm in arms if arm.kind in ("wrong", "zeroed")]
    best = max(destroyed, key=lambda name: sum(record.f1 for record in by_arm[name].values()), default=None)
    references = {"f1_bought": best, "f1_minus_text": text}
    return {"control": best, "arms": [{"kind": arm.kind, **_row(arm.name, by_arm, references)} for arm in arms]}


def _row(name: str, by_arm: dict[str, dict[str, Record]], references: dict[str, str | None]) -> dict[str, Any]:
    group = by_arm[name]
    scores = list(group.values())
    row: dict[str, Any] = {"arm": name, "items": len(scores)}
    for metric in ("f1", "em", "contains"):
        row[metric] = _rounded(bootstrap([100 * getattr(score, metric) for score in scores]))
    row["nll"] = round(sum(score.nll for score in scores) / len(scores), 4)
    row["bytes"] = round(sum(score.bytes for score in scores) / len(scores))
    row["bits_per_value"] = round(sum(score.bits_per_value for score in scores) / len(scores), 3)
    for kind, reference in references.items():
        if reference is not None and reference != name:
            other = by_arm[reference]
            row[kind] = _rounded(bootstrap([100 * (group[i].f1 - other[i].f1) for i in group]))
    return row


def _rounded(interval: Interval) -> list[float]:
    return [round(interval.mean, 2), round(interval.low, 2), round(interval.high, 2)]


def _run_batch(
    link: Link, group: Sequence[Item], others: Sequence[str], arms: Sequence[Arm], max_new_tokens: int
) -> Iterator[list[Record]]:
    if not arms:
        return
    own = _Read(link, [item.context for item in group])
    wrong = _Read(link, list(others)) if any(arm.kind == "wrong" for arm in arms) else own
    for arm in arms:
        yield _run_arm(link, group, arm, wrong if arm.kind == "wrong" else own, max_new_tokens)


class _Read:
    """A batch of contexts that the sharer has read once, for all arms."""

    def __init__(self, link: Link, contexts: Sequence[str]) -> None:
        self.contexts = contexts
        sharer = link.sharer
        head = sharer.lm.head_ids()
        cache = sharer.lm.prefill([head + sharer.lm.encode(context) for context in contexts])
        self.caches: list[KVCache] = [row.since(sharer.start).attendable(sharer.lm.spec) for row in cache.rows()]


def _run_arm(link: Link, group: Sequence[Item], arm: Arm, read: _Read, max_new_tokens: int) -> list[Record]:
    lm = link.receiver.lm
    sizes, bits, plans = [0] * len(group), [0.0] * len(group), [""] * len(group)
    prompts = [link.receiver.prompt(item.question) for item in group]
    contexts: list[list[Prefix]] = [[] for _ in group]
    if arm.kind == "text":
        encoded = [lm.encode(context) for context in read.contexts]
        sizes = [len(context.encode()) for context in read.contexts]
        prompts = [ids + prompt for ids, prompt in zip(encoded, prompts, strict=True)]
    elif arm.kind != "none":
        for index, cache in enumerate(read.caches):
            plan = link.sharer.plan(cache, arm.budget and Budget.parse(arm.budget), arm.plan)
            blob = link.sharer.encode(cache, plan)
            prefix = link.receiver.prefix(blob)
            contexts[index] = [_zeroed(prefix) if arm.kind == "zeroed" else prefix]
            sizes[index], plans[index] = len(blob), str(plan)
            bits[index] = bits_per_value(len(blob), cache.length[0] - link.sharer.start, link.sharer.lm)
    room = max(map(len, prompts)) + max_new_tokens + 64
    placed = lm.place(contexts, room=room, gaps=arm.gaps)
    nlls = _answer_nll(link, group, prompts, placed)
    made = lm.generate(prompts, placed, max_new_tokens=max_new_tokens)
    return [
        Record(
            id=item.id,
            arm=arm.name,
            answer=generation.text,
            em=exact_match(generation.text, item.answers),
            f1=round(f1(generation.text, item.answers), 4),
            contains=contains_answer(generation.text, item.answers),
            nll=round(nlls[index], 4),
            bytes=sizes[index],
            bits_per_value=round(bits[index], 4),
            plan=plans[index],
        )
        for index, (item, generation) in enumerate(zip(group, made, strict=True))
    ]


def _answer_nll(link: Link, group: Sequence[Item], prompts: Sequence[list[int]], placed: PlacedCache) -> list[float]:
    """Nats a token of the first accepted answer after each prompt; leaves the placed cache as it was."""
    lm = link.receiver.lm
    answers = [lm.encode(" " + item.answers[0]) for item in group]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    before = placed.mark()
    logits = lm.logits(rows, placed, keep=max(map(len, answers)) + 1)
    nlls = []
    for row, answer in zip(logits, answers, strict=True):
        scores = torch.log_softmax(row[-len(answer) - 1 : -1].float(), dim=-1)
        nlls.append(-float(scores[range(len(answer)), answer].mean()))
    placed.rewind(before)
    return nlls


def _zeroed(prefix: Prefix) -> Prefix:
    def layers() -> Iterator[LayerCache]:
        for layer in prefix.layers:
            kv_heads, head_dim = layer.shape
            nothing = torch.zeros(1, kv_heads, layer.positions.shape[1], head_dim)
            yield LayerCache(nothing, nothing, layer.positions)

    return replace(prefix, layers=layers())


def _other_contexts(items: Sequence[Item]) -> list[str]:
    """For each item the next context in the file that is not its own."""
    contexts = list(dict.fromkeys(item.context for item in items))
    if len(contexts) < 2:
        raise InputError("the wrong-cache control needs at least two different contexts")
    place = {context: index for index, context in enumerate(contexts)}
    return [contexts[(place[item.context] + 1) % len(contexts)] for item in items]


def _manifest(link: Link, items: Sequence[Item], arms: Sequence[Arm], max_new_tokens: int) -> dict[str, Any]:
    device = link.receiver.lm.device
    return {
        "command": " ".join(["kvtalk", *sys.argv[1:]]),
        "sharer": {"name": link.sharer.lm.name, **asdict(link.sharer.lm.spec.fingerprint)},
        "receiver": {"name": link.receiver.lm.name, **asdict(link.receiver.lm.spec.fingerprint)},
        "prompt": asdict(link.receiver.lm.prompt),
        "items": {"count": len(items), "xxh3": digest(items)},
        "arms": [asdict(arm) for arm in arms],
        "max_new_tokens": max_new_tokens,
        "decoding": "greedy",
        "dtype": str(link.receiver.lm.spec.dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": {
            "kvtalk": kvtalk.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _claim(file: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, or make sure that the one that is there is of the same run."""
    if file.exists():
        before = json.loads(file.read_text("utf-8"))
        fixed = ("sharer", "receiver", "prompt", "items", "arms", "max_new_tokens", "dtype")
        different = [key for key in fixed if before.get(key) != json.loads(json.dumps(manifest[key]))]
        if different:
            raise InputError(
                f"{file.parent} holds another run ({', '.join(different)} differ): give another --out, or remove it"
            )
        return
    _write(file, (json.dumps(manifest, indent=1) + "\n").encode())


def _read_log(log: Path) -> list[Record]:
    """Records of an interrupted run; a line that was cut off is dropped."""
    records = []
    for line in log.read_text("utf-8").split("\n"):
        try:
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return records


def _write_summary(out: Path, summary: dict[str, Any]) -> None:
    rows = ",\n".join(json.dumps(row) for row in summary["arms"])
    (out / "summary.json").write_text(
        f'{{"control": {json.dumps(summary["control"])}, "arms": [\n{rows}\n]}}\n', "utf-8"
    )
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in summary["arms"]]
    _write(out / "table.md", ("\n".join(lines) + "\n").encode())


def _line(record: Record) -> str:
    return json.dumps(asdict(record)) + "\n"  # ASCII, so that no character of an answer ends a line


def _write(file: Path, content: bytes) -> None:
    with saving(file) as target:
        target.write(content)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        transient=True,
    )
