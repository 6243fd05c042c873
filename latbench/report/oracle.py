"""The picture of a validation: predictions against measurements, residuals below, each with the interval's band."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from latbench.report.style import (
    BLUE,
    GUIDE,
    INK,
    MANY,
    QUIET,
    SKY,
    VERMILION,
    open_figure,
    open_frame,
    save_figure,
    settle,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from latbench.oracle.validation import Predictions, Validation

Floats = NDArray[np.float64]

_TAIL = 0.995  # share of residuals that the axis of residuals must hold; the rest is drawn at its edge


def plot_predictions(
    found: Predictions, path: Path | str, *, title: str, subtitle: str = "", truth: str = "measured"
) -> None:
    """Draws `found` into a PNG, SVG or PDF file, 10 x 8 inches (1000 x 800 pixels).

    `truth` says what the networks' latencies are: measured, simulated, imported.
    Raises UsageError on another suffix or where matplotlib is missing, TableError where the file cannot be written.
    """
    path = Path(path)
    figure = open_figure(path, (10, 8), title)
    grid = figure.add_gridspec(2, 2, width_ratios=(4.2, 1), height_ratios=(1.25, 1))
    above = figure.add_subplot(grid[0, 0])
    below = figure.add_subplot(grid[1, 0], sharex=above)
    side = figure.add_subplot(grid[1, 1], sharey=below)
    _draw_predictions(above, found)
    _draw_residuals(below, found, truth)
    _draw_histogram(side, found)
    _write_figures(figure.add_subplot(grid[0, 1]), found.validation())
    settle(figure, subtitle)
    save_figure(figure, path)


def _draw_predictions(ax: Axes, found: Predictions) -> None:
    span = _span(found)
    scale = "log" if span[1] > 20 * span[0] else "linear"
    ax.set(xscale=scale, yscale=scale, xlim=span, ylim=span, ylabel="predicted, ms")
    ax.plot(span, span, color=GUIDE, linewidth=1, zorder=2)
    _draw_band(ax, found, lambda measured, edge: measured * (1 + edge))
    _scatter(ax, found, found.predicted)
    ax.tick_params(labelbottom=False)
    open_frame(ax)
    if found.interval is not None:
        ax.legend(loc="upper left", fontsize=9, frameon=False)


def _draw_residuals(ax: Axes, found: Predictions, truth: str) -> None:
    reach = _reach(found)
    ax.axhline(0, color=GUIDE, linewidth=1, zorder=2)
    _draw_band(ax, found, lambda measured, edge: 100 * edge + 0 * measured)
    _scatter(ax, found, np.clip(100 * found.relative, -reach, reach))
    beyond = int((np.abs(100 * found.relative) > reach).sum())
    if beyond:
        ax.set_title(f"{beyond} further off, drawn at the edge", loc="right", fontsize=9, color=QUIET)
    ax.set(ylim=(-1.05 * reach, 1.05 * reach), xlabel=f"{truth}, ms", ylabel=f"predicted / {truth} - 1, %")
    open_frame(ax)


def _draw_histogram(ax: Axes, found: Predictions) -> None:
    from matplotlib.ticker import MaxNLocator

    reach = _reach(found)
    n_bins = int(np.clip(2 * np.sqrt(len(found.measured)), 9, 41)) | 1  # odd: one bin is about 0
    percent = np.clip(100 * found.relative, -reach, reach)
    bins = list(np.linspace(-reach, reach, n_bins + 1))
    ax.hist(percent, bins=bins, orientation="horizontal", color=SKY, edgecolor="white", linewidth=0.4)
    ax.axhline(0, color=GUIDE, linewidth=1, zorder=2)
    ax.axhline(100 * float(found.relative.mean()), color=INK, linewidth=1.1, linestyle="--", label="bias", zorder=3)
    ax.legend(loc="upper right", fontsize=9, frameon=False)
    ax.set(xlabel="networks")
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.tick_params(labelleft=False)
    open_frame(ax)


def _write_figures(ax: Axes, figures: Validation) -> None:
    """The figures in words, in the corner that the panels leave."""
    ax.set_axis_off()
    lines = [("networks", f"{figures.n}"), ("mean error", f"{figures.mape:.2%}")]
    lines += [("within 5 %", f"{figures.within_5:.1%}"), ("within 10 %", f"{figures.within_10:.1%}")]
    lines += [("bias", f"{figures.bias:+.2%}"), ("RMSE", f"{figures.rmse:.3g} ms")]
    ranks = (("Kendall", figures.kendall), ("Spearman", figures.spearman))
    lines += [(name, f"{value:.4f}") for name, value in ranks if value is not None]
    if figures.coverage is not None:
        lines += [("", ""), (f"{100 * figures.confidence:g} % interval", "")]
        lines += [("holds", f"{figures.coverage:.1%}"), ("half-width", f"{figures.half_width:.2%}")]
    for i, (name, text) in enumerate(lines):
        y = 0.98 - 0.082 * i
        ax.text(0, y, name, transform=ax.transAxes, va="top", fontsize=9.5, color=QUIET)
        ax.text(1, y, text, transform=ax.transAxes, va="top", ha="right", fontsize=9.5, color=INK)


def _scatter(ax: Axes, found: Predictions, y: Floats) -> None:
    """Networks outside their interval in another colour and shape."""
    size = float(np.clip(4000 / len(y), 7, 26))
    inside = np.ones(len(y), bool)
    if found.interval is not None:
        inside = (found.interval[0] <= found.measured) & (found.measured <= found.interval[1])
    for mask, colour, marker, words in ((inside, BLUE, "o", "inside it"), (~inside, VERMILION, "D", "outside")):
        if mask.any():
            ax.scatter(
                found.measured[mask], y[mask], s=size, c=colour, marker=marker, alpha=0.8, linewidths=0, zorder=4,
                rasterized=len(y) > MANY, label=f"{mask.sum()} networks {words}",
            )  # fmt: skip


def _draw_band(ax: Axes, found: Predictions, place: Callable[[Floats, Floats], Floats]) -> None:
    """Where a prediction may lie for its interval to hold the measurement; `place` (measured, edge) -> y.

    Exact at every network, joined by straight lines between them.
    """
    edges = _edges(found)
    if edges is None:
        return
    order = np.argsort(found.measured)
    x, (low, high) = found.measured[order], (place(found.measured, edge)[order] for edge in edges)
    label = f"{100 * found.confidence:g} % interval"
    ax.fill_between(x, low, high, color=SKY, alpha=0.3, linewidth=0, zorder=1, label=label)


def _edges(found: Predictions) -> tuple[Floats, Floats] | None:
    """(N,) each: the residuals, as shares, between which the measurement lies in the interval."""
    if found.interval is None:
        return None
    low, high = found.interval
    return found.predicted / high - 1, found.predicted / low - 1


def _span(found: Predictions) -> tuple[float, float]:
    """Limits of the axes of latencies, ms."""
    both = np.concatenate([found.measured, found.predicted])
    low, high = float(both.min()), float(both.max())
    if high > 20 * low:  # drawn on logarithmic axes
        return low / 1.1, high * 1.1
    pad = 0.04 * (high - low) or 0.1 * high
    return low - pad, high + pad


def _reach(found: Predictions) -> float:
    """Upper limit of the axis of residuals, %: holds the band and nearly all networks."""
    edges = _edges(found)
    widest = 0.0 if edges is None else float(np.quantile(np.abs(edges), 0.95))
    reach = max(float(np.quantile(np.abs(found.relative), _TAIL)), widest)
    return 115 * reach or 1.0
