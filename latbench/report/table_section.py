"""A latency table as a section: what was measured, on what, how, how noisy, and what it came to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from latbench.report import charts
from latbench.report.parts import Column, Grid, Picture, Section
from latbench.report.words import (
    amount,
    conditions,
    failures,
    headline,
    kinds,
    machine,
    measured_rows,
    method,
    noise,
    two_digits,
)
from latbench.report.words import versions as versions_in_words
from latbench.tables import LatencyTable

N_TYPES = 7  # block types with a colour of their own; the rest are "other types"
N_SLOWEST = 15
_COLUMNS = (
    Column("name", "block or network"),
    Column("ms", "latency, ms", "ms"),
    Column("half", "± %", "percent"),
    Column("macs", "MACs", "count"),
    Column("rate", "GMAC/s", "number"),
    Column("kind", "kind", "word"),
    Column("remarks", "remarks"),
    Column("key", "key"),
)


def table_section(table: LatencyTable, name: str, source: str) -> Section:
    """`name` is the anchor and begins every file of the section, `source` says where the table was read."""
    grid = f"{name}-rows"
    rows = _rows(table)
    pictures, missing = [], []
    drawn = rows[(rows["ms"] > 0) & (rows["macs"] > 0) & (rows["kind"] != "stub") & (rows["status"] == "ok")]
    if drawn.empty:
        missing.append(_why_no_latencies(table, rows))
    else:
        pictures.append(_latency_picture(name, grid, rows, drawn))
        pictures.append(_slowest_picture(name, drawn))
    shares = 100 * noise(table.frame)
    if (shares > 0).any():
        pictures.append(_noise_picture(name, shares[shares > 0], table))
    elif len(rows):
        missing.append("How noisy the figures are: no row has an interval.")
    sums = table.notes.get("additivity") or {}
    if sums.get("measured_ms"):
        pictures.append(_sums_picture(name, sums))
    elif (rows["kind"] == "block").any():
        missing.append(
            "Whether sums of blocks foretell networks: no whole network was measured; latbench profile ... "
            "--networks 40 adds some."
        )
    caption = "Click a heading to sort; type to filter. Latencies are increments where a block was timed in context."
    grids = (Grid(grid, "All rows", caption, _COLUMNS, rows),) if len(rows) else ()
    facts = (*_facts(table), ("file", source))
    return Section(name, "table", headline(table), _lead(table), facts, tuple(missing), tuple(pictures), grids)


def _rows(table: LatencyTable) -> pd.DataFrame:
    """Every row as the grid and the charts show it; a failed row has no figures, its reason in `remarks`."""
    frame = table.frame
    ms = frame["latency_ref_ms"].astype(float).fillna(frame["latency_ms"].astype(float))
    ms = ms.where(frame["status"] == "ok")
    macs = frame["macs"].astype(float)
    low, high = (frame[name].astype(float).where(ms.notna()) for name in ("ci_low_ms", "ci_high_ms"))
    with np.errstate(divide="ignore", invalid="ignore"):
        half = 100 * (high - low) / 2 / ms.abs().where(ms != 0)
        rate = macs / ms.where(ms > 0) / 1e6
    rows: pd.DataFrame = pd.DataFrame(
        {
            "key": frame["key"],
            "kind": frame["kind"],
            "name": _names(frame),
            "site": frame["site"].astype(object).where(frame["site"].notna(), ""),
            "group": _groups(frame),
            "status": frame["status"],
            "macs": macs,
            "ms": ms,
            "low": low,
            "high": high,
            "half": half,
            "rate": rate,
            "remarks": _remarks(frame),
        }
    )
    return rows


def _names(frame: pd.DataFrame) -> pd.Series[Any]:
    """Block type and site, or the architecture, or the beginning of the signature."""
    columns = frame[["block_type", "site", "arch", "signature", "context", "kind"]].to_numpy(object)
    both = frame.loc[frame["kind"] == "block", "context"].nunique() > 1
    names = []
    for block_type, site, arch, signature, context, kind in columns:
        if isinstance(arch, list | tuple | np.ndarray):
            names.append(",".join(map(str, arch)))
        else:
            text = " at ".join(part for part in (block_type, site) if isinstance(part, str))
            isolated = ", isolated" if both and kind == "block" and context == "isolated" else ""
            names.append((text or str(signature)[:60]) + isolated)
    return pd.Series(names, frame.index, dtype=object)


def _groups(frame: pd.DataFrame) -> pd.Series[Any]:
    """Block types by frequency, the rare ones together; chains; whole networks."""
    types = frame["block_type"].astype(object).where(frame["block_type"].notna(), "blocks")
    counts = types[frame["kind"] == "block"].value_counts()
    kept = counts.index if len(counts) <= N_TYPES else counts.index[: N_TYPES - 1]
    groups = types.where(types.isin(kept), "other types").where(frame["kind"] != "network", "whole networks")
    named: pd.Series[Any] = groups.where(frame["kind"] != "chain", "chains of blocks")
    return named


def _remarks(frame: pd.DataFrame) -> pd.Series[Any]:
    texts = []
    for status, stage, error, warnings in frame[["status", "stage", "error", "warnings"]].to_numpy(object):
        if status != "ok":
            parts = [status, *(str(part) for part in (stage, error) if isinstance(part, str))]
            texts.append(" ".join(" ".join(parts).split()))
        else:
            texts.append(", ".join(warnings))
    return pd.Series(texts, frame.index, dtype=object)


def _lead(table: LatencyTable) -> str:
    found, p = measured_rows(table.frame), table.provenance
    if found.empty:
        return "The table holds no row that succeeded." if len(table) else "The table is empty."
    text = f"{kinds(table.frame[table.frame['kind'] != 'stub'])} on {p.device_name}: {conditions(p)}."
    for kind in ("network", "block"):
        ms = found.loc[found["kind"] == kind, "ms"]
        if len(ms) > 1:
            text += f" {kind.capitalize()}s take {amount(float(ms.median()))} at the median"
            text += f", {amount(float(ms.quantile(0.05)))} to {amount(float(ms.quantile(0.95)))} for nine in ten."
    return text


def _facts(table: LatencyTable) -> tuple[tuple[str, str], ...]:
    p, frame, notes = table.provenance, table.frame, table.notes
    settings = ", ".join(f"{name} {value}" for name, value in p.settings.items())
    failed = "; ".join(f"{n} x {reason}" for reason, n in list(failures(frame).items())[:8])
    warnings = frame["warnings"].explode().dropna().value_counts()
    found: list[tuple[str, str]] = [
        ("device", f"{p.device}: {machine(p)}"),
        ("software", versions_in_words(p)),
        ("space", f"{p.space} ({settings})" if p.space else ""),
        ("how", method(p)),
        ("origin", ", ".join(sorted(set(frame["origin"]) - {"measured"}))),
        ("noise", _noise_in_words(table)),
        ("failed", failed),
        ("warnings", ", ".join(f"{n} x {name}" for name, n in warnings.items())),
        ("conditions mixed", "; ".join(notes.get("mixed", ()))),
        ("made", " to ".join(filter(None, (p.started_at, p.finished_at)))),
        ("ids", f"environment {p.env_id}, policy {p.policy_id}"),
        ("command", p.command),
    ]
    return tuple((name, text) for name, text in found if text)


def _noise_in_words(table: LatencyTable) -> str:
    shares, canary = noise(table.frame), table.notes.get("canary") or {}
    parts = []
    if len(shares):
        parts.append(
            f"half of the interval is {np.median(shares):.2%} of the latency at the median, "
            f"{np.quantile(shares, 0.95):.2%} at the 95th percentile"
        )
    if canary.get("n"):
        parts.append(
            f"a reference block visited {canary['n']:.0f} times spread by {canary['spread']:.2%}, at worst "
            f"{canary['worst']:.2%}"
        )
    return "; ".join(parts)


def _why_no_latencies(table: LatencyTable, rows: pd.DataFrame) -> str:
    what = "Latency against MACs: "
    if not len(rows):
        return what + "the table holds no row; its run ended before the first one, or everything was filtered out."
    if (rows["status"] != "ok").all():
        reason, n = next(iter(failures(table.frame).items()))
        return what + f"none of {len(rows)} rows succeeded; {n} ended in {reason}."
    return what + "no row has both MACs and a latency above 0."


def _latency_picture(name: str, grid: str, rows: pd.DataFrame, drawn: pd.DataFrame) -> Picture:
    n_flat = int(((rows["ms"] <= 0) & (rows["kind"] != "stub")).sum())
    bars = len(drawn) <= charts.MANY and drawn["low"].notna().any()
    caption = "Every block and network; those on one dashed line run at one rate, its number in GMAC/s."
    caption += " Bars are the intervals of the latencies." if bars else ""
    caption += " Click a type in the legend to see it alone."
    if n_flat:
        caption += f" {n_flat} increments at or below 0 ms cannot be drawn on this axis; the table has them."
    spec = charts.latencies(drawn, grid)
    return Picture(f"{name}-latency", "Latency against multiply-accumulates", caption, spec)


def _slowest_picture(name: str, drawn: pd.DataFrame) -> Picture:
    blocks = drawn[drawn["kind"] == "block"]
    what, of = ("blocks", blocks) if len(blocks) else ("networks", drawn)
    top = of.nlargest(N_SLOWEST, "ms")
    rows = [
        {
            "name": f"{row.site or row.kind} · {row.key[:6]}",
            "group": row.group,
            "value": row.ms,
            "low": row.low if np.isfinite(row.low) else row.ms,
            "high": row.high if np.isfinite(row.high) else row.ms,
        }
        for row in top.itertuples()
    ]
    share = float(top["ms"].sum() / of["ms"].sum())
    caption = f"The {len(top)} slowest of {len(of):,} {what}, with their intervals; the digits begin the row's key."
    if len(top) < len(of):
        caption += f" Together they are {share:.0%} of the time of all."
    return Picture(f"{name}-slowest", f"The slowest {what}", caption, charts.intervals(rows, "latency, ms"))


def _noise_picture(name: str, percents: Any, table: LatencyTable) -> Picture:
    confidence = 100 * float(table.provenance.policy.get("confidence", 0.95))
    chart = charts.histogram(percents, f"half of the {confidence:g} % interval, % of the latency")
    caption = (
        f"How well each row is known, from the spread between blocks of samples and processes: half of its interval is "
        f"{two_digits(float(np.median(percents)))} % of the latency at the median, "
        f"{two_digits(float(np.quantile(percents, 0.95)))} % at the 95th "
        "percentile. Increments of small blocks are known least: they are differences of two figures."
    )
    return Picture(f"{name}-noise", "Noise", caption, chart)


def _sums_picture(name: str, sums: dict[str, Any]) -> Picture:
    beyond = sums.get("beyond_cache")
    kinds = {"sums of blocks": sums, **({"with cache misses": beyond} if beyond else {})}
    rows = [
        {"measured": measured, "predicted": predicted, "group": kind}
        for kind, one in kinds.items()
        for measured, predicted in zip(one["measured_ms"], one["predicted_ms"], strict=True)
    ]
    chart = charts.agreement(rows, "network measured, ms", "sum of its blocks, ms")
    caption = f"{len(sums['measured_ms'])} networks against the sums of their blocks; nothing is fitted to them."
    forms = {"mape": "Mean error {:.2%}", "bias": "bias {:+.2%}", "spearman": "Spearman {:.4f}"}
    told = [form.format(sums[key]) for key, form in forms.items() if sums.get(key) is not None]
    caption += f" {', '.join(told)}." if told else ""
    halves = [sums[key]["mape"] for key in ("fewer_params", "more_params") if key in sums]
    if len(halves) == 2:
        caption += f" The half with fewer parameters: {halves[0]:.2%}; with more: {halves[1]:.2%}."
    if beyond:
        caption += f" With what chains of blocks pay for weights beyond the cache: mean error {beyond['mape']:.2%}."
    return Picture(f"{name}-sums", "Do blocks add up to networks?", caption, chart)
