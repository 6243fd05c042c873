"""RelativeNAS: a small population of genotypes that learn from each other in pairs.

Tan, Cheng, Huang, He, Qiu, Yang, Luo: Relative Neural Architecture Search via Slow-Fast Learning, TNNLS 2021; released
code EMI-Group/RelativeNAS. Genotypes are real vectors (``slow_fast``); both of a pair are trained for an epoch from a
common weight store (``relativenas_supernet``) and compared by their loss on held-out images; the worse one moves
towards the better one, and the store takes what both have learned.

Differs from the paper and its released code:

* Latency: budgets decide before the loss who of a pair is the fast learner; oracles speak of the network of the table's
  space, not of the small one that is trained. The paper has none.
* The result is chosen: all vectors of the last generation are evaluated with the store's weights, batch norms
  calibrated and nothing trained, on images without augmentation; the best that keeps the budgets. Theirs logs the 20
  genotypes. Where none keeps them, the best that did in an earlier generation, else the nearest, changed until it does.
* Both of a pair see the same images, crops and noise: what differs is the genotype. Every draw is seeded; theirs splits
  the images by an unseeded generator.
* The rate is the cosine itself; theirs is a recursion whose values depend on the PyTorch release.
* With another `evaluator` than the store, whose answers hold for good, one that finds nothing better is renewed
  (``slow_fast``), and `evaluations` bounds what is asked; theirs would ask for the same networks again.
* A loss that is not finite is the worst and leaves nothing in the store; two of them end the search.
* Holes of the cutout are `cutout` of the image's side; theirs 16 of 32 pixels.
* The found network has the store's weights where `channels` and `layers` are the space's; else fresh ones, calibrated:
  train it from scratch. So it is with any other `evaluator`, which replaces training (``evaluators.open_evaluator``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latbench.errors import InfeasibleTargetError, UsageError
from latbench.graph.torch import weights_of
from latbench.spaces.base import Arch
from searchers.base import Problem, Reporter, Scalar, SearchResult, infeasible, sum_near
from searchers.data import Splits
from searchers.derive import inherit, module_of, num_classes, publish
from searchers.evaluators import BudgetSpentError
from searchers.options import settings_of
from searchers.relativenas_judges import Asked, Judge, Ranked, Trained, Training
from searchers.slow_fast import Floats, Ints, Population, Renewal, first_wins, mend, upper_bounds, violations
from searchers.train import Loop, Position
from searchers.world import World

SUPERNET = "supernet"


@dataclass(frozen=True)
class RelativeNAS(Training):
    """Options, with those of ``Training``. The score of a result is minus its loss on held-out images with the store's
    weights, in nats; with another `evaluator` than "supernet", that one's.

    Raises UsageError where they are out of range.
    """

    population: int = 20  # even
    generations: int = 50
    feasible_start: bool = False  # the first generation keeps the budgets; else it is uniform, as released
    evaluator: str = SUPERNET  # or train[:EPOCHS], synflow, naswot, table:FILE[:COLUMN]
    evaluations: int | None = None  # distinct networks that such an evaluator is asked for at most
    renewal: bool = True  # [E] with such an evaluator: populations follow each other (slow_fast)

    name: ClassVar[str] = "relativenas"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generations < 1 or self.population < 2 or self.population % 2:
            raise UsageError("relativenas: population must be even and at least 2, generations at least 1")
        if self.evaluations is not None and (self.evaluations < 1 or self.evaluator == SUPERNET):
            raise UsageError(
                "relativenas: evaluations must be at least 1 and bound another evaluator than supernet, whose are "
                "population times generations"
            )

    def search(self, problem: Problem, *, reporter: Reporter | None = None) -> SearchResult:
        """As ``Searcher.search``. Once it is finished another target is answered from the last generation.

        Raises UsageError also where the space is not RelativeNAS' and the evaluator is the supernet.
        """
        problem.check_feasible()
        start = attainable(problem)
        world = World.here()
        judge: Judge = (
            Trained(self, problem, world)
            if self.evaluator == SUPERNET
            else Asked(self.evaluator, problem, held_out=self.held_out, budget=self.evaluations)
        )
        course = _Course(problem, Population(upper_bounds(problem.space), self.population, seed=problem.seed))
        if self.feasible_start:
            course.population.mend(problem.space, problem.constraints)
        history = self._run(problem, course, judge, world, reporter)
        chosen, notes = choose(problem, course, judge, start)
        graph = problem.space.network(chosen.arch)
        inherited = judge.weights(chosen.arch)
        torch.manual_seed(problem.seed)
        weights = inherited or weights_of(module_of(graph))
        splits = Splits.of(problem, num_classes(graph), held_out=self.held_out)
        module, _ = inherit(problem, graph, weights, splits, world, self.batch_size)
        return publish(
            problem,
            self,
            module,
            world,
            arch=chosen.arch,
            score=-chosen.loss,
            history=history,
            notes={**chosen.figures, "inherited": inherited is not None, **notes},
        )

    def _run(
        self, problem: Problem, course: _Course, judge: Judge, world: World, reporter: Reporter | None
    ) -> tuple[Mapping[str, Scalar], ...]:
        """All generations that are left; a step is a pair. Gives the history."""
        loop = Loop(
            problem.out,
            "search",
            {"course": course, **judge.parts},
            identity=problem.identity(settings_of(self, without=["generations", "evaluations"])),
            epochs=self.generations,
            seed=problem.seed,
            world=world,
            reporter=reporter,
        )
        loop.resume(free=["constraints"])

        def step(pair: Pair, at: Position) -> dict[str, float]:
            archs = course.population.archs[pair.rows.tolist()]
            excess = violations(problem.constraints, archs)
            if problem.fleet is not None and isinstance(judge, Asked):
                judge.lookups.prepare(course.undecided(problem))
            losses = judge.losses(_archs(archs), excess, at, int(loop.rng("noise").integers(1 << 63)))
            first = bool(first_wins(losses, excess))
            judge.settle(losses, first)
            course.note(archs, losses, excess, first)
            return {"feasible": float((excess == 0).mean())}

        def advance(generation: int) -> dict[str, Any]:
            row = course.advance(generation)
            if self.renewal and isinstance(judge, Asked):
                course.renew(judge.loss)
            return row

        with suppress(BudgetSpentError):
            loop.run(_Pairs(course, self.population // 2, self.batch_size), step, advance)
        return tuple(loop.history)


def attainable(problem: Problem) -> Arch | None:
    """A network that keeps all budgets; None where no oracle can tell its fastest one.

    Raises InfeasibleTargetError where single changes lead from no oracle's fastest network to one.
    """
    oracles = [oracle for c in problem.constraints if (oracle := sum_near(c)) is not None]
    starts = [mend(problem.space, problem.constraints, oracle.fastest()[0]) for oracle in oracles]
    for arch in starts:
        if problem.satisfied(arch):
            return arch
    if len(oracles) < len(problem.constraints):
        return None
    told = ", ".join(f"{problem.space.format_arch(arch)} at {problem.predicted(arch)}" for arch in starts)
    raise InfeasibleTargetError(
        f"each of the budgets {problem.targets} can be kept, but not all of them together: the nearest networks are "
        f"{told}; raise a target"
    )


# ---- the state of a search ------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """What a step is about."""

    rows: Tensor  # (2,) of the population


@dataclass(frozen=True)
class _Pairs:
    """The pairs of a generation, dealt as ``Batches`` are."""

    course: _Course
    n: int
    batch_size: int

    def __len__(self) -> int:
        return self.n

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Pair]:
        """Of the population's generation, the first `skip` left out."""
        for rows in self.course.population.pairs()[skip:]:
            yield Pair(torch.from_numpy(rows))


class _Course:
    """The population, this generation's verdicts, and what kept the budgets so far; kept in checkpoints."""

    def __init__(self, problem: Problem, population: Population) -> None:
        self.population, self.renewal = population, Renewal(problem.space, problem.constraints)
        self.first: list[bool] = []  # of every pair so far, whether its first wins
        self.losses: list[float] = []
        self.seen: dict[Arch, float] = {}  # latest loss of architectures within the budgets

    def undecided(self, problem: Problem) -> list[Arch]:
        """Of this generation's pairs that are still to come, those that violations do not decide."""
        pairs, archs = self.population.pairs()[len(self.first) :], self.population.archs
        excess = violations(problem.constraints, archs)
        return _archs(archs[pairs[excess[pairs[:, 0]] == excess[pairs[:, 1]]].ravel()])

    def note(self, archs: Ints, losses: Floats, excess: Floats, first: bool) -> None:
        """One pair's outcome: (2, D), (2,), (2,)."""
        self.first.append(first)
        for arch, loss, over in zip(_archs(archs), losses.tolist(), excess.tolist(), strict=True):
            if math.isfinite(loss):
                self.losses.append(loss)
                if over == 0:
                    self.seen[arch] = loss
                    self.renewal.note(arch, loss)

    def renew(self, loss: Callable[[Arch], float]) -> None:
        """Another population where this one finds nothing better."""

        def ask(arch: Arch) -> float:
            self.seen[arch] = loss(arch)
            self.renewal.note(arch, self.seen[arch])
            return self.seen[arch]

        self.renewal.advance(self.population, ask)

    def advance(self, generation: int) -> dict[str, Any]:
        """Moves the slow learners; the generation's figures."""
        population = self.population
        row = {
            "loss": float(np.mean(self.losses)) if self.losses else None,
            "loss_best": min(self.losses, default=None),
            "diversity": population.diversity,
            "archs": " ".join(",".join(map(str, arch)) for arch in population.archs.tolist()),
        }
        population.advance(np.array(self.first))
        self.first, self.losses = [], []
        return {name: value for name, value in row.items() if value is not None}

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {
            "population": self.population.state_dict(),
            "first": list(self.first),
            "losses": list(self.losses),
            "seen": [[list(arch), loss] for arch, loss in self.seen.items()],
            "renewal": self.renewal.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        self.population.load_state_dict(state["population"])
        self.first, self.losses = list(state["first"]), list(state["losses"])
        self.seen = {tuple(arch): loss for arch, loss in state["seen"]}
        for arch, loss in self.seen.items():
            self.renewal.note(arch, loss)
        self.renewal.load_state_dict(state["renewal"])


def _archs(rows: Ints) -> list[Arch]:
    return [tuple(row) for row in rows.tolist()]


# ---- the end --------------------------------------------------------------------------------------------------------


def choose(problem: Problem, course: _Course, judge: Judge, start: Arch | None) -> tuple[Ranked, dict[str, Any]]:
    """The best of the last generation that keeps the budgets, and the whole ranking; of all generations where a judge
    remembers.

    Where none does: the best of those that did in earlier generations, else what the nearest can be mended to, else
    `start`, with a warning. Raises InfeasibleTargetError where that breaks a budget too.
    """
    space, last = problem.space, list(dict.fromkeys(_archs(course.population.archs)))
    known = sorted((arch for arch in course.seen if problem.satisfied(arch)), key=course.seen.__getitem__)
    known, origin = known[: len(course.population.vectors)], "last generation"
    if judge.remembers:
        last = known + [arch for arch in last if judge.affords(arch) and arch not in known and problem.satisfied(arch)]
        known, origin = [], "all generations"
    ranking = judge.rank(last)
    notes: dict[str, str] = {}
    kept = [ranked for ranked in ranking if problem.satisfied(ranked.arch)]
    if not kept and known:
        kept, origin = judge.rank(known), "earlier generations"
    if not kept:
        every = _archs(course.population.archs)
        nearest = every[int(violations(problem.constraints, course.population.archs).argmin())]
        mended = mend(space, problem.constraints, nearest)
        arch = mended if problem.satisfied(mended) or start is None else start
        if not problem.satisfied(arch):
            bound = float(problem.constraints[0].bounds(np.array([arch]))[0])
            raise InfeasibleTargetError(infeasible(problem.constraints[0], arch, bound))
        kept, origin = judge.rank([arch]), "nearest to the last generation"
        notes["warning"] = (
            "no candidate kept the budget; this is the nearest to the last generation, changed until it does: give the "
            "search more generations, or start within the budget (--set feasible_start=true)"
        )
    told = [
        {"arch": list(r.arch), "loss": r.loss, "predicted": list(problem.predicted(r.arch))}
        for r in sorted(ranking, key=lambda r: r.loss)
    ]
    return min(kept, key=lambda r: r.loss), {"chosen_from": origin, "ranking": told, **notes}
