"""Slow-fast learning: vectors in a box, paired at random; in every pair the worse moves towards the better.

Tan, Cheng, Huang, He, Qiu, Yang, Luo: Relative Neural Architecture Search via Slow-Fast Learning, TNNLS 2021: a
competitive swarm without the attraction to the mean. A vector has one real per decision of any search space, between 0
and the number of options; losses only compare the two of a pair. Constraints enter the comparison alone: constraint
domination (Deb, CMAME 2000), which the paper lacks.

Differs from the released code: one winner of a pair decides everything, the first at a tie; there a tie or a NaN makes
one the winner here and the other there. A loss that is not finite is the worst.

Extension [E], for judges whose answers hold for good (``explore``, evaluators): ``Renewal``. A population of 12 agrees
after some 40 networks and asks for nothing new, whatever is left to spend; one in a large space never does. After a
generation that brings nothing better the most promising single changes of the best network are tried (``foresight``),
which vectors that have met leave untried; then a new population follows, the most promising of many vectors, half of
which are drawn around the best so far. Where candidates are trained from a weight store the population stays, as
published: a loss there is never the same twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latbench.errors import UsageError
from latbench.oracle.base import Constraint
from latbench.spaces.base import Arch, SearchSpace
from searchers.base import TOLERANCE
from searchers.foresight import figures_of, promising

KEEP, IN_VAIN = 2 / 3, 3  # of a renewed population: share of the best's decisions; as often it may fail to improve
DRAWN, TRIED = 50, 8  # vectors drawn for each that is kept; single changes tried of a network before it counts as best
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# ---- the encoding ---------------------------------------------------------------------------------------------------


def upper_bounds(space: SearchSpace) -> Floats:
    """(D,): the box of a space is [0, number of options] in every decision."""
    return np.array([len(decision.options) for decision in space.decisions], np.float64)


def decode(vectors: Floats) -> Ints:
    """(..., D) reals of the box -> option indices. An integer m belongs to m - 1, so that the upper bound is legal:
    clipping puts many values exactly there."""
    return np.maximum(np.ceil(vectors).astype(np.int64) - 1, 0)


def encode(archs: NDArray[Any] | Sequence[Arch]) -> Floats:
    """(..., D) option indices -> the middles of their intervals; ``decode`` is its inverse."""
    return np.asarray(archs, np.float64) + 0.5


# ---- who is better --------------------------------------------------------------------------------------------------


def violations(constraints: Sequence[Constraint], archs: Ints) -> Floats:
    """(N, D) -> (N,): how far each is above its budgets, as a share of them, added up; 0 where it keeps them all."""
    total = np.zeros(len(archs))
    for constraint in constraints:
        excess = constraint.bounds(archs) / constraint.target - 1
        total += np.where(excess > TOLERANCE, excess, 0.0)
    return total


def first_wins(losses: Floats, excess: Floats) -> NDArray[np.bool_]:
    """(..., 2) losses and violations of pairs -> (...): whether the first is the fast learner.

    A smaller violation wins, hence feasible over infeasible; at equal ones, hence among the feasible, the lower loss.
    """
    loss = np.where(np.isfinite(losses), losses, np.inf)
    equal = excess[..., 0] == excess[..., 1]
    won: NDArray[np.bool_] = np.where(equal, loss[..., 0] <= loss[..., 1], excess[..., 0] < excess[..., 1])
    return won


def order(losses: Floats, excess: Floats) -> Ints:
    """(N,) losses and violations -> indices, the best first, by the same comparison; ties in their order."""
    loss = np.where(np.isfinite(losses), losses, np.inf)
    return np.lexsort((loss, excess))


def mend(space: SearchSpace, constraints: Sequence[Constraint], arch: Arch) -> Arch:
    """`arch`, changed one decision at a time, always the one that lowers the violation most, until it keeps all budgets
    or no single change lowers it."""
    sizes = [len(decision.options) for decision in space.decisions]
    changes = [(d, option) for d, size in enumerate(sizes) for option in range(size)]
    rows, (columns, options) = np.arange(len(changes)), np.array(changes, np.int64).T
    now, excess = np.array(arch, np.int64), float(violations(constraints, np.array([arch], np.int64))[0])
    while excess > 0:
        changed = np.tile(now, (len(changes), 1))
        changed[rows, columns] = options
        found = violations(constraints, changed)
        if found.min() >= excess:
            break
        now, excess = changed[int(found.argmin())], float(found.min())
    return tuple(now.tolist())


# ---- the population -------------------------------------------------------------------------------------------------


def learn(
    slow: Floats, fast: Floats, velocity: Floats, shares: tuple[Floats, Floats], upper: Floats
) -> tuple[Floats, Floats]:
    """Slow learners after one update, and their velocities, which clipping leaves as they are.

    All (N, D) but `upper`, (D,); `shares` are the two uniform draws, of the velocity and of the distance.
    """
    velocity = shares[0] * velocity + shares[1] * (fast - slow)
    return np.clip(slow + velocity, 0.0, upper), velocity


class Population:
    """N vectors, their velocities, and the stream of random numbers that pairs and moves them.

    >>> population = Population(upper_bounds(space), 20, seed=7)
    >>> pairs = population.pairs()  # (10, 2) rows of the population
    >>> population.advance(first_wins(losses[pairs], excess[pairs]))  # the next generation

    Draws come in the order of the released code from its generator: a seed gives its vectors. Raises UsageError where
    N is not even or below 2, or the seed is none of 32 bits.
    """

    def __init__(self, upper: Floats, size: int, *, seed: int) -> None:
        if size < 2 or size % 2:
            raise UsageError(f"a population is paired: its size must be even and at least 2, got {size}")
        if not 0 <= seed < 2**32:
            raise UsageError(f"a population's seed must be from 0 to {2**32 - 1}, got {seed}")
        self.upper = upper
        self._rng = np.random.RandomState(seed)
        self.vectors: Floats = self._rng.random_sample((size, len(upper))) * upper
        self.velocities: Floats = np.zeros_like(self.vectors)
        self._pairs: Ints | None = None  # of this generation, once drawn

    @property
    def archs(self) -> Ints:
        """(N, D) option indices."""
        return decode(self.vectors)

    @property
    def diversity(self) -> float:
        """Mean distance of the vectors from their mean."""
        return float(np.linalg.norm(self.vectors - self.vectors.mean(0), axis=1).mean())

    def mend(self, space: SearchSpace, constraints: Sequence[Constraint]) -> None:
        """Moves vectors above the budgets to what their architectures are mended to, where decisions change."""
        archs = self.archs
        for row in np.flatnonzero(violations(constraints, archs) > 0):
            mended = np.array(mend(space, constraints, tuple(archs[row].tolist())), np.int64)
            self.vectors[row] = np.where(mended == archs[row], self.vectors[row], encode(mended))

    def pairs(self) -> Ints:
        """(N / 2, 2) rows, every vector once; the same until ``advance``."""
        if self._pairs is None:
            self._pairs = self._rng.permutation(len(self.vectors)).astype(np.int64).reshape(-1, 2)
        return self._pairs

    def draw(self, n: int, around: Arch | None = None) -> Floats:
        """(n, D) vectors from the same stream; each decision is that of `around` with the chance ``KEEP``."""
        shape = (n, len(self.upper))
        vectors, kept = self._rng.random_sample(shape) * self.upper, self._rng.random_sample(shape) < KEEP
        return vectors if around is None else np.where(kept, encode([around]), vectors)

    def renew(self, vectors: Floats) -> None:
        """(N, D) vectors, at rest."""
        self.vectors, self.velocities, self._pairs = vectors, np.zeros_like(vectors), None

    def advance(self, first: NDArray[np.bool_]) -> None:
        """Moves all slow learners at once. `first`: (N / 2,) whether the first of each pair is the fast one."""
        pairs = self.pairs()
        fast = np.where(first, pairs[:, 0], pairs[:, 1])
        slow = np.where(first, pairs[:, 1], pairs[:, 0])
        shape = (len(pairs), len(self.upper))
        shares = self._rng.random_sample(shape), self._rng.random_sample(shape)
        self.vectors[slow], self.velocities[slow] = learn(
            self.vectors[slow], self.vectors[fast], self.velocities[slow], shares, self.upper
        )
        self._pairs = None

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        stream: Any = self._rng.get_state(legacy=False)
        return {
            "vectors": self.vectors.tolist(),
            "velocities": self.velocities.tolist(),
            "pairs": None if self._pairs is None else self._pairs.tolist(),
            "stream": [stream["state"]["key"].tolist(), stream["state"]["pos"]],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        self.vectors, self.velocities = np.array(state["vectors"]), np.array(state["velocities"])
        self._pairs = None if state["pairs"] is None else np.array(state["pairs"], np.int64)
        key, position = state["stream"]
        self._rng.set_state(("MT19937", np.array(key, np.uint32), position, 0, 0.0))


# ---- a search with any evaluator ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """An architecture whose loss was asked for."""

    arch: Arch
    loss: float
    violation: float
    generation: int


class Renewal:
    """Populations one after the other, each once the one before finds nothing better; kept in checkpoints.

    Networks are in their canonical spelling.
    """

    def __init__(self, space: SearchSpace, constraints: Sequence[Constraint]) -> None:
        self.space, self.constraints = space, constraints
        self.known: dict[Arch, float] = {}  # losses within the budgets, of all populations
        self.met: dict[Arch, None] = {}  # what this population has had
        self.own: dict[Arch, None] = {}  # of ``known``, what it was told
        self.own_best = math.inf  # the least of these losses, a generation ago
        self.champion: Arch | None = None  # the best so far, until populations fail at it
        self.in_vain = 0  # of these

    def note(self, arch: Arch, loss: float) -> None:
        """What the population was told of a network within the budgets."""
        network = self.space.canonical(arch)
        self.known[network] = loss
        self.own[network] = None

    def advance(self, population: Population, loss: Callable[[Arch], float]) -> None:
        """After each generation: where that brought nothing better, or, of a population that has kept no budget yet, no
        network that it has not had, ``climb`` from its best one, and another population. `loss` notes what it is asked.
        """
        found = [self.space.canonical(tuple(arch)) for arch in population.archs.tolist()]
        best = min((self.known[arch] for arch in self.own), default=math.inf)
        if best < self.own_best or (not self.own and not all(network in self.met for network in found)):
            self.met.update(dict.fromkeys(found))
            self.own_best = best
            return
        own = [arch for arch in self.own if arch != self.champion]
        self.in_vain += 1
        if own:
            top = self.climb(min(own, key=self.known.__getitem__), loss)
            if self.champion is None or self.known[top] < self.known[self.champion]:
                self.champion, self.in_vain = top, 0
        if self.in_vain > IN_VAIN:
            self.champion, self.in_vain = None, 0
        self.met, self.own, self.own_best = {}, {}, math.inf
        population.renew(self.promising(population))

    def climb(self, arch: Arch, loss: Callable[[Arch], float]) -> Arch:
        """A network within the budgets that no single change within them improves, of the ``TRIED`` most promising
        ones: the first that does is made until none is left. `arch` is known.

        White, Nolen, Savani: Exploring the Loss Landscape in Neural Architecture Search, UAI 2021.
        """
        sizes = [len(decision.options) for decision in self.space.decisions]
        changes = np.array([(d, option) for d, size in enumerate(sizes) for option in range(size)], np.int64)
        while True:
            near = np.tile(np.array(arch, np.int64), (len(changes), 1))
            near[np.arange(len(changes)), changes[:, 0]] = changes[:, 1]
            for network in [tuple(row) for row in near[self._ranked(near)[:TRIED]].tolist()]:
                if loss(network) < self.known[arch]:
                    arch = self.space.canonical(network)
                    break
            else:
                return arch

    def promising(self, population: Population) -> Floats:
        """(N, D) vectors of the next population: within the budgets, of networks not asked for yet, while there are
        such."""
        n = len(population.vectors)
        drawn = np.concatenate([population.draw(DRAWN * n // 2, around) for around in (self.champion, None)])
        chosen = self._ranked(decode(drawn))[:n]
        return np.concatenate([drawn[chosen], population.draw(n - len(chosen))])

    def _ranked(self, archs: Ints) -> Ints:
        """(M, D) -> rows of distinct networks within the budgets that are not known, the most promising first."""
        rows: dict[Arch, int] = {}
        for row in np.flatnonzero(violations(self.constraints, archs) == 0).tolist():
            rows.setdefault(self.space.canonical(tuple(archs[row].tolist())), row)
        new = {arch: row for arch, row in rows.items() if arch not in self.known}
        return np.array(list(new.values()), np.int64)[promising(self.known, list(new), figures_of(self.space))]

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers; without ``known``, which follows from all that was noted."""
        return {
            "met": [list(arch) for arch in self.met],
            "own": [list(arch) for arch in self.own],
            "own_best": self.own_best,
            "champion": self.champion and list(self.champion),
            "in_vain": self.in_vain,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``, where the same was noted before."""
        self.met, self.own = (dict.fromkeys(tuple(arch) for arch in state[name]) for name in ("met", "own"))
        self.own_best = state["own_best"]
        self.champion, self.in_vain = state["champion"] and tuple(state["champion"]), state["in_vain"]


def explore(
    space: SearchSpace,
    loss: Callable[[Arch], float],
    constraints: Sequence[Constraint] = (),
    *,
    size: int = 20,
    generations: int = 50,
    max_visits: int | None = None,
    seed: int,
    renewal: bool = False,
) -> list[Visit]:
    """What a population asked for, in order: each architecture once, and only where violations leave a pair open.

    Ends after `generations`, or `max_visits` losses. With `renewal` populations follow each other until then. ``best``
    gives the answer. Raises UsageError as ``Population``.
    """
    population = Population(upper_bounds(space), size, seed=seed)
    populations, generation = Renewal(space, constraints), 0
    visits: dict[Arch, Visit] = {}

    def ask(arch: Arch, violation: float = 0.0) -> float:
        if arch not in visits:
            if max_visits is not None and len(visits) >= max_visits:
                raise _SpentError
            visits[arch] = Visit(arch, loss(arch), violation, generation)
        if violation == 0:
            populations.note(arch, visits[arch].loss)
        return visits[arch].loss

    with suppress(_SpentError):
        for generation in range(generations):  # noqa: B007  ``ask`` notes it
            archs, pairs = population.archs, population.pairs()
            excess = violations(constraints, archs)
            losses = np.full(size, np.inf)
            for row in pairs[excess[pairs[:, 0]] == excess[pairs[:, 1]]].ravel():
                losses[row] = ask(tuple(archs[row].tolist()), float(excess[row]))
            population.advance(first_wins(losses[pairs], excess[pairs]))
            if renewal:
                populations.advance(population, ask)
    return list(visits.values())


class _SpentError(Exception):
    """No visit is left."""


def best(visits: Sequence[Visit]) -> Visit:
    """The visit that wins against all others. Raises UsageError where there is none."""
    if not visits:
        raise UsageError("nothing was evaluated: allow a generation and an evaluation at least")
    ranked = order(np.array([v.loss for v in visits]), np.array([v.violation for v in visits]))
    return visits[int(ranked[0])]
