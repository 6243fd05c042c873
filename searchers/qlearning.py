"""Tabular Q-learning over a row of choices, with experience replay: the search of BlockQNN and of IRLAS.

Zhong, Yan, Wu, Shao, Liu: Practical Block-wise Neural Network Architecture Generation, CVPR 2018 (BlockQNN); Guo et
al., CVPR 2019 (IRLAS), who add a bonus per step. Any space will do: ``Process.of(space)`` is one choice per decision,
and an evaluator is any function from trajectories to rewards::

    learner = Learner(Process.of(space), Rates(samples=8, replays=64))
    for i, epsilon in enumerate(epsilons(SCHEDULE, 38)):
        learner.iterate(i, epsilon, lambda new: [accuracy(arch) for arch in new])
    arch = learner.greedy()

What the papers leave open: a state is the place in the row and the last choice, not the whole prefix. A reward is
spread over its trajectory as BlockQNN does it, which gives R (1 + (L-1)/L) in all, so that longer trajectories earn up
to twice as much; `shape_reward` false pays the last step only.

Extension [E]: `hopeful`. A mean over what was replayed needs thousands of trajectories: at 300 look-ups on
NAS-Bench-201 the papers' rates do no better than chance (``benchmarks/nb201_search.py``). Choices are certain here, so
a value may as well be the best that ever followed it (Lauer, Riedmiller: An Algorithm for Distributed Reinforcement
Learning in Cooperative Multi-Agent Systems, ICML 2000), learned at once from every new trajectory. And `foresight`: of
many trajectories that the values draw, those are followed that the rewards so far promise most of (``foresight``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latbench.errors import UsageError
from latbench.spaces.base import SearchSpace

Floats = NDArray[np.float64]
Trajectory = tuple[int, ...]  # one action per step, the one that ends it included

# exploration rate: iterations. BlockQNN, table 2
SCHEDULE = "1.0:95,0.9:7,0.8:7,0.7:7,0.6:10,0.5:10,0.4:10,0.3:10,0.2:10,0.1:12"


@dataclass(frozen=True)
class Process:
    """Choices made one after another: what may be chosen depends on the step alone, nothing is random.

    `n_actions`: (T,) legal actions of each step, 0 to n - 1. `final`: (T,) the action that ends a trajectory at that
    step, None where none does; the last step always ends it. () means that all trajectories have T steps.
    """

    n_actions: tuple[int, ...]
    final: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        if not self.n_actions or min(self.n_actions) < 1 or len(self.final) not in (0, len(self.n_actions)):
            raise UsageError(f"a process needs steps with actions, and its final actions one per step, got {self}")

    @classmethod
    def of(cls, space: SearchSpace) -> Process:
        """One step per decision: its trajectories are the space's architectures."""
        return cls(tuple(len(decision.options) for decision in space.decisions))

    def ends(self, step: int, action: int) -> bool:
        """Whether nothing follows this action."""
        return step == len(self.n_actions) - 1 or (bool(self.final) and self.final[step] == action)


@dataclass(frozen=True)
class Rates:
    """How fast a ``Learner`` learns. Raises UsageError where a figure is out of range."""

    alpha: float = 0.01  # of an update
    discount: float = 1.0  # of what follows
    initial: float = 0.5  # every value at the start
    samples: int = 64  # trajectories per iteration
    replays: int = 64  # updates per iteration, drawn from all trajectories so far
    shape_reward: bool = True
    hopeful: bool = False  # values are the best returns, not means; `initial` is best set below all rewards
    foresight: int = 1  # trajectories drawn for each that is followed, where somebody chooses

    def __post_init__(self) -> None:
        if not (
            0 < self.alpha <= 1 and 0 <= self.discount <= 1 and min(self.samples, self.foresight, self.replays + 1) >= 1
        ):
            raise UsageError(
                "q-learning: alpha must be in (0, 1], discount in [0, 1], samples at least 1 and foresight as well, "
                "replays at least 0"
            )


def epsilons(schedule: str = SCHEDULE, iterations: int | None = None) -> tuple[float, ...]:
    """The exploration rate of every iteration: "1.0:95,0.1:12" -> 95 times 1.0, then 12 times 0.1.

    With `iterations` the schedule is stretched or shrunk to so many, shares kept. Raises UsageError on other text.
    """
    try:
        parts = [(float(rate), int(count)) for rate, _, count in (part.partition(":") for part in schedule.split(","))]
    except ValueError:
        parts = []
    if not parts or any(not 0 <= rate <= 1 or count < 0 for rate, count in parts) or sum(n for _, n in parts) < 1:
        raise UsageError(f"{schedule!r} is no exploration schedule: write RATE:ITERATIONS,..., such as 1.0:95,0.1:12")
    rates = [rate for rate, count in parts for _ in range(count)]
    if iterations is None:
        return tuple(rates)
    if iterations < 1:
        raise UsageError(f"a search needs at least 1 iteration, got {iterations}")
    return tuple(rates[(2 * i + 1) * len(rates) // (2 * iterations)] for i in range(iterations))


class Learner:
    """The value table, the memory of what was tried, and what it was worth.

    `bonus`: per step (n_actions,) what an action earns beside the trajectory's reward. The generator of an iteration
    depends on (`seed`, iteration) only, so a learner that is loaded goes on as if it had never stopped.
    """

    def __init__(
        self, process: Process, rates: Rates | None = None, *, seed: int = 0, bonus: Sequence[Floats] | None = None
    ) -> None:
        self.process, self.rates, self.seed = process, rates or Rates(), seed
        self.bonus = [np.asarray(part, np.float64) for part in bonus] if bonus is not None else None
        if self.bonus is not None and [part.shape for part in self.bonus] != [(n,) for n in process.n_actions]:
            raise UsageError(f"a bonus needs one figure per action, {process.n_actions} in each step")
        before = (1, *process.n_actions[:-1])
        self.tables: list[Floats] = [  # per step (last action, action)
            np.full((n_before, n), self.rates.initial) for n_before, n in zip(before, process.n_actions, strict=True)
        ]
        self.memory: list[Trajectory] = []
        self.rewards: dict[Trajectory, float] = {}  # of every distinct trajectory, in order of first appearance

    def iterate(
        self,
        iteration: int,
        epsilon: float,
        evaluate: Callable[[Sequence[Trajectory]], Sequence[float]],
        choose: Callable[[Sequence[Trajectory]], Sequence[Trajectory]] | None = None,
    ) -> list[Trajectory]:
        """Samples, evaluates, replays. Gives what was sampled.

        `evaluate` is called once, with the distinct trajectories that are new (none: not at all), and gives their
        rewards. `choose` gives those of `rates.foresight` times as many samples that are to be followed.
        """
        rng = np.random.default_rng((self.seed, iteration))
        sampled = self.sample(epsilon, rng)
        if choose is not None and self.rates.foresight > 1:
            sampled = list(choose(sampled))
        new = [trajectory for trajectory in dict.fromkeys(sampled) if trajectory not in self.rewards]
        if new:
            self.rewards.update(zip(new, map(float, evaluate(new)), strict=True))
            for trajectory in new if self.rates.hopeful else ():
                self.update(trajectory, self.rewards[trajectory])  # none waits for the memory's dice
        self.memory += sampled
        for i in rng.integers(len(self.memory), size=self.rates.replays).tolist():
            self.update(self.memory[i], self.rewards[self.memory[i]])
        return sampled

    def sample(self, epsilon: float, rng: np.random.Generator) -> list[Trajectory]:
        """`rates.samples` x `rates.foresight` trajectories: a random action with probability `epsilon`, else the best;
        ties at random."""
        n = self.rates.samples * self.rates.foresight
        last, alive = np.zeros(n, np.int64), np.ones(n, bool)
        trajectories: list[list[int]] = [[] for _ in range(n)]
        for step, (table, size) in enumerate(zip(self.tables, self.process.n_actions, strict=True)):
            values = table[last]  # (n, size)
            best = np.where(values == values.max(axis=1, keepdims=True), rng.random((n, size)), -1.0).argmax(axis=1)
            actions = np.where(rng.random(n) < epsilon, rng.integers(size, size=n), best)
            for i in np.flatnonzero(alive).tolist():
                trajectories[i].append(int(actions[i]))
                alive[i] = not self.process.ends(step, int(actions[i]))
            if not alive.any():
                break
            last = np.where(alive, actions, 0)
        return [tuple(trajectory) for trajectory in trajectories]

    def parts(self, trajectory: Trajectory, reward: float) -> Floats:
        """(L,) what each step earns: the reward's share, the whole at the end, and the bonuses."""
        earned = np.full(len(trajectory), reward / len(trajectory) if self.rates.shape_reward else 0.0)
        earned[-1] = reward
        if self.bonus is not None:
            earned += [part[action] for part, action in zip(self.bonus, trajectory, strict=False)]
        return earned

    def update(self, trajectory: Trajectory, reward: float) -> None:
        """Moves the values of one trajectory's steps toward what followed, from its end to its start.

        Where they are hopeful: raises them to what this trajectory earned from there on.
        """
        alpha, discount = self.rates.alpha, self.rates.discount
        earned = self.parts(trajectory, reward).tolist()
        following = 0.0  # of the best action after the step; of this trajectory, where values are hopeful
        for step in range(len(trajectory) - 1, -1, -1):
            row = self.tables[step][trajectory[step - 1] if step else 0]
            action, worth = trajectory[step], earned[step] + discount * following
            if self.rates.hopeful:
                row[action] = max(row[action], worth)
                following = worth
            else:
                row[action] = (1 - alpha) * row[action] + alpha * worth
                following = float(row.max())

    def greedy(self) -> Trajectory:
        """The best action at every step, the first of equals."""
        trajectory: list[int] = []
        for step, table in enumerate(self.tables):
            trajectory.append(int(table[trajectory[-1] if trajectory else 0].argmax()))
            if self.process.ends(step, trajectory[-1]):
                break
        return tuple(trajectory)

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays from which ``load`` restores values, memory and rewards."""
        index = {trajectory: i for i, trajectory in enumerate(self.rewards)}
        known = np.full((len(index), len(self.process.n_actions)), -1, np.int32)  # (N, T), padded
        for i, trajectory in enumerate(index):
            known[i, : len(trajectory)] = trajectory
        return {
            **{f"values{step}": table for step, table in enumerate(self.tables)},
            "trajectories": known,
            "rewards": np.array(list(self.rewards.values()), np.float64),
            "memory": np.array([index[trajectory] for trajectory in self.memory], np.int64),
        }

    def load(self, state: dict[str, NDArray[Any]]) -> None:
        """Inverse of ``state``. Raises UsageError where it belongs to another process."""
        tables = [state[f"values{step}"] for step in range(len(self.tables)) if f"values{step}" in state]
        if [table.shape for table in tables] != [table.shape for table in self.tables]:
            raise UsageError("the saved values belong to another row of choices: remove them to start again")
        self.tables = [table.copy() for table in tables]
        known: list[Trajectory] = [tuple(int(a) for a in row if a >= 0) for row in state["trajectories"]]
        self.rewards = dict(zip(known, state["rewards"].tolist(), strict=True))
        self.memory = [known[i] for i in state["memory"].tolist()]
