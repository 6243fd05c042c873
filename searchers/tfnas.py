"""TF-NAS: operations, depths and widths together, under a latency budget, by gradient.

Hu, Wu, He, Zhang, Liu, Li: TF-NAS: Rethinking Three Search Freedoms of Latency-Constrained Differentiable Neural
Architecture Search, ECCV 2020; released code AberHu/TF-NAS. *Operations*: the supernet learns along one sampled path
and a second that shares no operation with it (bi-sampling, section 3.2). *Depth*: a stage's output is the mixture of
its blocks' outputs (sink-connecting, 3.3). *Width*: after every epoch the derived network's channels are scaled until
its latency is the target (elasticity scaling, 3.4). Probabilities follow the loss on images kept out of the weights'
training, plus lambda * abs(E[latency] / target - 1), in which latency is linear in them.

Differs from the paper and its released code:

* 30 epochs, theirs 90 on 100 classes of ImageNet; the warm-up is the same share of them (theirs 10), and the
  temperature ends where theirs does. Colours are not jittered by default, theirs by 0.4.
* The result keeps the target always, and uses it: where no width brings the likeliest operations and depths to the
  target, the likeliest ones that can be brought there are derived instead (theirs stays above or below it silently).
* It is a network of the table's space: widths between two of its options, on which elasticity scaling runs as theirs
  does, end at the smaller, and what is left of the budget is filled by single options.
* Several budgets may hold at once: the latency term is of the one that is exceeded most.
* Optimisers keep their state between epochs; widening may reach every block's end; channels that were trained are
  preferred to others. `faithful` restores theirs in these three.
* Operations without a gradient rest in a step, theirs receive momentum and decay. Every draw is seeded.
* Theirs logs the accuracy of sampled paths in the last 5 epochs; here the mixture's, in every epoch.
* The found network's weights are the supernet's, batch norms calibrated; theirs are thrown away. Train it from scratch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from latbench.errors import UsageError
from searchers.base import Problem, Reporter, SearchResult
from searchers.chains import Floats, Ints
from searchers.data import Batch, Batches, Splits, eval_transform, train_batches
from searchers.derive import inherit, num_classes, publish
from searchers.options import settings_of
from searchers.tfnas_supernet import ChannelSGD, Choices, Supernet, bi_sample
from searchers.tfnas_widths import Budgets, Operations, derive, scale, settle, spare_steps
from searchers.train import Loop, Position, cosine
from searchers.world import Update, World, to_device

COOLINGS = 80  # epochs in which the published schedule cools by 0.96 each


@dataclass(frozen=True)
class TFNAS:
    """Options. The score of a result is the accuracy of its inherited weights on the held-out images.

    Raises UsageError where they contradict each other.
    """

    epochs: int = 30
    batch_size: int = 32  # of all processes
    lr: float = 0.025  # of weights, falls to 0 along a cosine
    momentum: float = 0.9
    weight_decay: float = 1e-5
    choice_lr: float = 0.01  # of operations' and depths' log-probabilities
    choice_weight_decay: float = 5e-4
    clip: float = 5.0  # of either gradient's norm
    warmup: float = 1 / 9  # of the epochs: weights only
    temperature: float = 5.0  # of the mixture, at the end of the warm-up
    cooling: float = 0.96
    latency_weight: float = 0.1  # lambda
    jitter: float = 0.0
    faithful: bool = False

    name: ClassVar[str] = "tfnas"

    def __post_init__(self) -> None:
        if self.batch_size < 2 or not 0 <= self.warmup < 1 or self.epochs <= self.n_warmup:
            raise UsageError("tfnas: batch_size must be at least 2, and an epoch must be left after the warm-up")
        if min(self.lr, self.choice_lr, self.clip, self.temperature, self.cooling) <= 0 or self.latency_weight < 0:
            raise UsageError("tfnas: rates, clip, temperature and cooling must be above zero, latency_weight not below")

    @property
    def n_warmup(self) -> int:
        """Epochs of weights only."""
        return round(self.epochs * self.warmup)

    def mixture_temperature(self, epoch: int) -> float:
        """Constant in the warm-up and the epoch after it; then falling by equal factors, theirs in 90 epochs."""
        share = max(0, epoch - self.n_warmup) / (self.epochs - self.n_warmup)
        return float(self.temperature * self.cooling ** (COOLINGS * share))

    def rate(self, at: Position) -> float:
        """Of the weights, constant in an epoch."""
        return cosine(self.lr, Position(at.epoch, 0, at.steps, at.epochs))

    def search(self, problem: Problem, *, reporter: Reporter | None = None) -> SearchResult:
        """As ``Searcher.search``. Once training is finished another target is answered by scaling and, where it must
        be, deriving anew; operations and depths are those learned for the first."""
        problem = problem.summed(self.name)
        budgets = Budgets.of(problem)
        problem.check_feasible()
        n_sites, n_ops = budgets.widest.shape
        derive(budgets, np.zeros((n_sites, n_ops)), np.zeros(n_sites))  # all budgets together, before any training
        world = World.here()
        run = _Run(self, problem, budgets, world)
        history = run.train(reporter)
        ops = run.derived()
        widths = settle(budgets, ops, run.scaled(ops))
        run.net.resize(widths, faithful=self.faithful)
        arch = budgets.arch(ops, widths)
        graph = problem.space.network(arch)
        weights = run.net.weights(graph, ops)
        module, accuracy = inherit(problem, graph, weights, run.splits, world, self.batch_size)
        return publish(
            problem,
            self,
            module,
            world,
            arch=arch,
            score=accuracy,
            history=history,
            notes={
                "accuracy": accuracy,
                "spare_steps": spare_steps(budgets, ops, widths),  # below 1: no block can be one option wider
                "operations": run.choices.alphas.exp().tolist(),  # (18, 8) probabilities
                "depths": run.choices.depth_probs().tolist(),  # (18,), each stage's in its blocks' places
            },
        )


class _Run:
    """One search while it trains."""

    def __init__(self, options: TFNAS, problem: Problem, budgets: Budgets, world: World) -> None:
        self.options, self.problem, self.budgets, self.world = options, problem, budgets, world
        torch.manual_seed(problem.seed)
        self.net = world.place(Supernet(budgets.space))
        self.choices = Choices(budgets.space).to(world.device)
        self.means = Means()
        head = budgets.space.block(budgets.space.sites[-1], ())
        assert head is not None
        self.splits = Splits.of(problem, num_classes(head))
        self.batches = train_batches(problem, self.splits, world, options.batch_size, jitter=options.jitter)
        self.held_out = Endless(held_out_batches(problem, self.splits, world, options.batch_size), world)
        self.weight_update = Update(
            ChannelSGD(
                self.net.parameters(),
                self.net.channel_masks(),
                lr=options.lr,
                momentum=options.momentum,
                weight_decay=options.weight_decay,
            ),
            world,
            clip=options.clip,
        )
        self.choice_update = Update(
            torch.optim.Adam(
                self.choices.parameters(),
                lr=options.choice_lr,
                betas=(0.5, 0.999),
                weight_decay=options.choice_weight_decay,
            ),
            world,
            clip=options.clip,
        )
        self.wrapped = world.wrap(self.net, unused=True)
        self.oracles = budgets.settled(self.net.widths())

    def train(self, reporter: Reporter | None) -> tuple[Mapping[str, Any], ...]:
        """All epochs that are left; gives the history."""
        loop = Loop(
            self.problem.out,
            "search",
            {
                "network": self.net,
                "choices": self.choices,
                "weight_update": self.weight_update,
                "choice_update": self.choice_update,
                "means": self.means,
            },
            identity=self.problem.identity(settings_of(self.options, without=["epochs"])),
            epochs=self.options.epochs,
            seed=self.problem.seed,
            world=self.world,
            reporter=reporter,
        )
        loop.resume(free=["constraints"])
        self.oracles = self.budgets.settled(self.net.widths())
        loop.run(self.batches, self.step, self.end_epoch)
        return tuple(loop.history)

    def derived(self) -> Operations:
        """The network that the probabilities stand for now."""
        log_betas = self.choices.depth_probs().log()
        return derive(self.budgets, _array(self.choices.alphas), _array(log_betas))

    def scaled(self, ops: Operations) -> Ints:
        """(L, O) widths that bring the network of these operations to its budgets."""
        widths = self.net.widths()
        return [widths, *scale(self.budgets, ops, widths, faithful=self.options.faithful)][-1]

    def step(self, batch: Batch, at: Position) -> dict[str, float]:
        """One update of the weights; after the warm-up, at every second one, one of the probabilities."""
        figures = {"loss_paths": self.weight_step(batch, at)}
        if at.epoch >= self.options.n_warmup and at.step % 2 == 0:
            position = (at.epoch - self.options.n_warmup) * -(-at.steps // 2) + at.step // 2
            self.means.add(self.choice_step(self.held_out.at(position), at.epoch))
        return figures

    def weight_step(self, batch: Batch, at: Position) -> float:
        """Section 3.2: one path while it warms up, then two."""
        # of this position alone, so that all processes take the same paths
        rng = np.random.default_rng((self.problem.seed, zlib.crc32(b"paths"), at.epoch, at.step))
        n_paths = 1 if at.epoch < self.options.n_warmup else 2
        paths = bi_sample(_array(self.choices.alphas.exp()), rng)[:n_paths]
        depths = self.choices.depth_probs().detach()
        with self.world.autocast():
            found: tuple[Tensor, ...] = self.wrapped(batch.images, paths, depths)
        losses = [functional.cross_entropy(logits.float(), batch.labels) for logits in found]
        loss = torch.stack(losses).sum()
        if not torch.isfinite(loss):
            raise UsageError("tfnas: the loss is no longer finite; search again with a smaller lr (--set lr=0.01)")
        self.weight_update.backward(loss)
        self.weight_update.step(self.options.rate(at))
        return float(loss.detach()) / len(paths)

    def choice_step(self, batch: Batch, epoch: int) -> dict[str, float]:
        """Sections 3.3 and 3.5: the mixture of all operations on held-out images, and what it is expected to cost."""
        temperature = self.options.mixture_temperature(epoch)
        weights = functional.gumbel_softmax(self.choices.alphas, tau=temperature)  # (L, O)
        self.net.requires_grad_(False)
        with self.world.autocast():
            (logits,) = self.net(batch.images, [weights], self.choices.depth_probs())
        loss = functional.cross_entropy(logits.float(), batch.labels)
        share = self.expected_share(weights)
        self.choice_update.backward(loss + self.options.latency_weight * (share - 1).abs())
        self.net.requires_grad_(True)
        self._average_gradients()
        self.choice_update.step()
        self.choices.normalise()
        hits = (logits.argmax(-1) == batch.labels).float().mean()
        return {"loss_mixture": float(loss.detach()), "accuracy_mixture": float(hits), "share": float(share.detach())}

    def expected_share(self, weights: Tensor) -> Tensor:
        """() of the budget that is used most: expected cost over target, of (L, O) weights of operations."""
        n_options = max(len(decision.options) for decision in self.budgets.space.decisions)
        probs = self.choices.probs(weights, n_options)
        limits = self.budgets.limits.tolist()
        costs = [oracle.expected_latency(probs) / limit for oracle, limit in zip(self.oracles, limits, strict=True)]
        return torch.stack(costs).max()

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """Section 3.4, and the epoch's figures."""
        row: dict[str, Any] = dict(self.means.take())
        if epoch >= self.options.n_warmup:
            ops = self.derived()
            self.net.resize(self.scaled(ops), faithful=self.options.faithful)
            self.oracles = self.budgets.settled(self.net.widths())
            cost = self.budgets.cost(ops, self.net.widths()).tolist()
            row |= {f"predicted{k}": value for k, value in enumerate(cost)}
            row |= {"temperature": self.options.mixture_temperature(epoch), "entropy": _entropy(self.choices.alphas)}
            row["operations"] = ",".join(map(str, ops))
        if self.options.faithful:
            self.weight_update.optimizer.state.clear()
            self.choice_update.optimizer.state.clear()
        return row

    def _average_gradients(self) -> None:
        for parameter in self.choices.parameters():
            if parameter.grad is not None:
                parameter.grad = self.world.gather(parameter.grad[None]).mean(0)


class Means:
    """Figures of some steps, averaged; kept in checkpoints."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.n = 0

    def add(self, figures: Mapping[str, float]) -> None:
        """One step's."""
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in figures.items()}
        self.n += 1

    def take(self) -> dict[str, float]:
        """Their means, and starts again."""
        means = {name: value / self.n for name, value in self.sums.items()}
        self.sums, self.n = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """Sums and their count."""
        return {"sums": dict(self.sums), "n": self.n}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        self.sums, self.n = dict(state["sums"]), state["n"]


class Endless:
    """Batches by their position in an unending row of epochs; in order they are read ahead."""

    def __init__(self, batches: Batches, world: World) -> None:
        self.batches, self.world = batches, world
        self.next = -1
        self.row: Iterator[Batch] = iter(())

    def at(self, position: int) -> Batch:
        """The batch of this position."""
        epoch, skip = divmod(position, len(self.batches))
        if position != self.next or skip == 0:
            self.row = to_device(self.batches.epoch(epoch, skip), self.world.device)
        self.next = position + 1
        return next(self.row)


def held_out_batches(problem: Problem, splits: Splits, world: World, batch_size: int) -> Batches:
    """The images that the probabilities learn from: shuffled, not augmented."""
    like = train_batches(problem, splits, world, batch_size)
    return Batches(
        splits.source,
        "train",
        splits.held_out,
        eval_transform(problem.space.resolution),
        max(1, min(like.batch_size, len(splits.held_out) // world.size)),
        seed=problem.seed,
        rank=world.rank,
        n_ranks=world.size,
        workers=like.workers,
    )


def _array(values: Tensor) -> Floats:
    return values.detach().double().cpu().numpy()


def _entropy(log_probs: Tensor) -> float:
    """Mean over sites, nats."""
    return float(-(log_probs.exp() * log_probs).detach().sum(-1).mean())
