"""What ``trtexec --exportTimes=FILE`` writes: a JSON list with the times of each inference, ms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from latbench.errors import UsageError
from latbench.importers.base import Source, parse_json, to_ms
from latbench.measure.statistics import median_interval, percentile
from latbench.spaces.base import SearchSpace
from latbench.tables import LatencyTable, Row

COLUMNS = ("computeMs", "latencyMs")  # GPU time of the network; the same with copies to and from the host


def read(source: Source, network: Row, space: SearchSpace | None, column: str | None) -> LatencyTable:
    """A table of one row: `network` with its samples, its latency their median, as for our own rows.

    `column`: one of ``COLUMNS``, by default the GPU's time. Raises TableError on the file's faults.
    """
    column = column or COLUMNS[0]
    if column not in COLUMNS:
        raise UsageError(f"--column {column}: trtexec's times are {' and '.join(COLUMNS)}")
    times = parse_json(source, source.text, "all of it")
    if not isinstance(times, list) or not times:
        raise source.wrong("all of it", "not a list of times: write it with trtexec --exportTimes=FILE")
    samples = []
    for i, entry in enumerate(times):
        if not isinstance(entry, dict) or column not in entry:
            raise source.wrong(f"entry {i}", f"has no {column}")
        samples.append(to_ms(source, entry[column], "ms", f"entry {i}, {column}"))
    low, high = median_interval(samples)
    array = np.array(samples)
    row = replace(
        network,
        latency_ms=float(np.median(array)),
        ci_low_ms=low,
        ci_high_ms=high,
        mean_ms=float(array.mean()),
        std_ms=float(array.std(ddof=1)) if len(array) > 1 else None,
        min_ms=float(array.min()),
        p90_ms=percentile(array, 0.90),
        p99_ms=percentile(array, 0.99),
        n_samples=len(samples),
        n_blocks=1,
        n_runs=1,
        repeat=1,
        clock="cuda_event",
        origin="imported",
        samples_ms=tuple(samples),
        block_sizes=(len(samples),),
        block_run=(0,),
    )
    return LatencyTable.from_rows([row], source.provenance(space, "trtexec", column=column, unit="ms"))
