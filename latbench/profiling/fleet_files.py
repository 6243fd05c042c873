"""What lies on disk while a fleet measures: a spool of the run, and one of each node, beside the output.

``t.parquet.partial.jsonl`` locks the output, keeps the conditions that the command asks for, and lists the nodes that
have a spool of their own, ``t.NODE.parquet.partial.jsonl``: what that node is, then a measurement a line.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from latbench.errors import ProvenanceConflictError
from latbench.profiling.profile import HEADER, Target
from latbench.provenance import Provenance, canonical_json, differences
from latbench.spaces.base import SearchSpace
from latbench.spool import Spool
from latbench.tables import LatencyTable

COMMON = ("backend", "policy", "space", "settings")  # conditions that are known before any node is asked


class Files:
    """The output and the spools beside it. Use as a context manager."""

    def __init__(self, out: Path, space: SearchSpace, target: Target) -> None:
        shared = (target.backend, target.policy, space.name, space.settings())
        self.out = out
        self._stack = ExitStack()
        self._spool = Spool(out, {"fleet": target.device, **dict(zip(COMMON, shared, strict=True))})
        self._spools: dict[str, Spool] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Files:
        self._stack.enter_context(self._spool)
        return self

    def __exit__(self, *about: object) -> None:
        if not self._spool.records:  # nothing to go on from: left behind, it would refuse the next run's options
            self._spool.remove()
        self._stack.close()

    def held(self) -> LatencyTable | None:
        """The table that is there. Raises ProvenanceConflictError where it was made under other conditions."""
        if not self.out.exists():
            return None
        held = LatencyTable.read(self.out)
        there = {name: held.provenance.to_dict()[name] for name in COMMON}
        conflicts = differences(there, {name: self._spool.header[name] for name in COMMON})
        if conflicts:
            raise made_otherwise(self.out, conflicts)
        return held

    def left(self) -> Iterator[tuple[str, Provenance, Spool]]:
        """Name, conditions and spool of every node that an interrupted run has measured on."""
        for record in self._spool.records:
            head = _header_of(Spool(self._path(record["node"]), {}).path)
            if head is None:  # removed, or killed while it was made
                continue
            spool = self._open(record["node"], head)
            known = next((one["provenance"] for one in spool.records if "provenance" in one), None)
            if known is not None:
                yield record["node"], Provenance.from_dict(known), spool

    def spool(self, name: str, provenance: Provenance) -> Spool:
        """A node's spool, open; its first record is the node's provenance.

        Raises ProvenanceConflictError where the node was another one when it began.
        """
        head = json.loads(canonical_json({name: provenance.to_dict()[name] for name in HEADER}))
        with self._lock:
            spool = self._spools.get(name) or self._open(name, head)
            if conflicts := differences(spool.header, head):
                raise ProvenanceConflictError(
                    f"{spool.path} holds what {name} measured under other conditions (there / now): "
                    f"{'; '.join(conflicts)}; choose another -o, or delete the file"
                )
            if not any(record["node"] == name for record in self._spool.records):
                self._spool.append({"node": name})
                self._spool.records.append({"node": name})
            if not spool.records:
                spool.append({"provenance": provenance.to_dict()})
            return spool

    def _path(self, name: str) -> Path:
        return self.out.with_name(f"{self.out.stem}.{name}{self.out.suffix}")

    def _open(self, name: str, head: dict[str, Any]) -> Spool:
        spool = self._spools[name] = self._stack.enter_context(Spool(self._path(name), head))
        return spool

    def remove(self, *, complete: bool) -> None:
        """Once the tables are written: the spools, if nothing is missing. The list of nodes goes last."""
        if complete:
            for spool in self._spools.values():
                spool.remove()
            self._spool.remove()


def made_otherwise(out: Path, conflicts: Sequence[str]) -> ProvenanceConflictError:
    """What to raise of a table whose conditions (there / now) differ."""
    return ProvenanceConflictError(
        f"{out} was measured under other conditions (there / now): {'; '.join(conflicts)}; choose another -o"
    )


def _header_of(path: Path) -> dict[str, Any] | None:
    """What stands in a spool's first line; None where there is no whole one. What is no spool is told by ``Spool``."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        line = file.readline()
    if not line.endswith(b"\n"):
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        header: dict[str, Any] = dict(json.loads(line)["header"])
        return header
    return {}
