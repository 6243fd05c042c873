"""Parsers of what is typed: quantities, settings, architectures."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from contract import Parser
from mutate import text, tree

from latbench import plugins
from latbench.cli.bench import parse_precision
from latbench.cli.target import assignment
from latbench.cli.training import parse_count
from latbench.cli.values import parse_dtype, parse_duration, parse_latency, parse_percent, parse_shape
from latbench.spaces.base import SearchSpace
from latbench.spaces.nsc import parse_codes

_CELL = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|"
_CODES = "(1,1,1,0,0)(2,1,3,0,0)(3,5,0,0,2)(4,1,5,0,0)(5,1,1,3,0)(6,7,0,0,0)"


def _typed(name: str, parse: Any, *examples: str) -> Parser:
    return Parser(name, partial(text, examples=examples), lambda case, _: parse(case), gate=300)


QUANTITIES = (
    _typed("duration", parse_duration, "350us", "4ms", "2.5s", "1h30min", "10 min", "5µs"),
    _typed("latency", parse_latency, "350us", "4ms", "2.5s", "1h30min", "0.001ns"),
    _typed("percent", parse_percent, "2%", "0.02", "100%", "1", ".5 %"),
    _typed("shape", parse_shape, "1x3x224x224", "input:1x3x224x224", "a:b:1", "x:999999999x999999999"),
    _typed("dtype", parse_dtype, "fp32", "float32", "FP16"),
    _typed("precision", parse_precision, "int8", "fp16", "float32"),
    _typed("count", parse_count, "1.5M", "300k", "4231976", ".5g"),
    _typed("name=value", assignment, "channels=16", "a=true", "b=1.5e3", 'c=[1,{"d":null}]', "name=text", "x=NaN"),
    _typed("structure code", parse_codes, _CODES, "(1, 7, 0, 0, 0)"),
)


def _architectures(name: str) -> Parser:
    kind: type[SearchSpace] = plugins.load("latbench.spaces", name)
    space = kind()
    n = len(space.decisions)
    texts = ("random:7", ",".join("0" * n), *list(space.published)[:4], _CELL, _CODES)

    def parse(case: str, _: Path) -> object:
        arch = space.parse_arch(case)
        return space.canonical(arch), space.format_arch(arch), space.describe(arch)

    return Parser(f"architecture of {name}", partial(text, examples=texts), parse)


def _settings(name: str) -> Parser:
    """What a table's metadata say of its space."""
    kind: type[SearchSpace] = plugins.load("latbench.spaces", name)
    valid = kind().settings()

    def parse(case: Any, _: Path) -> object:
        space = kind.from_settings(case if isinstance(case, dict) else {"batch": case})
        arch = space.sample(np.random.default_rng(0))
        return space.size, space.canonical(arch), space.published, list(space.blocks(arch))

    def case(rng: Random) -> Any:
        made = tree(rng, valid)
        if isinstance(made, dict) and rng.random() < 0.5:  # of the right type, and out of range
            key = rng.choice(list(valid))
            right = rng.choice((10**3, 10**6, 10**9, 10**18, 2**63, 0, -5, 96, 33))
            made = {**made, key: type(valid[key])(right) if not isinstance(valid[key], str) else rng.choice(TEXTS)}
        return made

    return Parser(f"settings of {name}", case, parse)


TEXTS = ("16x1,24x2s2", "16x1000000000", "9" * 5000 + "x1", "32,64,128", "1,1,1", "1000000000,1,1", "c100", "dense", "")
_SPACES = plugins.names("latbench.spaces")
PARSERS = (*QUANTITIES, *map(_architectures, _SPACES), *map(_settings, _SPACES))
