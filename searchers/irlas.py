"""IRLAS: Q-learning over a block's layers, drawn towards the wiring of an expert's network.

Guo, Zhong, Wu, Lin, Yan: IRLAS: Inverse Reinforcement Learning for Architecture Search, CVPR 2019. The mirror stimuli
function (``mirror``) scores how much a block is wired like ResNeXt's; blocks are sampled, trained for a few epochs in a
small stack, and their accuracy, cost and score are what a tabular Q-learning (``qlearning``, from Zhong et al., CVPR
2018) learns from. The best ones are trained in the stack that is deployed.

The search code was never published. Differs from what is known of it:

* Latency constrains the search; theirs is measured afterwards. "filter": a block that breaks a budget earns 0, costs no
  training, and is remembered, so that the search learns to avoid it. "penalty": its reward falls with the logarithm of
  the excess, as with density. "none": the search is theirs. In all of them only blocks that keep every budget are
  chosen. Budgets are asked of the deployed network, not of the proxy.
* The mirror score is scaled (expert 1, random blocks 0), spread over the steps that earn it, and added with `balance`.
* FLOPs are those of one block at `flops_width` channels and `flops_resolution` pixels, in millions, at least 1: a block
  without convolutions has none, and their logarithm would be the best there is.
* Proxies that are no accuracies (synflow, naswot) are mapped to (0, 1) by the spread over random blocks.
* Where even small blocks break a budget the search ends before it begins. No exact fastest network exists in a space
  that does not factor: all blocks of one and two layers are asked, then `scouts` sampled ones.
* The chosen blocks are trained without cutout, which our data have not.
* [E] `hopeful` values and `foresight` (``qlearning``) serve searches of hundreds of blocks; the defaults are the
  papers' mean, and every block that is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar, Literal

import numpy as np
from torch import nn

from latbench.errors import InfeasibleTargetError, UsageError
from latbench.oracle.base import Constraint
from latbench.spaces.base import Arch
from latbench.spaces.nsc import IRLASSpace, density, format_codes
from searchers import mirror
from searchers.base import TOLERANCE, Evaluator, Problem, Reporter, SearchResult, infeasible
from searchers.candidates import OnFleet
from searchers.data import Splits
from searchers.derive import Recipe, publish, train_network
from searchers.early_stop import EarlyStop, ShortTraining, Standardised
from searchers.evaluators import HeldOut, Lookups, open_evaluator
from searchers.irlas_blocks import BlockSearch, bounds_of
from searchers.options import settings_of
from searchers.qlearning import SCHEDULE, Floats, Rates, epsilons
from searchers.world import World

STATE, LOOKUPS, FINALISTS = "search.npz", "lookups.json", "finalists"  # in a problem's folder
FINAL = ("finalists", "final_epochs", "final_batch_size", "final_lr", "final_weight_decay")  # the search knows not of


@dataclass(frozen=True)
class IRLAS:
    """Options. The score of a result is its reward as a fraction plus `balance` times its mirror score.

    `experts`: published names of the space, or codes, ";" between them. `iterations` shrinks or stretches `schedule`.
    Defaults are BlockQNN's, 11,392 trainings less those of blocks seen twice. Raises UsageError.
    """

    experts: str = "resnext"
    features: Literal["indexed", "fields"] = "indexed"
    irl: Literal["max_margin", "projection"] = "max_margin"
    mirror_gamma: float = 0.9
    tolerance: float = 1e-3  # of max_margin
    irl_epsilon: float = 0.05  # of projection
    balance: float = 0.2  # lambda: of the mirror score, in units of accuracy as a fraction; 0 is BlockQNN
    flops_weight: float = 1.0  # mu: percent of accuracy per e-fold
    flops_width: int = 32
    flops_resolution: int = 32
    density_weight: float = 8.0  # rho
    latency_mode: Literal["filter", "penalty", "none"] = "filter"
    latency_weight: float = 8.0  # nu, of "penalty"
    scouts: int = 256
    schedule: str = SCHEDULE
    iterations: int | None = None
    samples: int = 64  # blocks per iteration
    replays: int = 64
    alpha: float = 0.01
    discount: float = 1.0
    initial: float = 0.5
    shape_reward: bool = True
    hopeful: bool = False  # [E] values are the best that ever followed; for searches of hundreds of blocks (qlearning)
    foresight: int = 1  # [E] blocks drawn for each that is asked for: the most promising of those within the budgets
    evaluator: str = "train"  # or [E] train:EPOCHS in the deployed stack, synflow, naswot, table:FILE
    proxy: Literal["cifar", "space"] = "cifar"  # the stack that blocks are judged in: BlockQNN's, or the deployed one
    proxy_resolution: int = 32  # of "cifar"
    held_out: float = 0.1  # of the training images, to judge by; one epoch's accuracy is told apart by more
    epochs: int = 12  # of a block's training
    batch_size: int = 256
    lr: float = 1e-3  # Adam
    lr_decay: float = 0.2
    decay_epochs: int = 5
    restarts: int = 3  # where the first epoch ends below chance
    restart_decay: float = 0.4  # of the rate
    finalists: int = 10  # trained in the deployed stack, the best by held-out accuracy is the answer
    final_epochs: int = 300
    final_batch_size: int = 128
    final_lr: float = 0.1
    final_weight_decay: float = 5e-4

    name: ClassVar[str] = "irlas"

    def __post_init__(self) -> None:
        counts = (self.finalists, self.final_epochs, self.flops_width, self.flops_resolution, self.proxy_resolution)
        if min(*counts, self.scouts + 1, self.final_batch_size - 1) < 1 or not self.final_lr > 0:
            raise UsageError(
                "irlas: finalists, final_epochs, widths and resolutions must be at least 1, final_batch_size 2, "
                "scouts 0, and final_lr above zero"
            )
        if min(self.balance, self.flops_weight, self.density_weight, self.latency_weight) < 0:
            raise UsageError("irlas: balance and weights must not be negative")
        if not 0 < self.held_out < 1:
            raise UsageError(f"irlas: held_out must lie between 0 and 1, got {self.held_out}")
        _ = self.rates, self.rounds, self.training

    @property
    def rates(self) -> Rates:
        """Of the Q-learning."""
        values = self.alpha, self.discount, self.initial
        return Rates(*values, self.samples, self.replays, self.shape_reward, self.hopeful, self.foresight)

    @property
    def training(self) -> ShortTraining:
        """Of a block, by the evaluator "train"."""
        steps = (self.epochs, self.batch_size, self.lr, self.lr_decay, self.decay_epochs)
        return ShortTraining(*steps, self.restarts, self.restart_decay)

    @property
    def rounds(self) -> tuple[float, ...]:
        """Of exploration, one per iteration."""
        return epsilons(self.schedule, self.iterations)

    def search(self, problem: Problem, *, reporter: Reporter | None = None) -> SearchResult:
        """As ``Searcher.search``; options of the last training may change when it goes on."""
        space = space_of(problem)
        trained = self.mirror(space)
        scout = self.scout(space, problem.constraints)
        splits = Splits.of(problem, space.num_classes, held_out=self.held_out)
        world = World.here()
        identity = self._identity(problem, world_size=world.size)
        evaluator = self._evaluator(problem) if problem.fleet is None else OnFleet(self._evaluator, problem)
        judged = self._identity(problem, world_size=world.size, constraints=False)
        lookups = Lookups(evaluator, space, path=problem.out / LOOKUPS, identity=judged)
        search = BlockSearch(
            self, space, trained, lookups.evaluate, problem.constraints, seed=problem.seed, prepare=lookups.prepare
        )
        try:
            history = search.run(problem.out / STATE, identity, reporter, leads=world.leads)
            ranked = search.ranked() or search.consider([scout])
        finally:
            lookups.flush()
        finals = [self._final(problem, splits, arch, reporter) for _, arch in ranked[: self.finalists]]
        place = max(range(len(finals)), key=lambda i: finals[i][1])
        (score, arch), (module, accuracy) = ranked[place], finals[place]
        return publish(
            problem,
            self,
            module,
            world,
            arch=arch,
            score=score,
            history=history,
            notes={
                "accuracy": accuracy,  # on the held-out images, trained in the deployed stack
                "code": format_codes(space.codes(arch)),
                "mirror": trained.score(arch),
                "margin": list(trained.margin),
                "evaluated": search.n_evaluated,
                "filtered": len(search.learner.rewards) - search.n_evaluated,
                "finalists": [
                    {"arch": list(block), "score": worth, "accuracy": reached}
                    for (worth, block), (_, reached) in zip(ranked, finals, strict=False)
                ],
            },
        )

    def mirror(self, space: IRLASSpace) -> mirror.Mirror:
        """The trained mirror stimuli function. Raises UsageError where an expert does not fit the space."""
        features = mirror.Features(space.max_index, self.mirror_gamma, self.features)
        experts = [space.parse_arch(text) for text in self.experts.split(";")]
        return mirror.train(features, experts, method=self.irl, tolerance=self.tolerance, epsilon=self.irl_epsilon)

    def scout(self, space: IRLASSpace, constraints: Sequence[Constraint]) -> Arch:
        """The small block furthest below the budgets. Raises InfeasibleTargetError, naming it, where it breaks one."""
        rng = np.random.default_rng(0)
        least: Arch = ()
        low = np.inf
        asked = (_blocks(space, 1), _blocks(space, 2), [space.sample(rng) for _ in range(self.scouts)])
        for blocks in filter(None, asked):
            share = (bounds_of(constraints, blocks) / [c.target for c in constraints]).max(axis=1)  # (N,)
            if share.min() < low:
                least, low = blocks[int(share.argmin())], float(share.min())
            if low <= 1 + TOLERANCE:
                return least
        bounds = bounds_of(constraints, [least])[0]
        worst = max(range(len(bounds)), key=lambda k: bounds[k] / constraints[k].target)
        raise InfeasibleTargetError(infeasible(constraints[worst], least, float(bounds[worst])))

    def reward(self, space: IRLASSpace, arch: Arch, accuracy: float, bounds: Floats, targets: Floats) -> float:
        """Of a block by its accuracy in [0, 1] and what its network's latencies are bounded by: a fraction."""
        codes = space.codes(arch)
        value = 100 * accuracy - self.density_weight * np.log(density(codes))
        if self.flops_weight:
            shape = (1, self.flops_width, self.flops_resolution, self.flops_resolution)
            value -= self.flops_weight * np.log(max(space.block(arch, self.flops_width, shape).macs / 1e6, 1.0))
        if self.latency_mode == "penalty":
            value -= self.latency_weight * np.log(np.maximum(bounds / targets, 1.0)).sum()
        return float(value / 100)

    def _identity(self, problem: Problem, *, world_size: int, constraints: bool = True) -> dict[str, Any]:
        options = settings_of(self, without=FINAL)
        return {**problem.identity(options, constraints=constraints), "seed": problem.seed, "processes": world_size}

    def _evaluator(self, problem: Problem) -> Evaluator:
        space = space_of(problem)
        if self.evaluator == "train":
            splits = Splits.of(problem, space.num_classes, held_out=self.held_out)
            judged = replace(
                space, stack="cifar", widths="", repeats="", resolution=self.proxy_resolution, batch=1, dtype="float32"
            )  # fmt: skip
            return EarlyStop(problem, judged if self.proxy == "cifar" else space, splits, self.training)
        found = open_evaluator(self.evaluator, problem, held_out=self.held_out)
        return found if self.evaluator.startswith(("table:", "train:")) else Standardised(found, space)

    def _final(
        self, problem: Problem, splits: Splits, arch: Arch, reporter: Reporter | None
    ) -> tuple[nn.Module, float]:
        """A block trained in the deployed stack, and its accuracy on the held-out images; resumable."""
        recipe = Recipe(
            epochs=self.final_epochs, batch_size=self.final_batch_size, lr=self.final_lr * 1024 / self.final_batch_size,
            warmup_epochs=0.0, weight_decay=self.final_weight_decay, label_smoothing=0.0, mixup=0.0,
        )  # fmt: skip
        where = problem.out / FINALISTS / "-".join(map(str, arch))
        known = replace(problem, data=HeldOut(splits), max_images=None)
        module, figures = train_network(known, arch, recipe, folder=where, reporter=reporter)
        return module, float(figures["accuracy"])


def space_of(problem: Problem) -> IRLASSpace:
    """The problem's space. Raises UsageError where its networks are not blocks in a stack."""
    if not isinstance(problem.space, IRLASSpace):
        raise UsageError(
            f"irlas searches network structure codes, not {problem.space.name}: latbench profile --space irlas"
        )
    return problem.space


def _blocks(space: IRLASSpace, n_layers: int) -> list[Arch]:
    """Every block of so many layers."""
    if n_layers >= space.max_index:
        return []
    rest = (0,) * (space.max_index - n_layers - 1)
    options = [range(len(d.options) - (i > 0)) for i, d in enumerate(space.decisions[:n_layers])]  # no terminal
    return [(*layers, len(space.decisions[n_layers].options) - 1, *rest) for layers in product(*options)]
