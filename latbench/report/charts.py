"""The charts of a report as Vega-Lite specifications, made with Altair: one description for the page and for papers.

Altair was chosen over Plotly and Bokeh because its specification is data: the page draws it with an inlined runtime of
0.9 MB (Plotly's takes several), and ``vl-convert`` draws the same one into PNG and SVG without a browser.

Colours are names such as ``@ink`` until a chart is drawn (``render.THEMES``): the page has a light and a dark theme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from latbench.errors import UsageError

Spec = dict[str, Any]

MANY = 2500  # points beyond which their intervals are not drawn: they would hide each other
SERIES = tuple(f"@{i}" for i in range(7))  # colours of series, by rank
_SHAPES = {"block": "circle", "chain": "triangle-up", "network": "diamond"}
_HEIGHT, _LINE = 330, 22  # pixels: of a chart, of a line of names


def altair() -> Any:
    """The library. Raises UsageError where it is not installed."""
    try:
        import altair
    except ImportError:
        raise UsageError("reports need altair and vl-convert: pip install 'latbench[report]'") from None
    return altair


def latencies(rows: pd.DataFrame, dataset: str) -> Spec:
    """Latency against MACs, both logarithmic, a colour per `group`; networks are diamonds, chains triangles.

    `rows` are those drawn (macs and ms above 0; low, high, group, kind); the page gives `dataset` when it draws.
    """
    alt = altair()
    groups = list(dict.fromkeys(rows["group"]))
    x = alt.X("macs:Q", title="multiply-accumulates per inference").scale(type="log", nice=False, padding=12)
    x = x.axis(format="~s", values=_round(rows["macs"]), grid=False)
    y = alt.Y("ms:Q", title="latency, ms").scale(type="log", nice=False, padding=12)
    y = y.axis(format="~g", values=_round(rows["ms"]))
    colour = alt.Color("group:N", title=None, sort=groups).scale(domain=groups, range=_colours(groups))
    base = alt.Chart(alt.NamedData(dataset)).transform_filter("datum.ms > 0 && datum.macs > 0 && datum.kind != 'stub'")
    size = float(np.clip(30000 / len(rows), 10, 45))
    shape = alt.Shape("kind:N", legend=None).scale(domain=list(_SHAPES), range=list(_SHAPES.values()))
    picked = alt.selection_point(fields=["group"], bind="legend", name="picked")
    opacity = alt.condition(picked, alt.value(0.75), alt.value(0.06))
    points = base.mark_point(filled=True, size=size, strokeWidth=0).encode(
        x=x,
        y=y,
        color=colour,
        shape=shape,
        opacity=opacity,
        tooltip=_tooltip("name", "kind", "macs", "ms", "low", "high"),
    )
    layers = [_guides(rows)]
    if len(rows) <= MANY and (rows["low"] > 0).any():
        bars = base.mark_rule(strokeWidth=1).encode(x=x, y="low:Q", y2="high:Q", color=colour, opacity=opacity)
        layers.append(bars.transform_filter("datum.low > 0"))
    layers.append(points.add_params(picked))
    return _spec(alt.layer(*layers), _HEIGHT)


def _guides(rows: pd.DataFrame) -> Any:
    """Lines of constant GMAC/s through the rows, their numbers at their right ends."""
    alt = altair()
    rate = rows["macs"] / rows["ms"] / 1e6  # MAC/ms -> GMAC/s
    (x0, x1), (y0, y1) = ((float(rows[name].min()), float(rows[name].max())) for name in ("macs", "ms"))
    lines: list[dict[str, Any]] = []
    for gmacs in _round(rate):
        start, end = max(x0, y0 * gmacs * 1e6), min(x1, y1 * gmacs * 1e6)
        if start < end:
            lines += [{"macs": m, "ms": m / gmacs / 1e6, "rate": f"{gmacs:g}"} for m in (start, end)]
    base = alt.Chart(alt.InlineData(lines or [{"macs": x0, "ms": y0, "rate": ""}])).encode(x="macs:Q", y="ms:Q")
    line = base.mark_line(color="@guide", strokeWidth=1, strokeDash=[4, 3]).encode(detail="rate:N")
    names = base.mark_text(color="@quiet", fontSize=10, align="right", dx=-4, dy=-6).encode(
        text="rate:N", x="max(macs):Q", y="max(ms):Q"
    )
    return line + names


def histogram(percents: np.ndarray[Any, np.dtype[np.float64]], title: str) -> Spec:
    """Rows by a positive percentage on a logarithmic axis, with the median and the 95th percentile."""
    alt = altair()
    low, high = np.log10([percents.min(), percents.max()])
    edges = 10 ** np.linspace(low - 0.02, high + 0.02, int(np.clip(2 * len(percents) ** 0.4, 8, 40)) + 1)
    counts, _ = np.histogram(percents, edges)
    bins = [
        {"from": float(a), "to": float(b), "rows": int(n)} for a, b, n in zip(edges, edges[1:], counts, strict=False)
    ]
    marks = [{"at": float(np.quantile(percents, q)), "text": words} for q, words in ((0.5, "median"), (0.95, "95 %"))]
    x = alt.X("from:Q", title=title).scale(type="log", nice=False)
    x = x.axis(format="~g", values=_round(percents), grid=False)
    y = alt.Y("rows:Q", title="rows").axis(tickCount=4, tickMinStep=1)
    tips = [alt.Tooltip(f, format="~s" if f == "rows:Q" else ".3~g") for f in ("from:Q", "to:Q", "rows:Q")]
    bars = alt.Chart(alt.InlineData(bins)).mark_bar(color="@4", binSpacing=1)
    bars = bars.encode(x=x, x2="to:Q", y=y, y2=alt.datum(0), tooltip=tips)
    at = alt.Chart(alt.InlineData(marks))
    rules = at.mark_rule(color="@ink", strokeWidth=1.2, strokeDash=[3, 2]).encode(x="at:Q")
    names = _rule_name(at, align="left", dx=4).encode(x="at:Q", y=alt.value(6), text="text:N")
    return _spec(alt.layer(bars, rules, names), _HEIGHT)


def intervals(rows: Sequence[Mapping[str, Any]], x_title: str) -> Spec:
    """One line per row in the order given: its `value` from `low` to `high`; columns name, value, low, high, group."""
    alt = altair()
    order = [row["name"] for row in rows]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    y = alt.Y("name:N", sort=order, title=None).axis(labelLimit=190, grid=True, ticks=False, domain=False)
    colour = alt.Color("group:N", title=None).scale(domain=groups, range=_colours(groups))
    base = alt.Chart(alt.InlineData(list(rows)))
    x = alt.X("value:Q", title=x_title).scale(zero=False, padding=8).axis(grid=False, tickCount=5)
    bars = base.mark_rule(strokeWidth=2, opacity=0.5).encode(x="low:Q", x2="high:Q", y=y, color=colour)
    dots = base.mark_point(filled=True, size=55, opacity=1).encode(
        x=x, y=y, color=colour, tooltip=_tooltip("name", "group", "value", "low", "high")
    )
    return _spec(alt.layer(bars, dots), _LINE * len(rows))


def agreement(rows: Sequence[Mapping[str, Any]], x_title: str, y_title: str, *, log: bool | None = None) -> Spec:
    """`predicted` against `measured` with the diagonal; intervals where rows have low and high, colours by group."""
    alt = altair()
    values = [float(row[name]) for row in rows for name in ("measured", "predicted")]
    low, high = min(values), max(values)
    log = high > 20 * low if log is None else log
    pad = (1.1, 1.1) if log else (1.0, 1.0)
    margin = 0.0 if log else 0.04 * (high - low) or 0.1 * high
    domain = [low / pad[0] - margin, high * pad[1] + margin]
    scale = {"type": "log" if log else "linear", "domain": domain, "nice": False, "clamp": True}
    groups = list(dict.fromkeys(row.get("group", "networks") for row in rows))
    x = alt.X("measured:Q", title=x_title).scale(**scale).axis(grid=False, tickCount=6, format="~g")
    y = alt.Y("predicted:Q", title=y_title).scale(**scale).axis(tickCount=6, format="~g")
    legend = alt.Legend() if len(groups) > 1 else None
    colour = alt.Color("group:N", title=None, legend=legend).scale(domain=groups, range=_colours(groups))
    line = alt.Chart(alt.InlineData([{"measured": v, "predicted": v} for v in domain]))
    layers = [line.mark_line(color="@guide", strokeWidth=1).encode(x=x, y=y)]
    base = alt.Chart(alt.InlineData([{"group": "networks", **row} for row in rows]))
    if all("low" in row for row in rows) and len(rows) <= MANY:
        layers.append(base.mark_rule(opacity=0.35).encode(x=x, y="low:Q", y2="high:Q", color=colour))
    layers.append(
        base.mark_point(filled=True, size=40, opacity=0.8, strokeWidth=0).encode(
            x=x, y=y, color=colour, tooltip=_tooltip(*(n for n in ("name", "measured", "predicted") if n in rows[0]))
        )
    )
    return _spec(alt.layer(*layers), _HEIGHT)


def changes(rows: Sequence[Mapping[str, Any]], threshold: float) -> Spec:
    """Relative change in per cent against latency, a colour per verdict: columns name, ms, change, group."""
    alt = altair()
    groups = [name for name in ("SLOWER", "FASTER", "UNSURE", "SAME") if any(row["group"] == name for row in rows)]
    x = alt.X("ms:Q", title="latency in the old table, ms").scale(type="log", nice=False, padding=12)
    x = x.axis(format="~g", values=_round([row["ms"] for row in rows]), grid=False)
    y = alt.Y("change:Q", title="change, %").scale(padding=10).axis(tickCount=7)
    colour = alt.Color("group:N", title=None).scale(domain=groups, range=_colours(groups))
    points = alt.Chart(alt.InlineData(list(rows))).mark_point(filled=True, size=32, opacity=0.8, strokeWidth=0)
    points = points.encode(x=x, y=y, color=colour, tooltip=_tooltip("name", "group", "ms", "change"))
    edges = [{"change": 100 * threshold}, {"change": 100 * (1 / (1 + threshold) - 1)}]
    rules = alt.Chart(alt.InlineData(edges)).mark_rule(color="@ink", strokeDash=[5, 3], opacity=0.6)
    return _spec(alt.layer(points, rules.encode(y="change:Q")), _HEIGHT)


def history(rows: Sequence[Mapping[str, Any]], y_title: str, rule: tuple[float, str] | None = None) -> Spec:
    """Lines over the epochs: columns epoch, value, series; `rule` is a target and its name."""
    alt = altair()
    series = list(dict.fromkeys(row["series"] for row in rows))
    legend = alt.Legend() if len(series) > 1 else None
    dots = len({row["epoch"] for row in rows}) <= 60
    layers = [
        alt.Chart(alt.InlineData(list(rows)))
        .mark_line(point={"size": 22} if dots else False, strokeWidth=1.6)
        .encode(
            x=alt.X("epoch:Q", title="epoch").axis(grid=False, tickMinStep=1),
            y=alt.Y("value:Q", title=y_title).scale(zero=False).axis(tickCount=5),
            color=alt.Color("series:N", title=None, legend=legend).scale(domain=series, range=_colours(series)),
            tooltip=_tooltip("series", "epoch", "value"),
        )
    ]
    if rule is not None:
        at = alt.Chart(alt.InlineData([{"value": rule[0], "text": rule[1]}]))
        layers.append(at.mark_rule(color="@ink", strokeDash=[5, 3]).encode(y="value:Q"))
        layers.append(_rule_name(at, align="left", dx=4, dy=-7).encode(x=alt.value(0), y="value:Q", text="text:N"))
    return _spec(alt.layer(*layers), 220)


def front(rows: Sequence[Mapping[str, Any]], x_title: str, y_title: str, target: float) -> Spec:
    """Quality against cost of the networks that a search looked at (name, cost, quality, group), the target's line."""
    alt = altair()
    groups = list(dict.fromkeys(row["group"] for row in rows))
    x = alt.X("cost:Q", title=x_title).scale(zero=False, padding=14).axis(grid=False, tickCount=6)
    y = alt.Y("quality:Q", title=y_title).scale(zero=False, padding=14).axis(tickCount=5)
    colour = alt.Color("group:N", title=None).scale(domain=groups, range=_colours(groups))
    shape = alt.Shape("group:N", title=None).scale(
        domain=groups, range=["circle", "diamond", "triangle-up"][: len(groups)]
    )
    base = alt.Chart(alt.InlineData(list(rows)))
    points = base.mark_point(filled=True, size=70, opacity=0.85).encode(
        x=x, y=y, color=colour, shape=shape, tooltip=_tooltip("name", "cost", "quality", "group")
    )
    at = alt.Chart(alt.InlineData([{"cost": target, "text": "target"}]))
    rule = at.mark_rule(color="@ink", strokeDash=[5, 3]).encode(x="cost:Q")
    name = _rule_name(at, align="right", dx=-5).encode(x="cost:Q", y=alt.value(8), text="text:N")
    return _spec(alt.layer(rule, name, points), _HEIGHT)


def _spec(chart: Any, height: int) -> Spec:
    """The specification of a chart as wide as its place."""
    spec: Spec = chart.properties(width="container", height=height).to_dict()
    return spec


def _rule_name(base: Any, **place: Any) -> Any:
    return base.mark_text(color="@ink", fontSize=11, **place)


def _round(values: Any) -> list[float]:
    """1, 2 and 5 times the powers of ten between the least and the greatest value; powers alone beyond two decades."""
    low, high = float(np.min(values)), float(np.max(values))
    steps = (1,) if high > 100 * low else (1, 2, 5)
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    found = [step * 10.0**e for e in decades for step in steps]
    return [value for value in found if 0.99 * low <= value <= 1.01 * high] or [low, high]


def _colours(groups: Sequence[str]) -> list[str]:
    """Series take the palette by rank; what has a meaning of its own takes its colour."""
    fixed = {
        "whole networks": "@ink", "other types": "@other",
        "SLOWER": "@1", "FASTER": "@2", "UNSURE": "@other", "SAME": "@0",
    }  # fmt: skip
    ranks = iter(SERIES * (1 + len(groups) // len(SERIES)))
    return [fixed[group] if group in fixed else next(ranks) for group in groups]


def _tooltip(*names: str) -> list[Any]:
    alt = altair()
    texts = ("name", "kind", "group", "series")
    return [alt.Tooltip(f"{n}:N") if n in texts else alt.Tooltip(f"{n}:Q", format=".4~g") for n in names]
