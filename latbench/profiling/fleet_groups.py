"""Which nodes of a fleet measure as one device, and what their common table says of where it comes from.

Two nodes agree where the device, the runtime and all options are the same and their reference blocks take the same time
within CANARY_LIMIT, restated at one reference clock as ``LatencyTable.merge`` restates rows. The machine around the
device may differ (another kernel, more memory): the reference block tells whether that matters, and the table names
each node's. Nothing is rescaled by the reference block: it is one convolution, and a node that is slower there by some
per cent is not slower everywhere by as much.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from latbench.provenance import Provenance, canonical_json, differences

CANARY_LIMIT = 0.03  # difference of reference blocks beyond which nodes are kept apart; plan.canary_drift likewise
MIN_CANARIES = 3  # visits before a node is judged


@dataclass(frozen=True)
class Witness:
    """What is known of a node as a measuring device."""

    provenance: Provenance
    canary_ms: float | None  # median, at its own reference clock; None: not known yet

    @property
    def pace(self) -> float | None:
        """The reference block's time per time of the clock probe, where there is one: what compares across nodes."""
        if self.canary_ms is None:
            return None
        return self.canary_ms / (self.provenance.clock_ref_us or 1.0)


def unlike(a: Provenance, b: Provenance) -> list[str]:
    """The conditions that keep two nodes apart whatever they measure, as "versions.tensorrt: 8.6 / 10.0"."""
    return differences(_essence(a), _essence(b))


def agrees(witness: Witness, other: Witness) -> bool:
    """Whether two nodes are one device, as far as is known."""
    if unlike(witness.provenance, other.provenance):
        return False
    paces = [one.pace for one in (witness, other)]
    return None in paces or _apart(*paces) <= CANARY_LIMIT  # type: ignore[arg-type]


def groups(witnesses: Mapping[str, Witness]) -> list[list[str]]:
    """The names in groups that agree, as few as there can be. A node of unknown pace is in the largest group that its
    conditions allow."""
    classes: dict[str, list[str]] = {}
    for name in sorted(witnesses):
        classes.setdefault(canonical_json(_essence(witnesses[name].provenance)), []).append(name)
    found: list[list[str]] = []
    for names in classes.values():
        paces = {name: pace for name in names if (pace := witnesses[name].pace) is not None}
        split: list[list[str]] = []
        for name in sorted(paces, key=paces.__getitem__):
            if not split or _apart(paces[split[-1][0]], paces[name]) > CANARY_LIMIT:
                split.append([])
            split[-1].append(name)
        split = split or [[]]
        max(split, key=len).extend(name for name in names if name not in paces)
        found += split
    return found


def shared(provenances: Sequence[Provenance]) -> Provenance:
    """Of nodes that agree, one: the conditions that all of them share, every host. Raises IndexError on none."""
    first = provenances[0]
    return replace(
        first,
        environment=_common([one.environment for one in provenances]),
        options=_common([one.options for one in provenances]),
        versions=_common([one.versions for one in provenances]),
        host=", ".join(dict.fromkeys(one.host for one in provenances)),
        commit=", ".join(dict.fromkeys(one.commit for one in provenances if one.commit)),
        started_at=min(one.started_at for one in provenances),
    )


def peculiar(provenance: Provenance, common: Provenance) -> dict[str, Any]:
    """What a node's conditions have that the common ones lack: its own kernel, the index of its GPU, ..."""
    mine = {**provenance.environment, **{f"option {k}": v for k, v in provenance.options.items()}}
    kept = {**common.environment, **{f"option {k}": v for k, v in common.options.items()}}
    return {name: value for name, value in mine.items() if name not in kept}


def _apart(a: float, b: float) -> float:
    return max(a, b) / min(a, b) - 1


def _essence(provenance: Provenance) -> dict[str, Any]:
    """What nodes must have in common: which of a machine's GPUs it is does not count, nor does the machine."""
    return {
        "device_name": provenance.device_name,
        "backend": provenance.backend,
        "versions": dict(provenance.versions),
        "space": provenance.space,
        "settings": dict(provenance.settings),
        "options": {name: value for name, value in provenance.options.items() if name != "device"},
        "policy": dict(provenance.policy),
    }


def _common(mappings: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The entries that all have, equal."""
    first, *rest = mappings
    return {name: value for name, value in first.items() if all(name in m and m[name] == value for m in rest)}
