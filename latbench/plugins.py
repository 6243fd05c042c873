"""Plug-ins: what packages register under our entry-point groups, ours included. Found by name, imported on demand.

A third party adds a back-end, a space, ... by one line in its own ``pyproject.toml``::

    [project.entry-points."latbench.spaces"]
    my_space = "my_package.spaces:MySpace"
"""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from latbench.errors import BackendUnavailableError, EnvironmentUnfitError, UsageError

GROUPS = {
    "latbench.backends": "back-end",
    "latbench.spaces": "search space",
    "latbench.launchers": "launcher",
    "latbench.oracles": "oracle",
    "latbench.searchers": "searcher",
}


def names(group: str) -> tuple[str, ...]:
    """Registered names, sorted; nothing is imported. Raises UsageError where `group` is none of ``GROUPS``."""
    return tuple(sorted({point.name for point in _points(group)}))


def spec(group: str, name: str) -> str:
    """ "module:attribute" of a plug-in, not imported: what a worker process is told. Raises UsageError."""
    return _point(group, name).value.partition("[")[0].strip()


def load(group: str, name: str) -> Any:
    """Imports a plug-in.

    Raises UsageError where the name is unknown, EnvironmentUnfitError (BackendUnavailableError for back-ends) where
    its import fails, with what to install.
    """
    point = _point(group, name)
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        unfit = BackendUnavailableError if group == "latbench.backends" else EnvironmentUnfitError
        raise unfit(f"{GROUPS[group]} {name} cannot be imported: {_reason(point, error)}") from error


def _points(group: str) -> list[EntryPoint]:
    if group not in GROUPS:
        raise UsageError(f"unknown plug-in group {group!r}: {', '.join(GROUPS)}")
    return list(entry_points(group=group))


def _point(group: str, name: str) -> EntryPoint:
    points = _points(group)
    found = {point.value: point for point in points if point.name == name}  # a package may be on the path twice
    if len(found) > 1:
        raise UsageError(f"two packages register the {GROUPS[group]} {name}: {' and '.join(found)}; uninstall one")
    if not found:
        known = sorted({point.name for point in points})
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"unknown {GROUPS[group]} {name!r}: {hint}known: {', '.join(known) or 'none'}")
    return next(iter(found.values()))


def _reason(point: EntryPoint, error: ImportError | AttributeError) -> str:
    package = point.dist.name if point.dist else point.module.partition(".")[0]
    missing = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    if missing and missing.partition(".")[0] != point.module.partition(".")[0]:
        wanted = f"'{package}[{','.join(point.extras)}]'" if point.extras else missing.partition(".")[0]
        return f"no module {missing}. Run: pip install {wanted}"
    if missing or isinstance(error, AttributeError):
        return f"{package} registers {point.value}, but {error}. Run: pip install --force-reinstall {package}"
    return f"{error}"
