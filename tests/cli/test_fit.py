"""``latbench fit``: models of small real tables, what is said of them, and what is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import refused, run

from latbench.cli.fit import parse_hold_out
from latbench.errors import UsageError
from latbench.oracle import store
from latbench.oracle.lut import LutOracle
from latbench.oracle.validation import network_names, split, validate
from latbench.tables import LatencyTable

pytestmark = pytest.mark.usefixtures("linear")


def fit(table: Path, out: Path, *args: object) -> dict[str, Any]:
    result = run("fit", table, "-o", out, "--json", *args)
    assert (result.exit_code, result.stderr) == (0, "")
    return dict(json.loads(result.stdout))


def test_a_model_holds_what_was_fitted_and_how_far_off_it_is(table: Path, tmp_path: Path) -> None:
    told = fit(table, tmp_path / "m.npz", "--oracle", "lut")
    stored, whole = store.load(tmp_path / "m.npz"), LatencyTable.read(table)
    fitted, kept_out = split(whole, 0.2, 0)
    assert (told["oracle"], told["n_networks"], told["n_blocks"]) == ("lut", 24, len(whole.select(kind="block")))
    assert stored.notes == {
        **{k: told[k] for k in told.keys() - {"model", "oracle"}},
        "networks": stored.notes["networks"],
    }
    assert set(stored.notes["networks"]) == {name for names in network_names(fitted) for name in names}
    assert told["table"] == {"path": str(table), "sha256": hashlib.sha256(table.read_bytes()).hexdigest()}
    figures = validate(LutOracle.fit(whole), kept_out).to_dict()
    assert told["validation"] == {"method": "held out", "seed": 0, **figures}
    assert figures["mape"] < 1e-6  # the roofline model adds up
    archs, measured = whole.networks()
    np.testing.assert_allclose(stored.oracle.latencies(archs), measured, rtol=1e-6)


def test_the_figures_are_printed(table: Path, tmp_path: Path) -> None:
    result = run("fit", table, "--oracle", "linear", "-o", tmp_path / "m.npz", "--hold-out", "12")
    assert (result.exit_code, result.stderr) == (0, "")
    for words in ("linear of mobilenet_v1 on ", "18 networks", "on 12 networks kept out of the fit (seed 0)", "MAPE",
                  "5 %: ", "Kendall", "90% interval", f"model written to {tmp_path}/m.npz"):  # fmt: skip
        assert words in result.stdout, words


def test_the_seed_chooses_the_networks(table: Path, tmp_path: Path) -> None:
    first, again, other = (fit(table, tmp_path / "m.npz", "--oracle", "linear", "--seed", s) for s in (0, 0, 1))
    assert first["validation"] == again["validation"] != other["validation"]
    assert fit(table, tmp_path / "m.npz", "--oracle", "linear", "--hold-out", "50%")["validation"]["n"] == 15


def few(table: Path, folder: Path, n: int) -> Path:
    """The table with its first `n` networks only."""
    whole = LatencyTable.read(table)
    rows = np.flatnonzero((whole.frame["kind"] != "network") | ((whole.frame["kind"] == "network").cumsum() <= n))
    whole.take(rows).write(folder / f"few{n}.parquet")
    return folder / f"few{n}.parquet"


def test_few_networks_are_cross_validated_and_that_is_said(table: Path, tmp_path: Path) -> None:
    told = fit(few(table, tmp_path, 12), tmp_path / "m.npz", "--oracle", "linear")
    assert (told["n_networks"], told["validation"]["method"], told["validation"]["n"]) == (12, "cross-validation", 12)
    result = run("fit", few(table, tmp_path, 12), "--oracle", "linear", "-o", tmp_path / "m.npz")
    assert "5-fold cross-validation over 12 networks, then fitted to all: fewer than 20 are too few" in " ".join(
        result.stdout.split()
    )
    asked = fit(few(table, tmp_path, 12), tmp_path / "m.npz", "--oracle", "linear", "--hold-out", "3")
    assert (asked["n_networks"], asked["validation"]["method"], asked["validation"]["n"]) == (9, "held out", 3)


def test_blocks_alone_are_summed_and_nothing_is_claimed(table: Path, tmp_path: Path) -> None:
    result = run("fit", few(table, tmp_path, 0), "-o", tmp_path / "m.npz")
    assert result.exit_code == 0
    assert "lut of mobilenet_v1" in result.stdout
    assert "not: no measured networks in the table to validate on" in result.stdout
    assert "validation" not in store.load(tmp_path / "m.npz").notes


def test_options_reach_the_oracle(table: Path, tmp_path: Path) -> None:
    told = fit(table, tmp_path / "m.npz", "--oracle", "linear", "--option", "ridge=1")
    assert told["options"] == {"ridge": 1}
    assert told["validation"] != fit(table, tmp_path / "m.npz", "--oracle", "linear")["validation"]


BAD_INPUT = {
    "oracle": (["--oracle", "linaer"], "unknown oracle 'linaer': did you mean linear?"),
    "option": (["--option", "rigde=1"], "linear has no option 'rigde': ridge, note"),
    "option of letters": (["--option", "ridge=big"], "linear: ridge must be a number, got 'big'"),
    "option of a truth value": (["--option", "ridge=true"], "linear: ridge must be a number, got True"),
    "option that is a number": (["--option", "note=3"], "linear: note must be text, got 3"),
    "option out of range": (["--option", "ridge=-1"], "ridge must be above 0"),
    "option without a value": (["--option", "ridge"], "'ridge' is no setting: write NAME=VALUE"),
    "source": (["--source", "TABLE"], "linear takes no --source; transfer does"),
    "hold-out of letters": (["--hold-out", "some"], "'some' is no percentage"),
    "hold-out of all": (["--hold-out", "100%"], "'100%' keeps out all"),
    "hold-out of nothing": (["--hold-out", "0%"], "'0%' keeps out none"),
    "hold-out of too many": (["--hold-out", "30"], "cannot keep 30 of 30 measured networks out and fit on the rest"),
    "hold-out that leaves too few": (["--hold-out", "27"], "linear needs 4 measured networks, the table has 3"),
    "seed": (["--seed", "-1"], "-1 is not in the range"),
    "folder": (["-o", "/no/such/folder/m.npz"], "/no/such/folder is no directory"),
}


@pytest.mark.parametrize(("args", "words"), BAD_INPUT.values(), ids=list(BAD_INPUT))
def test_bad_input_is_one_line_and_nothing_is_written(args: list[str], words: str, table: Path, tmp_path: Path) -> None:
    args = [str(table) if arg == "TABLE" else arg for arg in args]
    assert words in refused("fit", table, "--oracle", "linear", "-o", tmp_path / "m.npz", *args)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_table_is_one_line(table: Path, tmp_path: Path) -> None:
    model = tmp_path / "m.npz"
    fit(table, model, "--oracle", "lut")
    (tmp_path / "text").write_text("hello")
    for name, words in (("text", "no parquet file"), ("absent", "No such file"), ("m.npz", "no parquet file")):
        assert words in refused("fit", tmp_path / name, "-o", tmp_path / "new.npz")
    assert not (tmp_path / "new.npz").exists()


def test_a_table_is_never_written_over(table: Path) -> None:
    before = table.read_bytes()
    assert "is a latency table, which a model would replace" in refused("fit", table, "-o", table)
    assert table.read_bytes() == before


def test_a_table_without_a_space_cannot_be_fitted(table: Path, tmp_path: Path) -> None:
    whole = LatencyTable.read(table)
    replace(whole, provenance=replace(whole.provenance, space="")).write(tmp_path / "t.parquet")
    assert "names no search space" in refused("fit", tmp_path / "t.parquet", "-o", tmp_path / "m.npz")


def test_a_full_disk_leaves_the_old_model(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "m.npz"
    fit(table, model, "--oracle", "lut")
    before = model.read_bytes()

    def full(file: Any, **arrays: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    words = refused("fit", table, "--oracle", "linear", "-o", model)
    assert "No space left on device; the file that was there is unchanged" in words
    assert model.read_bytes() == before
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize(
    ("text", "value"), [("20%", 0.2), ("0.5", 0.5), ("40", 40.0), ("0", 0.0), ("1", 1.0), ("0.5%", 0.005)]
)
def test_shares_and_numbers_are_told_apart(text: str, value: float) -> None:
    assert parse_hold_out(text) == value


@pytest.mark.parametrize("text", ["", "-1", "1.5", "110%", "100%", "1.0", "0.0", "all"])
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_hold_out(text)
