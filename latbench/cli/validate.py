"""``latbench validate``: a model against networks that it has not seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latbench.cli.model import figures_in_words, print_facts, read_model
from latbench.cli.values import PERCENT
from latbench.errors import ProvenanceConflictError, TableError, UsageError

if TYPE_CHECKING:
    from latbench.oracle.store import StoredModel
    from latbench.oracle.validation import Predictions
    from latbench.provenance import Provenance
    from latbench.tables import LatencyTable

# What says nothing of whole networks: the order of measurement, and how blocks were embedded.
_OF_BLOCKS = ("policy.seed:", "policy.context:")


@click.command("validate")
@click.argument("model_path", metavar="MODEL", type=click.Path(path_type=Path))
@click.argument("table_path", metavar="TABLE", type=click.Path(path_type=Path))
@click.option("--all", "with_known", is_flag=True, help="Also the networks that the model was fitted to.")
@click.option("--confidence", type=PERCENT, default="90%", show_default=True, help="Of the interval to check.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw it: .png, .svg or .pdf.")
@click.option("--force", is_flag=True, help="Compare although device or conditions differ.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, every network included.")
def command(
    model_path: Path,
    table_path: Path,
    with_known: bool,
    confidence: float,
    plot: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """How far MODEL is off on the networks of TABLE that it was not fitted to."""
    from latbench.oracle.validation import Predictions
    from latbench.tables import LatencyTable

    if not 0 < confidence < 1:
        raise UsageError(f"--confidence must lie between 0% and 100%, got {confidence:.0%}")
    stored, table = read_model(model_path), LatencyTable.read(table_path)
    differences = _differences(stored.oracle.provenance, table.provenance, model_path, table_path)
    if differences and not force:
        raise ProvenanceConflictError(
            f"{table_path} was measured under other conditions than {model_path} was fitted to (model / table): "
            f"{'; '.join(differences)}; --force compares them all the same"
        )
    for difference in differences:
        click.echo(f"Warning: conditions differ (model / table): {difference}", err=True)
    networks = table if with_known else _unseen(stored, table, model_path, table_path)
    n_known = len(table.networks()[1]) - len(networks.networks()[1])
    found = Predictions.of(stored.oracle, networks, confidence=confidence)
    figures = found.validation().to_dict()
    if plot is not None:
        from latbench.report import plot_predictions

        title = f"{stored.oracle.space.name} on {table.provenance.device_name}"
        plot_predictions(found, plot, title=title, subtitle=_subtitle(stored), truth=_truth(networks))
    if as_json:
        head = {"model": str(model_path), "table": str(table_path), "oracle": stored.oracle.name, "n_known": n_known}
        click.echo(json.dumps({**head, "differences": differences, **figures, "networks": _networks(found)}))
    else:
        _print(stored, table_path, figures, n_known, plot)


def _differences(model: Provenance, table: Provenance, model_path: Path, table_path: Path) -> list[str]:
    """Conditions of the measurements that differ; raises UsageError where the networks are of another space."""
    found = [text for text in model.conflicts(table) if not text.startswith(_OF_BLOCKS)]
    space = [text for text in found if text.startswith(("space:", "settings."))]
    if space:
        raise UsageError(
            f"{table_path} holds other networks than {model_path} predicts (model / table): {'; '.join(space)}"
        )
    return found


def _unseen(stored: StoredModel, table: LatencyTable, model_path: Path, table_path: Path) -> LatencyTable:
    """The table's networks that were not in the fit."""
    from latbench.oracle.validation import unseen

    if "networks" not in stored.notes:
        raise TableError(f"{model_path} does not say which networks it was fitted to: --all compares with every one")
    new, n = unseen(table, stored.notes["networks"]), len(table.networks()[1])
    if n and not len(new):
        raise TableError(
            f"{model_path} was fitted to all {n} networks of {table_path}, so they say nothing of it: validate on "
            "others, keep some out (latbench fit --hold-out 20%), or give --all"
        )
    return new


def _networks(found: Predictions) -> list[dict[str, Any]]:
    low, high = found.interval or ([None] * len(found.measured),) * 2
    return [
        {
            "arch": arch,
            "measured_ms": float(measured),
            "predicted_ms": float(predicted),
            "low_ms": None if a is None else float(a),
            "high_ms": None if b is None else float(b),
        }
        for arch, measured, predicted, a, b in zip(
            found.archs.tolist(), found.measured, found.predicted, low, high, strict=True
        )
    ]


def _truth(networks: LatencyTable) -> str:
    """What the latencies of the networks are: measured, simulated, imported."""
    origins = networks.select(kind="network", status="ok").frame["origin"].unique()
    return str(origins[0]) if len(origins) == 1 else "measured"


def _subtitle(stored: StoredModel) -> str:
    notes = stored.notes
    fitted = [f"{notes[key]} {key[2:]}" for key in ("n_blocks", "n_networks") if notes.get(key)]
    return f"{stored.oracle.name}" + (f", fitted to {' and '.join(fitted)}" if fitted else "")


def _print(stored: StoredModel, table_path: Path, figures: dict[str, Any], n_known: int, plot: Path | None) -> None:
    from rich.console import Console

    oracle = stored.oracle
    console = Console(highlight=False, markup=False)
    known = f" ({n_known} that it was fitted to left out)" if n_known else ""
    facts = [
        ("model", f"{oracle.name} of {oracle.space.name} on {oracle.provenance.device_name}"),
        ("against", f"{figures['n']} networks of {table_path}{known}"),
        *figures_in_words(figures),
    ]
    print_facts(console, facts)
    if plot is not None:
        console.print(f"picture: {plot}", soft_wrap=True)
