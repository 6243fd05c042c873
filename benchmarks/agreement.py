"""Does latbench agree with a plain loop? ``python benchmarks/agreement.py``.

12 blocks and networks, about 20 us to 50 ms: latbench's median beside that of a loop a user would write, in a fresh
process, on the same ONNX file. The two take turns, seven times, because the machine drifts; told is the median of the
seven ratios. Aim: within 3 %.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from latbench import devices
from latbench.graph.ir import Graph
from latbench.graph.onnx import to_onnx
from latbench.graph.passes import fold_structure, random_weights
from latbench.profiling import Target
from latbench.profiling.bench import BENCH_PLAN, bench, read_model
from latbench.spaces.mobilenet_v1 import MobileNetV1Space
from latbench.spaces.nasbench201 import NASBench201Space

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


def main() -> None:
    target = Target("cpu", devices.detect().host.cpu_model, "onnxruntime", {"threads": 1}, PLAN, "isolated")
    worst = 0.0
    print(f"{'model':34s} {'latbench':>10s} {'plain loop':>10s} {'ratio':>8s}")
    with tempfile.TemporaryDirectory() as folder:
        for name, graph in models():
            path = Path(folder) / "model.onnx"
            path.write_bytes(to_onnx(graph, random_weights(graph)))
            ours, plain = [], []
            for _ in range(TURNS):
                run = subprocess.run(
                    [sys.executable, "-c", PLAIN, str(path)], check=True, capture_output=True, text=True
                )
                plain.append(json.loads(run.stdout))
                ours.append(bench(read_model(str(path)), target, layers=False).row.latency_ms)
            ratio = float(np.median(np.array(ours) / np.array(plain)))
            worst = max(worst, abs(ratio - 1))
            print(f"{name:34s} {np.median(ours):8.4f}ms {np.median(plain):8.4f}ms {ratio - 1:+8.2%}", flush=True)
    print(f"worst {worst:.2%} (aim: 3 %)")


if __name__ == "__main__":
    main()
