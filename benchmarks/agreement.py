"""Does latbench agree with what a user would measure by other means? ``python benchmarks/agreement.py [BACKEND...]``.

onnxruntime: a plain loop, on 12 blocks and networks of about 20 us to 50 ms. openvino: its own ``benchmark_app``, on
the 6 networks among them. torch: ``torch.utils.benchmark``, on those networks and 2 blocks. Each in a fresh process on
the same model, with the worker's affinity and priority. The two take turns, because the machine drifts; told is the
median of the ratios. Aim: within 3 %.

``--throughput``: openvino's inferences a second, as many at once as it thinks best, beside ``benchmark_app -hint
throughput`` on the same CPUs, on the networks up to 224 px.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from latbench import devices, plugins
from latbench.errors import EnvironmentUnfitError
from latbench.graph.ir import Graph
from latbench.graph.onnx import to_onnx
from latbench.graph.passes import FoldReport, fold_structure, random_weights
from latbench.measure.launcher import cpus_for
from latbench.measure.worker import raise_priority
from latbench.profiling import Target
from latbench.profiling.bench import BENCH_PLAN, Model, bench
from latbench.profiling.jobs import GraphJob
from latbench.profiling.throughput import throughput
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space
from latbench.tables import Row

TURNS = 7
PLAN = replace(BENCH_PLAN, runs=3, precision=0.05, min_time_s=0.2)  # shorter turns drift less

PLAIN = """
import json, sys, time
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
rng = np.random.default_rng(0)
binding = session.io_binding()
for i in session.get_inputs():
    binding.bind_cpu_input(i.name, rng.standard_normal(i.shape).astype(np.float32))
for o in session.get_outputs():
    binding.bind_ortvalue_output(o.name, ort.OrtValue.ortvalue_from_shape_and_type(o.shape, np.float32))
end = time.perf_counter() + 0.2
while time.perf_counter() < end:
    session.run_with_iobinding(binding)
times, end = [], time.perf_counter() + 0.6
while time.perf_counter() < end or len(times) < 20:
    start = time.perf_counter_ns()
    session.run_with_iobinding(binding)
    times.append(time.perf_counter_ns() - start)
print(json.dumps(float(np.median(times)) / 1e6))
"""

TORCH = """
import json, sys
from pathlib import Path
import torch
from torch.utils.benchmark import Timer
from latbench.backends.torch import keep_heap
from latbench.graph.ir import Graph
from latbench.graph.passes import random_weights
from latbench.graph.torch import to_module
keep_heap()
graph = Graph.from_json(Path(sys.argv[1]).read_text())
module = to_module(graph, random_weights(graph))
inputs = [torch.randn(shape) for _, shape in graph.inputs]
torch.set_num_interop_threads(1)
with torch.inference_mode():
    timer = Timer("module(*inputs)", globals={"module": module, "inputs": inputs}, num_threads=1)
    timer.blocked_autorange(min_run_time=0.2)
    print(json.dumps(timer.blocked_autorange(min_run_time=0.6).median * 1e3))
"""


def models() -> list[tuple[str, Graph]]:
    """Name and folded graph, from small to large."""
    big, small = MobileNetV1Space(), MobileNetV1Space(resolution=96)
    nasbench = NASBench201Space()

    def block(space: MobileNetV1Space, stage: int, picks: tuple[int, ...]) -> Graph:
        made = space.block(space.sites[stage], picks)
        assert made is not None
        return made

    chosen = [
        ("stem 8 at 96", block(small, 0, (0,))),
        ("stem 32 at 96", block(small, 0, (3,))),
        ("separable 64-128 s2 at 96", block(small, 2, (6, 8))),
        ("separable 512-512 at 96", block(small, 8, (8, 8))),
        ("separable 256-512 s2 at 224", block(big, 6, (8, 8))),
        ("separable 512-512 at 224", block(big, 8, (8, 8))),
        ("mobilenet_v1:mobilenet-v1 at 96", small.network(small.published["mobilenet-v1"])),
        ("nasbench201:resnet", nasbench.network(nasbench.published["resnet"])),
        ("mobilenet_v1:aows-readme at 224", big.network(big.published["aows-readme"])),
        ("mobilenet_v1:mobilenet-v1 at 224", big.network(big.published["mobilenet-v1"])),
        ("mobilenet_v1:widest at 224", big.network(big.published["widest"])),
        ("mobilenet_v1:widest at 448", MobileNetV1Space(resolution=448).network(big.published["widest"])),
    ]
    return [(name, fold_structure(graph)) for name, graph in chosen]


def output_of(command: list[str], cpus: tuple[int, ...] = cpus_for(1)) -> str:
    """Standard output of a process that has what a worker has: the last CPU, and a session that goes first."""

    def as_the_worker() -> None:
        os.sched_setaffinity(0, cpus)
        raise_priority()

    return subprocess.run(
        command, check=True, capture_output=True, text=True, start_new_session=True, preexec_fn=as_the_worker
    ).stdout


def plain_loop(path: Path) -> float:
    return float(json.loads(output_of([sys.executable, "-c", PLAIN, str(path)])))


def torch_benchmark(path: Path) -> float:
    return float(json.loads(output_of([sys.executable, "-c", TORCH, str(path)])))


def benchmark_app(path: Path) -> float:
    """Median ms. With ``-hint latency`` it refuses -nstreams and -nthreads, which say the same and more."""
    program, device = Path(sys.executable).with_name("benchmark_app"), ["-d", "CPU", "-infer_precision", "f32"]
    latency = ["-hint", "none", "-api", "sync", "-nstreams", "1", "-nthreads", "1", "-pin", "NO", "-t", "1"]
    told = output_of([str(program), "-m", str(path), *device, *latency])
    value, unit = told.partition("Median:")[2].split()[:2]
    return float(value) * {"ms": 1.0, "us": 1e-3}[unit]


def benchmark_app_per_s(path: Path) -> float:
    """Inferences a second, by its throughput hint on all CPUs of this process."""
    program, device = Path(sys.executable).with_name("benchmark_app"), ["-d", "CPU", "-infer_precision", "f32"]
    command = [str(program), "-m", str(path), *device, "-hint", "throughput", "-t", "2"]
    told = output_of(command, tuple(os.sched_getaffinity(0)))
    return float(told.partition("Throughput:")[2].split()[0])


REFERENCES: dict[str, tuple[Callable[[Path], float], str]] = {
    "onnxruntime": (plain_loop, "plain loop"),
    "openvino": (benchmark_app, "bench._app"),
    "torch": (torch_benchmark, "t.u.bench."),
}


def wanted(backend: str) -> list[tuple[str, Graph]]:
    if backend == "onnxruntime":
        return models()
    networks = [(name, graph) for name, graph in models() if ":" in name]
    return networks if backend == "openvino" else [models()[0], models()[5], *networks]


def model_and_file(name: str, graph: Graph, artifact: str, folder: str) -> tuple[Model, Path]:
    """What latbench measures, and the same on disk for others."""
    row = Row(graph.key, "network", graph.signature, macs=graph.macs)
    path = Path(folder) / ("model.json" if artifact == "graph" else "model.onnx")
    path.write_bytes(graph.to_json().encode() if artifact == "graph" else to_onnx(graph, random_weights(graph)))
    return Model(name, GraphJob(graph, row, alone=True), FoldReport((), ())), path


def agreement(backend: str, turns: int) -> float:
    """Prints a line per model; the largest deviation of a ratio from 1."""
    reference, title = REFERENCES[backend]
    target = Target("cpu", devices.detect().host.cpu_model, backend, {"threads": 1}, PLAN, "isolated")
    worst = 0.0
    print(f"{backend:34s} {'latbench':>10s} {title:>10s} {'ratio':>8s}")
    with tempfile.TemporaryDirectory() as folder:
        for name, graph in wanted(backend):
            model, path = model_and_file(name, graph, target.backend_class.artifact, folder)
            ours, theirs = [], []
            for _ in range(turns):
                theirs.append(reference(path))
                ours.append(bench(model, target, layers=False).row.latency_ms)
            ratio = float(np.median(np.array(ours) / np.array(theirs)))
            worst = max(worst, abs(ratio - 1))
            print(f"{name:34s} {np.median(ours):8.4f}ms {np.median(theirs):8.4f}ms {ratio - 1:+8.2%}", flush=True)
    print(f"worst {worst:.2%} (aim: 3 %)\n", flush=True)
    return worst


def throughput_agreement(turns: int) -> float:
    """As ``agreement``, of openvino's throughput."""
    target = Target("cpu", devices.detect().host.cpu_model, "openvino", {"threads": 1}, PLAN, "isolated")
    worst = 0.0
    print(f"{'openvino, inferences a second':34s} {'latbench':>10s} {'bench._app':>10s} {'ratio':>8s}")
    with tempfile.TemporaryDirectory() as folder:
        for name, graph in wanted("openvino")[:4]:
            model, path = model_and_file(name, graph, "onnx", folder)
            ours, theirs = [], []
            for _ in range(turns):
                theirs.append(benchmark_app_per_s(path))
                ours.append(throughput(model, target).per_s)
            ratio = float(np.median(np.array(ours) / np.array(theirs)))
            worst = max(worst, abs(ratio - 1))
            print(f"{name:34s} {np.median(ours):8.1f}/s {np.median(theirs):8.1f}/s {ratio - 1:+8.2%}", flush=True)
    print(f"worst {worst:.2%} (aim: 3 %)\n", flush=True)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backends", nargs="*", default=list(REFERENCES), metavar="BACKEND")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--throughput", action="store_true", help="openvino's inferences a second instead")
    arguments = parser.parse_args()
    if arguments.throughput:
        throughput_agreement(arguments.turns)
        return
    for backend in arguments.backends:
        try:
            plugins.load("latbench.backends", backend).available()
        except EnvironmentUnfitError as error:
            print(f"{backend}: {error}\n")
            continue
        agreement(backend, arguments.turns)


if __name__ == "__main__":
    main()
