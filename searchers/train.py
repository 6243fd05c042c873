"""Epochs of steps that can be killed at any moment, and what training is made of: schedules, losses, evaluation.

Before every step torch's generators are seeded with (seed, run, epoch, step, rank), so a checkpoint holds no random
state and a run that goes on takes the steps that an uninterrupted one would: on one CPU thread, bit for bit.
"""

from __future__ import annotations

import io
import math
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from latbench.errors import UsageError
from latbench.provenance import canonical_json
from latbench.seals import check_zip
from searchers.base import Reporter, Scalar
from searchers.data import Batch, Batches
from searchers.folders import held
from searchers.interrupts import Interrupts, deferred
from searchers.results import check_settings, write_bytes, write_history
from searchers.world import World, memory_told, to_device

SAVE_EVERY_S = 30.0  # between checkpoints: what a killed run may lose
B_co = TypeVar("B_co", covariant=True)
B = TypeVar("B")


class Dealer(Protocol[B_co]):
    """Deals what the steps of an epoch read, named tuples of tensors, the same whenever it is asked: ``Batches``."""

    @property
    def batch_size(self) -> int:
        """Images that a step holds in memory."""
        ...

    def __len__(self) -> int:
        """Steps of an epoch."""
        ...

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[B_co]:
        """The first `skip` left out."""
        ...


class Stateful(Protocol):
    """What a checkpoint can hold."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors, numbers, texts, lists and mappings of them."""
        ...

    def load_state_dict(self, state: Any) -> Any:
        """Inverse of ``state_dict``."""
        ...


@dataclass(frozen=True)
class Position:
    """Where training stands: `step` of `steps` in `epoch` of `epochs`, all from 0."""

    epoch: int
    step: int
    steps: int
    epochs: int

    @property
    def progress(self) -> float:
        """In epochs: 2.5 is half way through the third."""
        return self.epoch + self.step / self.steps

    @property
    def share(self) -> float:
        """Of the whole run, in [0, 1)."""
        return self.progress / self.epochs


class Loop:
    """Trains `parts` step by step, with checkpoints and a history in `folder`.

    `identity` (JSON) is what the steps depend on: a checkpoint of another identity is refused, not overwritten.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        parts: Mapping[str, Stateful],
        *,
        identity: Mapping[str, Any],
        epochs: int,
        seed: int,
        world: World,
        reporter: Reporter | None = None,
        save_every_s: float | None = None,  # SAVE_EVERY_S
    ) -> None:
        self.folder, self.name, self.parts, self.epochs = folder, name, parts, epochs
        self.identity = {**identity, "epochs": epochs, "seed": seed, "processes": world.size}
        self.seed, self.world, self.reporter = seed, world, reporter
        self.save_every_s = SAVE_EVERY_S if save_every_s is None else save_every_s
        self.epoch = self.step = 0
        self.sums: dict[str, float] = {}
        self.history: list[dict[str, Scalar]] = []
        self.saved = time.monotonic()

    @property
    def path(self) -> Path:
        """Of the checkpoint."""
        return self.folder / f"{self.name}.ckpt"

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.epoch >= self.epochs

    def resume(self, *, free: Iterable[str] = ()) -> bool:
        """Goes to where the checkpoint stands; False where there is none.

        `free`: entries of the identity that may differ once training is finished. Raises UsageError where the
        checkpoint is of another run, or damaged.
        """
        if not self.path.exists():
            return False
        state = self._read()
        finished = state["epoch"] >= self.epochs
        wanted = {k: v for k, v in self.identity.items() if not (finished and k in free)}
        found = {k: v for k, v in state["identity"].items() if not (finished and k in free)}
        check_settings(self.path, "trained", found, wanted)
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:  # an older latbench's parts
            raise self._unfit(error) from None
        self.epoch, self.step, self.sums = state["epoch"], state["step"], state["sums"]
        self.history = state["history"]
        return True

    def run(
        self,
        batches: Dealer[B],
        step: Callable[[B, Position], Mapping[str, float]],
        end_epoch: Callable[[int], Mapping[str, float]] | None = None,
    ) -> None:
        """Takes the steps that are left. `step` gives figures, averaged over the epoch into one row of the history,
        to which `end_epoch` adds.

        An interrupt waits for the end of its step, whose checkpoint is then written; a second one does not. Raises
        OutOfMemoryError, and UsageError where an image is damaged, or another run is at work in the folder; the last
        checkpoint stays.
        """
        with held(self.folder) if self.world.leads else nullcontext(), deferred() as interrupts:
            self._run(batches, step, end_epoch, interrupts)

    def _run(
        self,
        batches: Dealer[B],
        step: Callable[[B, Position], Mapping[str, float]],
        end_epoch: Callable[[int], Mapping[str, float]] | None,
        interrupts: Interrupts,
    ) -> None:
        steps = len(batches)
        began, spent_s = time.monotonic(), float(self.sums.pop("seconds", 0.0))
        while not self.finished:
            for batch in to_device(batches.epoch(self.epoch, self.step), self.world.device):
                self._seed()
                with memory_told(batches.batch_size):
                    figures = step(batch, Position(self.epoch, self.step, steps, self.epochs))
                for name, value in figures.items():
                    self.sums[name] = self.sums.get(name, 0.0) + float(value)
                self.step += 1
                self._tell(steps, figures)
                if self.step < steps:
                    sums = {**self.sums, "seconds": spent_s + time.monotonic() - began}
                    self._save_sometimes(sums, at_once=interrupts.pending)
                    interrupts.heed()
            row: dict[str, Scalar] = {"epoch": self.epoch, **{k: v / steps for k, v in self.sums.items()}}
            if end_epoch is not None:
                row |= end_epoch(self.epoch)
            row["seconds"] = spent_s + time.monotonic() - began
            self.history.append(row)
            self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
            began, spent_s = time.monotonic(), 0.0
            if self.world.leads:  # before the checkpoint: a finished run that is gone on with writes nothing
                write_history(self.folder / f"{self.name}.parquet", self.history)
            self._save_sometimes({}, at_once=self.finished or interrupts.pending)
            if self.world.leads and self.reporter is not None:
                self.reporter.epoch(self.history)
            interrupts.heed()

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator of this position's own; of one purpose always the same."""
        return np.random.default_rng((self.seed, zlib.crc32(purpose.encode()), self.epoch, self.step, self.world.rank))

    def _seed(self) -> None:
        torch.manual_seed(int(self.rng(self.name).integers(1 << 63)))

    def _tell(self, steps: int, figures: Mapping[str, float]) -> None:
        if self.reporter is not None and self.world.leads:
            text = ", ".join(f"{name} {float(value):.4g}" for name, value in figures.items())
            self.reporter.advance(self.epoch * steps + self.step, self.epochs * steps, text)

    def _save_sometimes(self, sums: Mapping[str, float], *, at_once: bool = False) -> None:
        if not at_once and time.monotonic() - self.saved < self.save_every_s:
            return
        if self.world.leads:
            state = {
                "identity": self.identity,
                "epoch": self.epoch,
                "step": self.step,
                "sums": dict(sums),
                "history": self.history,
                "parts": {name: part.state_dict() for name, part in self.parts.items()},
            }
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_bytes(self.path, buffer.getvalue())
        self.saved = time.monotonic()

    def _read(self) -> dict[str, Any]:
        try:
            state = load_tensors(self.path)
            state = {name: kind(state[name]) for name, kind in _STATE.items()}
            canonical_json(state["identity"])
        except Exception as error:  # whatever a damaged file makes torch raise
            raise self._unfit(error) from None
        return state

    def _unfit(self, error: Exception) -> UsageError:
        why = " ".join(str(error).split())[:120]
        return UsageError(f"{self.path} is no checkpoint of latbench, or damaged ({why}): remove it to start again")


_STATE = {"epoch": int, "step": int, "parts": dict, "identity": dict, "sums": dict, "history": list}


def load_tensors(path: Path) -> dict[str, Any]:
    """What ``torch.save`` and ``write_bytes`` put there, on the CPU. No code of the file's is run. Raises
    BrokenSealError where it is damaged, and whatever torch raises where it is none."""
    with path.open("rb") as file:
        check_zip(file)
        if zipfile.is_zipfile(file):  # torch compresses nothing: what is compressed may unpack to any size
            with zipfile.ZipFile(file) as archive:
                if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                    raise ValueError("its members are compressed")
        file.seek(0)
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state


# ---- schedules and losses -------------------------------------------------------------------------------------------


def cosine(base: float, at: Position, *, warmup: float = 0.0) -> float:
    """Rate that falls from `base` to 0 over the run, after `warmup` epochs of linear growth from 0."""
    if at.progress < warmup:
        return base * (at.progress + 1 / at.steps) / warmup
    return 0.5 * base * (1 + math.cos(math.pi * (at.progress - warmup) / (at.epochs - warmup)))


def soft_cross_entropy(logits: Tensor, target_logits: Tensor) -> Tensor:
    """(N, K), (N, K) -> (N,): against the softmax of the other's logits, which gets no gradient."""
    probs = target_logits.detach().float().softmax(-1)  # (N, K)
    return -(probs * logits.float().log_softmax(-1)).sum(-1)


def mixup(batch: Batch, num_classes: int, alpha: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Convex combinations of pairs of images and of their labels: (N, 3, H, W), (N, K). Zhang et al. 2018.

    One weight ~ Beta(alpha, alpha) a batch; alpha 0 mixes nothing.
    """
    hot = functional.one_hot(batch.labels, num_classes).float()
    if alpha == 0:
        return batch.images, hot
    share = float(rng.beta(alpha, alpha))
    other = torch.from_numpy(rng.permutation(len(batch.labels))).to(batch.labels.device)
    return share * batch.images + (1 - share) * batch.images[other], share * hot + (1 - share) * hot[other]


# ---- evaluation -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(forward: Callable[[Tensor], Tensor], batches: Batches, world: World) -> dict[str, float]:
    """Mean "loss" and "accuracy" of a forward pass, (N, 3, H, W) -> (N, K), over all images, over all processes."""
    sums = {"n": 0.0, "loss": 0.0, "hits": 0.0}
    for images, labels in to_device(batches.epoch(0), world.device):
        with world.autocast():
            logits = forward(images).float()
        sums["n"] += len(labels)
        sums["loss"] += float(functional.cross_entropy(logits, labels, reduction="sum"))
        sums["hits"] += float((logits.argmax(-1) == labels).sum())
    sums = world.sum(sums)
    return {"loss": sums["loss"] / sums["n"], "accuracy": sums["hits"] / sums["n"]}


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Batches, world: World, *, steps: int = 32) -> None:
    """Sets running statistics of batch norms to the mean over some batches: after weights moved to another width.

    Yu, Huang: Universally Slimmable Networks and Improved Training Techniques, ICCV 2019.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    was = module.training
    module.train()
    for _, (images, _) in zip(range(steps), to_device(batches.epoch(0), world.device), strict=False):
        module(images)
    module.train(was)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
