from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from latbench import devices, host, plugins
from latbench.cli import cli


@pytest.fixture(autouse=True)
def no_profiles_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LATBENCH_DEVICES", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def output(*args: str) -> str:
    result = CliRunner().invoke(cli, ["devices", *args])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_holds_host_matches_and_back_ends() -> None:
    found = json.loads(output("--json"))
    assert found["host"]["cpu_model"] == host.read().cpu_model
    assert found["matches"][-1] == {"profile": "cpu", "index": None}
    assert found["auto"] in {match["profile"] for match in found["matches"]}
    assert [profile["name"] for profile in found["profiles"]] == [match["profile"] for match in found["matches"]]
    works = {backend["name"]: backend["works"] for backend in found["backends"]}
    assert set(works) == set(plugins.names("latbench.backends"))
    assert works["onnxruntime"]


def test_json_of_all_profiles() -> None:
    assert [profile["name"] for profile in json.loads(output("--json", "--all"))["profiles"]] == list(
        devices.profiles()
    )


def test_the_table_names_host_profiles_and_back_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    few, every = output(), output("--all")
    assert host.read().cpu_model.split()[0] in few
    assert "titanxp" not in few
    for name, profile in devices.profiles().items():
        assert any(line.startswith(f"{name} ") and profile.title in line for line in every.splitlines())
    for name in plugins.names("latbench.backends"):
        assert f"\n{name} " in few
    assert max(map(len, every.splitlines())) <= 80
    assert "…" not in every
    assert "\x1b" not in every  # no colour where nobody sees it


def test_a_malformed_profile_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "d.toml").write_text("[titanxp]\nkind = 1\n")
    monkeypatch.setenv("LATBENCH_DEVICES", str(tmp_path / "d.toml"))
    result = CliRunner().invoke(cli, ["devices"])
    assert result.exit_code == 1
    assert result.stderr == f"Error: {tmp_path}/d.toml: [titanxp] kind = 1: must be gpu or cpu\n"


def test_a_back_end_that_does_not_work_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "absent_runtime-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: absent-runtime\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[latbench.backends]\nabsent = absent_runtime:Backend\n")
    monkeypatch.syspath_prepend(tmp_path)
    status = {backend["name"]: backend for backend in json.loads(output("--json"))["backends"]}["absent"]
    assert not status["works"]
    assert "absent_runtime" in status["problem"]
    assert "pip install" in status["problem"]
    assert "pip install" in " ".join(output().split())
