from __future__ import annotations

from pathlib import Path

import linear_oracle
import pytest


@pytest.fixture
def linear(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the oracle "linear"."""
    linear_oracle.register(Path(tmp_path_factory.mktemp("plugin")), monkeypatch)
