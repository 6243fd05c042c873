"""The documentation builds without a warning, holds every module, and every public name says what it is."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built documentation."""
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    pytest.importorskip("mkdocstrings_handlers.python", reason="the docs extra is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-q",
        "-f",
        ROOT / "docs" / "mkdocs.yml",
        "-d",
        folder,
    ]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def test_the_documentation_builds_without_warnings_and_has_every_command(site: Path) -> None:
    from latbench.cli import COMMANDS

    text = (site / "reference" / "commands.html").read_text()
    assert all(f"Usage: latbench {name}" in text for name in COMMANDS)


def test_fields_are_told_with_the_comments_behind_them(site: Path) -> None:
    text = (site / "reference" / "tables.html").read_text()
    assert "as measured, of the blocks that count" in text  # of Row.latency_ms
    assert 'id="latbench.tables.LatencyTable.merge"' in text


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        for word in ('src="http', 'rel="stylesheet" href="http', "@import"):
            assert word not in page.read_text(), f"{page.name} loads {word}"


def test_every_public_name_has_a_docstring() -> None:
    missing = [text for path in sources() for text in undocumented(path)]
    assert missing == []


def sources() -> Iterator[Path]:
    for package in ("latbench", "searchers"):
        yield from sorted((ROOT / package).rglob("*.py"))


def undocumented(path: Path) -> list[str]:
    """Public modules, classes and functions of a file without a docstring.

    Methods inherit theirs from the contract that they fulfil, so they are not asked for one.
    """
    tree = ast.parse(path.read_text())
    where = path.relative_to(ROOT)
    found = [] if ast.get_docstring(tree) or not tree.body else [f"{where}: the module"]
    for node in tree.body:
        public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
        if public and not ast.get_docstring(node):  # type: ignore[arg-type]
            found.append(f"{where}: {node.name}")  # type: ignore[union-attr]
    return found
