"""``latbench fit``: a table into a model that predicts whole networks."""

from __future__ import annotations

import hashlib
import inspect
import json
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latbench.cli.model import kind_of_file, print_facts, validation_in_words
from latbench.cli.values import Quantity, parse_percent
from latbench.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from latbench.oracle.base import Model
    from latbench.oracle.store import StoredModel

_TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool, "None": type(None)}
_WORDS: dict[type, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def parse_hold_out(text: str) -> float:
    """ "20%" or "0.2": a share below 1; "40": a number of networks; "0": none. Raises UsageError."""
    if text.strip().isdecimal():
        return float(int(text))
    share = parse_percent(text)
    if share in (0, 1):
        raise UsageError(f"{text!r} keeps out {'all' if share else 'none'}: write 20%, or a number of networks")
    return share


HOLD_OUT = Quantity("share or number", parse_hold_out)


@click.command("fit")
@click.argument("table_path", metavar="TABLE", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The model's file.")
@click.option(
    "--oracle",
    "name",
    help="lut, pairwise, calibrated, additive, learned, transfer; default: calibrated where the table has blocks and "
    "networks, learned for networks alone, lut for blocks alone.",
)
@click.option(
    "--hold-out",
    "held_out",
    type=HOLD_OUT,
    metavar="SHARE|N",
    help="Networks to keep out of the fit and to validate on; 0: cross-validate [20%; of fewer than 20 networks: 0].",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the choice of these networks.")
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="TABLE",
    type=click.Path(path_type=Path),
    help="Another device's measurements, for transfer; may be given several times.",
)
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="An option of the oracle.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    table_path: Path,
    output: Path,
    name: str | None,
    held_out: float | None,
    seed: int,
    sources: tuple[Path, ...],
    options: tuple[str, ...],
    as_json: bool,
) -> None:
    """Fit a model to TABLE and tell how far off it is on networks that it has not seen."""
    from rich.console import Console

    from latbench import plugins
    from latbench.cli.target import assignment
    from latbench.oracle import store
    from latbench.oracle.fitting import default_oracle, fit
    from latbench.tables import LatencyTable

    _check_output(output)
    table = LatencyTable.read(table_path)
    name = name or ("transfer" if sources else default_oracle(table))
    kind = plugins.load("latbench.oracles", name)
    chosen = dict(assignment(text) for text in options)
    _check_options(kind, chosen, with_sources=bool(sources))
    given = {"sources": tuple(LatencyTable.read(path) for path in sources)} if sources else {}
    with Console(stderr=True).status(f"fitting {name} to {table_path}"):
        fitted = fit(name, table, held_out=held_out, seed=seed, **chosen, **given)
    notes = {**_origin(table_path, sources, chosen), **fitted.notes}
    store.save(output, fitted.oracle, notes)
    if as_json:
        told = {k: v for k, v in notes.items() if k != "networks"}
        click.echo(json.dumps({"model": str(output), "oracle": name, **told}))
    else:
        _print(Console(highlight=False, markup=False), output, fitted)


def _check_output(path: Path) -> None:
    """Before the work: a folder that is not there, or a table that would be lost."""
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is no directory: make it, or choose another -o")
    if kind_of_file(path) == "table":
        raise UsageError(f"{path} is a latency table, which a model would replace: choose another -o")


def _check_options(kind: type[Model], chosen: Mapping[str, Any], *, with_sources: bool) -> None:
    """Against the keywords of ``kind.fit`` that text can give: an unknown name, a value of another type."""
    parameters = inspect.signature(kind.fit).parameters
    if with_sources and "sources" not in parameters:
        raise UsageError(f"{kind.name} takes no --source; transfer does")
    if not with_sources and "sources" in parameters and parameters["sources"].default is inspect.Parameter.empty:
        raise UsageError(f"{kind.name} learns from other devices' tables: give --source TABLE")
    known = {name: types for name, p in parameters.items() if (types := _scalars(p.annotation))}
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name, value in chosen.items():
        if name not in known and open_ended:
            continue  # the oracle's own to refuse
        if name not in known:
            raise UsageError(f"{kind.name} has no option {name!r}: {', '.join(known) or 'it takes none'}")
        if type(value) not in known[name] and not (type(value) is int and float in known[name]):
            words = " or ".join(_WORDS[t] for t in known[name] if t in _WORDS)
            raise UsageError(f"{kind.name}: {name} must be {words}, got {value!r}")


def _scalars(annotation: Any) -> tuple[type, ...]:
    """The types that an annotation such as "float | None" allows; none where it allows more than plain values."""
    parts = [part.strip() for part in str(annotation).split("|")]
    return tuple(_TYPES[part] for part in parts) if all(part in _TYPES for part in parts) else ()


def _origin(table_path: Path, sources: tuple[Path, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """When, how and from which files."""
    named = Path(sys.argv[0]).stem == "latbench"
    return {
        "command": shlex.join(["latbench", *sys.argv[1:]]) if named else "",
        "fitted_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "table": _file(table_path),
        "sources": [_file(path) for path in sources],
        "options": dict(options),
    }


def _file(path: Path) -> dict[str, str]:
    return {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _print(console: Console, output: Path, fitted: StoredModel) -> None:
    model, notes = fitted.oracle, fitted.notes
    facts = [
        ("model", f"{model.name} of {model.space.name} on {model.provenance.device_name}"),
        ("fitted to", f"{notes['n_blocks']} blocks, {notes['n_networks']} networks"),
        *validation_in_words(notes),
    ]
    print_facts(console, facts)
    console.print(f"model written to {output}", soft_wrap=True)
