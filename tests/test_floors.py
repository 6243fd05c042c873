"""What imports what: the floors of the two packages, and what stays out of a process that does not need it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from latbench.cli import COMMANDS

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "numpy", "pandas", "pyarrow", "scipy", "matplotlib", "ray")


def loaded(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    report = "import sys; print(' '.join(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.splitlines()[-1].split())


def test_modules_import_from_floors_below_only() -> None:
    tool = shutil.which("lint-imports", path=f"{Path(sys.executable).parent}")
    if tool is None:
        pytest.skip("import-linter is not installed: pip install 'latbench[dev]'")
    done = subprocess.run([tool, "--no-cache"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=lambda words: "-".join(words) or "latbench")
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"""
from latbench.cli import cli
try:
    cli.main({[*words, "--help"]!r})
except SystemExit as end:
    assert not end.code"""
    assert not loaded(code) & set(HEAVY)


@pytest.mark.parametrize(
    "module",
    ["profiling", "profiling.bench", "tables", "measure.worker", "measure.launcher", "measure.statistics", "cli",
     "spaces.base", "spaces.mobilenet_v1", "spaces.nasbench201", "cli.profile", "cli.bench", "testing", "report"],
)  # fmt: skip
def test_no_torch_where_nothing_is_trained(module: str) -> None:
    assert not loaded(f"import latbench.{module}") & {"torch", "torchvision", "ray", "matplotlib"}


@pytest.mark.parametrize("module", ["measure.worker", "backends.onnxruntime", "measure.probe", "measure.base"])
def test_what_a_worker_imports_is_numpy_and_the_standard_library(module: str) -> None:
    assert not loaded(f"import latbench.{module}") & (set(HEAVY) - {"numpy"} | {"click", "rich"})
