"""Small real tables, made once by ``latbench profile`` with the roofline back-end; sums of their blocks are exact."""

from __future__ import annotations

from pathlib import Path

import linear_oracle
import pytest
from command_line import run

SPACE = [
    "--space",
    "mobilenet_v1",
    "--resolution",
    "32",
    "--set",
    "levels=2",
    "--set",
    "max_width=0.75",
    "--set",
    "num_classes=10",
]
PROFILE = ["profile", "--device", "cpu", "--backend", "roofline", *SPACE, "--runs", "1", "--rounds", "1"]


def _table(folder: Path, *args: object) -> Path:
    path = folder / "t.parquet"
    assert run(*PROFILE, *args, "-o", path).exit_code == 0
    return path


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All blocks and 30 networks."""
    return _table(tmp_path_factory.mktemp("table"), "--networks", 30)


@pytest.fixture(scope="session")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same space under the same conditions: 8 other networks."""
    return _table(tmp_path_factory.mktemp("others"), "--networks", 8, "--seed", 1)


@pytest.fixture
def linear(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the oracle "linear", which fits whole networks."""
    linear_oracle.register(tmp_path_factory.mktemp("plugin"), monkeypatch)
