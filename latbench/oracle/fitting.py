"""A table into a model that says how far off it is on networks that it has not seen: what ``latbench fit`` does."""

from __future__ import annotations

from typing import Any

from latbench import plugins
from latbench.errors import TableError, UsageError
from latbench.oracle.base import Model, space_of
from latbench.oracle.store import StoredModel
from latbench.oracle.validation import FOLDS, cross_validate, distinct_networks, network_names, split, validate
from latbench.spaces.base import FactoredSpace
from latbench.tables import LatencyTable

HELD_OUT = 0.2  # share of the networks, by default
FEW = 20  # distinct networks below which none is kept out by default: too few to fit on, and too few to judge by


def default_oracle(table: LatencyTable) -> str:
    """calibrated for blocks and networks or chains, learned for networks alone, else lut. Raises TableError."""
    factored = isinstance(space_of(table.provenance), FactoredSpace)
    has_blocks = factored and len(table.select(kind="block", status="ok")) > 0
    has_networks = len(table.networks()[1]) > 0
    if not has_blocks and not has_networks:
        raise TableError("the table has neither blocks nor networks with a latency, so there is nothing to fit")
    has_chains = len(table.select(kind="chain", status="ok")) > 0
    return ("calibrated" if has_networks or has_chains else "lut") if has_blocks else "learned"


def fit(name: str, table: LatencyTable, *, held_out: float | None = None, seed: int = 0, **options: Any) -> StoredModel:
    """The oracle `name` fitted to `table`; `options` are its own.

    `held_out` networks (a share below 1, or a number) are kept out of the fit and the model validated on them; at 0 the
    model is fitted to all and the figures are those of a cross-validation. Default: 0.2, below 20 distinct networks 0.

    The notes hold ``networks`` (names of those in the fit, ``validation.network_names``), n_networks, n_blocks, and
    ``validation``: method ("held out" or "cross-validation"), seed, the figures of ``Validation``; or ``unvalidated``:
    why there are none. Raises as the oracle's ``fit``, and UsageError where too many are to be kept out.
    """
    kind: type[Model] = plugins.load("latbench.oracles", name)
    if held_out is None:
        held_out = HELD_OUT if len(distinct_networks(table)) >= FEW else 0
    notes: dict[str, Any]
    if held_out:
        fitted, kept_out = split(table, held_out, seed)
        model = kind.fit(fitted, **options)
        notes = {"validation": {"method": "held out", "seed": seed, **validate(model, kept_out).to_dict()}}
    else:
        fitted, model = table, kind.fit(table, **options)
        notes = _cross_validated(kind, table, seed, options)
    names = network_names(fitted)
    return StoredModel(
        model,
        {
            "networks": sorted({name for pair in names for name in pair}),
            "n_networks": len(names),
            "n_blocks": len(fitted.select(kind="block", status="ok")),
            **notes,
        },
    )


def _cross_validated(kind: type[Model], table: LatencyTable, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    n = len(distinct_networks(table))
    if n < 2:
        return {"unvalidated": f"{n or 'no'} measured network{'s' * (n != 1)} in the table to validate on"}
    try:
        figures = cross_validate(kind, table, seed=seed, **options).validation()
    except (TableError, UsageError) as error:  # the whole table sufficed, a part of it does not
        return {"unvalidated": f"too few networks to cross-validate: {error}"}
    return {"validation": {"method": "cross-validation", "folds": min(FOLDS, n), "seed": seed, **figures.to_dict()}}
