"""InstaNAS: an architecture for every image, from one weight-shared meta-graph and a controller, under a budget.

Cheng, Lin, Juan, Chen, Ho, Sun: InstaNAS: Instance-aware Neural Architecture Search, AAAI 2020; released code
AnjieCheng/InstaNAS. *Pretraining*: the meta-graph learns with modules dropped at random. *Joint search*: in turns the
controller learns by policy gradient which modules an image needs (reward: the policy's latency in a window that moves
down, if the answer is right; baseline: the reward of the MAP policy), and the meta-graph learns under the controller's
policies, shuffled over the batch. *Fine-tuning*: the meta-graph under the MAP policies, the controller frozen.

Differs from the paper and its released code:

* There is a target. The window ends with its middle at `aim` of the way from the fastest network to the target, and
  rests there; theirs ends at half of MobileNet-v2's latency whatever is wanted (``window=paper``). The *mean* over
  held-out images keeps the target, and all constraints at once, by prices where the MAP policies alone do not
  (``instanas_policies``). ``SearchResult.arch`` is the most frequent network that keeps it by itself too.
* Exploration is mended: alpha goes from 0.8 to 0.98, the entropy is a Bernoulli's. Theirs (``exploration=original``)
  samples each module with probability 0.2 at least, which ends above the window, and one side of the entropy.
* Stem and head count, the controller does not, as in theirs: ``latbench bench DIR/controller.onnx`` says what it takes.
* A latency is that of a subset of modules as the table has it; theirs adds up modules (``latency=modules``).
* Variants are told apart on images held out from training; theirs looks at the test set. Their batch norms are
  calibrated under MAP policies before they are compared.
* [E] Where a layer does not repay a choice per image, all images may get one subset there: `trials` such variants of
  the best one are compared by their loss before it is fine-tuned. With few images the controller's reward is mostly
  latency, and some single networks are more accurate than what it chooses; then that is the answer.
* Shorter by default: 20 + 41 + 10 epochs, theirs 164 + 501 + 300, of batches 64, 32 and 64 (theirs 256), at rates ten
  times theirs: at theirs so few steps leave the meta-graph untrained (digits: 48 % right, at these 95 to 98 %).
* Pretraining drops modules as the search does, with module 4 in a first layer that loses all; theirs gives zeros.
* One normalisation of colours. The meta-graph's weights start as torch has them. Every draw is seeded.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from latbench.errors import UsageError
from searchers.base import Problem, Reporter, Scalar, SearchResult
from searchers.data import LARGE, Batch, Batches, Splits, eval_batches, train_batches
from searchers.derive import module_of, publish
from searchers.instanas_controller import N_MODULES, Controller, explore, linear, policy_loss, reward
from searchers.instanas_graph import MetaGraph, Routed
from searchers.instanas_policies import Costs, Route
from searchers.instanas_variants import (
    Exam,
    Examiner,
    Variant,
    best,
    examine,
    notes_of,
    save_weights,
    snapshot,
    snapshot_epochs,
    write_beside,
)
from searchers.options import settings_of
from searchers.train import Loop, Position, cosine
from searchers.world import Update, World

PRETRAINING = ("pretrain", "dropout", "momentum", "weight_decay", "cutout")  # what options of pretraining start with
History = tuple[Mapping[str, Scalar], ...]


@dataclass(frozen=True)
class InstaNAS:
    """Options. The score of a result is the accuracy on held-out images, each under its own policy, fine-tuned.

    Raises UsageError where they contradict each other.
    """

    epochs: int = 40  # N of the joint search, which has N + 1, each a pass for the controller and one for the graph
    batch_size: int = 32  # of all processes
    controller_lr: float = 5e-4  # of Adam
    lr_decay: float = 0.1  # of the controller's rate, every
    lr_step: int = 100  # epochs
    net_lr: float = 5e-3  # of plain SGD; theirs 5e-4, on ImageNet 0.01
    interleaved: bool = False  # both in every batch, instead of passes in turn
    reward_right: float = 30.0  # w+
    reward_wrong: float = 0.0  # w-
    gamma: float = 1.0  # of a reward's latency term
    exploration: Literal["mended", "original"] = "mended"
    alpha: float = 0.8  # of exploration, at the start
    alpha_end: float = 0.98  # at the end, where it is mended
    entropy_weight: float = 0.8
    window: Literal["target", "paper", "static"] = "target"
    window_start: float = 0.7  # upper bound, of the whole meta-graph's latency
    window_end: float = 0.5  # of MobileNet-v2's, in the paper's window
    aim: float = 0.95  # where the last window's middle is between the fastest network and the target
    rest: float = 0.2  # of the epochs, at the end, in which that window rests
    latency: Literal["subsets", "modules"] = "subsets"  # what rewards read: measured sets of modules, or their sums
    cutout: float = 0.5  # side of the square that is cut out of training images below 96 pixels; 0: none
    variants: int = 5  # snapshots along the search
    trials: int = 0  # [E] of the best one, variants with one subset for all images in some layers; 50 for few images
    pretrain_epochs: int = 20
    pretrain_batch_size: int = 64
    pretrain_lr: float = 0.1  # theirs 0.01; a tenth from half of the epochs on, a hundredth from three quarters
    pretrain_keep: float = 0.5  # share of modules that are kept in the last epoch; all in the first half
    dropout: float | None = None  # before the classifier while pretraining; None: 0.5 in the layout imagenet, else none
    momentum: float = 0.9  # Nesterov's, of pretraining and fine-tuning
    weight_decay: float = 1e-4  # of pretraining
    finetune_epochs: int = 10
    finetune_batch_size: int = 64
    finetune_lr: float = 0.01  # theirs 1e-3; falls to 0 along a cosine
    finetune_weight_decay: float = 4e-5

    name: ClassVar[str] = "instanas"

    def __post_init__(self) -> None:
        sizes = (self.batch_size, self.pretrain_batch_size, self.finetune_batch_size)
        if (
            min(self.epochs, self.variants, self.lr_step) < 1
            or min(self.pretrain_epochs, self.finetune_epochs, self.trials) < 0
        ):
            raise UsageError(
                "instanas: epochs, variants and lr_step must be at least 1, other epochs and trials at least 0"
            )
        if min(sizes) < 2 or min(self.controller_lr, self.net_lr, self.pretrain_lr, self.finetune_lr) <= 0:
            raise UsageError("instanas: batches hold at least 2 images, and rates are above zero")
        if not (0.5 < self.alpha <= 1 and 0.5 < self.alpha_end <= 1):
            raise UsageError("instanas: alpha lies above 0.5, where samples would say nothing, and not above 1")
        if not (0 < self.aim <= 1 and 0 <= self.rest < 1 and 0 <= self.cutout < 1 and 0 < self.pretrain_keep <= 1):
            raise UsageError("instanas: aim and pretrain_keep lie in (0, 1], rest and cutout in [0, 1)")

    # -- schedules; epochs count from 0

    def keep(self, epoch: int) -> float:
        """Share of modules kept in an epoch of pretraining."""
        half = self.pretrain_epochs // 2
        return linear(1.0, self.pretrain_keep, min(1.0, max(0, epoch + 1 - half) / max(1, half)))

    def pretrain_rate(self, epoch: int) -> float:
        """Of the meta-graph's weights."""
        drops = (2 * epoch >= self.pretrain_epochs) + (4 * epoch >= 3 * self.pretrain_epochs)
        return float(self.pretrain_lr * 0.1**drops)

    def alpha_at(self, epoch: int) -> float:
        """Of exploration in an epoch of the search."""
        return self.alpha if self.exploration == "original" else linear(self.alpha, self.alpha_end, epoch / self.epochs)

    # -- the search

    def search(self, problem: Problem, *, reporter: Reporter | None = None) -> SearchResult:
        """As ``Searcher.search``. Once the joint search is finished another target is answered by other prices, and
        fine-tuning for them; the controller is the one that learned for the first."""
        problem = problem.summed(self.name)
        costs = Costs.of(problem, modular=self.latency == "modules")
        run = _Run(self, problem, costs, World.here())
        history = run.pretrain(reporter) + run.joint(reporter)
        variants = run.variants()
        chosen = run.fixing(best(variants))
        history += run.finetune(chosen, reporter)
        held_out, test = run.exam("held_out", chosen.prices), run.exam("test", chosen.prices)
        arch = costs.representative(held_out.policies)
        notes = notes_of(costs, chosen, held_out, test) | {"variants": [variant.row(variants) for variant in variants]}
        if run.world.leads:
            write_beside(notes["variants"], run.controller, run.graph, chosen, held_out, costs)
        module = module_of(problem.space.network(arch), run.graph.weights(problem.space.network(arch)))
        return publish(
            problem, self, module, run.world, arch=arch, score=held_out.accuracy, history=history, notes=notes
        )


class _Run:
    """One search while it trains."""

    def __init__(self, options: InstaNAS, problem: Problem, costs: Costs, world: World) -> None:
        self.options, self.problem, self.costs, self.world = options, problem, costs, world
        self.alone = World(world.device)  # what is evaluated, each process evaluates all of
        self.splits = Splits.of(problem, costs.space.num_classes)
        torch.manual_seed(problem.seed)
        self.controller, self.graph = world.place(Controller(costs.space)), world.place(MetaGraph(costs.space))
        calibration = train_batches(problem, self.splits, self.alone, options.batch_size)
        held_out = eval_batches(problem, self.splits, self.alone, "held_out")
        self.examiner = Examiner(self.controller, self.graph, costs, calibration, held_out, self.alone)
        self.wrapped_controller = world.wrap(self.controller)
        self.wrapped_graph = world.wrap(self.graph, unused=True)
        self.windows = costs.windows(
            options.epochs,
            kind=options.window,
            start=options.window_start,
            end=options.window_end,
            aim=options.aim,
            rest=options.rest,
        )

    # -- stage I

    def pretrain(self, reporter: Reporter | None) -> History:
        """The meta-graph alone, modules dropped at random in the second half."""
        options = self.options
        if not options.pretrain_epochs:
            return ()
        update = self._sgd(options.pretrain_lr, options.weight_decay)
        loop = self._loop("pretrain", {"graph": self.graph, "update": update}, options.pretrain_epochs, reporter)
        loop.resume()
        dropout = 0.5 if self.costs.space.layout == "imagenet" else 0.0
        self.graph.dropout.p = dropout if options.dropout is None else options.dropout

        def step(batch: Batch, at: Position) -> dict[str, float]:
            drawn = torch.rand(len(batch.labels), len(self.costs.space.layers), N_MODULES)
            loss = self._learn(batch, drawn < options.keep(at.epoch))
            update.backward(loss)
            update.step(options.pretrain_rate(at.epoch))
            return {"loss": float(loss.detach())}

        loop.run(self._batches(options.pretrain_batch_size), step)
        self.graph.dropout.p = 0.0
        return _told("pretrain", loop)

    # -- stage II

    def joint(self, reporter: Reporter | None) -> History:
        """Controller and meta-graph in turns, a pass each; snapshots along the way."""
        options = self.options
        adam = torch.optim.Adam(self.controller.parameters(), lr=options.controller_lr)
        plain = torch.optim.SGD(self.graph.parameters(), lr=options.net_lr)
        self.controller_update, self.graph_update = Update(adam, self.world), Update(plain, self.world)
        parts = {
            "controller": self.controller,
            "graph": self.graph,
            "controller_update": self.controller_update,
            "graph_update": self.graph_update,
        }
        passes = 1 if options.interleaved else 2
        loop = self._loop("search", parts, passes * (options.epochs + 1), reporter, constraints=True)
        loop.resume(free=["constraints"])

        def step(batch: Batch, at: Position) -> dict[str, float]:
            epoch, second = divmod(at.epoch, passes)
            figures = {} if second else self.controller_step(batch, epoch)
            return figures | (self.graph_step(batch, epoch) if second or options.interleaved else {})

        def end_epoch(passed: int) -> dict[str, float]:
            epoch, second = divmod(passed, passes)
            if second == passes - 1 and epoch in snapshot_epochs(options.variants, options.epochs) and self.world.leads:
                save_weights(snapshot(self.problem.out, epoch), self.controller, self.graph, torch.zeros(0))
            window = self.windows[epoch]
            bounds = {"window_lower": window.lower, "window_upper": window.upper}
            return {"search_epoch": epoch, "alpha": options.alpha_at(epoch), **bounds}

        loop.run(self._batches(options.batch_size), step, end_epoch)
        self.world.wait()
        return _told("search", loop)

    def controller_step(self, batch: Batch, epoch: int) -> dict[str, float]:
        """Section 2.1 of the released code: self-critical policy gradient; the meta-graph only answers."""
        options, window = self.options, self.windows[epoch]
        self.controller.train()
        self.graph.eval()
        with self.world.autocast():
            probs: Tensor = self.wrapped_controller(batch.images)
        alpha = options.alpha_at(epoch)
        likeliest = probs.detach() >= 0.5
        sampled = torch.bernoulli(explore(probs.detach(), alpha)).bool()
        both = torch.cat([likeliest, sampled])
        with torch.no_grad(), self.world.autocast():
            logits = self.graph(torch.cat([batch.images, batch.images]), both)
        right, loads = logits.argmax(-1) == batch.labels.repeat(2), self.costs.load(both)
        weights = {"right": options.reward_right, "wrong": options.reward_wrong, "gamma": options.gamma}
        rewards = reward(loads, right, window, **weights).view(2, -1)  # of MAP policies, of samples
        advantage, one_sided = rewards[1] - rewards[0], options.exploration == "original"
        loss, entropy = policy_loss(
            probs, sampled, advantage, alpha=alpha, entropy_weight=options.entropy_weight, one_sided=one_sided
        )
        self.controller_update.backward(_finite(loss))
        self.controller_update.step(options.controller_lr * options.lr_decay ** (epoch // options.lr_step))
        return {
            "loss_controller": float(loss.detach()),
            "score_map": float(rewards[0].mean()),
            "score_sampled": float(rewards[1].mean()),
            "accuracy_map": float(right[: len(probs)].float().mean()),
            "predicted_map": float(loads[: len(probs)].mean()),  # shares of the budget
            "predicted_explored": float(self.costs.expected_load(explore(probs.detach(), alpha))),
            "entropy": float(entropy.detach()),
        }

    def graph_step(self, batch: Batch, epoch: int) -> dict[str, float]:
        """Section 2.2: each image under a policy drawn for another one, so that modules do not specialise early."""
        self.controller.eval()
        with torch.no_grad(), self.world.autocast():
            probs = self.controller(batch.images)
        sampled = torch.bernoulli(explore(probs, self.options.alpha_at(epoch))).bool()
        loss = self._learn(batch, sampled[torch.randperm(len(sampled), device=sampled.device)])
        self.graph_update.backward(loss)
        self.graph_update.step()
        return {"loss_graph": float(loss.detach())}

    def variants(self) -> list[Variant]:
        """Every snapshot, examined."""
        epochs = snapshot_epochs(self.options.variants, self.options.epochs)
        return [self.examiner.variant(epoch) for epoch in epochs]

    def fixing(self, chosen: Variant) -> Variant:
        """The best of it and of as many trials as were asked for."""
        return self.examiner.fixing(chosen, self.options.trials, np.random.default_rng((self.problem.seed, 0xF1)))

    # -- stage III

    def finetune(self, chosen: Variant, reporter: Reporter | None) -> History:
        """The chosen snapshot's meta-graph under the policies that keep the budgets, the controller frozen."""
        options = self.options
        self.examiner.restore(chosen)
        route = Route(self.controller, chosen.prices, self.costs)
        if not options.finetune_epochs:
            return ()
        update = self._sgd(options.finetune_lr, options.finetune_weight_decay)
        which = zlib.crc32(chosen.prices.numpy().tobytes(), chosen.epoch)
        parts = {"graph": self.graph, "update": update}
        loop = self._loop(
            "finetune", parts, options.finetune_epochs, reporter, suffix=f"-{which:08x}", constraints=True
        )
        loop.resume()

        def step(batch: Batch, at: Position) -> dict[str, float]:
            loss = self._learn(batch, route(batch.images))
            update.backward(loss)
            update.step(cosine(options.finetune_lr, at))
            return {"loss": float(loss.detach())}

        loop.run(self._batches(options.finetune_batch_size), step)
        return _told("finetune", loop)

    def exam(self, part: Literal["test", "held_out"], prices: Tensor) -> Exam:
        """The present weights at these prices."""
        images = eval_batches(self.problem, self.splits, self.alone, part)
        return examine(Routed(self.graph, Route(self.controller, prices, self.costs)), images, self.alone)

    # -- what stages share

    def _learn(self, batch: Batch, policies: Tensor) -> Tensor:
        """The loss of the meta-graph in training mode."""
        self.graph.train()
        with self.world.autocast():
            logits = self.wrapped_graph(batch.images, policies)
        return _finite(functional.cross_entropy(logits.float(), batch.labels))

    def _sgd(self, lr: float, weight_decay: float) -> Update:
        momentum = self.options.momentum
        parameters = self.graph.parameters()
        sgd = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0)
        return Update(sgd, self.world)

    def _loop(
        self,
        stage: str,
        parts: Mapping[str, Any],
        epochs: int,
        reporter: Reporter | None,
        *,
        suffix: str = "",
        constraints: bool = False,
    ) -> Loop:
        """Whose checkpoint depends on the options of its stage and of those before, and not on its own length."""
        settings = settings_of(self.options)
        if stage == "pretrain":
            settings = {name: value for name, value in settings.items() if name.startswith(PRETRAINING)}
        if stage == "search":
            settings = {name: value for name, value in settings.items() if not name.startswith(("finetune", "trials"))}
        own = {"search": "epochs"}.get(stage, f"{stage}_epochs")
        return Loop(
            self.problem.out,
            stage + suffix,
            parts,
            identity=self.problem.identity({k: v for k, v in settings.items() if k != own}, constraints=constraints),
            epochs=epochs,
            seed=self.problem.seed,
            world=self.world,
            reporter=reporter,
        )

    def _batches(self, size: int) -> Batches:
        """Of training images, augmented."""
        batches = train_batches(self.problem, self.splits, self.world, size)
        side = self.options.cutout
        if not side or self.problem.space.resolution >= LARGE:
            return batches
        cut = v2.RandomErasing(p=1.0, scale=(side**2, side**2), ratio=(1.0, 1.0))
        return replace(batches, transform=v2.Compose([batches.transform, cut]))


def _finite(loss: Tensor) -> Tensor:
    if not torch.isfinite(loss):
        raise UsageError("instanas: the loss is no longer finite; search again with smaller rates (--set net_lr=1e-4)")
    return loss


def _told(stage: str, loop: Loop) -> History:
    return tuple({"stage": stage, **row} for row in loop.history)
