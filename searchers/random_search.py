"""Random search: networks drawn uniformly from those that keep the budget, the best of them kept.

The baseline that any other searcher has to beat under the same number of evaluations and the same constraints (Li,
Talwalkar: Random Search and Reproducibility for Neural Architecture Search, UAI 2019; Yu et al.: Evaluating the Search
Phase of Neural Architecture Search, ICLR 2020). Distinct networks, not spellings, are uniform: where a space spells a
network in several ways, only the canonical spelling is drawn. The oracle is asked for many at once:

* small spaces (``ENUMERABLE``) are listed, and what fits is drawn without replacement;
* in others, spellings are drawn until enough fit; what does not is thrown away;
* where fewer than one in ``RARE`` fits, Markov chains walk among what fits (``walk``): uniform in the long run over
  what single changes connect. The result says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from latbench.errors import InfeasibleTargetError, UsageError
from latbench.spaces.base import Arch
from searchers.base import TOLERANCE, Problem, Reporter, Scalar, SearchResult
from searchers.derive import Recipe, publish
from searchers.evaluators import HELD_OUT, QUICK, Lookups, Trained, open_evaluator
from searchers.options import settings_of
from searchers.slow_fast import violations
from searchers.world import World

LOOKUPS = "evaluations.json"  # in the problem's folder
ENUMERABLE = 1 << 16  # architectures
RARE = 10_000
CHAINS, SWEEPS = 64, 20  # of a walk; changes tried per decision between two samples of a chain
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RandomSearch:
    """Options. The score of a result is the evaluator's: held-out accuracy under "train".

    `epochs`, `batch_size`, `lr`, `held_out`: of the training that "train" judges candidates by, and that the network
    which is found gets its weights from under any evaluator. Raises UsageError where they are out of range.
    """

    evaluations: int = 50  # distinct networks; all that fit, where they are fewer
    evaluator: str = "train"  # or train:EPOCHS, synflow, naswot, table:FILE[:COLUMN]
    epochs: int = QUICK.epochs
    batch_size: int = QUICK.batch_size  # of all processes
    lr: float = QUICK.lr  # at 1024 images a batch, scaled linearly
    held_out: float = HELD_OUT  # of the training images, to judge by

    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        if self.evaluations < 1 or not self.lr > 0:
            raise UsageError("random: evaluations must be at least 1, lr above zero")
        if not 0 < self.held_out < 1:
            raise UsageError(f"random: held_out must lie between 0 and 1, got {self.held_out}")
        assert self.recipe

    @property
    def recipe(self) -> Recipe:
        """Of a candidate's training. Raises UsageError."""
        return replace(QUICK.lasting(self.epochs), batch_size=self.batch_size, lr=self.lr)

    def search(self, problem: Problem, *, reporter: Reporter | None = None) -> SearchResult:
        """As ``Searcher.search``; with more `evaluations` it goes on from those made before."""
        problem.check_feasible()
        drawn = draw(problem, self.evaluations, np.random.default_rng((problem.seed, 0xD1CE)))
        options = settings_of(self, without=["evaluations"])
        lookups = Lookups(
            open_evaluator(self.evaluator, problem, recipe=self.recipe, held_out=self.held_out),
            problem.space,
            path=problem.out / LOOKUPS,
            identity={**problem.identity(options, constraints=False), "seed": problem.seed},
        )
        history = self._evaluate(problem, drawn.archs, lookups, reporter)
        arch, score = lookups.best(drawn.archs)
        module, accuracy = Trained(problem, self.recipe, self.held_out).train(arch, reporter=reporter)
        return publish(
            problem,
            self,
            module,
            World.here(),
            arch=arch,
            score=score,
            history=history,
            notes={"accuracy": accuracy, "evaluations": len(drawn.archs), **drawn.notes},
        )

    def _evaluate(
        self, problem: Problem, archs: list[Arch], lookups: Lookups, reporter: Reporter | None
    ) -> tuple[Mapping[str, Scalar], ...]:
        """One row per network, in the order of drawing."""
        lookups.prepare(archs)
        history: list[Mapping[str, Scalar]] = []
        best = -np.inf
        for i, arch in enumerate(archs):
            new = not lookups.knows(arch)
            score = lookups.evaluate(arch)
            best = max(best, score)
            costs = {f"predicted{k}": cost for k, cost in enumerate(problem.predicted(arch))}
            text = problem.space.format_arch(arch)
            history.append(
                {
                    "epoch": i,
                    "score": score,
                    "score_best": best,
                    **costs,
                    "arch": text,
                    "seconds": lookups.seconds[arch],
                }
            )
            if new and reporter is not None and World.here().leads:
                reporter.advance(i + 1, len(archs), f"score {score:.4g}, best {best:.4g}")
                reporter.epoch(history)
        lookups.flush()
        return tuple(history)


# ---- drawing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """Distinct networks that keep every constraint, and how they were found."""

    archs: list[Arch]
    notes: Mapping[str, Any]


def draw(problem: Problem, n: int, rng: np.random.Generator) -> Drawn:
    """`n` distinct networks in random order, uniform among all that keep the constraints; all where they are fewer.

    Raises InfeasibleTargetError where none is found, naming the one nearest to the budgets.
    """
    if problem.space.size <= ENUMERABLE:
        return _from_all(problem, n, rng)
    found: dict[Arch, None] = {}
    tried = 0
    while len(found) < n and tried < RARE * (len(found) + 1):
        share = (len(found) + 1) / (tried + 1)
        wanted = int(np.clip((n - len(found)) / share, 16, 4096))
        archs = np.array([problem.space.sample(rng) for _ in range(wanted)], np.int64)
        found.update(dict.fromkeys(_networks(problem, archs[violations(problem.constraints, archs) <= TOLERANCE])))
        tried += wanted
    notes = {"sampling": "rejection", "feasible_share": len(found) / tried, "drawn": tried}
    if len(found) < n:
        notes["sampling"] = "walk"
        walk(problem, n, rng, found)
    return Drawn(list(found)[:n], notes)


def _from_all(problem: Problem, n: int, rng: np.random.Generator) -> Drawn:
    space = problem.space
    shape = tuple(len(decision.options) for decision in space.decisions)
    archs = np.stack(np.unravel_index(np.arange(space.size), shape), axis=1).astype(np.int64)  # (N, D)
    over = violations(problem.constraints, archs)
    if not (over <= TOLERANCE).any():
        raise InfeasibleTargetError(_none(problem, archs, over))
    found = _networks(problem, rng.permutation(archs[over <= TOLERANCE]))
    return Drawn(found[:n], {"sampling": "all", "feasible": len(found), "drawn": len(archs)})


def walk(problem: Problem, n: int, rng: np.random.Generator, found: dict[Arch, None], *, rounds: int = 40) -> None:
    """Adds networks that keep the constraints to `found` until there are `n`, or after `rounds` samples of each chain.

    A chain changes one random decision to a random option at a time, and stays where the change would go further beyond
    the budgets (Metropolis): from any start down to what fits, then uniformly among it. Raises InfeasibleTargetError
    where no chain gets there.
    """
    space = problem.space
    sizes = np.array([len(decision.options) for decision in space.decisions])
    chains = np.array([space.sample(rng) for _ in range(CHAINS)], np.int64)  # (C, D)
    over, rows = violations(problem.constraints, chains), np.arange(CHAINS)
    for _ in range(rounds):
        for _ in range(SWEEPS * len(sizes)):
            changed = chains.copy()
            which = rng.integers(len(sizes), size=CHAINS)
            changed[rows, which] = rng.integers(sizes[which])
            new = violations(problem.constraints, changed)
            moved = new <= np.maximum(over, TOLERANCE)
            chains[moved], over[moved] = changed[moved], new[moved]
        found.update(dict.fromkeys(_networks(problem, chains[over <= TOLERANCE])))
        if len(found) >= n:
            return
    if not found:
        raise InfeasibleTargetError(_none(problem, chains, over))


def _networks(problem: Problem, archs: Ints) -> list[Arch]:
    """(N, D) -> those that are their network's one canonical spelling."""
    spelled = [tuple(arch) for arch in archs.tolist()]
    return [arch for arch in spelled if problem.space.canonical(arch) == arch]


def _none(problem: Problem, archs: Ints, over: NDArray[np.float64]) -> str:
    """One line on budgets that nothing keeps."""
    nearest = tuple(archs[int(over.argmin())].tolist())
    told = ", ".join(
        f"{predicted:.6g} {c.oracle.unit} of {c.target:.6g}"
        for predicted, c in zip(problem.predicted(nearest), problem.constraints, strict=True)
    )
    return (
        f"no {problem.space.name} network was found that keeps every constraint: the nearest is "
        f"{problem.space.format_arch(nearest)} at {told}; raise a target"
    )
