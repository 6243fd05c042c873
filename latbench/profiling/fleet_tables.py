"""From what the nodes of a fleet measured to tables: one of those that agree, others beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from latbench.errors import EnvironmentUnfitError
from latbench.profiling.fleet_board import Board, Member
from latbench.profiling.fleet_groups import groups, peculiar, shared, unlike
from latbench.profiling.jobs import Job
from latbench.profiling.profile import Target, command_line, identity, now, with_sums
from latbench.profiling.rows import finish, increment
from latbench.profiling.session import steadiness
from latbench.spaces.base import SearchSpace
from latbench.tables import LatencyTable, Row


@dataclass(frozen=True)
class Apart:
    """Nodes that do not agree with those of the main table, and the one of what they measured."""

    path: Path | None  # None: they measured no row
    nodes: tuple[str, ...]
    rows: int
    slower: float | None  # by which share its reference block is slower than the main one's; None: not the reason
    conflicts: tuple[str, ...]  # conditions that differ, main / here

    @property
    def why(self) -> str:
        """In words."""
        if self.conflicts:
            return f"other conditions ({'; '.join(self.conflicts)})"
        if self.slower is None:
            return "no other node agrees"
        return f"its reference block is {abs(self.slower):.1%} {'slower' if self.slower > 0 else 'faster'}"


@dataclass(frozen=True)
class Written:
    """What was written."""

    table: LatencyTable
    n_missing: int
    nodes: dict[str, dict[str, Any]]
    apart: tuple[Apart, ...]


def write_tables(
    board: Board, space: SearchSpace, target: Target, todo: Sequence[Job], held: LatencyTable | None, out: Path
) -> Written:
    """Writes the table of the main group, with what is there already, and one of each group that is kept apart.

    Raises EnvironmentUnfitError where no node has joined, so that there is nothing to say of any.
    """
    main = board.main()
    members = [member for name, member in board.members.items() if name in main]
    if not members and held is None:
        raise EnvironmentUnfitError(f"no {target.device} of the fleet was free in time: nothing was measured")
    table = with_sums(_merged(board, members, todo, target, held), space, target.context)
    apart = _apart(board, main, todo, target, out)
    table.write(out)
    found = set(zip(*(table.frame[name] for name in ("key", "kind", "context")), strict=True))
    n_missing = sum(identity(job.row) not in found for job in todo)
    nodes = {name: _about(member, _rows(board, todo, member, main, target)) for name, member in board.members.items()}
    return Written(table, n_missing, nodes, apart)


def _rows(board: Board, jobs: Sequence[Job], member: Member, group: Set[str], target: Target) -> list[Row]:
    """The rows that count as this member's, less its own stubs; each names the node."""
    origin: Literal["simulated", "measured"] = "simulated" if target.simulated else "measured"
    mine = [job for job in jobs if board.holder(job, group) is member]
    measured = member.session.progress
    needed = {stub.key: stub for job in mine for stub in board.stubs[job.key]}
    stubs = {job.row.key: finish(job.row, measured[job.key], origin=origin) for job in needed.values()}
    rows = [increment(finish(job.row, measured[job.key], origin=origin), stubs) for job in mine]
    return [replace(row, conditions=_with_node(row.conditions, member.name)) for row in rows]


def _with_node(conditions: str | None, name: str) -> str:
    return json.dumps({**json.loads(conditions or "{}"), "node": name})


def _merged(
    board: Board, members: Sequence[Member], jobs: Sequence[Job], target: Target, held: LatencyTable | None
) -> LatencyTable:
    """One table of members that agree, after the one that is there; each restated at the first one's clock."""
    before = [held.provenance] if held is not None else []
    common = shared([*before, *(member.provenance for member in members)])
    common = replace(common, command=command_line(), finished_at=now())
    group = {member.name for member in members}
    table = (
        None if held is None else replace(held, provenance=replace(common, clock_ref_us=held.provenance.clock_ref_us))
    )
    nodes: dict[str, Any] = dict(held.notes.get("fleet", {}).get("nodes", {})) if held is not None else {}
    for member in members:
        rows = _rows(board, jobs, member, group, target)
        one = LatencyTable.from_rows(rows, replace(common, clock_ref_us=member.provenance.clock_ref_us))
        table = one if table is None else table.merge(one)
        if rows:
            n_before = nodes.get(member.name, {}).get("rows", 0)
            about = {**_about(member, rows), "peculiar": peculiar(member.provenance, common)}
            nodes[member.name] = {**about, "rows": n_before + len(rows)}
    assert table is not None
    canary_ms = _canary_ms(members, table.provenance.clock_ref_us)
    notes = dict(table.notes)
    if canary_ms:
        notes["canary"] = steadiness(canary_ms)
    first = notes.get("fleet", {}).get("canary_ms") or notes.get("canary", {}).get("median_ms")
    return replace(table, notes={**notes, "fleet": {"canary_ms": first, "nodes": nodes}})


def _canary_ms(members: Sequence[Member], clock_ref_us: float | None) -> list[float]:
    """Every visit to the reference block, restated at one clock."""
    values = []
    for member in members:
        own_us = member.provenance.clock_ref_us
        scale = clock_ref_us / own_us if clock_ref_us and own_us else 1.0
        values += [scale * ms for _, ms in member.session.canary_ms]
    return values


def _about(member: Member, rows: Sequence[Row]) -> dict[str, Any]:
    about = {
        "rows": len(rows),
        "host": member.provenance.host,
        "clock_ref_us": member.provenance.clock_ref_us,
        "canary": member.session.canary_notes(),
    }
    return about if member.lost is None else {**about, "lost": member.lost}


def _apart(board: Board, main: Set[str], jobs: Sequence[Job], target: Target, out: Path) -> tuple[Apart, ...]:
    """Writes a table of each group beside the main one, after what an earlier run put there."""
    found = []
    reference = board.anchor or next((board.members[name].witness for name in sorted(main)), None)
    others = {name: member.witness for name, member in board.members.items() if name not in main}
    for group in groups(others):
        members = [board.members[name] for name in group]
        table = _merged(board, members, jobs, target, None)
        path = _room(out, group[0], table) if len(table) else None
        if path is not None:
            (LatencyTable.read(path).merge(table) if path.exists() else table).write(path)
        conflicts = tuple(unlike(reference.provenance, members[0].provenance)) if reference is not None else ()
        pace, usual = members[0].witness.pace, reference.pace if reference is not None else None
        slower = None if pace is None or usual is None else pace / usual - 1
        found.append(Apart(path, tuple(group), len(table), slower, conflicts))
    return tuple(found)


def _room(out: Path, name: str, table: LatencyTable) -> Path:
    """Where a table that is kept apart goes: beside the main one, and beside one that it does not fit."""
    n = 1
    while True:
        path = out.with_name(f"{out.stem}.{name}{'' if n == 1 else f'-{n}'}{out.suffix}")
        if not path.exists() or not LatencyTable.read(path).provenance.conflicts(table.provenance):
            return path
        n += 1
