"""``latbench validate``: only networks that the model has not seen, only under its conditions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import refused, run

from latbench.oracle import store
from latbench.oracle.validation import split, validate
from latbench.tables import LatencyTable

pytestmark = pytest.mark.usefixtures("linear")


@pytest.fixture
def model(table: Path, tmp_path: Path) -> Path:
    assert run("fit", table, "--oracle", "linear", "--hold-out", 10, "-o", tmp_path / "m.npz").exit_code == 0
    return tmp_path / "m.npz"


def told(*args: object) -> dict[str, Any]:
    result = run("validate", *args, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return dict(json.loads(result.stdout))


def test_known_networks_are_left_out(model: Path, table: Path, others: Path) -> None:
    stored, whole = store.load(model), LatencyTable.read(table)
    _, kept_out = split(whole, 10, 0)
    found = told(model, table)
    figures = validate(stored.oracle, kept_out).to_dict()
    assert {name: found[name] for name in figures} == figures
    assert {k: v for k, v in stored.notes["validation"].items() if k in figures} == figures
    assert (found["n"], found["n_known"], found["differences"]) == (10, 20, [])
    assert told(model, table, "--all")["n"] == 30
    assert (told(model, others)["n"], told(model, others)["n_known"]) == (8, 0)


def test_every_network_is_in_the_json(model: Path, others: Path) -> None:
    found = told(model, others)["networks"]
    archs, measured = LatencyTable.read(others).networks()
    oracle = store.load(model).oracle
    np.testing.assert_array_equal([one["arch"] for one in found], archs)
    np.testing.assert_allclose([one["measured_ms"] for one in found], measured)
    np.testing.assert_allclose([one["predicted_ms"] for one in found], oracle.latencies(archs))
    assert all(one["low_ms"] < one["predicted_ms"] < one["high_ms"] for one in found)


def test_the_figures_are_printed(model: Path, table: Path) -> None:
    out = " ".join(run("validate", model, table, "--confidence", "80%").stdout.split())
    for words in ("linear of mobilenet_v1 on ", "10 networks of ", "(20 that it was fitted to left out)", "MAPE ",
                  "5 %: ", "bias ", "RMSE ", "Kendall ", "Spearman ", "80% interval holds "):  # fmt: skip
        assert words in out, words


def test_a_model_without_an_interval_says_so(table: Path, tmp_path: Path) -> None:
    run("fit", table, "--oracle", "lut", "-o", tmp_path / "m.npz")
    assert "interval none: too few networks" in " ".join(run("validate", tmp_path / "m.npz", table).stdout.split())
    found = told(tmp_path / "m.npz", table)
    assert (found["coverage"], found["half_width"]) == (None, None)
    assert found["mape"] < 1e-6


def test_nothing_new_is_one_line(table: Path, tmp_path: Path) -> None:
    model = tmp_path / "m.npz"
    run("fit", table, "--oracle", "linear", "--hold-out", 0, "-o", model)
    assert "was fitted to all 30 networks" in refused("validate", model, table)
    assert told(model, table, "--all")["n"] == 30
    stored = store.load(model)
    store.save(model, stored.oracle)
    assert "does not say which networks it was fitted to: --all" in refused("validate", model, table)


def test_a_table_without_networks_is_one_line(model: Path, table: Path, tmp_path: Path) -> None:
    LatencyTable.read(table).select(kind="block").write(tmp_path / "t.parquet")
    assert "no measured network" in refused("validate", model, tmp_path / "t.parquet")


def changed(table: Path, out: Path, **conditions: Any) -> Path:
    whole = LatencyTable.read(table)
    replace(whole, provenance=replace(whole.provenance, **conditions)).write(out)
    return out


def test_other_conditions_are_refused_unless_forced(model: Path, others: Path, tmp_path: Path) -> None:
    one = changed(others, tmp_path / "t.parquet", device_name="Another", versions={"roofline": "7"})
    words = refused("validate", model, one)
    assert "device_name: " in words
    assert "/ Another" in words
    assert "versions.roofline: 1 / 7" in words
    assert "--force" in words
    result = run("validate", model, one, "--force", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["n"] == 8
    assert len(json.loads(result.stdout)["differences"]) == result.stderr.count("Warning: ") >= 2


def test_another_space_is_refused_whatever_is_forced(model: Path, others: Path, tmp_path: Path) -> None:
    settings = {**LatencyTable.read(others).provenance.settings, "num_classes": 11}
    for change in ({"settings": settings}, {"space": "nasbench201", "settings": {}}):
        one = changed(others, tmp_path / "t.parquet", **change)
        assert "holds other networks" in refused("validate", model, one, "--force")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_picture_is_drawn(model: Path, table: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="the report extra is not installed")
    path = tmp_path / f"p{suffix}"
    result = run("validate", model, table, "--all", "--plot", path)
    assert result.exit_code == 0
    assert result.stdout.endswith(f"picture: {path}\n")
    assert path.stat().st_size > 8_000


def test_what_cannot_be_drawn_is_one_line(model: Path, table: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the report extra is not installed")
    assert "its name must end in .png, .svg, .pdf" in refused("validate", model, table, "--plot", tmp_path / "p.gif")
    assert "cannot write the picture" in refused("validate", model, table, "--plot", tmp_path / "no" / "p.png")


def test_the_wrong_way_round_is_told(model: Path, table: Path) -> None:
    assert "is a table, not a fitted model: latbench fit" in refused("validate", table, model)
    assert "no parquet file" in refused("validate", model, model)
    assert "No such file" in refused("validate", model.with_name("absent"), table)
    assert "between 0% and 100%" in refused("validate", model, table, "--confidence", "0%")


# -- latbench show MODEL


def test_show_tells_what_a_model_is(model: Path, table: Path) -> None:
    stored = store.load(model)
    notes, p = stored.notes, stored.oracle.provenance
    out = " ".join(run("show", model).stdout.split())
    mape = f"MAPE {notes['validation']['mape']:.2%}"
    for words in ("model linear", p.device_name, f"environment {p.env_id}", "blocks and 20 networks of", mape,
                  "on 10 networks kept out of the fit (seed 0)", notes["fitted_at"], "roofline 1"):  # fmt: skip
        assert words in out, words
    facts = json.loads(run("show", model, "--json").stdout)
    assert facts["notes"] == notes
    assert facts["provenance"] == p.to_dict()


def test_show_refuses_what_only_tables_have(model: Path) -> None:
    for args in (["ab12"], ["--kind", "block"], ["--limit", 3], ["--plot", "p.png"], ["--sort", "key"]):
        assert "is a fitted model, which has no rows" in refused("show", model, *args)
    assert "does not say which command made it" in refused("show", model, "--command")  # made in this process


def test_show_of_a_damaged_model_is_one_line(model: Path) -> None:
    model.write_bytes(model.read_bytes()[:300])
    assert str(model) in refused("show", model)
