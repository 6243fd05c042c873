"""Building engines, on a scripted builder of TensorRT 8.6."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted_tensorrt import Log

from latbench.backends import tensorrt_build
from latbench.backends.tensorrt_build import Plans, Toolkit, build, configure
from latbench.backends.tensorrt_versions import ENUMERATIONS, Api, settings
from latbench.errors import MeasurementError


class Recorder:
    """An object whose calls are kept, and answered from a table (None otherwise)."""

    def __init__(self, answers: dict[str, Any]) -> None:
        vars(self).update(answers=answers, calls=[])

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            answer = self.answers.get(name)
            return answer(*arguments) if callable(answer) else answer

        return call


def building(
    *,
    reasons: tuple[str, ...] = (),
    plan: bytes | None = b"plan",
    types: tuple[str, ...] = ("FLOAT",),
    layers: tuple[str, ...] = ("CONVOLUTION",) * 9,
    **config: Any,
) -> tuple[Any, Recorder]:
    """A toolkit of TensorRT 8.6 whose parser, builder and config do as they are told, and the config."""
    tensors = [SimpleNamespace(dtype=SimpleNamespace(name=name)) for name in types]
    network = SimpleNamespace(
        num_inputs=1,
        get_input=lambda i: tensors[0],
        num_layers=len(tensors) - 1,
        get_layer=lambda i: SimpleNamespace(
            num_outputs=1, get_output=lambda j: tensors[i + 1], type=SimpleNamespace(name=layers[i])
        ),
    )
    parser = SimpleNamespace(
        parse=lambda model: not reasons,
        num_errors=len(reasons),
        get_error=lambda i: SimpleNamespace(desc=lambda: reasons[i]),
    )
    made = Recorder({"get_tactic_sources": 0b11111, **config})
    members = {
        "BuilderFlag": ("FP16", "INT8", "TF32"),
        "TacticSource": ("CUBLAS", "CUBLAS_LT", "CUDNN"),
        "PreviewFeature": ("DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805",),
        "NetworkDefinitionCreationFlag": ("EXPLICIT_BATCH",),
    }
    numbered = {name: SimpleNamespace(**{m: i for i, m in enumerate(found)}) for name, found in members.items()}
    verbosity = SimpleNamespace(DETAILED="detailed")
    trt = SimpleNamespace(**numbered, OnnxParser=lambda net, logger: parser, ProfilingVerbosity=verbosity)
    builder = SimpleNamespace(
        create_network=lambda flags: network if flags == 1 else pytest.fail("EXPLICIT_BATCH was not asked for"),
        create_builder_config=lambda: made,
        build_serialized_network=lambda net, config: plan,
    )
    kit = SimpleNamespace(
        trt=trt,
        builder=builder,
        api=Api("8.6.1", members),
        logger=Log(),
        typing="weak",
        external=False,
        cache_path=None,
        options={"tf32": False, "optimisation_level": 3},
    )
    kit.logger.lines.append("Error Code 10: no implementation for node conv")
    return kit, made


def test_a_half_precision_model_is_built_with_its_flag_and_without_tf32() -> None:
    kit, config = building(types=("HALF", "HALF", "FLOAT"))
    assert build(kit, b"onnx") == (b"plan", [])
    assert ("set_flag", kit.trt.BuilderFlag.FP16) in config.calls
    assert ("clear_flag", kit.trt.BuilderFlag.TF32) in config.calls
    assert ("set_tactic_sources", 0b11000) in config.calls
    assert not [call for call in config.calls if call[0] == "set_preview_feature"]
    assert vars(config)["profiling_verbosity"] == "detailed"


@pytest.mark.parametrize("shown", ["INT8", "FLOAT"])  # a QuantizeLinear's output, before it is built: by version
def test_quantised_tensors_ask_for_int8(shown: str) -> None:
    kit, config = building(types=("FLOAT", shown, "FLOAT"), layers=("QUANTIZE", "DEQUANTIZE"))
    build(kit, b"onnx")
    assert [call for call in config.calls if call[0] == "set_flag"] == [("set_flag", kit.trt.BuilderFlag.INT8)]


def test_every_reason_of_the_parser_is_told() -> None:
    kit, _ = building(reasons=("no importer for MyOp", "x has no shape"))
    with pytest.raises(MeasurementError, match=r"^no importer for MyOp; x has no shape$"):
        build(kit, b"onnx")


def test_a_builder_without_a_plan_is_told_with_the_loggers_words() -> None:
    kit, _ = building(plan=None)
    with pytest.raises(MeasurementError, match="no engine could be built: Error Code 10: no implementation for node"):
        build(kit, b"onnx")


def test_a_build_reads_and_grows_the_timing_cache(tmp_path: Path) -> None:
    entries = iter((b"first", b"first and second"))
    given: list[bytes] = []

    def grown() -> Any:
        return SimpleNamespace(serialize=lambda: bytearray(next(entries)))

    notes = []
    for _ in range(2):
        kit, config = building(
            create_timing_cache=lambda data: given.append(data) or "cache",
            set_timing_cache=True,
            get_timing_cache=grown,
        )
        kit.cache_path = tmp_path / "t.timing"
        notes += build(kit, b"onnx")[1]
        assert ("set_timing_cache", "cache", False) in config.calls, "a cache of another device must be refused"
    assert given == [b"", b"first"]
    first, second = (note.removeprefix("timing_cache=").split("->") for note in notes)
    assert first[0] == "empty"
    assert first[1] == second[0] != second[1]


@pytest.mark.parametrize(
    "config", [{"create_timing_cache": None}, {"create_timing_cache": 1, "set_timing_cache": False}]
)
def test_a_timing_cache_of_another_device_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    kit, _ = building(**config)
    kit.cache_path = tmp_path / "t.timing"
    with pytest.raises(MeasurementError, match=r"is of another TensorRT or device .*run: rm '"):
        build(kit, b"onnx")


@pytest.mark.parametrize(("limit_bytes", "builds"), [(1 << 20, "abc"), (8, "abcab"), (0, "abcabab")])
def test_a_worker_builds_a_model_once_while_there_is_room(
    limit_bytes: int, builds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans of 4 bytes: with room for two, the one used longest ago goes."""
    built: list[bytes] = []
    monkeypatch.setattr(
        tensorrt_build, "build", lambda kit, model: (built.append(model), (bytearray(3) + model, ["typing=weak"]))[1]
    )
    plans, kit = Plans(limit_bytes), SimpleNamespace()
    for model in (b"a", b"b", b"c", b"a", b"b", b"a", b"b"):
        assert plans.get(kit, model) == (b"\0\0\0" + model, ["typing=weak"])  # type: ignore[arg-type]
    assert b"".join(built).decode() == builds


@pytest.mark.parametrize(
    ("wish", "version", "capability", "cudnn", "external", "note"),
    [
        ("auto", "8.6.1", (6, 1), True, True, ""),
        ("auto", "8.6.1", (6, 1), False, False, "external_tactics=off: no cuDNN 8 here"),
        ("auto", "8.6.1", (9, 0), True, False, ""),
        ("on", "8.6.1", (9, 0), True, True, ""),
        ("on", "11.1", (9, 0), False, True, ""),
        ("off", "8.6.1", (6, 1), True, False, ""),
    ],
)
def test_libraries_beside_it_are_used_on_pascal_where_they_are_real(
    wish: str,
    version: str,
    capability: tuple[int, int],
    cudnn: bool,
    external: bool,
    note: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensorrt_build, "_cudnn_works", lambda: cudnn)
    kit: Any = SimpleNamespace(options={"external_tactics": wish}, api=Api(version, {}))
    used, said = Toolkit._external(kit, capability)
    assert (used, said[: len(note)]) == (external, note)


def test_settings_reach_a_builder_config_by_name() -> None:
    """The calls on a config, in the order of the settings; the real one needs a GPU to exist."""
    calls: list[tuple[Any, ...]] = []

    class Config:
        def __getattr__(self, name: str) -> Callable[..., int]:
            return lambda *arguments: calls.append((name, *arguments)) or 0b11101  # type: ignore[func-returns-value]

    sources = SimpleNamespace(CUBLAS=0, CUBLAS_LT=1, CUDNN=2)
    flags = SimpleNamespace(TF32="tf32", FP16="fp16")
    trt = SimpleNamespace(BuilderFlag=flags, TacticSource=sources, PreviewFeature=SimpleNamespace())
    members = dict.fromkeys(ENUMERATIONS, ()) | {
        "BuilderFlag": ("TF32", "FP16"),
        "TacticSource": ("CUBLAS", "CUBLAS_LT", "CUDNN"),
    }
    configure(trt, Config(), settings(Api("8.6.1", members), "weak", types={"HALF"}))
    assert calls == [
        ("set_flag", "fp16"),
        ("clear_flag", "tf32"),
        ("get_tactic_sources",),
        ("set_tactic_sources", 0b11000),
    ]
