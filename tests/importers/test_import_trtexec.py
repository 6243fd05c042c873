"""trtexec's times: one row with all samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latbench.errors import LatbenchError
from latbench.importers import trtexec
from latbench.importers.base import Source
from latbench.tables import Row

NETWORK = Row("00ff", "network", "text", arch=(1, 2))


def times(computes: list[Any]) -> list[dict[str, Any]]:
    """As sampleReporting.cpp of TensorRT's open-source samples writes them."""
    return [
        {
            "startH2dMs": 10.0 * i,
            "endH2dMs": 10.0 * i + 0.5,
            "startComputeMs": 10.0 * i + 0.5,
            "endComputeMs": 10.0 * i + 1,
            "startD2hMs": 10.0 * i + 1,
            "endD2hMs": 10.0 * i + 1.5,
            "h2dMs": 0.5,
            "computeMs": ms,
            "d2hMs": 0.5,
            "latencyMs": 99.0,
        }
        for i, ms in enumerate(computes)
    ]


def written(tmp_path: Path, text: str) -> Source:
    (tmp_path / "times.json").write_text(text)
    return Source(tmp_path / "times.json", device="titanxp", framework="tensorrt")


def test_the_row_has_the_samples_and_their_median(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(1, 2, 301).tolist()
    (row,) = trtexec.read(written(tmp_path, json.dumps(times(samples))), NETWORK, None, None).rows()
    assert row.samples_ms == tuple(samples)
    assert row.latency_ms == float(np.median(samples))
    assert row.ci_low_ms is not None
    assert row.ci_high_ms is not None
    assert row.ci_low_ms < row.latency_ms < row.ci_high_ms
    assert row.p99_ms == float(np.quantile(samples, 0.99))
    assert (row.key, row.arch, row.n_samples, row.origin, row.clock) == ("00ff", (1, 2), 301, "imported", "cuda_event")


def test_the_other_column(tmp_path: Path) -> None:
    table = trtexec.read(written(tmp_path, json.dumps(times([1.0]))), NETWORK, None, "latencyMs")
    assert table["00ff"] == 99.0
    assert table.provenance.policy["column"] == "latencyMs"
    assert table.provenance.backend == "tensorrt"


@pytest.mark.parametrize(
    ("text", "column", "match"),
    [
        ("[]", None, "not a list of times"),
        ('{"computeMs": 1}', None, "not a list of times"),
        ("[1.0]", None, "entry 0: has no computeMs"),
        (json.dumps(times([1.0]))[:-4], None, "not JSON, or cut off"),
        (json.dumps(times([1.0, 0.0])), None, r"entry 1, computeMs: a latency of 0\.0 ms"),
        (json.dumps(times([1.0, float("nan")])), None, "entry 1, computeMs: a latency of nan ms"),
        (json.dumps(times([1.0, -3])), None, r"entry 1, computeMs: a latency of -3\.0 ms"),
        (json.dumps(times(["1.0"])), None, "entry 0, computeMs: '1.0' is no number"),
        (json.dumps(times([1.0])), "endMs", "--column endMs: trtexec's times are computeMs and latencyMs"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, column: str | None, match: str) -> None:
    with pytest.raises(LatbenchError, match=match):
        trtexec.read(written(tmp_path, text), NETWORK, None, column)
