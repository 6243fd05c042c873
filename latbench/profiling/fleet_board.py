"""Who measures what: a board of jobs from which the nodes of a fleet take small parts, until every row is there.

A row is measured wholly on one node, together with the stubs that are taken off it. Quick nodes come back for more
sooner, so work balances itself; what a lost node had taken goes back on the board. Rows count where their node is in
the *main* group, the one that the table is made of: nodes that turn out to disagree with it take nothing more, and
what they measured is measured again by the others. One lock guards everything here; nobody measures under it.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field

from latbench.measure.base import SamplingPlan
from latbench.profiling.fleet_groups import MIN_CANARIES, Witness, agrees, groups
from latbench.profiling.jobs import Job, estimate_s
from latbench.profiling.session import CHUNK_S, Session
from latbench.provenance import Provenance

PARTS = 8  # that a node takes of the whole, on average: the last ones end within an eighth of each other
LEAST_S = 1.0  # of work in a part: starting workers and the reference block cost up to half a second


@dataclass(eq=False)
class Member:
    """A node, of this run or of an interrupted one, and what it measured."""

    name: str
    provenance: Provenance
    session: Session
    present: bool  # may still measure
    joined: bool = False  # holds its device
    done: set[str] = field(default_factory=set)  # keys of graphs that are final here
    part: list[Job] = field(default_factory=list)  # being measured
    part_done_s: float = 0.0
    lost: str | None = None  # why it is not present any more

    @property
    def witness(self) -> Witness:
        """What it says of itself as a measuring device."""
        values = [ms for _, ms in list(self.session.canary_ms)]
        known = len(values) >= MIN_CANARIES
        return Witness(self.provenance, statistics.median(values) if known else None)

    def begun(self, key: str) -> bool:
        """Whether it has measured a part of this row, and only that."""
        return key not in self.done and key in self.session.progress


class Board:
    """The jobs of a run and its members. `anchor`: the table that is there already, with which nodes must agree."""

    def __init__(self, jobs: Sequence[Job], plan: SamplingPlan, n_nodes: int, anchor: Witness | None = None) -> None:
        distinct = {job.key: job for job in jobs}
        by_row = {job.row.key: job for job in jobs if job.row.kind == "stub"}
        self.stubs = {job.key: [by_row[key] for key in dict.fromkeys(job.row.stubs)] for job in distinct.values()}
        self.costs_s = {key: estimate_s(job, plan) for key, job in distinct.items()}
        self.total_s = sum(self.costs_s.values())
        self.part_s = min(CHUNK_S, max(LEAST_S, self.total_s / PARTS / max(1, n_nodes)))
        self.jobs = self._ordered(list(distinct.values()), plan.seed)
        self.anchor = anchor
        self.members: dict[str, Member] = {}
        self.awaited = n_nodes  # nodes of which nothing is known yet
        self.over = False  # nobody takes anything any more
        self.error: BaseException | None = None
        self.changed = threading.Condition()
        self.ready: set[str] = set()  # keys that some member has measured
        self.ready_s = 0.0

    def _ordered(self, jobs: list[Job], seed: int) -> list[Job]:
        """Runs of neighbours, which share stubs, in random order; stubs last, as others bring them."""
        runs: list[list[Job]] = []
        room_s = 0.0
        for job in (job for job in jobs if job.row.kind != "stub"):
            if room_s <= 0:
                runs.append([])
                room_s = self.part_s
            runs[-1].append(job)
            room_s -= self.costs_s[job.key]
        random.Random(seed).shuffle(runs)
        return [*(job for run in runs for job in run), *(job for job in jobs if job.row.kind == "stub")]

    def main(self) -> set[str]:
        """Names of the members whose rows count: those that agree with the table there is, else the group of most
        present members, then of most rows."""
        witnesses = {name: member.witness for name, member in self.members.items()}
        if self.anchor is not None:
            return {name for name, witness in witnesses.items() if agrees(witness, self.anchor)}

        def weight(group: Iterable[str]) -> tuple[int, int]:
            members = [self.members[name] for name in group]
            return sum(member.present for member in members), sum(len(member.done) for member in members)

        found = groups(witnesses)
        return set(max(found, key=weight)) if found else set()

    def holder(self, job: Job, main: Set[str]) -> Member | None:
        """The member of the main group that has the row, and its stubs; one where it did not fail, if there is one."""
        keys = {job.key, *(stub.key for stub in self.stubs[job.key])}
        found = [m for name, m in self.members.items() if name in main and keys <= m.done]
        return min(found, key=lambda m: m.session.progress[job.key].failure is not None, default=None)

    def missing(self, main: Set[str]) -> list[Job]:
        """The jobs that nobody of the main group has measured."""
        return [job for job in self.jobs if self.holder(job, main) is None]

    def take(self, member: Member) -> list[Job] | None:
        """The next jobs for a member; waits while others may leave it some. None: there is nothing more to do."""
        with self.changed:
            while not self.over:
                main = self.main()
                missing = self.missing(main)
                part = list(self._part(member, missing)) if member.name in main else []
                if part:
                    member.part = part
                    return part
                busy = any(other.part for other in self.members.values())
                helpless = not self.awaited and not any(
                    other.joined and other.present and other.name in main for other in self.members.values()
                )
                if not busy and (not missing or helpless):
                    self.over = True
                    self.changed.notify_all()
                else:
                    self.changed.wait(timeout=1.0)
        return None

    def _part(self, member: Member, missing: Sequence[Job]) -> Iterator[Job]:
        """What it has begun; else what nobody has; else what only members that are not back have begun."""
        others = [m for m in self.members.values() if m is not member and m.present]
        taken = {job.key for m in others for job in m.part}
        free = [job for job in missing if job.key not in taken]
        mine = [job for job in free if member.begun(job.key)]
        theirs = {job.key for job in free for m in others if m.begun(job.key)}
        kept = {job.key for job in free for m in others if m.joined and m.begun(job.key)}
        chosen = mine or [job for job in free if job.key not in theirs] or [job for job in free if job.key not in kept]
        room_s, brought = self.part_s, set(member.done)
        for job in chosen:
            if room_s <= 0:
                return
            for one in (*self.stubs[job.key], job):
                if one.key not in brought:
                    brought.add(one.key)
                    room_s -= self.costs_s[one.key]
                    yield one

    def add(self, member: Member) -> None:
        """A node that an interrupted run has left something of."""
        with self.changed:
            self.members[member.name] = member
            self._count(member, member.session.finished)

    def _count(self, member: Member, keys: Set[str]) -> None:
        new = (keys & self.costs_s.keys()) - self.ready
        self.ready |= new
        self.ready_s += sum(self.costs_s[key] for key in new)
        member.done |= keys

    def join(self, member: Member) -> None:
        """A node that holds its device: from now on it may take jobs."""
        with self.changed:
            member.joined = member.present = True
            self.add(member)
            self.awaited -= 1
            self.changed.notify_all()

    def finish(self, member: Member) -> None:
        """Its part is measured."""
        with self.changed:
            self._count(member, {job.key for job in member.part if member.session.complete(job.key)})
            member.part, member.part_done_s = [], 0.0
            self.changed.notify_all()

    def leave(self, name: str, why: str | None = None) -> None:
        """A node that takes no more; `why`: it is lost, and what it had taken is free."""
        with self.changed:
            member = self.members.get(name)
            if member is None or not member.joined:
                self.awaited -= 1
            if member is not None:
                member.present = member.joined = False
                member.part, member.part_done_s, member.lost = [], 0.0, why
            self.changed.notify_all()

    def stop(self, error: BaseException | None = None) -> None:
        """Nobody takes anything any more. `error`: what the run ends with."""
        with self.changed:
            self.error, self.over = self.error or error, True
            self.changed.notify_all()

    def wait(self, wait_s: float) -> bool:
        """Whether it is over by then."""
        end = time.monotonic() + wait_s
        with self.changed:
            while not self.over and (left_s := end - time.monotonic()) > 0:
                self.changed.wait(left_s)
            return self.over

    def told(self, member: Member, done_s: float) -> tuple[float, int]:
        """Estimated seconds of work done by all, and rows; `done_s` of this member's part."""
        with self.changed:
            member.part_done_s = done_s
            live = sum(one.part_done_s for one in self.members.values())
            new = sum(
                job.key not in self.ready and one.session.complete(job.key)
                for one in self.members.values()
                for job in one.part
            )
            return min(self.ready_s + live, self.total_s), min(len(self.ready) + new, len(self.jobs))
