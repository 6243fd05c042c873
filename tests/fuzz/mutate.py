"""Cases near valid ones: texts, bytes, JSON trees. Random bytes end at a parser's first check; these go deeper.

Every function draws from the generator that it is given, so a case is known by its seed, and hypothesis or libFuzzer
may steer it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

NUMBERS = (
    *(0, 1, -1, 2, 7, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30),
    *(0.5, -0.0, 1e-400, 5e-324, 1e308, float("inf"), float("-inf"), float("nan")),
)
WORDS = (
    *(
        "",
        " ",
        "\n",
        "\r",
        "\x00",
        "\x1b[2J",
        "\u2028",
        "\udcff",
        "\ufeff",
        "é",
        "µ",
        "\uff11",
        "\u0663",
        "\U0001d7d9",
        "²",
        "∞",
        "😀",
        "‮",
    ),
    *("0", "-1", "+1", "00", "1e5", "1e999", "nan", "inf", "-inf", "1_0", "0x10", "1.5", ".", "1..2", "9" * 400),
    *("9" * 5000, "x" * 3000, "(" * 2000, "null", "true", "../..", "/dev/zero", "%s%n", "{}", "[]", "a.b", "'", '"'),
    *(",", ":", ";", "=", "|", "~", "+", "/"),
)
LETTERS = "0123456789.,:;x+-eE%=|~()[]{}\"' \t\n_/*&\\ab"


def text(rng: Random, examples: Sequence[str]) -> str:
    """An example with a few edits, or now and then letters without order."""
    if rng.random() < 0.1:
        return "".join(rng.choice(LETTERS) for _ in range(rng.randrange(12)))
    made = rng.choice(examples)
    for _ in range(rng.randrange(4)):
        start, end = sorted((rng.randrange(len(made) + 1), rng.randrange(len(made) + 1)))
        kind = rng.randrange(5)
        if kind == 0:
            made = made[:start] + made[end:]
        elif kind == 1:
            made = made[:start] + made[start:end] * 2 + made[end:]
        elif kind == 2:
            made = made[:start] + rng.choice(WORDS) + made[start:]
        elif kind == 3:
            made = made[:start] + rng.choice(LETTERS) + made[start + 1 :]
        else:
            made = made[:start] + rng.choice(examples) + made[end:]
    return made


def damaged(rng: Random, examples: Sequence[bytes]) -> bytes:
    """An example with bits flipped, bytes cut, doubled, put in or taken from another one, or huge lengths."""
    made = bytearray(rng.choice(examples))
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(made) + 1)
        length = min(rng.choice((1, 1, 2, 4, 8, 64, 1024)), len(made) - at)
        kind = rng.randrange(8)
        if kind == 0 and length:
            made[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del made[at:]
        elif kind == 2:
            del made[at : at + length]
        elif kind == 3:
            made[at:at] = made[at : at + length]
        elif kind == 4:
            made[at:at] = bytes(rng.randrange(256) for _ in range(min(length, 8)))
        elif kind == 5:
            other = rng.choice(examples)
            start = rng.randrange(len(other) + 1)
            made[at : at + length] = other[start : start + length]
        elif kind == 6:
            number = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, 10**6))
            size = 4 if number < 2**32 and rng.random() < 0.5 else 8
            made[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
        elif length:
            made[at] = rng.choice((0, 0x7F, 0x80, 0xFF))
    return bytes(made)


def value(rng: Random) -> Any:
    """A JSON value that is seldom expected."""
    kind = rng.randrange(7)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice(WORDS)
    return rng.choice((None, True, False, [], {}, [[]], {"": {}}, [None] * 3, {"a": 1}, [1, "a", None], [0] * 2000))


def tree(rng: Random, example: Any, edits: int = 3, other: Callable[[Random], Any] = value) -> Any:
    """A JSON tree, up to `edits` places of it replaced, dropped, doubled, renamed or swapped with another."""
    made = example
    for _ in range(rng.randrange(edits + 1)):
        made = _edited(rng, made, example, other)
    return made


def _edited(rng: Random, node: Any, root: Any, other: Callable[[Random], Any]) -> Any:
    """A copy of `node` with one place changed, deeper ones more often."""
    if isinstance(node, dict) and node and rng.random() < 0.9:
        key = rng.choice(list(node))
        kind = rng.randrange(10)
        if kind == 0:
            return {k: v for k, v in node.items() if k != key}
        if kind == 1:
            return {**node, rng.choice(WORDS): node[key]}
        if kind == 2:
            return {(rng.choice(WORDS) if k == key else k): v for k, v in node.items()}
        return {**node, key: _edited(rng, node[key], root, other)}
    if isinstance(node, list) and node and rng.random() < 0.9:
        i = rng.randrange(len(node))
        kind = rng.randrange(8)
        if kind == 0:
            return [*node[:i], *node[i + 1 :]]
        if kind == 1:
            return [*node[: i + 1], *node[i:]]
        return [*node[:i], _edited(rng, node[i], root, other), *node[i + 1 :]]
    return _somewhere(rng, root) if rng.random() < 0.15 else other(rng)


def _somewhere(rng: Random, node: Any) -> Any:
    """A subtree."""
    while isinstance(node, (dict, list)) and node and rng.random() < 0.7:
        node = rng.choice(list(node.values()) if isinstance(node, dict) else node)
    return node


def json_text(rng: Random, example: Any, edits: int = 3) -> bytes:
    """A JSON text near an example's: another tree, or the same with names doubled, cut off, or nested without end."""
    if rng.random() < 0.75:
        return json.dumps(tree(rng, example, edits), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    made = json.dumps(example).encode()
    at = rng.randrange(len(made) + 1)
    kind = rng.randrange(4)
    if kind == 0:
        return made[:at] + rng.choice((b"[", b'{"a":', b"-", b'"')) * rng.choice((3, 100_000)) + made[at:]
    if kind == 1:
        return made.replace(b'{"', b'{"schema": 1, "', 1) if rng.random() < 0.5 else made[:at]
    if kind == 2:
        return made[:at] + rng.choice(WORDS).encode("utf-8", "surrogatepass") + made[at:]
    return damaged(rng, [made])
