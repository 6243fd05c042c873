"""Candidates judged on a fleet: independent trainings and look-ups, one at a time on every node.

A node that judges holds all its devices meanwhile and shares the lock of its machine, so that no measurement of a
fleet runs beside it. An answer depends on the
architecture, the problem and its seed: which node gives it does not matter as far as nodes compute alike (they use as
many threads as the process that asks). A supernet's training does not split in this way; ``torchrun`` shares that.
"""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from latbench import __version__
from latbench.errors import EnvironmentUnfitError, LatbenchError
from latbench.measure.fleet import Fleet, Held, NodeLostError, connect
from latbench.profiling.fleet_node import machine_lock
from latbench.profiling.scratch import scratch
from latbench.spaces.base import Arch
from searchers.base import Evaluator, Problem

POLL_S = 0.2
SILENT_S = 30.0  # of waiting for a first node, before it is said
Make = Callable[[Problem], Evaluator]  # a module's function, or a partial of one: nodes import it
Say = Callable[[str], None]


class CandidateNode:
    """Lives on a node. Checkpoints are in a folder of its own, which goes with it."""

    def __init__(self, version: str, threads: int) -> None:
        self._error: LatbenchError | None = None
        if version != __version__:
            self._error = EnvironmentUnfitError(
                f"it has latbench {__version__}, this machine {version}: install the same on both"
            )
        torch.set_num_threads(threads)
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(scratch())
        self._evaluator: Evaluator | None = None

    def prepare(self, make: Make, problem: Problem) -> None:
        """What it cannot make, a data set that this node lacks for example, ``evaluate`` raises."""
        try:
            self._evaluator = make(replace(problem, out=self._folder))
        except LatbenchError as error:
            self._error = error

    def evaluate(self, arch: Arch) -> float:
        """As the evaluator, and as what went wrong before."""
        if self._error is not None:
            raise self._error
        assert self._evaluator is not None
        lock = machine_lock()
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)  # waits while another node of this machine measures
            return float(self._evaluator.evaluate(arch))
        finally:
            os.close(lock)

    def close(self) -> None:
        """Removes its folder."""
        self._stack.close()


class CandidateFleet:
    """The nodes of a fleet, held for as long as a search lasts. Made by ``candidate_fleet``."""

    def __init__(self, fleet: Fleet, held: Sequence[Held], say: Say) -> None:
        self._fleet, self._held, self._say = fleet, list(held), say
        self._made: dict[str, tuple[Make, Problem]] = {}  # node -> what it was told to make

    def evaluate(self, make: Make, problem: Problem, archs: Sequence[Arch]) -> Iterator[tuple[int, float]]:
        """Positions in `archs` and values, as they come. A lost node's candidate is given to another.

        Raises the LatbenchError that an evaluator raised, NodeLostError where no node is left.
        """
        todo, calls = deque(range(len(archs))), dict[Any, tuple[Held, int]]()
        patience = time.monotonic() + SILENT_S
        while todo or calls:
            busy = [held for held, _ in calls.values()]
            for held in [held for held in self._held if held not in busy]:
                if todo:
                    try:
                        if held.placed(0):
                            self._tell(held, make, problem)
                            call = held.send("evaluate", archs[todo[0]])
                            calls[call] = held, todo.popleft()
                    except (NodeLostError, EnvironmentUnfitError) as error:
                        self._drop(held, error)
            if not self._held:
                raise NodeLostError("no node of the fleet is left to judge candidates; the same command goes on")
            if not calls and time.monotonic() > patience:
                self._say(
                    f"waiting for {', '.join(held.node.name for held in self._held)}: other runs hold the devices"
                )
                patience = math.inf
            for call in self._fleet.done(list(calls), POLL_S):
                held, i = calls.pop(call)
                try:
                    value = held.receive(call, POLL_S)
                except NodeLostError as error:
                    self._drop(held, error)
                    todo.appendleft(i)
                else:
                    yield i, value

    def _tell(self, held: Held, make: Make, problem: Problem) -> None:
        wanted, known = (make, problem), self._made.get(held.node.id)
        if known is None or known[0] is not make or known[1] is not problem:
            held.send("prepare", make, replace(problem, fleet=None))
            self._made[held.node.id] = wanted

    def _drop(self, held: Held, error: LatbenchError) -> None:
        self._held.remove(held)
        held.kill()
        self._say(f"{held.node.name}: {error}; going on without it")


class OnFleet:
    """An ``Evaluator`` that judges several at once on the problem's fleet, and single ones here."""

    def __init__(self, make: Make, problem: Problem) -> None:
        self._make, self._problem = make, problem
        self._here: Evaluator | None = None

    def evaluate(self, arch: Arch) -> float:
        """In this process."""
        if self._here is None:
            self._here = self._make(replace(self._problem, fleet=None))
        return self._here.evaluate(arch)

    def evaluate_each(self, archs: Sequence[Arch]) -> Iterator[tuple[int, float]]:
        """Positions in `archs` and values, as they come; raises as ``CandidateFleet.evaluate``."""
        assert self._problem.fleet is not None
        yield from self._problem.fleet.evaluate(self._make, self._problem, archs)


@contextmanager
def candidate_fleet(address: str, say: Say = lambda line: None) -> Iterator[CandidateFleet]:
    """Every node of the fleet at an address of Ray's. Raises EnvironmentUnfitError where nobody answers there."""
    with connect(address) as fleet, ExitStack() as stack:
        nodes = fleet.nodes()
        held = [
            stack.enter_context(fleet.hold(node, None, CandidateNode, __version__, torch.get_num_threads()))
            for node in nodes
        ]
        say(f"{len(held)} nodes judge candidates: {', '.join(node.name for node in nodes)}")
        yield CandidateFleet(fleet, held, say)
