"""A searcher's options as plain values: what ``--set NAME=VALUE`` gives, and what a result folder keeps."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar, cast

from latbench.errors import UsageError
from searchers.base import Scalar

S = TypeVar("S")


def settings_of(searcher: Any, *, without: Collection[str] = ()) -> dict[str, Scalar]:
    """Option -> value, but for those named in `without`; ``from_settings`` is its inverse."""
    return {name: value for name, value in dataclasses.asdict(searcher).items() if name not in without}


def from_settings(kind: type[S], settings: Mapping[str, Any]) -> S:
    """The searcher, or other frozen dataclass of plain values, with these options, defaults for what is left out.

    Raises UsageError on an unknown or unfit one.
    """
    options = {f.name: f for f in dataclasses.fields(cast(Any, kind))}
    title = getattr(kind, "name", kind.__name__.lower())
    hints = typing.get_type_hints(kind)
    for name, value in settings.items():
        if name not in options:
            raise UsageError(f"{title} has no option {name!r}: {', '.join(options)}")
        if not _fits(value, hints[name]):
            raise UsageError(f"{title}: {name} must be {_told(hints[name])}, got {value!r}")
    return kind(**settings)


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    kinds = typing.get_args(hint) or (hint,)
    if type(value) in kinds:
        return not isinstance(value, float) or math.isfinite(value)
    return (value is None and type(None) in kinds) or (type(value) is int and float in kinds)


def _told(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return " or ".join(names.get(kind, str(kind)) for kind in (typing.get_args(hint) or (hint,)))
