"""``Provenance``: where the numbers of a table come from, and which conditions must agree before two tables are one."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# What may differ between two tables that merge: when, where and by whom they were made.
_CONDITIONS = ("device_name", "backend", "versions", "environment", "options", "policy", "space", "settings")

_NAMES = ("device", "device_name", "backend", "space", "command", "commit", "started_at", "finished_at", "host")
_REPLACED = ("-o", "--output", "--only")  # options of `profile` that another run of one row sets anew


@dataclass(frozen=True)
class Provenance:
    """Conditions and origin of every row of a table. Mappings hold JSON values only."""

    device: str  # name of the device profile: "titanxp"
    device_name: str  # as the driver or the CPU says it
    backend: str
    versions: Mapping[str, str] = field(default_factory=dict)  # latbench, runtime, driver, python, ...
    space: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # the space's fields: batch, resolution, dtype, ...
    options: Mapping[str, Any] = field(default_factory=dict)  # of the back-end
    policy: Mapping[str, Any] = field(default_factory=dict)  # every measurement option: plan, context, fold_bn, ...
    environment: Mapping[str, Any] = field(default_factory=dict)  # CPU model, governor, threads, affinity, kernel, ...
    clock_ref_us: float | None = None  # the clock probe that `latency_ref_ms` is stated at; None: no probe
    seed: int = 0
    command: str = ""  # argv, shell-quoted
    commit: str = ""
    started_at: str = ""  # UTC, ISO 8601
    finished_at: str = ""
    host: str = ""
    parents: tuple[str, ...] = ()  # sha256 of the tables it was derived from

    @property
    def env_id(self) -> str:
        """12 hex digits over what can move a number: device, back-end, versions (lowering is ours), environment."""
        return _digest([self.device_name, self.backend, self.versions, self.environment])

    @property
    def policy_id(self) -> str:
        """12 hex digits over how a number is made: policy and back-end options."""
        return _digest([self.policy, self.options])

    def conflicts(self, other: Provenance) -> list[str]:
        """The conditions that differ, as "versions.onnxruntime: 1.18.0 / 1.19.2"; empty where the tables may merge."""
        mine, theirs = self.to_dict(), other.to_dict()
        return differences({k: mine[k] for k in _CONDITIONS}, {k: theirs[k] for k in _CONDITIONS})

    def remeasure_command(self, key: str) -> str:
        """The command that measures one row again; for a table not made by ``profile``, the command that made it."""
        words = shlex.split(self.command)
        if "profile" not in words:
            return self.command
        kept = [
            word
            for before, word in zip(["", *words], words, strict=False)
            if before not in _REPLACED and word.split("=")[0] not in _REPLACED
        ]
        return shlex.join([*kept, "--only", key, "-o", f"{key}.parquet"])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "parents": list(self.parents)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Provenance:
        """Inverse of ``to_dict``; raises TypeError on missing or unknown fields, and on names that are no text."""
        for name in _NAMES:
            if not isinstance(raw.get(name, ""), str):
                raise TypeError(f"{name} must be text, not {type(raw[name]).__name__}")
        return cls(**{**raw, "parents": tuple(raw.get("parents", ()))})


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every leaf that differs between two JSON mappings, as "name.of.leaf: mine / theirs", sorted by name."""
    out = []
    for name in sorted({*mine, *theirs}):
        a, b = mine.get(name, _ABSENT), theirs.get(name, _ABSENT)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += differences(a, b, f"{prefix}{name}.")
        elif _text(a) != _text(b):
            out.append(f"{prefix}{name}: {_text(a)} / {_text(b)}")
    return out


_ABSENT = object()


def _text(value: Any) -> str:
    if value is _ABSENT:
        return "(absent)"
    return value if isinstance(value, str) else canonical_json(value)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys: equal values, equal text. Raises ValueError on NaN, TypeError on what JSON lacks."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:12]
