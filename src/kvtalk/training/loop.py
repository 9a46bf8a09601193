"""The loop of every training: steps, learning rate, checkpoints, and validation on the way.

Devices are accelerate's business. The batch of a step depends on the seed, the step and the process alone, so a run
that was stopped goes on to the same losses.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from kvtalk.errors import CodecError, TrainingError
from kvtalk.training.muon import StackedMuon

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
GAIN = "gain"
"""What of a validation says how good the module is, where a run keeps the best; the higher the better."""
STACKED = "stacked"
"""Attribute of a parameter: it holds one matrix for each first index."""
FASTER = "faster"
"""Attribute of a parameter: by how much its learning rate is above the others'."""


@dataclass(frozen=True)
class Schedule:
    """How the weights are moved.

    Attributes:
        steps: optimizer steps.
        rate: learning rate at its peak; it rises linearly and falls as a cosine to zero.
        warm_up: steps to the peak; by default a tenth of them, at most 100.
        decay: weight decay.
        optimizer: ``muon`` for matrices (and AdamW for the rest), or ``adamw``.
        averaged: share of the steps, the last ones, after which the weights are taken into the mean that is kept in
            place of the last ones (stochastic weight averaging, 1803.05407); 0 keeps the last ones.
    """

    steps: int = 2000
    rate: float = 2e-3
    warm_up: int | None = None
    decay: float = 0.01
    optimizer: str = "muon"
    averaged: float = 0.0

    def share(self, step: int) -> float:
        """Of the peak rate."""
        warm_up = self.warm_up or max(1, min(100, self.steps // 10))
        return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class Objective(Protocol):
    """What is learned."""

    def losses(self, module: nn.Module, batch: Any, step: int) -> dict[str, Tensor]:
        """Losses of a batch by name; ``total`` is minimised."""

    def measure(self, module: nn.Module) -> dict[str, float]:
        """Validation, controls included."""

    def during(self, module: nn.Module, step: int) -> AbstractContextManager[None]:
        """Holds while a step's losses and gradients are computed, and while the module is measured after it."""


@dataclass
class _Best:
    """What a run was best with.

    Attributes:
        gain: of that validation.
        since: validations after it.
        module: what was learned till then.
    """

    gain: float = -math.inf
    since: int = 0
    module: dict[str, Tensor] = field(default_factory=dict)

    def weigh(self, gain: float, module: dict[str, Tensor]) -> None:
        """Take what is better."""
        if gain > self.gain:
            self.gain, self.since = gain, 0
            self.module = {name: value.detach().clone() for name, value in module.items()}
        else:
            self.since += 1


@dataclass
class _Mean:
    """Of the weights after some steps.

    Attributes:
        steps: that many.
        module: their mean.
    """

    steps: int = 0
    module: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def take(self, module: dict[str, Tensor]) -> None:
        """The weights after one more step."""
        self.steps += 1
        if self.steps == 1:
            self.module = {name: value.detach().clone() for name, value in module.items()}
        for name, value in module.items():
            self.module[name].lerp_(value, 1 / self.steps)


class Loop:
    """A training run in a folder.

    Attributes:
        module: what is trained.
        step: steps done.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        batches: Dataset[Any],
        schedule: Schedule,
        settings: dict[str, Any],
        out: Path,
        patience: int = 0,
    ) -> None:
        """Prepare; a run that lies in the folder is continued.

        Args:
            module: its parameters are trained, but for frozen ones.
            objective: what is learned.
            batches: one for each step and process, by these two numbers.
            schedule: how.
            settings: everything that must not change when the run goes on.
            out: folder for checkpoints and the log.
            patience: validations without a better :data:`GAIN` after which the run ends, with what it was best with;
                0 for a run to the last step, with what comes then.

        Raises:
            TrainingError: the folder holds a run of other settings, or an unknown optimizer.
        """
        gpu = torch.cuda.is_available()
        self.accelerator = Accelerator(cpu=not gpu, mixed_precision="bf16" if gpu else "no")
        self.objective, self.batches, self.schedule, self.out = objective, batches, schedule, out
        optimizers = _optimizers(module, schedule)
        self.wrapped, *self.optimizers = self.accelerator.prepare(module, *optimizers)
        self.module: nn.Module = self.accelerator.unwrap_model(self.wrapped)
        self._frozen = {name for name, value in self.module.named_parameters() if not value.requires_grad}
        processes = self.accelerator.num_processes
        waits = {"patience": patience} if patience else {}
        self.settings = json.loads(json.dumps({**settings, "processes": processes, **waits}))
        self.step, self.patience, self._best, self._mean = 0, patience, _Best(), _Mean()
        self._resume()

    def run(
        self, report: Callable[[int, dict[str, float]], None], check_every: int = 250, report_every: int = 50
    ) -> nn.Module:
        """Train to the end.

        Args:
            report: is given the step and what was measured.
            check_every: steps from one validation and checkpoint to the next.
            report_every: steps from one look at the losses to the next.

        Raises:
            TrainingError: a loss is no longer a number; the last checkpoint stays.
        """
        steps = self.schedule.steps
        if self.step == 0:
            measured = self.objective.measure(self.module)
            if self.patience and GAIN not in measured:
                raise TrainingError("patience needs a gain to wait for: give more texts, so that there are wrong ones")
            self._note(report, 0, measured)
        started, first = time.perf_counter(), self.step
        for batch in self._loader():
            checks = (self.step + 1) % check_every == 0 or self.step + 1 == steps
            try:
                losses = self._train(batch)
                if checks or (self.step + 1) % report_every == 0:
                    shown = {name: float(value.detach()) for name, value in losses.items()}
                    self._check(shown)
                    shown["steps a second"] = (self.step + 1 - first) / (time.perf_counter() - started)
                    self._note(report, self.step + 1, shown)
                self.step += 1
                if self.step > steps - round(self.schedule.averaged * steps):
                    self._mean.take(self._learned())
                if checks:
                    with self._averaged():  # what would be kept, as it would be
                        with self.objective.during(self.module, steps if self.patience else self.step):
                            measured = self.objective.measure(self.module)
                        self._check(measured)
                        if self.patience:
                            gain = torch.tensor(measured[GAIN], device=self.accelerator.device)
                            self._best.weigh(float(broadcast(gain)), self._learned())  # every process the same
                    self._save()
                    self._note(report, self.step, measured)
                if self.patience and self._best.since >= self.patience:
                    break
            except CodecError as error:  # what is no number cannot be packed
                raise self._lost() from error
        self._fill(self._best.module or self._mean.module or self._learned())
        return self.module

    def _loader(self) -> DataLoader[Any]:
        rank = self.accelerator.process_index
        workers = 4 if self.accelerator.device.type == "cuda" else 0
        indices: Any = [(step, rank) for step in range(self.step, self.schedule.steps)]
        return DataLoader(
            Subset(self.batches, indices),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
        )

    def _train(self, batch: Any) -> dict[str, Tensor]:
        share = self.schedule.share(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * self.schedule.rate * group.get("scale", 1)
        with self.objective.during(self.module, self.step):
            losses = self.objective.losses(self.wrapped, batch, self.step)
            self.accelerator.backward(losses["total"])
        self.accelerator.clip_grad_norm_(self.module.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return losses

    def _check(self, figures: dict[str, float]) -> None:
        if not all(map(math.isfinite, figures.values())):
            raise self._lost()

    def _lost(self) -> TrainingError:
        kept = self.out / CHECKPOINT
        saved = f"the last good checkpoint is {kept}" if kept.exists() else "there is no checkpoint yet"
        return TrainingError(
            f"the loss is no longer a number at step {self.step + 1}; {saved}: go on with a smaller rate"
        )

    def _note(self, report: Callable[[int, dict[str, float]], None], step: int, figures: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **{name: round(value, 5) for name, value in figures.items()}}) + "\n")
        report(step, figures)

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "settings": self.settings,
            "module": self._learned(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "best": vars(self._best),
            "mean": vars(self._mean),
        }
        partial = self.out / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self.out / CHECKPOINT)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """With the mean of the weights so far, if it has begun."""
        if not self._mean.steps:
            yield
            return
        last = {name: value.clone() for name, value in self._learned().items()}
        self._fill(self._mean.module)
        try:
            yield
        finally:
            self._fill(last)

    def _fill(self, learned: dict[str, Tensor]) -> None:
        self.module.load_state_dict({**self.module.state_dict(), **learned})

    def _learned(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.module.state_dict().items() if name not in self._frozen}

    def _resume(self) -> None:
        file = self.out / CHECKPOINT
        if not file.exists():
            return
        state = torch.load(file, map_location=self.accelerator.device, weights_only=True)
        theirs = state["settings"]
        different = [key for key in {**self.settings, **theirs} if theirs.get(key) != self.settings.get(key)]
        if different:
            raise TrainingError(
                f"{self.out} holds a run with other settings ({', '.join(different)} differ): "
                "give the same ones again or another folder"
            )
        self._fill(state["module"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self._best, self._mean = state["step"], _Best(**state["best"]), _Mean(**state["mean"])
        log = self.out / LOG
        if log.exists() and self.accelerator.is_main_process:  # what came after the checkpoint is done again
            lines = [line for line in log.read_text("utf-8").splitlines() if json.loads(line)["step"] <= self.step]
            log.write_text("".join(line + "\n" for line in lines), "utf-8")


@dataclass(frozen=True)
class Weights:
    """What an earlier run kept, or an adapter holds.

    Attributes:
        module: its tensors.
        digest: of the run's checkpoint, or the adapter's identity.
    """

    module: dict[str, Tensor]
    digest: str

    def into(self, module: nn.Module) -> None:
        """Start a module from them; what is frozen in it stays, and is in no checkpoint.

        Raises:
            TrainingError: they are of another version's module.
        """
        frozen = {name: value for name, value in module.named_parameters() if not value.requires_grad}
        try:
            module.load_state_dict({**self.module, **frozen})
        except RuntimeError as error:
            raise TrainingError(
                "what to start from is of another version: its weights have other names or sizes"
            ) from error


def weights_of(folder: Path, settings: dict[str, Any], alike: Sequence[str]) -> Weights:
    """The weights of an earlier run, to start another one from.

    Args:
        folder: of that run.
        settings: of the new one.
        alike: which settings both must share.

    Raises:
        TrainingError: no run is there, it is damaged, or a setting differs.
    """
    module, theirs = exact_weights(folder)
    same_settings(f"the run in {folder}", theirs, settings, alike)
    return Weights(module, str(xxhash.xxh3_64_hexdigest((folder / CHECKPOINT).read_bytes())))


def exact_weights(folder: Path, last: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a run learned, unrounded as its checkpoint has it, without frozen parts; and its settings.

    Args:
        folder: of the run.
        last: the weights after its last step, also where it kept others, their mean or its best.

    Raises:
        TrainingError: no run is there, or it is damaged.
    """
    file = folder / CHECKPOINT
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        kept = (dict(state.get(name, {}).get("module", {})) for name in ("best", "mean"))  # older runs have neither
        module = dict(state["module"])
        return module if last else next(filter(None, kept), module), dict(state["settings"])
    except OSError as error:
        raise TrainingError(f"{folder} holds no {CHECKPOINT} of an earlier run") from error
    except (RuntimeError, KeyError, TypeError, ValueError, UnpicklingError) as error:
        raise TrainingError(f"{file} is damaged or not a run's checkpoint") from error


def same_settings(what: str, theirs: dict[str, Any], settings: dict[str, Any], alike: Sequence[str]) -> None:
    """Refuse to start from what is of other settings.

    Args:
        what: to start from, for the message.
        theirs: its settings, as JSON gives them back.
        settings: of the new run.
        alike: which of them both must share.

    Raises:
        TrainingError: one differs.
    """
    different = [key for key in alike if theirs.get(key) != json.loads(json.dumps(settings[key]))]
    if different:
        raise TrainingError(f"{what} has another {', '.join(different)}: start from one with the same")


def _optimizers(module: nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() == 2]
    stacks = [parameter for parameter in trained if hasattr(parameter, STACKED) and min(parameter.shape[1:]) > 1]
    known = {id(parameter) for parameter in (*matrices, *stacks)}
    rest = [parameter for parameter in trained if id(parameter) not in known]
    options: dict[str, Any] = {"lr": schedule.rate, "weight_decay": schedule.decay}
    if schedule.optimizer == "adamw":
        return [_adamw(trained, options)]
    if schedule.optimizer == "muon":
        made: list[torch.optim.Optimizer] = []
        if matrices:
            groups = [
                {"params": [matrix], "scale": 5 * min(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5}
                for matrix in matrices
            ]
            made.append(torch.optim.Muon(groups, adjust_lr_fn="original", **options))
        if stacks:
            made.append(StackedMuon(stacks, **options))
        return [*made, _adamw(rest, options)]
    raise TrainingError(f"no optimizer {schedule.optimizer!r}; there are muon, adamw")


def _adamw(parameters: Sequence[nn.Parameter], options: dict[str, Any]) -> torch.optim.Optimizer:
    faster = [parameter for parameter in parameters if hasattr(parameter, FASTER)]
    usual = [parameter for parameter in parameters if not hasattr(parameter, FASTER)]
    groups = [{"params": usual}, *({"params": [one], "scale": getattr(one, FASTER)} for one in faster)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), **options)
