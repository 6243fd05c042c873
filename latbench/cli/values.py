"""How quantities are typed and printed: ``4ms``, ``2%``, ``input:1x3x224x224``. The only place where they are text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import click

from latbench.errors import UsageError, shown

_SECONDS = {
    "ns": Decimal("1e-9"),
    "us": Decimal("1e-6"),
    "µs": Decimal("1e-6"),  # micro sign
    "μs": Decimal("1e-6"),  # Greek mu
    "ms": Decimal("1e-3"),
    "s": Decimal(1),
    "min": Decimal(60),
    "h": Decimal(3600),
}
_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_QUANTITY = re.compile(rf"({_NUMBER})\s*({'|'.join(_SECONDS)})\s*")  # "ms" and "min" stand before "s"
_SHAPE = re.compile(r"(?:(?P<name>.+):)?(?P<dims>[1-9][0-9]{0,8}(?:x[1-9][0-9]{0,8})*)")
_DTYPES: dict[str, Literal["float32", "float16"]] = {
    "fp32": "float32",
    "float32": "float32",
    "fp16": "float16",
    "float16": "float16",
}


class InputShape(NamedTuple):
    """Shape of a model's input; `name` is None where the model has only one."""

    name: str | None
    dims: tuple[int, ...]


def parse_duration(text: str) -> float:
    """Seconds of "350us", "4ms", "2.5s", "1h30min". Raises UsageError."""
    return float(_duration(text, "10min, 2.5s, 1h30min"))


def parse_latency(text: str) -> float:
    """Milliseconds, above zero, of "4ms", "350us". Raises UsageError."""
    latency_ms = float(_duration(text, "4ms, 350us, 1.2s") * 1000)
    if latency_ms == 0:
        raise UsageError(f"{shown(text)}: a latency must be above zero (4ms, 350us, 1.2s)")
    return latency_ms


def parse_percent(text: str) -> float:
    """Share between 0 and 1 of "2%" or "0.02". Raises UsageError."""
    match = re.fullmatch(rf"\s*({_NUMBER})\s*(%?)\s*", text)
    if match is None:
        raise UsageError(f"{shown(text)} is no percentage: write 2% or 0.02")
    share = float(Decimal(match[1]) / (100 if match[2] else 1))
    if share > 1:
        hint = "" if match[2] else f": did you mean {match[1][:20]}%?"
        raise UsageError(f"{shown(text)} is more than 100%{hint}")
    return share


def parse_shape(text: str) -> InputShape:
    """Name (everything before the last colon) and dimensions of "input:1x3x224x224". Raises UsageError."""
    match = _SHAPE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{shown(text)} is no shape: write 1x3x224x224 or input:1x3x224x224, every size above zero")
    return InputShape(match["name"], tuple(int(size) for size in match["dims"].split("x")))


def parse_dtype(text: str) -> Literal["float32", "float16"]:
    """ "fp32" or "float32", "fp16" or "float16" -> numpy's name. Raises UsageError."""
    try:
        return _DTYPES[text.strip().lower()]
    except KeyError:
        raise UsageError(f"unknown dtype {shown(text)}: fp32 or fp16") from None


class Quantity(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.4 only
    """A typed option: malformed text becomes click's one-line usage error."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Text is parsed; a default that is already a value passes through."""
        if not isinstance(value, str):
            return value
        try:
            return self.parse(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


DURATION = Quantity("duration", parse_duration)  # float, s
LATENCY = Quantity("latency", parse_latency)  # float, ms
PERCENT = Quantity("percent", parse_percent)  # float, share of 1
SHAPE = Quantity("shape", parse_shape)  # InputShape
DTYPE = Quantity("dtype", parse_dtype)  # "float32" | "float16"


def format_ms(latency_ms: float, half: float | None = None) -> str:
    """Three digits and the unit that suits: "4.21 ms", "35.0 µs", "1.20 s"; with `half`, the relative half-width of
    its interval, "4.21 ms ± 0.8 %". A value that is not finite prints as "-"."""
    if not math.isfinite(latency_ms):
        return "-"
    text = _scaled(latency_ms * 1e6, ("ns", "µs", "ms", "s"), 1000) if latency_ms else "0 ms"
    return text if half is None or not math.isfinite(half) else f"{text} ± {_two_digits(half * 100)} %"


def format_bytes(nbytes: int) -> str:
    """Binary units, three digits: "512 B", "1.50 MiB"."""
    return f"{nbytes} B" if abs(nbytes) < 1024 else _scaled(nbytes, ("B", "KiB", "MiB", "GiB", "TiB"), 1024)


def format_count(count: int) -> str:
    """Decimal units, three digits: "950", "1.20 M"."""
    return str(count) if abs(count) < 1000 else _scaled(count, ("", "k", "M", "G", "T"), 1000)


def _duration(text: str, examples: str) -> Decimal:
    parts = list(_QUANTITY.finditer(text[:40]))
    scales = [_SECONDS[part[2]] for part in parts]
    falling = all(larger > smaller for larger, smaller in pairwise(scales))  # "1h30min", never "30min1h"
    if not parts or "".join(part[0] for part in parts) != text.lstrip() or not falling:
        bare = re.fullmatch(rf"\s*{_NUMBER}\s*", text)
        raise UsageError(f"{text[:40]!r} {'has no unit' if bare else 'is no duration'}: write {examples}")
    return sum((Decimal(part[1]) * scale for part, scale in zip(parts, scales, strict=True)), Decimal(0))


def _scaled(value: float, units: tuple[str, ...], base: int) -> str:
    """Three significant digits in the largest unit that leaves at least 1; rounding may carry into the next."""
    for unit in units[:-1]:
        if abs(float(_three_digits(value))) < base:
            return f"{_three_digits(value)} {unit}"
        value /= base
    return f"{_three_digits(value)} {units[-1]}"


def _three_digits(value: float) -> str:
    rounded = abs(float(f"{value:.3g}"))
    return f"{value:.{2 if rounded < 10 else 1 if rounded < 100 else 0}f}"


def _two_digits(value: float) -> str:
    return f"{value:.{2 if value < 0.1 else 1 if value < 10 else 0}f}"
