"""What a candidate is worth: training from scratch, a published table, or a proxy that trains nothing.

A searcher asks an ``Evaluator`` and need not know which; ``Lookups`` remembers, counts and bounds what it asks. An
answer depends on the architecture, the problem and its seed, never on what was asked before.
"""

from __future__ import annotations

import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from latbench.errors import UsageError
from latbench.provenance import canonical_json
from latbench.spaces.base import Arch, SearchSpace
from searchers.accuracy_table import AccuracyTable
from searchers.base import Evaluator, Problem, Reporter
from searchers.candidates import OnFleet
from searchers.data import Splits
from searchers.derive import Recipe, num_classes, train_network
from searchers.proxies import NASWOT, SynFlow
from searchers.results import check_settings, read_json, write_json
from searchers.sources import Indices
from searchers.world import World

KINDS = "train[:EPOCHS], synflow, naswot, table:FILE[:COLUMN[:percent]]"
QUICK = Recipe(epochs=3, batch_size=64, warmup_epochs=0.5, mixup=0.0)  # what a candidate is trained with
HELD_OUT = 0.2  # of the training images: what it is judged by
CANDIDATES = "candidates"  # folder of their checkpoints, in the problem's
SAVING = 0.01  # share of the time that ``Lookups`` may spend on its file


def open_evaluator(text: str, problem: Problem, *, recipe: Recipe = QUICK, held_out: float = HELD_OUT) -> Evaluator:
    """The evaluator that a text names, on the problem's fleet, if it has one. `recipe` and `held_out`, a share of the
    training images, are for "train", whose epochs may stand behind it ("train:1").

    Raises UsageError on an unknown text, TableError on a table that does not fit the space.
    """
    if problem.fleet is not None:
        return OnFleet(partial(_opened, text, recipe, held_out), problem)
    return _opened(text, recipe, held_out, problem)


def _opened(text: str, recipe: Recipe, held_out: float, problem: Problem) -> Evaluator:
    kind, colon, where = text.partition(":")
    if kind == "table" and where:
        return AccuracyTable.named(where, problem.space)
    if kind == "train" and (not colon or (where.isdecimal() and int(where) > 0)):
        return Trained(problem, recipe.lasting(int(where)) if colon else recipe, held_out)
    if kind == "synflow" and not colon:
        return SynFlow(problem)
    if kind == "naswot" and not colon:
        return NASWOT(problem)
    raise UsageError(f"unknown evaluator {text!r}: {KINDS}")


# ---- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """A problem's training images as a ``DataSource`` of their own: its "test" are those that a search keeps out."""

    splits: Splits

    @property
    def name(self) -> str:
        """The source's, and which images."""
        which = zlib.crc32(self.splits.train.tobytes() + self.splits.held_out.tobytes())
        return f"{self.splits.source.name}, training images {which:08x}"

    @property
    def classes(self) -> tuple[str, ...]:
        return self.splits.source.classes

    @property
    def mirrored(self) -> bool:
        return self.splits.source.mirrored

    def labels(self, split: str) -> NDArray[np.int64]:
        """(N,) class indices."""
        return self.splits.source.labels("train")[self._indices(split)]

    def image(self, split: str, index: int) -> NDArray[np.uint8]:
        """(H, W, 3). Raises UsageError, naming the image."""
        return self.splits.source.image("train", int(self._indices(split)[index]))

    def _indices(self, split: str) -> Indices:
        return self.splits.train if split == "train" else self.splits.held_out


@dataclass(frozen=True)
class Trained:
    """Accuracy on the held-out images after training from scratch on the others.

    Every candidate starts from the problem's seed and sees the same images in the same order, so candidates differ by
    what they are and not by luck. A candidate whose training was cut off goes on where it was.
    """

    problem: Problem
    recipe: Recipe = QUICK
    held_out: float = HELD_OUT

    def evaluate(self, arch: Arch) -> float:
        """In [0, 1]. Raises UsageError where the data do not fit the network."""
        accuracy = self.train(arch)[1]
        if World.here().leads:
            shutil.rmtree(self._folder(arch))
        return accuracy

    def train(self, arch: Arch, *, reporter: Reporter | None = None) -> tuple[nn.Module, float]:
        """The network with the weights that ``evaluate`` judges, and its accuracy; its checkpoint stays."""
        module, figures = train_network(
            replace(self.problem, data=self._data, max_images=None),
            arch,
            self.recipe,
            folder=self._folder(arch),
            reporter=reporter,
        )
        return module, float(figures["accuracy"])

    @cached_property
    def _data(self) -> HeldOut:
        space = self.problem.space
        any_arch = space.sample(np.random.default_rng(0))
        return HeldOut(Splits.of(self.problem, num_classes(space.network(any_arch)), held_out=self.held_out))

    def _folder(self, arch: Arch) -> Path:
        name = self.problem.space.format_arch(arch)
        return self.problem.out / CANDIDATES / f"{zlib.crc32(name.encode()):08x}"


# ---- a budget of look-ups -------------------------------------------------------------------------------------------


class BudgetSpentError(UsageError):
    """A look-up beyond the budget."""


class Lookups:
    """An evaluator that remembers what it was told and counts distinct networks.

    A network is asked for by its canonical spelling: spellings of one graph are one look-up. With a `path` the answers
    outlast the process; saving takes 1 % of the time, and `flush` saves what is left. `identity` (JSON) is what the
    answers depend on: a file of another one is refused, not overwritten. Raises UsageError there, and where the file is
    damaged.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        space: SearchSpace,
        *,
        budget: int | None = None,
        path: Path | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        if budget is not None and budget < 1:
            raise UsageError(f"a search needs at least 1 look-up, got {budget}")
        self.evaluator, self.space, self.budget, self.path = evaluator, space, budget, path
        self.identity = dict(identity or {})
        self.values: dict[Arch, float] = {}  # canonical architecture -> value, in order of asking
        self.seconds: dict[Arch, float] = {}  # that finding it took; on a fleet, since the batch began
        self._saved_at, self._saving_s, self._unsaved = time.monotonic(), 0.0, False
        if path is not None and path.exists():
            self._read(path)

    @property
    def spent(self) -> int:
        """Distinct networks looked up so far, those of the file included."""
        return len(self.values)

    @property
    def left(self) -> int | None:
        """Look-ups that the budget still allows; None: any number."""
        return None if self.budget is None else max(0, self.budget - self.spent)

    def knows(self, arch: Arch) -> bool:
        """Whether asking costs nothing."""
        return self.space.canonical(arch) in self.values

    def evaluate(self, arch: Arch) -> float:
        """As the evaluator has it. Raises BudgetSpentError on a network that is new where no look-up is left."""
        network = self.space.canonical(arch)
        if network not in self.values:
            if self.left == 0:
                raise BudgetSpentError(
                    f"the budget of {self.budget} look-ups is spent: {self.space.format_arch(network)} is one more"
                )
            began = time.monotonic()
            self._note(network, float(self.evaluator.evaluate(network)), time.monotonic() - began)
        return self.values[network]

    def _note(self, network: Arch, value: float, seconds: float) -> None:
        if not np.isfinite(value):
            raise UsageError(f"the evaluator's answer for {self.space.format_arch(network)} is {value}: no number")
        self.values[network], self.seconds[network] = value, seconds
        self._unsaved = True
        if SAVING * (time.monotonic() - self._saved_at) >= self._saving_s:
            self.flush()

    def prepare(self, archs: Sequence[Arch]) -> None:
        """Asks about all that are new at once, as far as the budget goes, where the evaluator can do that."""
        if not isinstance(self.evaluator, OnFleet):
            return
        networks = dict.fromkeys(self.space.canonical(arch) for arch in archs)
        new = [network for network in networks if network not in self.values][: self.left]
        began = time.monotonic()
        try:
            for i, value in self.evaluator.evaluate_each(new):
                self._note(new[i], value, time.monotonic() - began)
        finally:
            self.flush()

    def best(self, among: Sequence[Arch] | None = None) -> tuple[Arch, float]:
        """The best network looked up, the first of equals, and its value; `among`: of these only.

        Raises UsageError where none was looked up.
        """
        known = self.values if among is None else {self.space.canonical(arch): None for arch in among}
        found = [network for network in known if network in self.values]
        if not found:
            raise UsageError("nothing was looked up yet")
        network = max(found, key=self.values.__getitem__)
        return network, self.values[network]

    def flush(self) -> None:
        """Saves what is not saved yet. Raises UsageError where the file cannot be written."""
        if self.path is None or not self._unsaved:
            return
        began = time.monotonic()
        if World.here().leads:
            rows = [[list(arch), value, round(self.seconds[arch], 3)] for arch, value in self.values.items()]
            write_json(self.path, {"identity": self.identity, "lookups": rows})
        self._saved_at, self._unsaved = time.monotonic(), False
        self._saving_s = self._saved_at - began

    def _read(self, path: Path) -> None:
        try:
            raw = read_json(path)
            found, rows = (
                raw["identity"],
                [(tuple(map(int, arch)), float(v), float(s)) for arch, v, s in raw["lookups"]],
            )
            for arch, _, _ in rows:
                self.space.check(arch)
            canonical_json(dict(found))  # NaN is no JSON
        except (OSError, KeyError, TypeError, ValueError, OverflowError, UsageError) as error:
            why = " ".join(str(error).split())[:120]
            raise UsageError(f"{path} holds no look-ups, or is damaged ({why}): remove it to start again") from None
        check_settings(path, "filled", found, self.identity)
        for arch, value, seconds in rows:
            self.values[arch], self.seconds[arch] = value, seconds
