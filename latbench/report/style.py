"""What the pictures share: palette, figure set-up, saving."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from latbench.errors import TableError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette, distinct under every common colour blindness; its yellow is too light for points on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C564B")
BLUE, VERMILION, SKY = COLOURS[0], COLOURS[1], COLOURS[4]
OTHER, INK, QUIET, GUIDE = "#999999", "#222222", "#555555", "#B8B8B8"
MANY = 1000  # points beyond which a vector file holds them as pixels
_SUFFIXES = (".png", ".svg", ".pdf")


def open_figure(path: Path, size: tuple[float, float], title: str) -> Figure:
    """A figure of `size` inches with its headline, for ``save_figure``; the axes are laid out without overlap.

    Raises UsageError where `path` has another suffix than .png, .svg, .pdf, or matplotlib is missing.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"cannot draw into {path}: its name must end in {', '.join(_SUFFIXES)}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("pictures need matplotlib: pip install 'latbench[report]'") from None
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)  # no pyplot: nothing global, no display
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.09)
    head = figure.suptitle(f"{title}\n", x=0.012, ha="left", fontsize=14, fontweight="bold", color=INK)
    head.set_parse_math(False)  # a device's name may hold a $
    return figure


def settle(figure: Figure, subtitle: str) -> None:
    """Lays the axes out and writes `subtitle` below the headline: afterwards positions on the page are known."""
    figure.draw_without_rendering()
    figure.text(0.012, 0.947, subtitle, ha="left", va="top", fontsize=9.5, color=QUIET, parse_math=False)


def save_figure(figure: Figure, path: Path) -> None:
    """100 pixels per inch in a PNG. Raises TableError where the file cannot be written."""
    try:
        figure.savefig(path, dpi=100 if path.suffix.lower() == ".png" else 200)
    except OSError as error:
        raise TableError(f"cannot write the picture {path}: {error.strerror or error}") from None


def open_frame(ax: Axes) -> None:
    """Two of the four lines around the axes."""
    ax.spines[["top", "right"]].set_visible(False)
