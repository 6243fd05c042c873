"""``profile`` on a fleet: many nodes that hold one kind of device, one table.

One ``Session`` a node, in a thread each, with its own clock reference and reference block; a ``Board`` hands the work
out. Every measurement is on our disk before it counts, in a spool for each node beside the output, so whatever is
killed (a node, this process, all of them), the same command goes on and has lost one measurement a node at most.
Nodes that agree become one table, whose notes name them and whose rows say which node measured them
(``conditions``); what others measured is kept apart in tables of their own.

What a node is (``Node``) is left open: tests and the benchmark use local launchers, ``fleet_node`` brings Ray's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

from latbench.errors import EnvironmentUnfitError, LatbenchError, MeasurementError, ProvenanceConflictError, UsageError
from latbench.measure.base import Measurement, Request
from latbench.measure.fleet import NodeLostError
from latbench.profiling.fleet_board import Board, Member
from latbench.profiling.fleet_files import Files, made_otherwise
from latbench.profiling.fleet_groups import Witness, unlike
from latbench.profiling.fleet_tables import Apart, write_tables
from latbench.profiling.profile import Outcome, Target, identity, wanted
from latbench.profiling.session import Reporter, Session, SessionLauncher
from latbench.provenance import Provenance
from latbench.spaces.base import Arch, SearchSpace
from latbench.spool import Spool
from latbench.tables import LatencyTable

GRACE_S = 5.0  # for a node to end its measurement when the run ends, before it is aborted


class Node(Protocol):
    """A machine that can hold the device of its `target`."""

    @property
    def name(self) -> str:
        """Unique in the fleet, the same whenever it comes back, fit for a file's name."""
        ...

    @property
    def target(self) -> Target: ...

    def open(
        self, space: SearchSpace, waiting: Callable[[str], None]
    ) -> AbstractContextManager[tuple[SessionLauncher, Provenance]]:
        """Holds the device, as soon as it is free; `waiting` is told, once, where it is not."""
        ...

    def abort(self) -> None:
        """Makes whoever waits for the node or measures on it raise NodeLostError; from another thread."""
        ...


@dataclass(frozen=True)
class FleetOutcome(Outcome):
    """What a run on a fleet came to."""

    nodes: dict[str, dict[str, Any]]  # name -> rows, canary, what is peculiar to it, lost: why, where it was
    apart: tuple[Apart, ...]  # what nodes that disagree measured


def profile_fleet(
    space: SearchSpace,
    nodes: Sequence[Node],
    out: Path,
    *,
    networks: int | Sequence[Arch] = 0,
    only: str | None = None,
    budget_s: float = float("inf"),
    reporter: Reporter | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> FleetOutcome:
    """As ``profile``, on every node. `say` is told, a line each, of nodes that wait, are lost, or are left out.

    Raises as ``profile``; NodeLostError where no node is left: what was measured is kept, the same command goes on.
    """
    begin = time.monotonic()
    target = nodes[0].target
    jobs = wanted(space, target, networks, only)
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent} is no directory: make it, or choose another -o")
    with ExitStack() as stack:
        files = stack.enter_context(Files(out, space, target))
        held = files.held()
        have = {identity(row) for row in (held.rows(samples=False) if held else ()) if row.status == "ok"}
        todo = [job for job in jobs if identity(job.row) not in have]
        needed = {key for job in todo for key in job.row.stubs}
        measured = [
            *todo,
            *(job for job in jobs if job.row.kind == "stub" and job.row.key in needed and job not in todo),
        ]
        board = Board(measured, target.plan, len(nodes), None if held is None else _anchor(held))
        run = Run(space, target, board, files, held, begin + budget_s, reporter, say)
        run.restore({node.name for node in nodes})
        run.measure(nodes)
        outcome = write_tables(board, space, target, todo, held, out)
        files.remove(complete=not outcome.n_missing)
    return FleetOutcome(
        outcome.table, out, len(jobs), outcome.n_missing, time.monotonic() - begin, outcome.nodes, outcome.apart
    )


def _anchor(held: LatencyTable) -> Witness:
    """What new nodes must agree with: the reference block of the run that began the table."""
    notes: dict[str, dict[str, Any]] = {"fleet": {}, "canary": {}, **held.notes}
    return Witness(held.provenance, notes["fleet"].get("canary_ms") or notes["canary"].get("median_ms"))


@dataclass
class Run:
    """One call of ``profile_fleet`` while it measures."""

    space: SearchSpace
    target: Target  # of one of the nodes
    board: Board
    files: Files
    held: LatencyTable | None
    deadline: float  # time.monotonic()
    reporter: Reporter | None
    say: Callable[[str], None]
    reasons: dict[str, LatbenchError] = field(default_factory=dict)  # why nodes are out

    def restore(self, present: set[str]) -> None:
        """Takes what an interrupted run has left."""
        for name, provenance, spool in self.files.left():
            member = self._member(name, provenance, spool)
            member.present = name in present
            self.board.add(member)

    def measure(self, nodes: Sequence[Node]) -> None:
        """On all nodes at once, until all is measured, time is up or nobody is left. Raises as ``profile_fleet``."""
        threads = [threading.Thread(target=self._serve, args=(node,), name=node.name, daemon=True) for node in nodes]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) and not self.board.wait(0.2):
                if time.monotonic() > self.deadline and not any(m.part for m in self.board.members.values()):
                    break
        finally:  # an interrupt too: what is being measured ends, nothing stays on the nodes
            self.board.stop()
            self._end(nodes, threads)
        if self.board.error is not None:
            raise self.board.error
        if len(self.reasons) == len(nodes) and self.board.missing(self.board.main()):
            self._nobody_left(nodes)

    def _end(self, nodes: Sequence[Node], threads: Sequence[threading.Thread]) -> None:
        end = time.monotonic() + GRACE_S
        for node, thread in zip(nodes, threads, strict=True):
            member = self.board.members.get(node.name)
            thread.join(max(0.0, end - time.monotonic()) if member is not None and member.joined else 0.0)
            if thread.is_alive():
                node.abort()
        for thread in threads:
            thread.join(GRACE_S)

    def _serve(self, node: Node) -> None:
        """A node's thread: holds its device, measures parts while there are any."""
        why: str | None = None
        try:
            with node.open(self.space, self.say) as (launcher, provenance):
                member = self._joined(node.name, launcher, provenance)
                while (part := self.board.take(member)) is not None:
                    going = member.session.measure(part)
                    self.board.finish(member)
                    if not going:
                        break
        except _OverError:
            pass
        except (MeasurementError, EnvironmentUnfitError, ProvenanceConflictError) as error:
            if not self.board.over:
                self.reasons[node.name] = error
                why = str(error)
                self.say(f"{node.name} is out, its rows go on elsewhere: {why}")
        except BaseException as error:  # of this machine (no room) or a bug: it ends the run
            self.board.stop(error)
        finally:
            self.board.leave(node.name, why)

    def _joined(self, name: str, launcher: SessionLauncher, provenance: Provenance) -> Member:
        """The node's member, with what it measured before. Raises ProvenanceConflictError where it does not fit."""
        if self.held is not None and (conflicts := unlike(self.held.provenance, provenance)):
            raise made_otherwise(self.files.out, conflicts)
        spool = self.files.spool(name, provenance)
        member = self.board.members.get(name) or self._member(name, provenance, spool)
        session = member.session
        session.launcher, session.deadline = launcher, self.deadline
        session.reporter = _Share(self, member)
        self.board.join(member)
        return member

    def _member(self, name: str, provenance: Provenance, spool: Spool) -> Member:
        def record(measurement: Measurement) -> None:
            spool.append(measurement.to_dict())
            if self.board.over:
                raise _OverError

        session = Session(_ELSEWHERE, self.target.plan, self.target.artifact, provenance.clock_ref_us, record)
        session.restore(Measurement.from_dict(raw) for raw in spool.records if "key" in raw)
        return Member(name, provenance, session, present=True)

    def _nobody_left(self, nodes: Sequence[Node]) -> NoReturn:
        if len(nodes) == 1 and not self.board.ready:
            raise next(iter(self.reasons.values()))
        told = "; ".join(str(error) for error in self.reasons.values())
        raise NodeLostError(
            f"no node is left ({told}); what was measured is kept beside {self.files.out}: run the same command again"
        )


class _OverError(Exception):
    """The run has ended: not an error of anybody's."""


@dataclass(frozen=True)
class _Share:
    """Tells the run's reporter of all nodes what a member's session tells of one."""

    run: Run
    member: Member

    def advance(self, done_s: float, total_s: float, rows: int, n_rows: int) -> None:
        """As ``Reporter``."""
        if self.run.reporter is not None:
            board = self.run.board
            all_s, n_ready = board.told(self.member, done_s)
            self.run.reporter.advance(all_s, board.total_s, n_ready, len(board.jobs))


class _Elsewhere:
    """In place of a node's launcher until it holds its device."""

    conditions: Mapping[str, object] = {}

    def prepare(self, workers: int) -> None:
        """Nothing to start."""

    def measure(self, requests: Iterable[Request]) -> Iterator[Measurement]:
        """Raises NodeLostError."""
        raise NodeLostError("this node is not there")


_ELSEWHERE = _Elsewhere()
