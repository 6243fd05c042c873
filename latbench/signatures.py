"""Signatures compared: which known graph is nearest to one that has no figure, and in what it differs."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

from latbench.errors import one_line

_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def nearest(signature: str, known: Mapping[str, str]) -> tuple[str, str]:
    """Key -> signature -> (key, difference in words): same operators first, then the closest numbers.

    Where no known graph has the same operators, the difference is the nearest one's signature. Raises ValueError on an
    empty mapping.
    """
    if not known:
        raise ValueError("nothing to compare with")
    operators = _mask(signature)
    forms: dict[str, list[str]] = {}
    for key, text in known.items():
        forms.setdefault(_mask(text), []).append(key)
    wanted = _parts(operators)
    form = operators if operators in forms else max(forms, key=lambda f: _similarity(wanted, _parts(f)))
    key = min(forms[form], key=lambda k: _distance(signature, known[k]))
    if form != operators:
        return key, f"other operators: {shorten(known[key])}"
    pairs = zip(re.split(r"[;,()]", known[key]), re.split(r"[;,()]", signature), strict=True)
    changes = list(dict.fromkeys(f"{theirs} for {ours}" for theirs, ours in pairs if theirs != ours))
    return key, shorten(", ".join(changes)) or "the same computation"


def shorten(text: str, limit: int = 160) -> str:
    """At most `limit` printable characters, on one line."""
    return one_line(text, limit)


def _mask(signature: str) -> str:
    return _NUMBER.sub("#", signature)


def _parts(mask: str) -> Counter[str]:
    """How often each operator stands in it. Linear in its length: difflib's ratio takes an hour on two networks."""
    return Counter(re.split("[;>]", mask))


def _similarity(a: Counter[str], b: Counter[str]) -> float:
    """Share of the operators of both that the other one has too."""
    return 2 * (a & b).total() / max(1, a.total() + b.total())


def _distance(a: str, b: str) -> float:
    """Sum of the log-ratios of the numbers, in order: 64 is as far from 96 as 32 from 48."""
    pairs = zip(_NUMBER.findall(a), _NUMBER.findall(b), strict=False)
    return sum(abs(math.log1p(float(x)) - math.log1p(float(y))) for x, y in pairs)
