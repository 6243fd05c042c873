"""What a fleet costs per block against the local launcher: ``python benchmarks/fleet_overhead.py [--fleet ADDRESS]``.

The same jobs, plan and session on a ``LocalLauncher`` and on a node of a fleet take turns; told is wall time per block
of samples (one request) of each, their ratio, and the difference. Starting Ray and placing the process on the node is
told apart: it is paid once a run. Without ``--fleet`` a node is started on this machine, so head, node and worker share
its cores: between machines the line's delay comes on top, and hides behind the calls that are under way.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from blocks200 import sample_jobs

from latbench import devices
from latbench.measure.base import SamplingPlan
from latbench.measure.fleet import connect
from latbench.profiling import Target
from latbench.profiling.fleet_node import FleetNode
from latbench.profiling.jobs import GraphJob
from latbench.profiling.session import Session
from latbench.spaces.mobilenet_v1 import MobileNetV1Space

SPACE = MobileNetV1Space()  # named in the node's provenance, nothing else
TURNS = 3
RAY = Path(sys.executable).with_name("ray")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fleet", metavar="ADDRESS", help="default: a node is started here, and stopped")
    parser.add_argument("--blocks", type=int, default=200)
    args = parser.parse_args()
    plan = SamplingPlan(rounds=1)
    name = devices.detect().host.cpu_model
    jobs = sample_jobs(args.blocks)
    with node_here() if args.fleet is None else nullcontext(args.fleet) as address:
        for backend, options in (("onnxruntime", {"threads": 1}), ("roofline", {})):
            compare(Target("cpu", name, backend, options, plan), address, jobs)


def compare(target: Target, address: str, jobs: Sequence[GraphJob]) -> None:
    """Prints the figures of one back-end."""
    local_us: list[float] = []
    fleet_us: list[float] = []
    begin = time.perf_counter()
    with connect(address) as fleet, target.launcher() as launcher:
        launcher.start()
        node = FleetNode(fleet, fleet.holding("cpu")[0], target)
        before = time.perf_counter()
        with node.open(SPACE, print) as (remote, _):
            placed_s = time.perf_counter() - before
            for _ in range(TURNS):
                local_us.append(us_per_request(launcher, target, jobs))
                fleet_us.append(us_per_request(remote, target, jobs))
    local, there = statistics.median(local_us), statistics.median(fleet_us)
    print(
        f"{target.backend:12s} {len(jobs)} blocks: {local:7.0f} us per block of samples here, {there:7.0f} us on the "
        f"fleet: ratio {there / local:.3f}, {there - local:+.0f} us; connecting {before - begin:.1f} s, "
        f"placing {placed_s:.1f} s once",
        flush=True,
    )


def us_per_request(launcher: Any, target: Target, jobs: Sequence[GraphJob]) -> float:
    """Wall time of a session over its requests."""
    count = 0

    def record(measurement: Any) -> None:
        nonlocal count
        count += 1
        assert measurement.status == "ok", measurement.error

    session = Session(launcher, target.plan, target.artifact, launcher.conditions.get("clock_probe_us"), record)
    begin = time.perf_counter()
    session.measure(jobs)
    return 1e6 * (time.perf_counter() - begin) / count


@contextmanager
def node_here() -> Iterator[str]:
    """The address of a Ray node that holds this machine's CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = ["start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={address.partition(':')[2]}"]
    words += ["--include-dashboard=false", "--disable-usage-stats", '--resources={"latbench:cpu": 1}']
    with tempfile.TemporaryDirectory(prefix="ray") as folder, (Path(folder) / "said").open("w") as said:
        variables = {**os.environ, "RAY_worker_niceness": "0"}
        words.append(f"--temp-dir={folder}")
        process = subprocess.Popen([RAY, *words], env=variables, stdout=said, stderr=said)
        try:
            while "Ray runtime started" not in (Path(folder) / "said").read_text():
                assert process.poll() is None, (Path(folder) / "said").read_text()
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
