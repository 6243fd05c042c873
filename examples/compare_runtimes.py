"""Compare two runtimes block by block: ``python examples/compare_runtimes.py onnxruntime openvino -o runtimes``.

Measures one small space with each back-end, every block by itself, then says of every block whether the second runtime
is surely slower or faster, the same, or whether the samples cannot tell; the page ``runtimes/comparison.html`` shows it
all.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from latbench import devices
from latbench.compare import compare
from latbench.measure.base import SamplingPlan
from latbench.profiling import Target, profile
from latbench.report.comparison_section import comparison_section, markdown
from latbench.report.page import write_page
from latbench.spaces.mobilenet_v1 import MobileNetV1Space


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backends", nargs=2, metavar="BACKEND")
    parser.add_argument("--resolution", type=int, default=96)
    parser.add_argument("--levels", type=int, default=2, help="widths per layer")
    parser.add_argument("--threshold", type=float, default=0.05)
    parser.add_argument("-o", "--output", type=Path, default=Path("runtimes"))
    args = parser.parse_args()

    args.output.mkdir(exist_ok=True)
    space = MobileNetV1Space(resolution=args.resolution, levels=args.levels)
    name = devices.detect().host.cpu_model
    tables = []
    for backend in args.backends:
        target = Target("cpu", name, backend, {"threads": 1}, SamplingPlan(), "isolated")
        tables.append(profile(space, target, args.output / f"{backend}.parquet"))
    old, new = (outcome.table for outcome in tables)
    found = compare(old, new, threshold=args.threshold, across=["backend"])
    print(markdown(found, *args.backends))
    section = comparison_section(found, *args.backends)
    write_page(args.output / "comparison.html", section.title, [section])


if __name__ == "__main__":
    main()
