"""The mirror stimuli function: a linear score of a block's wiring, learned from an expert's by inverse reinforcement.

Guo et al., CVPR 2019 (IRLAS). Abbeel, Ng: Apprenticeship Learning via Inverse Reinforcement Learning, ICML 2004. A
block is a trajectory of layer codes; its discounted feature count is mu = sum_t gamma^(t-1) phi(s_t), its score w . mu,
and w is what tells the expert's count from that of every other block. No images are needed.

Differs from the paper (whose search code was never published):

* What may follow depends on a layer's index alone, so the best block under any w is found exactly, by dynamic
  programming, in place of an inner Q-learning.
* "indexed" features have a copy of each bit per layer index. With one copy for all ("fields") no w makes ResNeXt the
  one best block: it takes conv3 at index 2 where conv1 was legal and conv1 at index 3 where conv3 was.
* ``max_margin`` finds the point of smallest norm in the convex hull of the differences (Frank-Wolfe with exact line
  search), to a given precision, which also bounds the margin. ``projection`` is the literal method of Abbeel and Ng; on
  "fields" its distance goes to 0 without the best block ever being the expert.
* Scores are told on a scale where the expert has 1 and random blocks 0 on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from latbench.errors import UsageError
from latbench.spaces.nsc import FIRST_TERMINAL, KIND_OF, KINDS, Code, legal_codes, predecessors

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Block = tuple[int, ...]  # option indices up to the terminal; what follows it is ignored
LAYOUTS = ("indexed", "fields")
MAX_STEPS = {"max_margin": 20_000, "projection": 2_000}


@dataclass(frozen=True)
class Features:
    """Binary features of a layer code, and their discounted counts over blocks of at most `max_index` codes.

    "fields": type (7), kernel 1, 3, 5 (3), first and second predecessor (T each). "indexed": per index, kind of layer
    (11) and predecessors (T each). Kernel bits are 0 where there is no kernel, second predecessors only where two are
    read; a terminal has its type's bit alone.
    """

    max_index: int
    gamma: float = 0.9
    layout: str = "indexed"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS or not 0 < self.gamma <= 1 or self.max_index < FIRST_TERMINAL:
            raise UsageError(
                f"mirror: features are {' or '.join(LAYOUTS)}, gamma in (0, 1], max_index at least {FIRST_TERMINAL}; "
                f"got {self}"
            )

    @property
    def size(self) -> int:
        """M, the number of features."""
        n = self.max_index
        return 10 + 2 * n if self.layout == "fields" else n * (len(KINDS) + 2 * n)

    def bits(self, code: Code) -> tuple[int, ...]:
        """The features that are 1."""
        index, kind, kernel = code[:3]
        width, n = len(KINDS), self.max_index
        if self.layout == "fields":
            first, *rest = kind - 1, *([7 + (kernel - 1) // 2] if kernel else [])
            base = 10
        else:
            start = (index - 1) * (width + 2 * n)
            first, rest, base = start + KIND_OF[kind, kernel], [], start + width
        return (first, *rest, *(base + n * slot + source for slot, source in enumerate(predecessors(code))))

    @cached_property
    def columns(self) -> tuple[Ints, ...]:
        """Per index, (A, 4) features of each legal code that are 1, filled up with M."""
        found = []
        for index in range(1, self.max_index + 1):
            bits = [self.bits(code) for code in legal_codes(index, self.max_index)]
            found.append(np.array([[*b, *(self.size,) * (4 - len(b))] for b in bits], np.int64))
        return tuple(found)

    def ends(self, step: int, option: int) -> bool:
        """Whether an option of `step` (from 0) is the terminal."""
        return self._terminals[step] == option

    def cut(self, block: Block) -> Block:
        """The block up to its terminal."""
        for step, (option, last) in enumerate(zip(block, self._terminals, strict=False)):
            if option == last:
                return block[: step + 1]
        raise UsageError(f"mirror: {block} has no terminal within {self.max_index} layers")

    @cached_property
    def _terminals(self) -> tuple[int, ...]:
        """Per step the option that ends a block there; -1 where none does."""
        return tuple(len(c) - 1 if i + 1 >= FIRST_TERMINAL else -1 for i, c in enumerate(self.columns))

    def count(self, block: Block) -> Floats:
        """(M,) discounted counts, mu."""
        total = np.zeros(self.size + 1)
        for step, option in enumerate(self.cut(block)):
            np.add.at(total, self.columns[step][option], self.gamma**step)
        return total[:-1]

    def uniform(self) -> Floats:
        """(M,) expected counts where every layer is uniform over its legal codes."""
        total, alive = np.zeros(self.size + 1), 1.0
        for step, columns in enumerate(self.columns):
            np.add.at(total, columns, alive * self.gamma**step / len(columns))
            alive *= 1 - (step + 1 >= FIRST_TERMINAL) / len(columns)
        return total[:-1]

    def values(self, weights: Floats) -> list[Floats]:
        """(M,) weights -> per step (A,): what each option adds to a block's w . mu."""
        padded = np.append(weights, 0.0)
        return [self.gamma**step * padded[columns].sum(1) for step, columns in enumerate(self.columns)]

    def best(self, weights: Floats, excluded: Sequence[Block] = ()) -> Block:
        """The block of the largest w . mu, of all but the excluded ones; the first options of equals."""
        values = self.values(weights)
        totals: list[Floats] = [np.zeros(0)] * len(values)  # per step (A,): with the best continuation
        following = 0.0
        for step in range(len(values) - 1, -1, -1):
            totals[step] = values[step] + following
            if step + 1 >= FIRST_TERMINAL:
                totals[step][-1] -= following  # nothing follows the terminal, the last option
            following = float(totals[step].max())
        return self._deviation(values, totals, 0, [self.cut(block) for block in excluded])[1]

    def _deviation(
        self, values: list[Floats], totals: list[Floats], step: int, excluded: list[Block]
    ) -> tuple[float, Block]:
        """Value and options of the best continuation from `step` that is none of these, all of one prefix so far."""
        total = totals[step].copy()
        after: dict[int, Block] = {}
        for option in {block[step] for block in excluded}:
            if self.ends(step, option):
                total[option] = -np.inf
                continue
            same = [block for block in excluded if block[step] == option]
            value, after[option] = self._deviation(values, totals, step + 1, same)
            total[option] = values[step][option] + value
        best = int(total.argmax())
        if best not in after:
            after[best] = () if self.ends(step, best) else self._deviation(values, totals, step + 1, [])[1]
        return float(total[best]), (best, *after[best])


@dataclass(frozen=True, eq=False)
class Mirror:
    """A trained score of blocks. `margin` bounds the largest possible one: w . mu of the expert above any other's."""

    features: Features
    weights: Floats  # (M,), of norm 1
    expert: Floats  # (M,) mean count of the experts
    margin: tuple[float, float]
    distances: tuple[float, ...]  # per iteration: norm of what still separates expert and hull

    @cached_property
    def _random(self) -> float:
        return float(self.weights @ self.features.uniform())

    @cached_property
    def scale(self) -> float:
        """kappa: w . mu of the expert above that of random blocks."""
        return float(self.weights @ self.expert) - self._random

    @cached_property
    def _values(self) -> list[list[float]]:
        return [values.tolist() for values in self.features.values(self.weights)]

    def score(self, block: Block) -> float:
        """1 for the expert, 0 on average for random blocks."""
        worth = sum(values[option] for values, option in zip(self._values, self.features.cut(block), strict=False))
        return (worth - self._random) / self.scale

    def bonus(self, balance: float) -> list[Floats]:
        """Per step (A,): what each option adds to ``balance * w . mu / kappa`` of its block."""
        return [balance / self.scale * values for values in self.features.values(self.weights)]


def train(
    features: Features, experts: Sequence[Block], *, method: str = "max_margin", tolerance: float = 1e-3,
    epsilon: float = 0.05, max_steps: int | None = None,
) -> Mirror:  # fmt: skip
    """The weights under which the experts' mean count is furthest above that of all other blocks.

    `tolerance` (of ``max_margin``): relative precision of the squared margin; `epsilon` (of ``projection``): distance
    at which it stops. Raises UsageError where there is no expert, or the features cannot tell them apart.
    """
    if not experts or method not in MAX_STEPS:
        raise UsageError(f"mirror: wants at least one expert and {' or '.join(MAX_STEPS)}, got {method!r}")
    expert: Floats = np.mean([features.count(block) for block in experts], axis=0)
    steps = MAX_STEPS[method] if max_steps is None else max_steps
    known = list(dict.fromkeys(features.cut(block) for block in experts))
    if method == "max_margin":
        direction, distances = _smallest(features, expert, known, tolerance, steps)
    else:
        direction, distances = _project(features, expert, known, epsilon, steps)
    norm = float(np.linalg.norm(direction))
    if norm < 1e-9:
        raise UsageError("mirror: these features cannot tell the experts from other blocks: take features indexed")
    weights = direction / norm
    rival = features.best(weights, known)
    low = float(weights @ (expert - features.count(rival)))
    trained = Mirror(features, weights, expert, (low, max(low, norm)), distances)
    if trained.scale <= 0:
        raise UsageError("mirror: random blocks score as high as the experts under these features: take others")
    return trained


def _smallest(
    features: Features, expert: Floats, known: Sequence[Block], tolerance: float, steps: int
) -> tuple[Floats, tuple[float, ...]]:
    """(M,) point of smallest norm in the convex hull of the expert's count less each other block's."""
    z = expert - features.uniform()
    distances = []
    for _ in range(steps):
        distances.append(float(np.linalg.norm(z)))
        d = expert - features.count(features.best(z, known))
        if z @ (z - d) <= tolerance * (z @ z):
            break
        z = _toward_origin(z, d)
    return z, tuple(distances)


def _project(
    features: Features, expert: Floats, known: Sequence[Block], epsilon: float, steps: int
) -> tuple[Floats, tuple[float, ...]]:
    """Abbeel and Ng 2004, section 3.1: the expert's count less its projection, until the best block is an expert's."""
    z = expert - features.uniform()  # the expert less mu_bar
    distances = []
    for i in range(steps):
        distances.append(float(np.linalg.norm(z)))
        best = features.best(z)
        if distances[-1] <= epsilon or best in known or i == steps - 1:
            break
        z = _toward_origin(z, expert - features.count(best))
    return z, tuple(distances)


def _toward_origin(z: Floats, d: Floats) -> Floats:
    """The point of smallest norm between `z` and `d`."""
    step = d - z
    share = float(np.clip(-(z @ step) / max(float(step @ step), 1e-300), 0.0, 1.0))
    return z + share * step
