"""The analytic back-end against latencies worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latbench.backends.roofline import RooflineBackend, kernels
from latbench.errors import MeasurementError, UsageError
from latbench.graph.ir import Graph, GraphBuilder
from latbench.graph.ops import Add, BatchNorm2d, Conv2d, Flatten, Linear, Op, ReLU
from latbench.testing import BackendConformance

BY_HAND = {"peak_gflops": 100.0, "bandwidth_gbs": 20.0, "kernel_us": 1.0, "call_us": 3.0}


class TestConformance(BackendConformance):
    backend = "roofline"
    gives_outputs = False


class TestConformanceOfATitanXp(BackendConformance):
    backend = "roofline"
    options = {"peak_gflops": 12150.0, "bandwidth_gbs": 547.6}  # noqa: RUF012
    gives_outputs = False


def chain(shape: tuple[int, ...], *ops: Op) -> Graph:
    b = GraphBuilder()
    x = b.input("x", shape)
    for i, op in enumerate(ops):
        x = b.add(op, x, name=f"n{i}")
    return b.build(x)


def test_a_dense_convolution_is_bound_by_arithmetic() -> None:
    """64 -> 64 channels, 3x3, 56x56: 115.6 MMAC, 231.2 MFLOP, 2.312 ms at 100 GFLOP/s; memory would take 0.088 ms."""
    (layer,) = kernels(chain((1, 64, 56, 56), Conv2d(64, 64, 3, padding=1)), BY_HAND)
    assert layer.ms == pytest.approx(2 * 64 * 64 * 9 * 56 * 56 / 100e9 * 1e3 + 1e-3, rel=1e-12)


def test_a_large_linear_layer_is_bound_by_memory() -> None:
    """4096 -> 4096: 67 MB of weights at 20 GB/s are 3.36 ms; 33.6 MFLOP would take 0.34 ms."""
    (layer,) = kernels(chain((1, 4096), Linear(4096, 4096)), BY_HAND)
    n_floats = 4096 * 4096 + 4096 + 4096 + 4096  # weight, bias, input, output
    assert layer.ms == pytest.approx(4 * n_floats / 20e9 * 1e3 + 1e-3, rel=1e-12)


def test_half_precision_halves_the_traffic() -> None:
    def memory_ms(dtype: Any) -> float:
        b = GraphBuilder(dtype)
        (layer,) = kernels(b.build(b.add(Linear(4096, 4096), b.input("x", (1, 4096)), name="fc")), BY_HAND)
        return layer.ms - 1e-3

    assert memory_ms("float16") == pytest.approx(memory_ms("float32") / 2)


def test_elementwise_operators_run_inside_the_kernel_before_them() -> None:
    shape = (1, 8, 4, 4)
    conv = Conv2d(8, 8, 3, padding=1)
    alone = kernels(chain(shape, conv), BY_HAND)
    assert kernels(chain(shape, conv, BatchNorm2d(8), ReLU()), BY_HAND) == alone
    assert [layer.op for layer in kernels(chain(shape, ReLU()), BY_HAND)] == ["ReLU"]  # nothing before it
    assert kernels(chain(shape, conv, ReLU(), Flatten()), BY_HAND) == alone  # a view is free


def test_an_operator_whose_input_is_read_twice_is_a_kernel_of_its_own() -> None:
    b = GraphBuilder()
    x = b.add(Conv2d(8, 8), b.input("x", (1, 8, 4, 4)), name="conv")
    graph = b.build(b.add(Add(), x, b.add(ReLU(), x, name="relu"), name="sum"))
    assert [layer.name for layer in kernels(graph, BY_HAND)] == ["conv", "relu", "sum"]


def test_a_call_costs_its_kernels_and_itself(tmp_path: Path) -> None:
    graph = chain((1, 8, 4, 4), Conv2d(8, 8), Conv2d(8, 8))
    (tmp_path / "g").write_text(graph.to_json())
    with RooflineBackend(BY_HAND).load(tmp_path / "g") as runner:
        assert runner.sample(1) == pytest.approx(3e-3 + sum(layer.ms for layer in kernels(graph, BY_HAND)))
        assert runner.sample(7) == pytest.approx(7 * runner.sample(1))
        with pytest.raises(MeasurementError, match="times, not outputs"):
            runner.outputs({})


@pytest.mark.parametrize("value", [0, -1.0, "fast", True, float("inf"), float("nan")])
def test_a_figure_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="peak_gflops must be a number above zero"):
        RooflineBackend({"peak_gflops": value})
