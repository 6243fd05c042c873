"""What fit, validate, predict and show share: telling models from tables, and a validation's figures in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latbench.cli.values import format_ms
from latbench.errors import UsageError

if TYPE_CHECKING:
    from latbench.oracle.store import StoredModel

_MAGIC = {b"PAR1": "table", b"PK\x03\x04": "model"}  # parquet; npz


def kind_of_file(path: Path) -> str | None:
    """ "table" or "model" by the first bytes; None where it is neither, or cannot be read."""
    try:
        with path.open("rb") as file:
            return _MAGIC.get(file.read(4))
    except OSError:
        return None


def read_model(path: Path) -> StoredModel:
    """The model in `path`. Raises UsageError where it is a table, else as ``store.load``."""
    from latbench.oracle import store

    if kind_of_file(path) == "table":
        raise UsageError(f"{path} is a table, not a fitted model: latbench fit {path} -o MODEL makes one of it")
    return store.load(path)


def figures_in_words(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of each figure of a ``Validation`` as data."""
    f = figures
    ranks = [f"{name} {f[key]:.4f}" for name, key in (("Kendall", "kendall"), ("Spearman", "spearman")) if f[key]]
    words = [
        ("MAPE", f"{f['mape']:.2%}"),
        ("within", f"5 %: {f['within_5']:.1%} of networks, 10 %: {f['within_10']:.1%}"),
        ("bias", f"{f['bias']:+.2%}, RMSE {format_ms(f['rmse'])}"),
    ]
    if ranks:
        words.append(("rank", ", ".join(ranks)))
    if f["coverage"] is not None:
        held = f"holds {f['coverage']:.1%} of measurements, mean half-width {f['half_width']:.2%}"
        words.append((f"{f['confidence']:.0%} interval", held))
    else:
        words.append((f"{f['confidence']:.0%} interval", "none: too few networks in the fit to calibrate one"))
    if f["n_missing"]:
        words.append(("left out", f"{f['n_missing']} networks with a block that has no entry"))
    return words


def validation_in_words(notes: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of what a model's notes say of its validation."""
    from latbench.oracle.fitting import FEW

    validation = notes.get("validation")
    if validation is None:
        return [("validated", f"not: {notes.get('unvalidated', 'its notes hold no figures')}")]
    n = validation["n"]
    how = f"on {n} networks kept out of the fit (seed {validation['seed']})"
    if validation["method"] == "cross-validation":
        how = f"by {validation['folds']}-fold cross-validation over {n} networks, then fitted to all"
        if n < FEW:
            how += f": fewer than {FEW} are too few to keep some out"
    return [("validated", how), *figures_in_words(validation)]
