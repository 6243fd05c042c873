"""Every parser ends in a value or in one line, whatever it is given.

The gate takes a few hundred cases of each, the same ones every time. More, and others: ``LATBENCH_FUZZ_CASES=10000``,
or ``benchmarks/fuzz.py``, which also survives what kills a process.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest
from contract import HangError, Parser, bounded, outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parsers import PARSERS

from latbench.errors import UsageError

CASES = int(os.environ.get("LATBENCH_FUZZ_CASES", "0"))


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_ends_in_a_value_or_one_line(name: str, tmp_path: Path) -> None:
    parser = PARSERS[name]

    @settings(
        max_examples=CASES or parser.gate,
        derandomize=not CASES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=True))  # hypothesis draws the seed: a case costs what its parser costs
    def holds(rng: Random) -> None:
        outcome(parser, parser.case(rng), tmp_path)

    holds()


@pytest.mark.parametrize("name", PARSERS)
def test_cases_reach_both_ends(name: str, tmp_path: Path) -> None:
    """What only ever refuses, or never does, tests nothing."""
    parser, seen = PARSERS[name], set()
    for seed in range(400):
        seen.add(outcome(parser, parser.case(Random(seed)), tmp_path) == "value")
        if len(seen) == 2 or parser.name in ("host", "nvidia-smi", "signatures"):  # they refuse nothing
            return
    pytest.fail(f"400 cases of {name}: {'none' if seen == {False} else 'all'} of them read")


def _never(case: object, _: Path) -> object:
    while True:
        pass


def test_the_contract_sees_hangs_bombs_bugs_and_messages_of_several_lines(tmp_path: Path) -> None:
    def ends(parse: object) -> str:
        return outcome(Parser("made up", lambda rng: None, parse), None, tmp_path)  # type: ignore[arg-type]

    class BareError(UsageError):
        def __str__(self) -> str:
            return "two\nlines"

    def refuse(case: object, _: Path) -> object:
        raise BareError

    assert ends(lambda case, _: None) == "value"
    with pytest.raises(AssertionError, match="of several lines"):
        ends(refuse)
    with pytest.raises(MemoryError):
        ends(lambda case, _: bytearray(2 << 30))
    with pytest.raises(ZeroDivisionError):
        ends(lambda case, _: 1 / 0)
    with pytest.raises(HangError), bounded(0.05):
        _never(None, tmp_path)
