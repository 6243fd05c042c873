"""IRLAS' Q-learning over one block: what is sampled, what it earns, how blocks rank; kept in a file.

``irlas`` says what a reward is and what is done with the best blocks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from latbench import archives
from latbench.errors import UsageError
from latbench.oracle.base import Constraint
from latbench.spaces.base import Arch
from latbench.spaces.nsc import IRLASSpace
from searchers import mirror, train
from searchers.base import TOLERANCE, Reporter, Scalar
from searchers.foresight import figures_of, promising
from searchers.qlearning import Floats, Learner, Process, Rates, Trajectory
from searchers.results import check_settings, write_bytes

STATE_BYTES = 1 << 28  # of a search: its values, memory and history are a few MB


class Options(Protocol):
    """What a search takes of ``IRLAS``."""

    @property
    def rates(self) -> Rates: ...

    @property
    def rounds(self) -> tuple[float, ...]:
        """Of exploration, one per iteration."""
        ...

    @property
    def samples(self) -> int:
        """Blocks per iteration."""
        ...

    @property
    def balance(self) -> float:
        """Of the mirror score."""
        ...

    @property
    def latency_mode(self) -> str: ...

    def reward(self, space: IRLASSpace, arch: Arch, accuracy: float, bounds: Floats, targets: Floats) -> float:
        """Of a block, a fraction."""
        ...


class BlockSearch:
    """The Q-learning of one run, what its blocks earned, and the ranking.

    `accuracy` judges an architecture; `prepare` is told before which ones it will be asked about.
    """

    def __init__(
        self, options: Options, space: IRLASSpace, trained: mirror.Mirror, accuracy: Callable[[Arch], float],
        constraints: Sequence[Constraint] = (), *, seed: int = 0,
        prepare: Callable[[Sequence[Arch]], None] | None = None,
    ) -> None:  # fmt: skip
        self.options, self.space, self.mirror, self.accuracy, self.prepare = options, space, trained, accuracy, prepare
        self.constraints, self.targets = constraints, np.array([c.target for c in constraints], np.float64)
        sizes = tuple(len(decision.options) for decision in space.decisions)
        final = tuple(n - 1 if i else None for i, n in enumerate(sizes))
        bonus = trained.bonus(options.balance) if options.balance else None
        self.learner = Learner(Process(sizes, final), options.rates, seed=seed, bonus=bonus)
        self.accuracies: dict[Trajectory, float] = {}  # those that were evaluated
        self.history: list[dict[str, Scalar]] = []
        self.best = -np.inf  # score so far, budgets aside

    @property
    def n_evaluated(self) -> int:
        """Distinct blocks that the evaluator saw."""
        return len(self.accuracies)

    def run(
        self, path: Path | None = None, identity: Mapping[str, Any] | None = None, reporter: Reporter | None = None,
        *, leads: bool = True,
    ) -> list[dict[str, Scalar]]:  # fmt: skip
        """The iterations that are left. State goes to `path`; raises UsageError where that is another run's.

        Budgets may differ from those of a run that is finished.
        """
        if path is not None and path.exists():
            self._load(path, identity or {})
        rounds = self.options.rounds
        saved = time.monotonic()
        while len(self.history) < len(rounds):
            i = len(self.history)
            self.history.append(self._iterate(i, rounds[i], reporter))
            done = len(self.history) == len(rounds)
            if path is not None and leads and (done or time.monotonic() - saved >= train.SAVE_EVERY_S):
                write_bytes(path, self._state(identity or {}))
                saved = time.monotonic()
            if reporter is not None and leads:
                reporter.epoch(self.history)
        return self.history

    def _iterate(self, i: int, epsilon: float, reporter: Reporter | None) -> dict[str, Scalar]:
        began, known, judged = time.monotonic(), len(self.learner.rewards), self.n_evaluated
        total = len(self.options.rounds) * self.options.samples

        def told(accuracy: float) -> None:
            if reporter is not None:
                done = i * self.options.samples + self.n_evaluated - judged
                reporter.advance(done, total, f"accuracy {accuracy:.4g}")

        sampled = self.learner.iterate(i, epsilon, lambda new: self._rewards(new, told), self._promising)
        new, evaluated = len(self.learner.rewards) - known, self.n_evaluated - judged
        row: dict[str, Scalar] = {
            "epoch": i,
            "epsilon": epsilon,
            "new": new,
            "filtered": new - evaluated,
            "reward": float(np.mean([self.learner.rewards[block] for block in sampled])),
            "mirror": float(np.mean([self.mirror.score(block) for block in sampled])),
        }
        if self.accuracies:
            row["score"] = self.best
        row["seconds"] = time.monotonic() - began
        if reporter is not None:
            reporter.advance((i + 1) * self.options.samples, total, f"reward {row['reward']:.4g}")
        return row

    def _rewards(self, blocks: Sequence[Trajectory], told: Callable[[float], None] | None = None) -> list[float]:
        archs = [self.arch(block) for block in blocks]
        bounds, targets = self._bounded(archs)
        kept = np.ones(len(archs), bool)
        if self.options.latency_mode == "filter":
            kept &= (bounds <= targets * (1 + TOLERANCE)).all(axis=1)
        if self.prepare is not None:
            self.prepare([archs[i] for i in np.flatnonzero(kept)])
        rewards = []
        for block, arch, bound, asked in zip(blocks, archs, bounds, kept, strict=True):
            if not asked:
                rewards.append(0.0)
                continue
            accuracy = self.accuracies[block] = float(self.accuracy(arch))
            rewards.append(self.options.reward(self.space, arch, accuracy, bound, targets))
            self.best = max(self.best, self._score(block, rewards[-1]))
            if told is not None:
                told(accuracy)
        return rewards

    def _bounded(self, archs: Sequence[Arch]) -> tuple[Floats, Floats]:
        """What rewards know of the budgets: (N, K) and (K,); K is 0 where they know nothing."""
        if self.options.latency_mode == "none" or not self.constraints or not archs:
            return np.empty((len(archs), 0)), np.empty(0)
        return bounds_of(self.constraints, archs), self.targets

    def _reward_again(self) -> None:
        """Evaluated blocks, by the budgets of now."""
        archs = [self.arch(block) for block in self.accuracies]
        bounds, targets = self._bounded(archs)
        for (block, accuracy), arch, bound in zip(self.accuracies.items(), archs, bounds, strict=True):
            self.learner.rewards[block] = self.options.reward(self.space, arch, accuracy, bound, targets)

    def _promising(self, drawn: Sequence[Trajectory]) -> list[Trajectory]:
        """As many as an iteration samples: of new blocks within the budgets the most promising by score, else any."""
        new = [block for block in dict.fromkeys(drawn) if block not in self.learner.rewards]
        if self.options.latency_mode != "none":
            new = self._kept(new)
        known = {self.arch(block): -self.score(block) for block in self.accuracies}
        n = self.options.rates.samples
        order = promising(known, [self.arch(block) for block in new], figures_of(self.space))
        return [new[i] for i in order[:n]] or list(drawn[:n])

    def _kept(self, blocks: list[Trajectory]) -> list[Trajectory]:
        """Those that keep all budgets."""
        if not blocks or not self.constraints:
            return blocks
        bounds = bounds_of(self.constraints, [self.arch(block) for block in blocks])
        kept = np.all(bounds <= self.targets * (1 + TOLERANCE), axis=1)
        return [blocks[i] for i in np.flatnonzero(kept)]

    def arch(self, block: Trajectory) -> Arch:
        """A trajectory as the space spells it."""
        return (*block, *(0,) * (self.space.max_index - len(block)))

    def score(self, block: Trajectory) -> float:
        """What blocks are ranked by."""
        return self._score(block, self.learner.rewards[block])

    def _score(self, block: Trajectory, reward: float) -> float:
        return reward + self.options.balance * self.mirror.score(block)

    def ranked(self) -> list[tuple[float, Arch]]:
        """Score and architecture of every evaluated block that keeps all budgets, the best first."""
        blocks = self._kept(list(self.accuracies))
        return sorted(((self.score(block), self.arch(block)) for block in blocks), key=lambda pair: -pair[0])

    def consider(self, archs: Sequence[Arch]) -> list[tuple[float, Arch]]:
        """``ranked`` after these were evaluated too; the values learn nothing from them."""
        blocks = [self.mirror.features.cut(arch) for arch in archs]
        self.learner.rewards.update(zip(blocks, self._rewards(blocks), strict=True))
        return self.ranked()

    def _state(self, identity: Mapping[str, Any]) -> bytes:
        arrays = self.learner.state()
        arrays["accuracies"] = np.array([self.accuracies.get(b, np.nan) for b in self.learner.rewards], np.float64)
        return archives.pack(json.dumps({"identity": dict(identity), "history": self.history}), arrays)

    def _load(self, path: Path, identity: Mapping[str, Any]) -> None:
        try:
            arrays = archives.unpack(path, STATE_BYTES)
            head = archives.head_of(arrays)
            found, history, accuracies = head["identity"], head["history"], arrays["accuracies"]
        except (OSError, KeyError, TypeError, ValueError) as error:
            why = " ".join(str(error).split())[:120]
            raise UsageError(f"{path} holds no search, or is damaged ({why}): remove it to start again") from None
        finished = len(history) >= len(self.options.rounds)
        if finished:  # under other budgets the same blocks are ranked anew
            found, identity = ({**told, "constraints": None} for told in (found, identity))
        check_settings(path, "searched", found, identity)
        self.learner.load(arrays)
        pairs = zip(self.learner.rewards, accuracies.tolist(), strict=True)
        self.history, self.accuracies = history, {block: value for block, value in pairs if value == value}
        if finished:
            self._reward_again()
        self.best = max(map(self.score, self.accuracies), default=-np.inf)


def bounds_of(constraints: Sequence[Constraint], archs: Sequence[Arch]) -> Floats:
    """(N, K) what each constraint compares with its target."""
    return np.stack([constraint.bounds(np.array(archs, np.int64)) for constraint in constraints], axis=1)
