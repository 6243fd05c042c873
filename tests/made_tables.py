"""Tables made by hand, for the tests of tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from latbench.tables import LatencyTable, Provenance, Row

COMMAND = "latbench profile --device cpu --space 'mobilenet v1' -o lookup_tables/cpu.parquet --runs 2"
PROVENANCE = Provenance(
    device="cpu",
    device_name="Xeon",
    backend="onnxruntime",
    versions={"latbench": "0.1.0", "onnxruntime": "1.20.0"},
    space="mobilenet_v1",
    settings={"batch": 1, "resolution": 224},
    options={"threads": 1},
    policy={"runs": 2, "context": "sandwich"},
    environment={"cpu": "Xeon", "affinity": [0, 1]},
    clock_ref_us=10.0,
    command=COMMAND,
    started_at="2026-01-01T00:00:00Z",
    finished_at="2026-01-01T01:00:00Z",
)


def row(key: str, ms: float | None = 1.0, **more: Any) -> Row:
    return Row(key=key, **{"kind": "block", "signature": f"sig {key}", "latency_ms": ms, **more})


def table(*rows: Row, **more: Any) -> LatencyTable:
    return LatencyTable.from_rows(rows, replace(PROVENANCE, **more))
