"""The history of a run as a picture, redrawn while it runs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from latbench.errors import UsageError
from searchers.base import Scalar
from searchers.results import write_bytes

# by the columns' prefixes
PANELS = ("loss", "accuracy", "score", "predicted", "entropy", "temperature", "multiplier", "diversity", "feasible")


def draw(path: Path, history: Sequence[Mapping[str, Scalar]]) -> None:
    """One panel per kind of figure over the epochs, as SVG, PNG or PDF by the suffix. Raises UsageError."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UsageError("a plot needs matplotlib. Run: pip install 'latbench[report]'") from None
    names = [name for name in dict.fromkeys(n for row in history for n in row) if name not in ("epoch", "seconds")]
    panels = {prefix: [name for name in names if name.startswith(prefix)] for prefix in PANELS}
    panels = {prefix: found for prefix, found in panels.items() if found}
    figure = Figure(figsize=(6, 1 + 1.6 * max(1, len(panels))), layout="constrained")
    axes = figure.subplots(max(1, len(panels)), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (prefix, found) in zip(axes, panels.items(), strict=False):
        for name in found:
            points = [(row["epoch"], row[name]) for row in history if isinstance(row.get(name), int | float)]
            axis.plot(*zip(*points, strict=True), marker=".", label=name.removeprefix(prefix).strip("_") or prefix)
        axis.set_ylabel(prefix)
        if prefix in ("temperature", "multiplier"):
            axis.set_yscale("symlog", linthresh=1e-6)
        if len(found) > 1:
            axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("epoch")
    buffer = io.BytesIO()
    try:
        figure.savefig(buffer, format=path.suffix.lstrip(".") or "svg")
    except ValueError as error:
        raise UsageError(f"cannot draw {path}: {error}") from None
    write_bytes(path, buffer.getvalue())
