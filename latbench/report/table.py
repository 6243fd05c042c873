"""The picture of a table: latency against MACs, noise, and whether blocks add up to networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from latbench.report.style import COLOURS, GUIDE, INK, MANY, OTHER, QUIET, open_figure, open_frame, save_figure, settle
from latbench.report.words import conditions, headline, measured_rows, noise, two_digits
from latbench.tables import LatencyTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis


def plot_table(table: LatencyTable, path: Path | str, *, title: str | None = None) -> None:
    """Draws `table` into a PNG, SVG or PDF file, 12 x 7 inches (1200 x 700 pixels).

    Raises UsageError on another suffix or where matplotlib is missing, TableError where the file cannot be written.
    """
    path = Path(path)
    figure = open_figure(path, (12, 7), title or headline(table))
    grid = figure.add_gridspec(2, 2, width_ratios=(1.75, 1))
    rows = measured_rows(table.frame)
    left = figure.add_subplot(grid[:, 0])
    _draw_latencies(left, table, rows)
    _draw_noise(figure.add_subplot(grid[0, 1]), rows)
    _draw_sums(figure.add_subplot(grid[1, 1]), table.notes.get("additivity"), rows)
    settle(figure, conditions(table.provenance))
    _turn_guides(left)
    save_figure(figure, path)


def _draw_latencies(ax: Axes, table: LatencyTable, rows: pd.DataFrame) -> None:
    from matplotlib.ticker import EngFormatter

    drawn = rows[(rows["macs"] > 0) & (rows["kind"] != "stub")]
    positive = drawn[drawn["ms"] > 0]
    _note_counts(ax, table, rows, drawn)
    if positive.empty:
        _say(ax, "no row succeeded" if rows.empty else "no row has both MACs and a positive latency")
        return
    x_lim, y_lim = _limits(drawn["macs"]), _limits(positive["ms"])
    ax.set(xscale="log", yscale="log", xlim=x_lim, ylim=y_lim)
    ax.set(xlabel="multiply-accumulates per inference", ylabel="latency, ms")
    _draw_guides(ax, positive)
    for label, colour, marker, size, group in _groups(drawn):
        pixels = len(drawn) > MANY
        shown = group[group["ms"] > 0]
        low = shown["ci_low_ms"].astype(float).fillna(shown["ms"]).clip(lower=y_lim[0])  # to the edge, where it holds 0
        high = shown["ci_high_ms"].astype(float).fillna(shown["ms"])
        ax.vlines(shown["macs"], low, high, colors=colour, linewidth=0.9, alpha=0.55, rasterized=pixels, zorder=2)
        edge = {"edgecolors": "white", "linewidths": 0.8} if marker == "D" else {"linewidths": 0}
        ax.scatter(
            shown["macs"], shown["ms"], s=size, c=colour, marker=marker, alpha=0.85,
            label=f"{label} ({len(group)})", rasterized=pixels, zorder=3, **edge,
        )  # fmt: skip
        flat = group[group["ms"] <= 0]
        edge_ms = np.full(len(flat), y_lim[0])
        ax.scatter(
            flat["macs"], edge_ms, s=34, facecolors="none", edgecolors=colour, marker="v", clip_on=False, zorder=4
        )
    _label_decades(ax.xaxis, x_lim, EngFormatter(sep=" "))
    _label_decades(ax.yaxis, y_lim)
    legend = ax.legend(loc="upper left", fontsize=9, framealpha=0.92, edgecolor="none", borderpad=0.5)
    for handle in legend.legend_handles:
        handle.set(sizes=[30], alpha=1)  # type: ignore[union-attr]
    open_frame(ax)


def _label_decades(axis: Axis, limits: tuple[float, float], form: Callable[[float, int], str] | None = None) -> None:
    """Plain numbers at the decades of a logarithmic axis; at 2 and 5 as well where it spans less than two."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plain = FuncFormatter(form or (lambda value, _: f"{value:g}"))
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(NullFormatter())
    if limits[1] / limits[0] < 100:
        axis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        axis.set_minor_formatter(plain)


def _groups(rows: pd.DataFrame) -> list[tuple[str, str, str, float, pd.DataFrame]]:
    """(label, colour, marker, size, rows): block types by frequency, the rare ones together, then whole networks."""
    blocks, networks = rows[rows["kind"] == "block"], rows[rows["kind"] == "network"]
    types = blocks["block_type"].astype(object).where(blocks["block_type"].notna(), "block")
    if blocks["context"].nunique() > 1:
        types = types.where(blocks["context"] == "sandwich", types + ", isolated")
    names = list(types.value_counts().index)
    kept = names if len(names) <= len(COLOURS) else names[: len(COLOURS) - 1]
    size = float(np.clip(9000 / max(len(blocks), 1), 5, 34))
    groups = [(str(n), c, "o", size, blocks[types == n]) for n, c in zip(kept, COLOURS, strict=False)]
    if len(kept) < len(names):
        groups.append((f"{len(names) - len(kept)} other types", OTHER, "o", size, blocks[~types.isin(kept)]))
    if len(networks):
        groups.append(("whole networks", INK, "D", max(size, 26.0), networks))
    return groups


def _limits(values: pd.Series[Any]) -> tuple[float, float]:
    """Logarithmic limits around positive values, at least a decade apart."""
    low, high = np.log10(values.min()), np.log10(values.max())
    pad = max(0.06 * (high - low), (1 - (high - low)) / 2, 0.08)
    return float(10 ** (low - pad)), float(10 ** (high + pad))


def _draw_guides(ax: Axes, rows: pd.DataFrame) -> None:
    """Lines of constant GMAC/s at the decades that the rows reach; each is named where it leaves the axes."""
    (x0, x1), y1 = ax.get_xlim(), ax.get_ylim()[1]
    rates = rows["macs"] / rows["ms"] / 1e6  # MAC/ms -> GMAC/s
    decades = range(int(np.floor(np.log10(rates.min()))), int(np.ceil(np.log10(rates.max()))) + 1)
    step = -(-len(decades) // 7)
    for exponent in decades[::step]:
        rate = 10.0**exponent
        ax.plot(
            (x0, x1), (x0 / rate / 1e6, x1 / rate / 1e6), color=GUIDE, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1
        )
        end = min(np.log10(x1), np.log10(y1 * rate * 1e6)) - 0.01 * np.log10(x1 / x0)
        if end <= np.log10(x0) + 0.3 * np.log10(x1 / x0):
            continue  # it only crosses the corner where the legend is
        ax.text(
            10**end, 10**end / rate / 1e6, f"{rate:g} GMAC/s", gid="guide", fontsize=8, color="#777777",
            ha="right", va="bottom", rotation_mode="anchor", clip_on=True, zorder=1,
        )  # fmt: skip


def _turn_guides(ax: Axes) -> None:
    """Turns the guides' names along their lines: the angle is known once the layout is."""
    (x, y) = (ax.get_xlim()[0], ax.get_ylim()[0])
    dx, dy = ax.transData.transform((10 * x, 10 * y)) - ax.transData.transform((x, y))
    for text in ax.texts:
        if text.get_gid() == "guide":
            text.set_rotation(float(np.degrees(np.arctan2(dy, dx))))


def _note_counts(ax: Axes, table: LatencyTable, rows: pd.DataFrame, drawn: pd.DataFrame) -> None:
    """What the axes cannot show is counted above them."""
    n_flat = int((drawn["ms"] <= 0).sum())
    n_bare = int(((rows["kind"] != "stub") & ~(rows["macs"] > 0)).sum())
    n_failed = len(table) - len(rows)
    confidence = 100 * float(table.provenance.policy.get("confidence", 0.95))
    parts = [f"bars: {confidence:g} % interval"] if drawn["ci_low_ms"].notna().any() else []
    parts += [f"▽ {n_flat} increments at or below 0"] if n_flat else []
    parts += [f"{n_bare} without MACs, not drawn"] if n_bare else []
    parts += [f"{n_failed} of {len(table)} rows failed"] if n_failed else []
    ax.set_title("   ".join(parts), loc="left", fontsize=9, color=QUIET)


def _draw_noise(ax: Axes, rows: pd.DataFrame) -> None:
    _draw_shares(ax, noise(rows), "noise: half the interval, % of the latency", "no intervals recorded")


def _draw_shares(ax: Axes, shares: NDArray[np.float64], label: str, none: str) -> None:
    """Histogram of positive fractions in per cent, on a logarithmic axis: noise spans decades."""
    from matplotlib.ticker import MaxNLocator

    percent = 100 * shares[shares > 0]
    if not len(percent):
        _say(ax, none)
        return
    low, high = _limits(pd.Series(percent))
    middle, most = float(np.median(percent)), float(np.quantile(percent, 0.95))
    ax.hist(percent, bins=list(np.geomspace(low, high, 41)), color=COLOURS[4], edgecolor="white", linewidth=0.4)
    ax.axvline(middle, 0, 0.78, color=INK, linewidth=1.1, label=f"median {two_digits(middle)} %")
    ax.axvline(most, 0, 0.78, color=INK, linewidth=1.1, linestyle="--", label=f"95th percentile {two_digits(most)} %")
    ax.set(xscale="log", xlim=(low, high), xlabel=label, ylabel="rows", ylim=(0, 1.3 * ax.get_ylim()[1]))
    bars_lie_right = middle * most > low * high
    ax.legend(loc="upper left" if bars_lie_right else "upper right", fontsize=9, frameon=False)
    _label_decades(ax.xaxis, (low, high))
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    open_frame(ax)


def _draw_sums(ax: Axes, additivity: Mapping[str, Any] | None, rows: pd.DataFrame) -> None:
    if additivity and len(additivity.get("measured_ms", ())):
        _draw_additivity(ax, additivity)
    elif (rows["run_spread"] > 0).any():
        spread = rows["run_spread"].dropna().to_numpy(np.float64)
        _draw_shares(ax, spread, "spread between runs, % of the latency", "one run")
    else:
        _draw_sites(ax, rows)


def _draw_additivity(ax: Axes, additivity: Mapping[str, Any]) -> None:
    measured = np.asarray(additivity["measured_ms"], np.float64)
    predicted = np.asarray(additivity["predicted_ms"], np.float64)
    low, high = float(min(measured.min(), predicted.min())), float(max(measured.max(), predicted.max()))
    pad = 0.06 * (high - low) or 0.1 * high
    span = (low - pad, high + pad)
    ax.plot(span, span, color=GUIDE, linewidth=1, zorder=1)
    ax.scatter(measured, predicted, s=18, c=COLOURS[0], alpha=0.8, linewidths=0, rasterized=len(measured) > MANY)
    beyond = additivity.get("beyond_cache")
    if beyond:
        ax.scatter(measured, beyond["predicted_ms"], s=18, c=COLOURS[1], alpha=0.8, linewidths=0)
    ax.set(xlim=span, ylim=span, xlabel="network measured, ms", ylabel="sum of its blocks, ms")
    named: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("mape", "mean error", lambda v: f"{two_digits(100 * v)} %"),
        ("bias", "bias", lambda v: f"{100 * v:+.2g} %"),
        ("spearman", "Spearman", lambda v: f"{v:.3f}"),
    )
    lines = [f"{len(measured)} networks"]
    lines += [f"{name} {form(additivity[key])}" for key, name, form in named if additivity.get(key) is not None]
    if beyond:
        added = f"weights beyond the cache added: {two_digits(100 * beyond['mape'])} %"
        ax.text(0.97, 0.05, added, transform=ax.transAxes, ha="right", fontsize=9, color=COLOURS[1])
    ax.text(0.03, 0.97, "\n".join(lines), transform=ax.transAxes, va="top", fontsize=9, color=INK, linespacing=1.35)
    open_frame(ax)


def _draw_sites(ax: Axes, rows: pd.DataFrame) -> None:
    """Median, and range, of the blocks first used at each site, in table order."""
    blocks = rows[(rows["kind"] == "block") & rows["site"].notna()]
    if blocks.empty:
        _say(ax, "no networks, replicates or sites to compare")
        return
    by_site = blocks.groupby("site", sort=False)["ms"].agg(["min", "median", "max"])
    at = np.arange(len(by_site))
    ax.vlines(at, by_site["min"], by_site["max"], colors=COLOURS[4], linewidth=2)
    ax.plot(at, by_site["median"], "o", color=COLOURS[0], markersize=4)
    every = -(-len(at) // 12)
    ax.set_xticks(at[::every], [str(name) for name in by_site.index[::every]], rotation=45, ha="right", fontsize=8)
    ax.set(xlabel="site", ylabel="its blocks: range and median, ms")
    open_frame(ax)


def _say(ax: Axes, text: str) -> None:
    """An empty panel says why."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_color("#DDDDDD")
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", fontsize=11, color="#777777")
