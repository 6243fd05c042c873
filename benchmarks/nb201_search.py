"""Search on NAS-Bench-201 with real accuracies and latencies: slow-fast learning and Q-learning beside random search.

    python benchmarks/nb201_search.py --data DIR [--batch 1 256] [--seeds 20] [--out bench_results/nb201_search]
    python benchmarks/nb201_search.py --data DIR --oracle true --lookups 40 --judge c100_val_12ep

DIR holds nb201_search.parquet: accuracies (CIFAR-100, 200 epochs, test) of all 15,625 cells and their latencies on a
GTX 1080 Ti at batch 1 and 256, imported as tables. A search may look up LOOKUPS accuracies, and asks an oracle for
latencies as often as it likes. Limits are percentiles of the latencies of all distinct networks. Networks are canonical
spellings, edges that do not reach the output set to none: a class of equal graphs is one network, one look-up, one
accuracy and one latency, its canonical spelling's (12,205 of 15,625; isomorphic graphs and edges from nodes without
input stay apart).

Oracles:

* true: the latencies.
* learned: a model fitted to MEASURED D-optimal cells, held to the upper end of its 90 % intervals.
* finalists: the same, with FINALISTS of the measurements kept back. The search is held to the lower ends, what may keep
  the limit; of what it looked up, the best are measured until one keeps it, or is known to without. A measurement is
  the published latency, by which answers are judged too, so a finalist that was measured cannot break a limit; measured
  again it would differ by 1.6 % at batch 1.

Searches (``SEARCHES``), each one fixed choice for all limits, made on CIFAR-10's accuracies (--tune; renewal's size on
ImageNet16-120's too):

* random: distinct networks, uniform among those that keep the limit.
* relativenas: ``slow_fast.explore`` over the six edges, one vector component each; a population that has had its
  generations is followed by a new one until the look-ups are spent. relativenas+renewal: with ``slow_fast.Renewal``.
* irlas: ``qlearning.Learner`` over the six edges, one step each, with the latency filter and without topology guidance,
  for which this space has no expert; the exploration rate follows the share of look-ups spent. irlas+hopeful: a value
  is the best reward that ever followed, which is Q-learning in a world without chance (Lauer, Riedmiller, ICML 2000).
  irlas+foresight: hopeful, and of 256 times as many trajectories the most promising are followed (``foresight``).

With --judge searches look up another accuracy than answers are told by, as where short trainings judge candidates.

The answer is the best network looked up. Regret: the best accuracy of any network that keeps the limit in truth, minus
the answer's, in points; it can be negative where an answer breaks the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from nb201_cells import FINALISTS, MEASURED, SHAPE, Cells, Knowledge

from latbench.errors import UsageError
from latbench.oracle.base import Constraint
from searchers.base import TOLERANCE, Problem
from searchers.evaluators import BudgetSpentError, Lookups
from searchers.foresight import figures_of, promising
from searchers.qlearning import SCHEDULE, Learner, Process, Rates, Trajectory, epsilons
from searchers.random_search import draw
from searchers.slow_fast import explore, violations

LOOKUPS = 300
PERCENTILES = (20, 50, 80)
TITLES = {
    "true": "true latencies",
    "learned": f"oracle learned from {MEASURED} cells, 90 % margin",
    "finalists": f"oracle learned from {MEASURED - FINALISTS} cells, {FINALISTS} finalists measured",
}


# ---- searches -------------------------------------------------------------------------------------------------------

Search = Callable[[Lookups, Constraint, int, int], None]  # asks until it is done or its budget spent; seed, budget


def random_search(lookups: Lookups, constraint: Constraint, seed: int, budget: int) -> None:
    """The baseline."""
    problem = Problem((constraint,), "digits", Path("unused"), seed)
    for arch in draw(problem, budget, np.random.default_rng(seed)).archs:
        lookups.evaluate(arch)


@dataclass(frozen=True)
class SlowFast:
    """RelativeNAS' populations, one after the other. The paper: one of 20 vectors, 50 generations."""

    size: int
    renewal: bool = False
    generations: int = 50
    populations: int = 50

    def __call__(self, lookups: Lookups, constraint: Constraint, seed: int, budget: int) -> None:
        for i in range(self.populations):
            explore(
                lookups.space,
                lambda arch: -lookups.evaluate(arch),
                (constraint,),
                size=self.size,
                generations=self.generations,
                seed=1000 * seed + i,
                renewal=self.renewal,
            )


@dataclass(frozen=True)
class QLearning:
    """IRLAS' learner with the latency filter. The paper: alpha 0.01, 64 samples, 64 replays, BlockQNN's schedule."""

    alpha: float = 0.1
    samples: int = 8
    replays: int = 256
    schedule: str = SCHEDULE
    hopeful: bool = False
    foresight: int = 1
    iterations: int = 2000  # where the look-ups are not spent before

    def __call__(self, lookups: Lookups, constraint: Constraint, seed: int, budget: int) -> None:
        hopeful, numbers = self.hopeful, (self.samples, self.replays)
        initial = 0.0 if hopeful else 0.5
        rates = Rates(
            self.alpha, 1.0, initial, *numbers, shape_reward=not hopeful, hopeful=hopeful, foresight=self.foresight
        )
        learner = Learner(Process.of(lookups.space), rates, seed=seed)
        exploration = epsilons(self.schedule, budget + 1)

        def rewards(new: Sequence[Trajectory]) -> list[float]:
            kept = violations((constraint,), np.array(new, np.int64)) <= TOLERANCE
            return [lookups.evaluate(arch) if keeps else 0.0 for arch, keeps in zip(new, kept, strict=True)]

        def choose(drawn: Sequence[Trajectory]) -> list[Trajectory]:
            known = {arch: reward for arch, reward in learner.rewards.items() if reward > 0}
            asked = {lookups.space.canonical(arch) for arch in known}
            kept = violations((constraint,), np.array(drawn, np.int64)) <= TOLERANCE
            spelled = {lookups.space.canonical(arch): arch for arch, keeps in zip(drawn, kept, strict=True) if keeps}
            new = [arch for network, arch in spelled.items() if network not in asked]
            losses = {arch: -reward for arch, reward in known.items()}
            order = promising(losses, new, figures_of(lookups.space))
            return [new[i] for i in order[: self.samples]] or list(drawn[: self.samples])

        for i in range(self.iterations):
            learner.iterate(i, exploration[lookups.spent], rewards, choose)


def renewed(size: int) -> SlowFast:
    """One row of populations, which know of each other."""
    return SlowFast(size, renewal=True, generations=2500, populations=1)


FALLING = "0.5:1,0.45:1,0.4:1,0.35:1,0.3:1,0.25:1,0.2:1,0.15:1,0.1:1"
PAPER = QLearning(alpha=0.01, samples=64, replays=64)
SEARCHES: dict[str, Search] = {
    "random": random_search,
    "relativenas": SlowFast(12),
    "relativenas+renewal": renewed(4),
    "irlas": PAPER,
    "irlas+hopeful": QLearning(replays=0, schedule=FALLING, hopeful=True),
    "irlas+foresight": QLearning(replays=0, schedule="0.5:1", hopeful=True, foresight=256),
}
CHOICES: dict[str, Search] = {  # what SEARCHES was chosen from, by the worst ratio to random search over the limits
    "random": random_search,
    **{f"relativenas {n}": SlowFast(n) for n in (6, 8, 10, 12, 14, 20, 30)},
    **{f"relativenas+renewal {n}": renewed(n) for n in (4, 6, 8, 12)},
    "irlas, the paper's": PAPER,
    **{f"irlas alpha {a} replays {n}": QLearning(a, replays=n) for a in (0.05, 0.1, 0.3) for n in (64, 256)},
    **{
        f"irlas+hopeful {name}": QLearning(replays=0, schedule=text, hopeful=True)
        for name, text in {"0.5 to 0.1": FALLING, "BlockQNN": SCHEDULE, "0.2": "0.2:1", "0.3": "0.3:1"}.items()
    },
    **{
        f"irlas+foresight {n}, {name}": QLearning(replays=0, schedule=text, hopeful=True, foresight=n)
        for n in (16, 64, 256)
        for name, text in {"0.5 to 0.1": FALLING, "0.5": "0.5:1", "0.3": "0.3:1"}.items()
    },
}


# ---- the study ------------------------------------------------------------------------------------------------------


def run(
    cells: Cells, search: Search, knowledge: Knowledge, limit_ms: float, seed: int, budget: int = LOOKUPS
) -> dict[str, object]:
    """One search's answer, judged by the truth."""
    lookups = Lookups(cells.judge or cells.accuracy, cells.space, budget=budget)
    with contextlib.suppress(BudgetSpentError):
        search(lookups, Constraint(cells.oracle(knowledge.asked), limit_ms), seed, budget)
    most_ms = limit_ms * (1 + TOLERANCE)
    best = float(cells.accuracies[cells.networks[cells.latency_ms[cells.networks] <= most_ms]].max())
    at = answer(cells, lookups, knowledge, most_ms)
    accuracy, latency_ms = float(cells.accuracies[at]), float(cells.latency_ms[at])
    return {
        "seed": seed,
        "arch": cells.space.format_arch(cells.archs[at].tolist()),
        "accuracy_percent": 100 * accuracy,
        "latency_ms": latency_ms,
        "limit_ms": limit_ms,
        "over_percent": 100 * (latency_ms / limit_ms - 1),
        "regret": 100 * (best - accuracy),
        "lookups": lookups.spent,
    }


def answer(cells: Cells, lookups: Lookups, knowledge: Knowledge, most_ms: float) -> int:
    """Index of the best network looked up that surely keeps the limit, or was measured to, best first. Raises
    UsageError where there is none."""
    left = knowledge.finalists
    for arch in sorted(lookups.values, key=lookups.values.__getitem__, reverse=True):
        at = int(np.ravel_multi_index(arch, SHAPE))
        if knowledge.surely[at] <= most_ms:
            return at
        if left and knowledge.asked[at] <= most_ms:
            left -= 1
            if cells.latency_ms[at] <= most_ms:
                return at
    raise UsageError(f"of {lookups.spent} networks looked up none is known to keep {most_ms:.4g} ms")


def study(
    cells: Cells, batch: int, searches: dict[str, Search], seeds: Sequence[int], oracle: str, budget: int = LOOKUPS
) -> Iterator[dict[str, object]]:
    """One line per limit, seed and search."""
    for seed in seeds:
        knowledge = Knowledge.of(cells, oracle, seed)
        for percentile in PERCENTILES:
            limit_ms = float(np.percentile(cells.latency_ms[cells.networks], percentile))
            about = {"batch": batch, "oracle": oracle, "percentile": percentile}
            for name, search in searches.items():
                found = run(cells, search, knowledge, limit_ms, seed, budget)
                yield {**about, "search": name, **found}


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Per limit and search: shares and the quartiles of the regret, which beside random search's median."""
    groups = table.groupby(["batch", "oracle", "percentile", "search"], sort=False)
    found = groups["regret"].quantile([0.25, 0.5, 0.75]).unstack()
    found.columns = ["q1", "median", "q3"]
    random = found.xs("random", level="search")["median"]
    found["of random"] = found["median"] / random.reindex(found.index.droplevel("search")).to_numpy()
    found["feasible %"] = 100 * groups["over_percent"].apply(lambda over: (over <= 100 * TOLERANCE).mean())
    found["> 5 % over, %"] = 100 * groups["over_percent"].apply(lambda over: (over > 5).mean())
    found["over, max %"] = groups["over_percent"].max()
    found["look-ups"] = groups["lookups"].mean()
    found.insert(0, "limit ms", groups["limit_ms"].first())
    return found


def draw_picture(table: pd.DataFrame, path: Path) -> None:
    """Regrets as boxes, a row of panels per batch, a column per oracle."""
    from matplotlib.figure import Figure

    names, batches, oracles = (list(dict.fromkeys(table[column])) for column in ("search", "batch", "oracle"))
    figure = Figure(figsize=(5 * len(oracles), 3.4 * len(batches)), layout="constrained")
    axes = figure.subplots(len(batches), len(oracles), squeeze=False, sharey="row").ravel()
    for axis, (batch, oracle) in zip(axes, product(batches, oracles), strict=True):
        part = table[(table["batch"] == batch) & (table["oracle"] == oracle)]
        for i, name in enumerate(names):
            regrets = [part[(part["search"] == name) & (part["percentile"] == p)]["regret"] for p in PERCENTILES]
            places = np.arange(len(PERCENTILES)) + (i - (len(names) - 1) / 2) * 0.16
            axis.boxplot(
                regrets,
                positions=places,
                widths=0.13,
                whis=(0, 100),
                patch_artist=True,
                boxprops={"facecolor": f"C{i}", "alpha": 0.5},
                medianprops={"color": "black"},
            )
            axis.plot([], [], color=f"C{i}", linewidth=6, alpha=0.5, label=name)
        limits = [part[part["percentile"] == p]["limit_ms"].iloc[0] for p in PERCENTILES]
        texts = [f"{p}th percentile\n{ms:.2f} ms" for p, ms in zip(PERCENTILES, limits, strict=True)]
        axis.set_xticks(np.arange(len(PERCENTILES)), texts)
        axis.set_title(f"GTX 1080 Ti, batch {batch}\n{TITLES[oracle]}", fontsize="medium")
        axis.grid(axis="y", alpha=0.3)
    for axis in axes[:: len(oracles)]:
        axis.set_ylabel("regret, points of accuracy")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 256], choices=[1, 256])
    parser.add_argument("--oracle", nargs="+", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--lookups", type=int, default=LOOKUPS)
    parser.add_argument("--judge", help="column of the accuracies that are looked up; else those that answers have")
    parser.add_argument("--searches", nargs="+", choices=list(SEARCHES), help="beside random; else all of them")
    parser.add_argument("--tune", action="store_true", help="CHOICES on CIFAR-10, with other seeds and true latencies")
    parser.add_argument("--out", type=Path, help="PREFIX of the figures: PREFIX.parquet, PREFIX.png")
    options = parser.parse_args()

    accuracy, searches, seeds = "c100_test_200ep", SEARCHES, range(options.seeds)
    if options.tune:
        accuracy, searches, seeds = "c10_test_200ep", CHOICES, range(100, 100 + options.seeds)
        options.oracle = ["true"]
    if options.searches:
        searches = {name: searches[name] for name in ("random", *options.searches)}
    lines: list[dict[str, object]] = []
    for batch in options.batch:
        cells = Cells.read(options.data / "nb201_search.parquet", accuracy, batch, options.judge)
        for oracle in options.oracle:
            lines += study(cells, batch, searches, seeds, oracle, options.lookups)
    table = pd.DataFrame(lines)
    found = summary(table)
    print("$ python", " ".join(sys.argv))
    print(found.to_string(float_format="{:.3f}".format))
    beside = found["of random"].groupby(["oracle", "search"], sort=False).agg(["mean", "max"])
    print(
        "\nmedian regret beside random search's, over the limits:",
        beside.to_string(float_format="{:.2f}".format),
        sep="\n",
    )
    if options.out:
        table.to_parquet(options.out.with_suffix(".parquet"), index=False)
        draw_picture(table, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
