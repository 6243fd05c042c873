"""Fuzzes every parser of latbench: 10,000 hostile cases each, in processes of their own.

    python benchmarks/fuzz.py [--cases 10000] [--seed 0] [--only NAME] [-o fuzz.txt]
    python benchmarks/fuzz.py --only "ONNX model" --case 1234      # one case again, with its traceback
    python benchmarks/fuzz.py --atheris "ONNX model" [-max_total_time=600 ...]    # libFuzzer, guided by coverage

A case is known by parser, seed and number. It may end in a value or in a LatbenchError of one line; anything else is a
fault: another exception, a warning, no end within 20 s, a GiB of memory more, the end of the process. Exit status 1
where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "fuzz"), str(ROOT / "tests")]

from contract import Parser, outcome  # noqa: E402
from parsers import PARSERS  # noqa: E402


def rng_of(parser: Parser, seed: int, number: int) -> Random:
    return Random(f"{parser.name}/{seed}/{number}")


def where(error: BaseException) -> str:
    """The innermost line of ours: faults of one place are counted together."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "/latbench/" in f.filename or "/searchers/" in f.filename
    ]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} " if frames else ""
    return f"{place}{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def work(parser: Parser, seed: int, first: int, last: int, log: Any) -> None:
    """Cases first to last - 1; a line before and one behind each, so that a death tells its case."""
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, last):
            print(number, file=log, flush=True)
            case = parser.case(rng_of(parser, seed, number))
            began = time.perf_counter()
            try:
                end, fault = outcome(parser, case, Path(folder)), None
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                end, fault = "FAULT", where(error)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(json.dumps([end, fault, time.perf_counter() - began, peak]), file=log, flush=True)


def fuzz(name: str, cases: int, seed: int) -> tuple[str, dict[str, list[int]]]:
    """A line on the parser, and fault -> the numbers of its cases. A process that dies is followed by another one."""
    ends: Counter[str] = Counter()
    faults: dict[str, list[int]] = {}
    done, slowest, base, peak, began = 0, (0.0, 0), 0, 0, time.monotonic()
    while done < cases:
        command = [sys.executable, __file__, "--work", name, str(seed), str(done), str(cases)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        running = None
        for line in process.stdout:
            if line.strip().isdecimal():
                running = int(line)
                continue
            end, fault, seconds, rss = json.loads(line)
            assert running is not None
            ends[end] += 1
            if fault is not None:
                faults.setdefault(fault, []).append(running)
            slowest, base, peak = max(slowest, (seconds, running)), base or rss, max(peak, rss)
            done, running = running + 1, None
        code = process.wait()
        if code and running is None:
            raise SystemExit(f"the process of {name} ended with {code} before a case")
        if running is not None:
            faults.setdefault(f"the process ended with {code}", []).append(running)
            ends["FAULT"] += 1
            done = running + 1
    read, refused = ends.pop("value", 0), ", ".join(f"{n} {kind}" for kind, n in ends.most_common())
    return (
        f"{name:28} {cases} cases, {time.monotonic() - began:.0f} s: {read} read, {refused or 'none refused'}; slowest "
        f"{1e3 * slowest[0]:.0f} ms (case {slowest[1]}), memory +{max(0, peak - base) >> 10} MiB"
    ), faults


def guided(name: str, arguments: list[str]) -> None:
    """libFuzzer by way of atheris: bytes steer the generator of cases, coverage of latbench steers the bytes."""
    import atheris  # type: ignore[import-not-found]
    from hypothesis import given, settings
    from hypothesis import strategies as st

    parser = PARSERS[name]
    folder = Path(tempfile.mkdtemp())

    @settings(database=None, deadline=None)
    @given(st.randoms(use_true_random=False))
    def holds(rng: Random) -> None:
        outcome(parser, parser.case(rng), folder)

    for module in [m for n, m in sys.modules.items() if n.partition(".")[0] in ("latbench", "searchers")]:
        for value in list(vars(module).values()):
            if getattr(value, "__module__", None) == module.__name__ and hasattr(value, "__code__"):
                atheris.instrument_func(value)
    atheris.Setup([sys.argv[0], *arguments], holds.hypothesis.fuzz_one_input)
    atheris.Fuzz()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", type=int, default=10_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", help="Parsers whose name holds this.")
    options.add_argument("--case", type=int, help="One case of the parser --only, again.")
    options.add_argument("--atheris", metavar="PARSER", help="Guided by coverage; further options are libFuzzer's.")
    options.add_argument("-o", "--output", type=Path)
    given, others = options.parse_known_args()
    if given.atheris:
        guided(given.atheris, others)
    if others:
        options.error(f"unknown: {' '.join(others)}")
    if given.case is not None:
        parser = PARSERS[given.only]
        case = parser.case(rng_of(parser, given.seed, given.case))
        print(repr(case)[:2000])
        print(outcome(parser, case, Path(tempfile.mkdtemp())))
        return
    faulty = 0
    with (given.output or Path(os.devnull)).open("w") as file:
        for name in PARSERS:
            if given.only is not None and given.only not in name:
                continue
            line, faults = fuzz(name, given.cases, given.seed)
            lines = [line, *(f"  FAULT x{len(n)} (case {n[0]}): {what}" for what, n in faults.items())]
            print(*lines, sep="\n", flush=True)
            print(*lines, sep="\n", file=file, flush=True)
            faulty += bool(faults)
    sys.exit(bool(faulty))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        name, seed, first, last = sys.argv[2:6]
        work(PARSERS[name], int(seed), int(first), int(last), os.fdopen(os.dup(1), "w"))
    else:
        main()
