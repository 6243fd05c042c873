"""How much does ``latbench compare`` find? ``python benchmarks/compare_power.py FOLDER [--measure 8 --pause 240]``.

`--measure` takes passes over the 200 blocks of ``blocks200.py`` at the default settings, each in processes of its own
and some minutes apart, into FOLDER. Then every ordered pair of passes is compared: as they are, when every row should
be SAME, and with 10 % added to 20 rows, fifty times chosen at random, when these and no others should be SLOWER. Aims:
SAME of 95 % of the rows, 18 of the 20 found for any pair and any choice.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latbench.compare import compare
from latbench.tables import LatencyTable
from latbench.tables.columns import Columns, InMemory

N_CHOICES, N_ROWS, FACTOR = 50, 20, 1.10
AIM_SAME, AIM_FOUND = 0.95, 18


@dataclass(frozen=True)
class Power:
    """What a comparison of two passes came to."""

    same: float  # share of rows, nothing added
    claimed: int  # rows SLOWER or FASTER, nothing added
    found: tuple[int, ...]  # of N_ROWS, for each choice
    wrong: tuple[int, ...]  # rows claimed that nothing was added to, or as FASTER


def slowed(table: LatencyTable, keys: set[str]) -> LatencyTable:
    """With every sample of some rows made longer."""
    data = table.data
    factors = np.where(np.isin(data["key"].to_numpy().astype(str), list(keys)), FACTOR, 1.0)
    samples = data["samples_ms"].combine_chunks()
    longer = pc.multiply(samples.flatten(), pa.array(np.repeat(factors, np.asarray(samples.value_lengths()))))
    at = data.schema.get_field_index("samples_ms")
    data = data.set_column(at, data.schema.field(at), pa.ListArray.from_arrays(samples.offsets, longer))
    return LatencyTable(Columns((InMemory(data),)), table.provenance, table.notes)


def power(old: LatencyTable, new: LatencyTable) -> Power:
    counts = compare(old, new).counts
    keys = np.array(old.frame_of("key")["key"].tolist())
    rng = np.random.default_rng(0)
    found, wrong = [], []
    for _ in range(N_CHOICES):
        chosen = set(rng.choice(keys, N_ROWS, replace=False).tolist())
        rows = compare(old, slowed(new, chosen)).rows
        right = sum(row.verdict == "SLOWER" and row.key in chosen for row in rows)
        found.append(right)
        wrong.append(sum(row.verdict in ("SLOWER", "FASTER") for row in rows) - right)
    return Power(counts["SAME"] / len(keys), counts["SLOWER"] + counts["FASTER"], tuple(found), tuple(wrong))


def measure(folder: Path, n: int, pause_s: float) -> None:
    """Passes 0 to n - 1, those that are there already left out; each in a fresh process."""
    for seed in range(n):
        path = folder / f"pass{seed}.parquet"
        if not path.exists():
            if seed:
                time.sleep(pause_s)
            subprocess.run([sys.executable, __file__, str(folder), "--one", str(seed)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--measure", type=int, default=0, metavar="N", help="take N passes first")
    parser.add_argument("--pause", type=float, default=240, help="seconds between two passes")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        from blocks200 import one_pass

        one_pass(args.one, "python benchmarks/compare_power.py").write(args.folder / f"pass{args.one}.parquet")
        return
    measure(args.folder, args.measure, args.pause)
    passes = {path.stem: LatencyTable.read(path) for path in sorted(args.folder.glob("pass*.parquet"))}
    print(f"{N_ROWS} rows made {FACTOR - 1:.0%} slower, {N_CHOICES} choices for each pair of {len(passes)} passes")
    print("old    new     SAME   claimed   found: mean  min  >= 18   claimed wrongly")
    all_found: list[int] = []
    shares, wrong = [], 0
    for old, new in itertools.permutations(passes, 2):
        one = power(passes[old], passes[new])
        enough = np.mean(np.array(one.found) >= AIM_FOUND)
        print(
            f"{old}  {new}  {one.same:6.1%}  {one.claimed:7d}   {np.mean(one.found):11.2f}  {min(one.found):3d}"
            f"  {enough:5.0%}   {sum(one.wrong)} of {N_CHOICES * N_ROWS}",
            flush=True,
        )
        shares.append(one.same)
        all_found += one.found
        wrong += sum(one.wrong)
    enough = np.mean(np.array(all_found) >= AIM_FOUND)
    print(f"SAME: mean {np.mean(shares):.1%}, least {min(shares):.1%} (aim: {AIM_SAME:.0%})")
    print(
        f"found: mean {np.mean(all_found):.2f}, least {min(all_found)}; at least {AIM_FOUND} in {enough:.1%} of cases"
    )
    print(f"claimed wrongly: {wrong} rows in {len(all_found)} comparisons")


if __name__ == "__main__":
    main()
