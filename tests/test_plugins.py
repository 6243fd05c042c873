"""Third-party plug-ins, registered for real: a package and its dist-info folder on ``sys.path``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from latbench import plugins
from latbench.errors import BackendUnavailableError, EnvironmentUnfitError, UsageError

ENTRY_POINTS = """
[latbench.spaces]
toy = thirdparty.spaces:ToySpace
typo = thirdparty.spaces:NoSuchSpace
moved = thirdparty.elsewhere:ToySpace

[latbench.backends]
quantum = thirdparty.quantum:QuantumBackend [quantum]
needy = thirdparty.quantum:QuantumBackend
broken = thirdparty.broken:BrokenBackend
"""


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution "thirdparty-latbench", forgotten by sys.modules afterwards."""
    package = tmp_path / "thirdparty"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "spaces.py").write_text("class ToySpace:\n    name = 'toy'\n")
    (package / "quantum.py").write_text("import qubits_runtime.engine\n")
    (package / "broken.py").write_text("raise ImportError('libquantum.so.3: cannot open shared object file')\n")
    _register(tmp_path, "thirdparty_latbench", ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("", ".spaces", ".quantum", ".broken"):
        monkeypatch.delitem(sys.modules, f"thirdparty{name}", raising=False)
    return tmp_path


def _register(folder: Path, name: str, text: str) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(text)


@pytest.mark.usefixtures("third_party")
def test_third_party_space_is_found_and_loaded() -> None:
    assert "toy" in plugins.names("latbench.spaces")
    assert plugins.spec("latbench.spaces", "toy") == "thirdparty.spaces:ToySpace"
    assert plugins.load("latbench.spaces", "toy").name == "toy"


@pytest.mark.usefixtures("third_party")
def test_names_and_spec_import_nothing() -> None:
    assert "quantum" in plugins.names("latbench.backends")
    assert plugins.spec("latbench.backends", "quantum") == "thirdparty.quantum:QuantumBackend"  # without its extra
    assert "thirdparty" not in sys.modules


def test_built_in_spaces_are_registered_like_any_other() -> None:
    if "mobilenet_v1" not in plugins.names("latbench.spaces"):
        pytest.skip("latbench is not installed here: pip install -e .")
    for name in ("mobilenet_v1", "nasbench201"):
        assert plugins.load("latbench.spaces", name).name == name


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize("ask", [plugins.load, plugins.spec])
def test_unknown_name_is_answered_with_the_nearest_and_all(ask: Callable[[str, str], object]) -> None:
    with pytest.raises(UsageError, match=r"unknown search space 'toyy': did you mean toy\? known: .*toy, typo"):
        ask("latbench.spaces", "toyy")
    with pytest.raises(UsageError, match=r"unknown search space 'xyzzy': known: "):
        ask("latbench.spaces", "xyzzy")


def test_unknown_group_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown plug-in group 'latbench.widgets': latbench.backends, "):
        plugins.names("latbench.widgets")


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("quantum", r"no module qubits_runtime\. Run: pip install 'thirdparty-latbench\[quantum\]'"),
        ("needy", r"no module qubits_runtime\. Run: pip install qubits_runtime"),
        ("broken", r"libquantum\.so\.3: cannot open"),
    ],
)
def test_missing_runtime_is_answered_with_what_to_install(name: str, command: str) -> None:
    with pytest.raises(BackendUnavailableError, match=f"back-end {name} cannot be imported: {command}"):
        plugins.load("latbench.backends", name)


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize("name", ["typo", "moved"])
def test_registration_that_points_nowhere_says_so(name: str) -> None:
    with pytest.raises(EnvironmentUnfitError, match=r"thirdparty-latbench registers .* --force-reinstall"):
        plugins.load("latbench.spaces", name)


def test_package_found_twice_is_one_plug_in(third_party: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = third_party / "copy"
    copy.mkdir()
    _register(copy, "another_name_for_it", "[latbench.spaces]\ntoy = thirdparty.spaces:ToySpace\n")
    monkeypatch.syspath_prepend(copy)
    assert plugins.load("latbench.spaces", "toy").name == "toy"


def test_two_plug_ins_of_one_name_are_refused(third_party: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rival = third_party / "rival"
    rival.mkdir()
    _register(rival, "rival", "[latbench.spaces]\ntoy = rival.spaces:ToySpace\n")
    monkeypatch.syspath_prepend(rival)
    with pytest.raises(UsageError, match=r"two packages register the search space toy: .* uninstall one"):
        plugins.load("latbench.spaces", "toy")
