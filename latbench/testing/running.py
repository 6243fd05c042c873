"""What the suites share: a graph's outputs by two runtimes, and what it means to be refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from latbench.errors import UsageError
from latbench.graph.ir import Graph, Weights


def refused(call: Callable[..., object], *args: object) -> bool:
    """Whether the call raises UsageError."""
    try:
        call(*args)
    except UsageError:
        return True
    return False


def run_torch(graph: Graph, weights: Weights, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Output of the graph as a torch module; float32, any shape."""
    import torch

    from latbench.graph.torch import to_module

    with torch.inference_mode():
        output: NDArray[np.float32] = to_module(graph, weights)(torch.from_numpy(x)).numpy()
    return output


def run_onnx(graph: Graph, weights: Weights, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Output of the graph by ONNX Runtime, one thread; float32, any shape."""
    import onnxruntime

    from latbench.graph.onnx import to_onnx

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(to_onnx(graph, weights), options, ["CPUExecutionProvider"])
    (output,) = session.run(None, {graph.inputs[0][0]: x})
    return np.asarray(output, np.float32)
