"""Pick widths under two budgets at once: ``python examples/two_budgets.py FAST.parquet 0.05 SLOW.parquet 0.4``.

Two tables of one space (two devices, two runtimes, two batch sizes), each with its budget in ms. The choice is exact:
no other network of the space has a larger score within both. The score here is the sum of the logarithms of the widths;
put in what your supernet says.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from latbench.oracle.lut import LutOracle
from latbench.tables import LatencyTable
from searchers.chains import Paths
from searchers.selection import select


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="of a space that is a chain of widths, such as mobilenet_v1")
    parser.add_argument("budget", type=float, help="ms")
    parser.add_argument("other_table", type=Path)
    parser.add_argument("other_budget", type=float, help="ms")
    args = parser.parse_args()

    oracles = [LutOracle.fit(LatencyTable.read(path)) for path in (args.table, args.other_table)]
    space = oracles[0].space
    scores = [np.log(np.array(decision.options, float)) for decision in space.decisions]
    found = select(Paths.of(scores, [oracle.chain() for oracle in oracles]), (args.budget, args.other_budget))

    print("widths", *(d.options[i] for d, i in zip(space.decisions, found.path, strict=True)))
    for oracle, budget in zip(oracles, (args.budget, args.other_budget), strict=True):
        print(f"{oracle.provenance.device_name}: {oracle.latency(found.path):.4f} ms of {budget:g} ms")


if __name__ == "__main__":
    main()
