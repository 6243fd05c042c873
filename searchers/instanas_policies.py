"""The policies of a set of images: how they keep budgets in the mean, and how they are told.

A controller that was searched for a target comes near it; that the mean over held-out images keeps it, for every
constraint at once, is seen to here. Per image and layer the subset of the largest log-probability less its price is
taken, prices being proportional to latencies by as small a factor as will do. Factor 0 gives the controller's own MAP
policy, which is the paper's, and a growing factor ends at the fastest networks.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from latbench.errors import UsageError
from latbench.oracle.factors import Factor, FactorOracle
from latbench.spaces.base import Arch
from latbench.spaces.instanas import DEFAULT, MODULES, N_SUBSETS, InstaNASSpace
from searchers.base import TOLERANCE, Problem
from searchers.chains import Paths
from searchers.instanas_controller import (
    Window,
    expected_latency,
    instance_latency,
    linear,
    policies_of,
    subsets_of,
)
from searchers.results import write_bytes
from searchers.selection import select

ROUNDS, HALVINGS, DOUBLINGS = 8, 40, 40  # of the search for prices
FORBIDDEN = 1e9  # a price that no log-probability pays
OPEN = N_SUBSETS  # of a layer: no subset for all images, the controller decides
LEAST_PROB = 1e-6  # of what a price is weighed against
TOLD = 32  # policies that the notes name
BINS = 40  # of a histogram
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True, eq=False)
class Costs:
    """What policies cost under each of K constraints, and the network that keeps all of them.

    A *load* is the share of a budget, less stem and head, that a policy uses; of several constraints the largest.
    """

    problem: Problem
    space: InstaNASSpace
    oracles: tuple[FactorOracle, ...]  # K, what constraints are held to
    learned: tuple[FactorOracle, ...]  # K, what rewards read
    tables: Tensor  # (K, L, 32) float64, of a subset in a layer
    constants: Tensor  # (K,) of stem and head
    limits: Tensor  # (K,)
    within: Tensor  # (L,) subsets of a network that keeps every budget

    @classmethod
    def of(cls, problem: Problem, *, modular: bool = False) -> Costs:
        """`modular`: rewards read the paper's sums over modules. Raises UsageError where the space is another or an
        oracle is no sum over layers, InfeasibleTargetError where nothing keeps all budgets, MissingEntryError."""
        space = problem.space
        if not isinstance(space, InstaNASSpace):
            raise UsageError(
                f"instanas searches the space instanas, not {space.name}: profile that one, or search with aows"
            )
        oracles = problem.sums("instanas")
        problem.check_feasible()
        chains = [oracle.chain() for oracle in oracles]
        if any(pair.any() for chain in chains for pair in chain.pairwise):
            raise UsageError(
                "instanas needs sums over layers, this oracle joins neighbouring ones: search with the table itself"
            )
        for site in space.layers:  # where fitted figures of one network's two spellings differ
            for chain in chains if site.first else ():
                chain.unary[site.scope[0]][0] = chain.unary[site.scope[0]][1 << DEFAULT]
        paths = Paths.of([np.zeros(N_SUBSETS) for _ in space.layers], chains)
        budgets = problem.budgets()
        return cls(
            problem,
            space,
            oracles,
            tuple(sum_of_modules(oracle, space) for oracle in oracles) if modular else oracles,
            torch.from_numpy(np.array([chain.unary for chain in chains])),
            torch.from_numpy(paths.constants),
            torch.tensor(budgets, dtype=torch.float64),
            torch.tensor(select(paths, budgets).path),
        )

    def latencies(self, policies: Tensor) -> Tensor:
        """(B, L, 5) -> (K, B) in the constraints' units, stem and head included."""
        run = self.as_run(policies)
        return torch.stack([instance_latency(oracle, run) for oracle in self.oracles]).cpu()

    def load(self, policies: Tensor) -> Tensor:
        """(B, L, 5) -> (B,) as rewards read it."""
        run = self.as_run(policies)
        return self._loads(torch.stack([instance_latency(oracle, run) for oracle in self.learned])).amax(0)

    def expected_load(self, probs: Tensor) -> Tensor:
        """(B, L, 5) probabilities -> scalar: the mean of ``load`` over images and policies, the fullest budget's."""
        each = torch.stack([expected_latency(oracle, probs.double()) for oracle in self.learned])  # (K, B)
        return self._loads(each).mean(1).amax()

    def _loads(self, each: Tensor) -> Tensor:
        """(K, B) latencies -> shares of the budgets."""
        return (each - self.constants.to(each.device)[:, None]) / self.room.to(each.device)[:, None]

    @property
    def room(self) -> Tensor:
        """(K,) of each budget, what layers may use."""
        room = self.limits - self.constants
        return torch.where(room > 0, room, self.limits)

    def load_of(self, subset: int | Sequence[int]) -> float:
        """Of one network; one subset stands for the same in every layer."""
        subsets = torch.tensor([subset] * len(self.space.layers) if isinstance(subset, int) else list(subset))
        return float(self.load(policies_of(subsets)[None])[0])

    def windows(self, n: int, *, kind: str, start: float, end: float, aim: float, rest: float) -> list[Window]:
        """Of epochs 0 to `n`, in loads. `kind` "paper" and "static" are the released ones, which know no target.

        "target": the upper bound falls from `start` of the whole meta-graph's latency to where the middle of the window
        is at `aim` of the way from the fastest network to the target, and rests there for the share `rest` of epochs.
        """
        most, base, least = (self.load_of(subset) for subset in (N_SUBSETS - 1, 1, 0))
        margin = 1e-3 * abs(base)
        if kind == "static":
            return [Window.clamped(least, most, margin)] * (n + 1)
        if kind == "paper":
            return [Window.clamped(least, linear(start * most, end * base, e / n), margin) for e in range(n + 1)]
        fastest = [self.load_of(oracle.fastest()[0]) for oracle in self.learned]
        lower = min(least, *fastest, self.load_of(self.within.tolist()))
        last = 2 * min(lower + aim * (1 - lower), most) - lower
        first, fall = max(start * most, last), max(n * (1 - rest), 1.0)
        return [Window.clamped(lower, linear(first, last, min(e / fall, 1.0)), margin) for e in range(n + 1)]

    # -- prices

    def decode(self, probs: Tensor, prices: Tensor) -> Tensor:
        """(B, L, 5) probabilities, (L, 32) prices -> (B, L, 5) bool; without prices the MAP policy, probs >= 0.5."""
        if not prices.any():
            return probs >= 0.5
        bits = policies_of(torch.arange(N_SUBSETS, device=probs.device)).double()  # (32, 5)
        p = probs.double().clamp(LEAST_PROB, 1 - LEAST_PROB)
        logs = p.log() @ bits.T + (1 - p).log() @ (1 - bits).T  # (B, L, 32)
        return policies_of((logs - prices.to(probs.device)).argmax(-1))

    def settle(self, probs: Tensor, fixed: Sequence[int] = ()) -> Tensor:
        """(N, L, 5) probabilities of held-out images -> (L, 32) prices under which the mean keeps every budget.

        `fixed`: per layer the subset that all images take there, or OPEN. Factors are found one constraint after the
        other; where that does not end, ``within`` becomes everybody's.
        """
        held = torch.zeros(self.tables.shape[1:], dtype=torch.float64)
        for layer, subset in enumerate(fixed):
            if subset != OPEN:
                held[layer] = FORBIDDEN
                held[layer, subset] = 0.0
        factors = torch.zeros(len(self.oracles), dtype=torch.float64)
        for _ in range(ROUNDS):
            if self.kept(self.decode(probs, held + self._prices(factors))):
                return held + self._prices(factors)
            for k in range(len(factors)):
                factors[k] = self._least_factor(probs, factors, k, held)
        if self.kept(self.decode(probs, held + self._prices(factors))):
            return held + self._prices(factors)
        return torch.full(self.tables.shape[1:], FORBIDDEN, dtype=torch.float64).scatter(1, self.within[:, None], 0.0)

    def affords(self, fixed: Sequence[int]) -> bool:
        """Whether these subsets, OPEN for any, leave room for the cheapest ones in the other layers."""
        least = self.tables.amin(-1)  # (K, L)
        for layer, subset in enumerate(fixed):
            if subset != OPEN:
                least[:, layer] = self.tables[:, layer, subset]
        return bool((self.constants + least.sum(-1) <= self.limits * (1 + TOLERANCE)).all())

    def kept(self, policies: Tensor) -> bool:
        """Whether the mean of (N, L, 5) policies keeps every budget, and one of them all by itself."""
        if not bool((self.latencies(policies).mean(1) <= self.limits * (1 + TOLERANCE)).all()):
            return False
        return any(self.problem.satisfied(arch) for arch, _ in self.census(policies))

    def _least_factor(self, probs: Tensor, factors: Tensor, k: int, held: Tensor) -> float:
        """The smallest price of constraint k that keeps its budget, the others' as they are."""

        def keeps(factor: float) -> bool:
            tried = factors.clone()
            tried[k] = factor
            mean = self.latencies(self.decode(probs, held + self._prices(tried)))[k].mean()
            return bool(mean <= self.limits[k] * (1 + TOLERANCE))

        if keeps(0.0):
            return 0.0
        high = 1.0
        for _ in range(DOUBLINGS):
            if keeps(high):
                break
            high *= 2
        low = 0.0 if high == 1.0 else high / 2
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            low, high = (low, middle) if keeps(middle) else (middle, high)
        return high

    def _prices(self, factors: Tensor) -> Tensor:
        found: Tensor = torch.tensordot(factors / self.room, self.tables, 1)
        return found

    # -- what they come to

    def census(self, policies: Tensor) -> list[tuple[Arch, int]]:
        """Distinct networks of (N, L, 5) policies and their number of images, the most frequent first."""
        return sorted(Counter(self.archs(policies)).items(), key=lambda pair: (-pair[1], pair[0]))

    def archs(self, policies: Tensor) -> list[Arch]:
        """The network of each of (N, L, 5) policies, spelled in one way."""
        return [tuple(row) for row in subsets_of(self.as_run(policies)).tolist()]

    def as_run(self, policies: Tensor) -> Tensor:
        """(..., L, 5) bits with the default module where a stage's first layer has none."""
        first = torch.tensor([site.first for site in self.space.layers], device=policies.device)
        found = policies.clone()
        found[..., DEFAULT] |= first & ~policies.any(-1)
        return found

    def representative(self, policies: Tensor) -> Arch:
        """(N, L, 5) -> the most frequent network among those that keep every budget; ``within`` where none does."""
        found = (arch for arch, _ in self.census(policies) if self.problem.satisfied(arch))
        return next(found, self.space.canonical(tuple(self.within.tolist())))

    def told(self, policies: Tensor) -> dict[str, Any]:
        """JSON on (N, L, 5) policies: per constraint the distribution of latencies, and the commonest networks."""
        latencies = self.latencies(policies).numpy()  # (K, N)
        found = self.census(policies)
        named = [
            {
                "arch": self.space.format_arch(arch),
                "share": count / policies.shape[0],
                "predicted": list(self.problem.predicted(arch)),
            }
            for arch, count in found[:TOLD]
        ]
        return {"latency": [_distribution(row) for row in latencies], "policies": named, "n_policies": len(found)}


@dataclass(frozen=True, eq=False)
class Route:
    """Images -> the policies that a controller gives them, at these prices."""

    controller: nn.Module
    prices: Tensor  # (L, 32); all 0: MAP policies
    costs: Costs

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, L, 5) bool."""
        return self.costs.decode(self.probabilities(images), self.prices)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, L, 5); in evaluation mode, and in float32 whatever surrounds it: policies do not flip."""
        with torch.autocast(images.device.type, enabled=False):
            found: Tensor = self.controller.eval()(images)
        return found


def sum_of_modules(oracle: FactorOracle, space: InstaNASSpace) -> FactorOracle:
    """The paper's latency: a subset costs the sum of its modules, each as measured alone."""
    chain = oracle.chain()
    bits = np.arange(N_SUBSETS)[:, None] >> np.arange(len(MODULES)) & 1  # (32, 5)
    singles = 1 << np.arange(len(MODULES))
    factors = [Factor("stem and head", (), np.array(chain.constant))]
    for site, values in zip(space.layers, chain.unary, strict=True):
        row = bits @ values[singles]
        row[0] = values[1 << DEFAULT] if site.first else 0.0
        factors.append(Factor(site.name, site.scope, row))
    return FactorOracle(space, tuple(factors), oracle.provenance, unit=oracle.unit)


def _distribution(latencies: NDArray[np.float64]) -> dict[str, Any]:
    marks = np.quantile(latencies, QUANTILES)
    return {
        "mean": float(latencies.mean()),
        "std": float(latencies.std()),
        "quantiles": {f"{q:g}": float(mark) for q, mark in zip(QUANTILES, marks, strict=True)},
    }


def draw_latencies(path: Path, latencies: NDArray[np.float64], targets: Sequence[float], units: Sequence[str]) -> None:
    """(K, N) of images -> a histogram per constraint with mean and target. Raises UsageError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UsageError("a plot needs matplotlib. Run: pip install 'latbench[report]'") from None
    figure = Figure(figsize=(6, 2.6 * len(latencies)), layout="constrained")
    axes = figure.subplots(len(latencies), 1, squeeze=False)[:, 0]
    for axis, row, target, unit in zip(axes, latencies, targets, units, strict=True):
        low, high = min(row.min(), target), max(row.max(), target)
        margin = 0.05 * (high - low) or 0.05 * high
        axis.hist(row, bins=np.linspace(low - margin, high + margin, BINS + 1), color="tab:blue", alpha=0.7)
        axis.axvline(row.mean(), color="tab:orange", label=f"mean {row.mean():.4g}")
        axis.axvline(target, color="black", linestyle="--", label=f"target {target:.4g}")
        axis.set_xlabel(f"predicted {unit} of an image's network")
        axis.set_ylabel("images")
        axis.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip("."))
    write_bytes(path, buffer.getvalue())
