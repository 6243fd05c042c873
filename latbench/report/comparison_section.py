"""A comparison of two tables as a section, and as Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from latbench.compare import VERDICTS, Change, Comparison
from latbench.report import charts
from latbench.report.parts import Column, Grid, Picture, Section

N_SHOWN = 15  # rows of a picture, of a summary
_COLUMNS = (
    Column("verdict", "verdict", "verdict"),
    Column("name", "block or network"),
    Column("change", "change, %", "percent"),
    Column("low", "low, %", "percent"),
    Column("high", "high, %", "percent"),
    Column("old_ms", "old, ms", "ms"),
    Column("new_ms", "new, ms", "ms"),
    Column("kind", "kind", "word"),
    Column("key", "key"),
)


def comparison_section(found: Comparison, old: str, new: str, name: str = "comparison") -> Section:
    """`old` and `new` say where the tables were read; `name` is the anchor."""
    frame = _frame(found.rows)
    missing = [f"{len(texts)} rows {words}: {texts[0]}" for texts, words in _left_out(found) if texts]
    caption = "The interval is that of one row by itself; the verdicts account for how many rows are looked at."
    facts = (
        ("old", old),
        ("new", new),
        ("compared at", found.clock),
        ("threshold", f"{found.threshold:.1%}"),
        ("confidence", f"{found.confidence:.0%}"),
        ("conditions that differ", "; ".join(found.differs)),
        ("verdicts", VERDICT_WORDS),
    )
    return Section(
        name,
        "comparison",
        f"{new} against {old}",
        " ".join(summary(found)),
        tuple((label, text) for label, text in facts if text),
        tuple(missing),
        _pictures(found, name),
        (Grid(f"{name}-rows", "Row by row", caption, _COLUMNS, frame),),
    )


VERDICT_WORDS = (
    "SLOWER and FASTER: surely by more than the threshold (false discoveries of all rows kept below 1 - confidence); "
    "SAME: surely within it; UNSURE: the measurements cannot tell."
)


def summary(found: Comparison) -> list[str]:
    """The answer in sentences: verdicts, then the mean of each kind of row."""
    counts = found.counts
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    sentences = [f"Of {len(found.rows)} rows {told} (threshold {found.threshold:.1%})."]
    return sentences + [
        f"{one.kind.capitalize()}s change by {100 * (one.ratio - 1):+.2f} % ({100 * (one.low - 1):+.2f} to "
        f"{100 * (one.high - 1):+.2f} %; geometric mean of {one.n})."
        for one in found.overall
    ]


def markdown(found: Comparison, old: str, new: str) -> str:
    """GitHub-flavoured: a headline, the summary, a table of what changed; the rest folded away."""
    counts = found.counts
    head = "regression" if found.regressed else "improvement" if counts["FASTER"] else "no change"
    lines = [f"### latbench: {head} beyond {found.threshold:.1%}", "", *summary(found), ""]
    lines += [f"`{old}` → `{new}`, at {found.clock}.", ""]
    lines += [f"- differs: {text}" for text in found.differs]
    lines += [f"- {len(texts)} rows {words}: {texts[0]}" for texts, words in _left_out(found) if texts]
    changed = [row for row in found.rows if row.verdict in ("SLOWER", "FASTER")]
    lines += ["", *_table(changed[:N_SHOWN])] if changed else []
    if len(changed) > N_SHOWN:
        lines.append(f"\nand {len(changed) - N_SHOWN} more.")
    unsure = [row for row in found.rows if row.verdict == "UNSURE"]
    if unsure:
        lines += [
            "",
            f"<details><summary>{len(unsure)} unsure</summary>",
            "",
            *_table(unsure[:N_SHOWN]),
            "",
            "</details>",
        ]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Change]) -> list[str]:
    lines = ["| verdict | row | change | 95 % interval | old | new |", "|---|---|---:|---:|---:|---:|"]
    for row in rows:
        name = f"{row.name} `{row.key[:8]}`".replace("|", "\\|")
        lines.append(
            f"| {row.verdict} | {name} | {100 * (row.ratio - 1):+.2f} % | {100 * (row.low - 1):+.2f} to "
            f"{100 * (row.high - 1):+.2f} % | {row.old_ms:.4g} ms | {row.new_ms:.4g} ms |"
        )
    return lines


def _left_out(found: Comparison) -> tuple[tuple[Sequence[str], str], ...]:
    return (found.lost, "of OLD have no figure in NEW"), (found.skipped, "cannot be compared")


def _frame(rows: Sequence[Change]) -> pd.DataFrame:
    percent = {n: [100 * (getattr(row, n) - 1) for row in rows] for n in ("ratio", "low", "high")}
    frame: pd.DataFrame = pd.DataFrame(
        {
            "verdict": [row.verdict for row in rows],
            "name": [row.name for row in rows],
            "change": percent["ratio"],
            "low": percent["low"],
            "high": percent["high"],
            **{n: [getattr(row, n) for row in rows] for n in ("old_ms", "new_ms", "q_change", "q_same", "kind", "key")},
        }
    )
    return frame


def _pictures(found: Comparison, name: str) -> tuple[Picture, ...]:
    points = [
        {"name": f"{row.name} {row.key[:6]}", "ms": row.old_ms, "change": 100 * (row.ratio - 1), "group": row.verdict}
        for row in reversed(found.rows)
    ]
    caption = f"Every row: its change against its latency. The dashed lines are the threshold, {found.threshold:.1%}."
    pictures = [Picture(f"{name}-changes", "Change by latency", caption, charts.changes(points, found.threshold))]
    top = sorted(found.rows, key=lambda row: -abs(row.ratio - 1))[:N_SHOWN]
    rows = [
        {
            "name": f"{row.name[:24]} · {row.key[:6]}",
            "group": row.verdict,
            "value": 100 * (row.ratio - 1),
            "low": 100 * (row.low - 1),
            "high": 100 * (row.high - 1),
        }
        for row in sorted(top, key=lambda row: -row.ratio)
    ]
    caption = f"The {len(rows)} rows that moved most, each with its own {found.confidence:.0%} interval."
    chart = charts.intervals(rows, "change, %")
    pictures.append(Picture(f"{name}-largest", "The largest changes", caption, chart))
    return tuple(pictures)
