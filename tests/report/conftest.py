"""Tables, models and searches for the report: the roofline back-end's, whose sums of blocks are exact."""

from __future__ import annotations

from pathlib import Path

import pytest
from found import make_found

from latbench.oracle.fitting import fit
from latbench.oracle.store import StoredModel
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.tables import LatencyTable
from searchers.testing import roofline_table

SPACE = MobileNetV1Space(resolution=32, levels=2, num_classes=10)


@pytest.fixture(scope="session")
def table() -> LatencyTable:
    """All blocks of a small space."""
    return roofline_table(SPACE)


@pytest.fixture(scope="session")
def found_folder(tmp_path_factory: pytest.TempPathFactory, table: LatencyTable) -> Path:
    """A finished search."""
    return make_found(tmp_path_factory.mktemp("found") / "run", table)


@pytest.fixture(scope="session")
def stored(table: LatencyTable) -> StoredModel:
    """Sums of blocks, validated on nothing."""
    return fit("lut", table)
