"""A fitted model as a section: what it was fitted to, how far off it is, predictions against measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from latbench.errors import LatbenchError
from latbench.oracle.store import StoredModel
from latbench.oracle.validation import Predictions, unseen
from latbench.report import charts
from latbench.report.parts import Column, Grid, Picture, Section
from latbench.report.words import conditions
from latbench.tables import LatencyTable

_COLUMNS = (
    Column("arch", "architecture"),
    Column("measured", "measured, ms", "ms"),
    Column("predicted", "predicted, ms", "ms"),
    Column("off", "off by, %", "percent"),
    Column("low", "low, ms", "ms"),
    Column("high", "high, ms", "ms"),
)


def model_section(stored: StoredModel, name: str, source: str, tables: Sequence[LatencyTable]) -> Section:
    """`tables` are those of the same page: the first of the model's space gives networks to compare with, those that
    were not in the fit where there are any."""
    model, p = stored.oracle, stored.oracle.provenance
    found, kind, missing = _predictions(stored, tables)
    pictures: tuple[Picture, ...] = ()
    grids: tuple[Grid, ...] = ()
    if found is not None:
        frame = _frame(found)
        columns = _COLUMNS if found.interval is not None else _COLUMNS[:-2]
        pictures, grids = (_picture(name, found, frame, kind),), (
            Grid(f"{name}-networks", "Predicted and measured", f"Networks {kind}.", columns, frame),
        )  # fmt: skip
    title = f"{model.name}: {p.space} on {p.device_name}"
    facts = (*_facts(stored), ("file", source))
    return Section(name, "model", title, _lead(stored), facts, missing, pictures, grids)


def _predictions(
    stored: StoredModel, tables: Sequence[LatencyTable]
) -> tuple[Predictions | None, str, tuple[str, ...]]:
    """Predictions of a table's networks, which networks these are, and why there are none."""
    p = stored.oracle.provenance
    of_space = [t for t in tables if (t.provenance.space, t.provenance.settings) == (p.space, p.settings)]
    with_networks = [table for table in of_space if len(table.select(kind="network", status="ok"))]
    if not with_networks:
        return None, "", ("Predicted against measured: give a table with measured networks of this space beside it.",)
    table, kind = with_networks[0], "that the model was fitted to"
    if "networks" in stored.notes:
        new = unseen(table, stored.notes["networks"])
        table, kind = (new, "that the model had not seen") if len(new) else (table, kind)
    try:
        return Predictions.of(stored.oracle, table), kind, ()
    except LatbenchError as error:
        return None, "", (f"Predicted against measured: {error}.",)


def _frame(found: Predictions) -> pd.DataFrame:
    low, high = found.interval if found.interval is not None else (None, None)
    frame: pd.DataFrame = pd.DataFrame(
        {
            "arch": [",".join(map(str, arch)) for arch in found.archs.tolist()],
            "measured": found.measured,
            "predicted": found.predicted,
            "off": 100 * found.relative,
            "low": low if low is not None else float("nan"),
            "high": high if high is not None else float("nan"),
        }
    )
    return frame


def _picture(name: str, found: Predictions, frame: pd.DataFrame, kind: str) -> Picture:
    names = ["measured", "predicted", *(("low", "high") if found.interval is not None else ())]
    rows = frame.rename(columns={"arch": "name"})[["name", *names]].to_dict("records")
    chart = charts.agreement([dict(row) for row in rows], "measured, ms", "predicted, ms")
    figures = found.validation()
    caption = f"{figures.n} networks {kind}: mean error {figures.mape:.2%}, bias {figures.bias:+.2%}"
    caption += f", Spearman {figures.spearman:.4f}." if figures.spearman is not None else "."
    if figures.coverage is not None:
        caption += (
            f" Bars are {figures.confidence:.0%} intervals; they hold {figures.coverage:.0%} of the measurements."
        )
    if figures.n_missing:
        caption += f" {figures.n_missing} networks with a block that has no entry are left out."
    return Picture(f"{name}-predictions", "Predicted against measured", caption, chart)


def _lead(stored: StoredModel) -> str:
    notes, validation = stored.notes, stored.notes.get("validation")
    fitted = [f"{notes[key]:,} {key[2:]}" for key in ("n_blocks", "n_networks") if notes.get(key)]
    text = f"Fitted to {' and '.join(fitted) or 'a table'} under {conditions(stored.oracle.provenance)}."
    if validation is None:
        return f"{text} How far it is off was not told: {notes.get('unvalidated', 'its notes hold no figures')}."
    return f"{text} On networks kept out of the fit it is {validation['mape']:.2%} off on average."


def _facts(stored: StoredModel) -> tuple[tuple[str, str], ...]:
    notes: Mapping[str, Any] = stored.notes
    v = notes.get("validation")
    found = [("options", ", ".join(f"{k} {v}" for k, v in notes.get("options", {}).items()))]
    if v is not None:
        found += [
            ("validated", f"{v['method']}, {v['n']} networks"),
            ("error", f"mean {v['mape']:.2%}, bias {v['bias']:+.2%}, RMSE {v['rmse']:.3g} {stored.oracle.unit}"),
            ("within", f"5 %: {v['within_5']:.0%} of networks, 10 %: {v['within_10']:.0%}"),
        ]
        ranks = [f"{name} {v[key]:.4f}" for name, key in (("Kendall", "kendall"), ("Spearman", "spearman")) if v[key]]
        found.append(("rank", ", ".join(ranks)))
        if v["coverage"] is not None:
            held = f"{v['confidence']:.0%} intervals hold {v['coverage']:.1%}, mean half-width {v['half_width']:.2%}"
            found.append(("interval", held))
    found += [("fitted", str(notes.get("fitted_at", ""))), ("command", str(notes.get("command", "")))]
    return tuple((name, text) for name, text in found if text)
