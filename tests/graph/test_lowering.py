"""The two lowerings agree with each other, and each operator with a formula of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from graphs import (
    CASES,
    NETWORKS,
    RUNNERS,
    Case,
    case_id,
    draw_inputs,
    relative_error,
    run_onnx,
    run_torch,
    single,
)
from torch.utils.flop_counter import FlopCounterMode

from latbench.errors import GraphError
from latbench.graph import ops
from latbench.graph.ir import Graph, GraphBuilder
from latbench.graph.onnx import to_onnx
from latbench.graph.passes import as_dtype, fold_structure, random_weights
from latbench.graph.torch import to_module, weights_of

cases = pytest.mark.parametrize("case", CASES, ids=case_id)
networks = pytest.mark.parametrize("network", NETWORKS)


def test_every_operator_has_a_case() -> None:
    known = {op for name, op in ops.OPS.items() if not name.startswith("_") and op.__module__ == ops.__name__}
    assert {type(op) for op, _, _ in CASES} == known


@cases
@pytest.mark.parametrize("runner", RUNNERS)
def test_operator_equals_its_formula(case: Case, runner: str) -> None:
    op, shapes, reference = case
    graph = single(op, *shapes)
    weights, inputs = random_weights(graph), draw_inputs(graph)
    roles = {role: torch.from_numpy(weights[f"op.{role}"]) for role in op.weights()}
    want = reference(*map(torch.from_numpy, inputs), **roles).numpy()
    assert relative_error(RUNNERS[runner](graph, weights, inputs), [want]) < 1e-5


@cases
def test_onnx_infers_the_shapes_of_the_graph(case: Case) -> None:
    op, shapes, _ = case
    graph = single(op, *shapes)
    model = onnx.load_from_string(to_onnx(graph, random_weights(graph)))
    onnx.checker.check_model(model, full_check=True)
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    (output,) = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph.output
    assert tuple(d.dim_value for d in output.type.tensor_type.shape.dim) == graph.shapes["op"]


@cases
def test_parameters_and_macs_are_those_torch_counts(case: Case) -> None:
    op, shapes, _ = case
    graph = single(op, *shapes)
    _assert_torch_counts(graph)


@networks
def test_parameters_and_macs_of_networks_are_those_torch_counts(network: Callable[[], Graph]) -> None:
    _assert_torch_counts(network())


def _assert_torch_counts(graph: Graph) -> None:
    module = to_module(graph)
    assert graph.n_params == sum(p.numel() for p in module.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*map(torch.from_numpy, draw_inputs(graph)))
    assert 2 * graph.macs == counter.get_total_flops()  # a FLOP counter sees a multiplication and an addition


@networks
@pytest.mark.parametrize("fold", [False, True], ids=["plain", "folded"])
def test_lowerings_of_networks_agree(network: Callable[[], Graph], fold: bool) -> None:
    graph = fold_structure(network()) if fold else network()
    weights, inputs = random_weights(graph), draw_inputs(graph)
    assert relative_error(run_onnx(graph, weights, inputs), run_torch(graph, weights, inputs)) < 1e-5


@networks
@pytest.mark.parametrize("runner", RUNNERS)
def test_float16_is_float32_up_to_rounding(network: Callable[[], Graph], runner: str) -> None:
    graph = network()
    weights = random_weights(graph)
    inputs = [x.astype(np.float16) for x in draw_inputs(graph, scale=1)]
    want = run_onnx(graph, weights, [x.astype(np.float32) for x in inputs])
    got = RUNNERS[runner](as_dtype(graph, "float16"), weights, inputs)  # both lowerings cast the weights
    assert all(y.dtype == np.float16 for y in got)
    assert relative_error(got, want) < 2e-2


@cases
def test_every_operator_lowers_to_float16(case: Case) -> None:
    op, shapes, _ = case
    graph = as_dtype(single(op, *shapes), "float16")
    weights, inputs = random_weights(graph), draw_inputs(graph, scale=1)
    assert all(w.dtype == np.float16 for w in weights.values())
    assert relative_error(run_onnx(graph, weights, inputs), run_torch(graph, weights, inputs)) < 1e-2


@networks
def test_onnx_keeps_names_shapes_and_dtype(network: Callable[[], Graph]) -> None:
    graph = as_dtype(network(), "float16")
    model = onnx.load_from_string(to_onnx(graph, random_weights(graph)))
    assert (model.ir_version, [(o.domain, o.version) for o in model.opset_import]) == (8, [("", 17)])
    assert [n.name for n in model.graph.node if "." not in n.name] == [n.name for n in graph.nodes]
    for values, names in ((model.graph.input, [n for n, _ in graph.inputs]), (model.graph.output, graph.outputs)):
        tensors = [v.type.tensor_type for v in values]
        assert [v.name for v in values] == list(names)
        assert [tuple(d.dim_value for d in t.shape.dim) for t in tensors] == [graph.shapes[n] for n in names]
        assert {t.elem_type for t in tensors} == {onnx.TensorProto.FLOAT16}


def test_onnx_stores_equal_constants_once() -> None:
    b = GraphBuilder()
    x = b.add(ops.ReLU6(), b.input("x", (1, 4)), name="a")
    graph = b.build(b.add(ops.ReLU6(), x, name="b"))
    assert len(onnx.load_from_string(to_onnx(graph, {})).graph.initializer) == 2


def test_onnx_is_a_function_of_graph_and_weights() -> None:
    graph = NETWORKS[0]()
    assert to_onnx(graph, random_weights(graph)) == to_onnx(graph, random_weights(graph))


def test_onnx_refuses_what_is_both_input_and_output() -> None:
    b = GraphBuilder()
    x = b.input("x", (1, 4))
    y = b.add(ops.ReLU(), x, name="y")
    with pytest.raises(GraphError, match="add an Identity node after x, y"):
        to_onnx(b.build(y, x, y), {})


def test_onnx_refuses_weights_beyond_the_limit_of_its_format() -> None:
    graph = single(ops.Linear(30_000, 20_000, False), (1, 30_000))
    with pytest.raises(GraphError, match="2400000000 bytes of weights do not fit one ONNX file"):
        to_onnx(graph, {"op.weight": np.broadcast_to(np.float32(0), (20_000, 30_000))})


@networks
def test_state_dict_has_the_names_of_the_graph(network: Callable[[], Graph]) -> None:
    graph = network()
    state = to_module(graph).state_dict()
    tracked = {f"{n.name}.num_batches_tracked" for n in graph.nodes if isinstance(n.op, ops.BatchNorm2d)}
    assert set(state) == {*graph.weight_shapes(), *tracked}
    assert all(tuple(state[name].shape) == shape for name, shape in graph.weight_shapes().items())


@networks
def test_weights_survive_the_module(network: Callable[[], Graph]) -> None:
    graph = network()
    weights = random_weights(graph)
    back = weights_of(to_module(graph, weights))
    assert list(back) == list(weights)
    assert all(np.array_equal(back[name], weights[name]) for name in weights)


def test_names_that_modules_own_are_free() -> None:
    b = GraphBuilder()
    x = b.input("x", (1, 4))
    for name in ("half", "forward", "eval", "state_dict", "_steps"):
        x = b.add(ops.Linear(4, 4), x, name=name)
    graph = b.build(x)
    weights, inputs = random_weights(graph), draw_inputs(graph)
    assert relative_error(run_torch(graph, weights, inputs), run_onnx(graph, weights, inputs)) < 1e-5


def test_module_can_be_trained() -> None:
    graph = NETWORKS[0]()
    module = to_module(graph)
    assert not module.training
    module.train()(*map(torch.from_numpy, draw_inputs(graph))).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("lower", [to_onnx, to_module])
def test_weights_that_do_not_fit_are_refused(lower: Callable[..., object]) -> None:
    graph = single(ops.Linear(4, 2), (1, 4))
    weights = random_weights(graph)
    with pytest.raises(GraphError, match=r"missing weights: op\.bias"):
        lower(graph, {"op.weight": weights["op.weight"]})
    with pytest.raises(GraphError, match=r"weights of no node: bn\.weight"):
        lower(graph, {**weights, "bn.weight": np.ones(2)})
    with pytest.raises(GraphError, match=r"op\.weight has shape \(4, 2\), the graph wants \(2, 4\)"):
        lower(graph, {**weights, "op.weight": weights["op.weight"].T})


@pytest.mark.parametrize("lower", [to_onnx, to_module])
def test_an_operator_without_lowering_is_named(lower: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "OPS", {})  # a subclass registers itself

    @dataclass(frozen=True)
    class Softmax(ops.Op):
        pass

    with pytest.raises(GraphError, match="Softmax has no lowering in latbench/graph"):
        lower(single(Softmax(), (1, 4)), {})
