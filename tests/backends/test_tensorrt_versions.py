"""The version logic against what each version's Python API really has (tensorrt_python_api.json)."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

from latbench import devices
from latbench.backends import tensorrt, tensorrt_build, tensorrt_runner
from latbench.backends.tensorrt_inspector import EngineLayer, parse
from latbench.backends.tensorrt_runner import NUMPY
from latbench.backends.tensorrt_versions import (
    CORE_ONLY,
    ENUMERATIONS,
    EXTERNAL,
    FLAG_OF_TYPE,
    Api,
    Settings,
    network_flags,
    newest_for,
    release_of,
    settings,
    typing_of,
    unsupported,
)
from latbench.errors import MeasurementError, UsageError

MODULES = (tensorrt, tensorrt_build, tensorrt_runner)
VERSIONS = ("8.6.1", "10.0.0", "10.7.0", "10.13.3", "10.16", "11.0", "11.1")

# The classes of the objects that tensorrt.py calls, by the name under which it holds them.
CLASS_OF = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "cache": "ITimingCache",
    "parser": "OnnxParser",
    "layer": "ILayer",
    "tensor": "ITensor",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "trt": "",
}
# Not in the recorded API although in every version: base classes that Python may derive from, with their enumeration.
UNRECORDED = {"ILogger"}


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, list[str]]]:
    folder = os.environ.get("LATBENCH_REFERENCE_DATA")
    if not folder:
        pytest.skip("recorded APIs: set LATBENCH_REFERENCE_DATA to the folder that holds tensorrt_python_api.json")
    apis: dict[str, dict[str, list[str]]] = json.loads((Path(folder) / "tensorrt_python_api.json").read_text())
    return apis


def api_of(recorded: dict[str, dict[str, list[str]]], version: str) -> Api:
    return Api(version, {name: recorded[version].get(name) or () for name in ENUMERATIONS})


def used_names() -> set[tuple[str, str]]:
    """(class, attribute) of every use of TensorRT in our modules, read from their syntax."""
    found = set()
    trees = [ast.parse(Path(module.__file__).read_text()) for module in MODULES]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
        name = name.lstrip("_")
        if name in CLASS_OF:
            found.add((CLASS_OF[name], node.attr))
        elif name in ("MemoryPoolType", "ProfilingVerbosity", "LayerInformationFormat", "TensorIOMode"):
            found.add((name, node.attr))
    return found


def test_the_reading_of_our_own_source_finds_what_it_should() -> None:
    used = used_names()
    for pair in [
        ("Builder", "build_serialized_network"),
        ("IExecutionContext", "execute_async_v3"),
        ("ICudaEngine", "num_io_tensors"),
        ("ProfilingVerbosity", "DETAILED"),
        ("TensorIOMode", "INPUT"),
        ("IBuilderConfig", "set_timing_cache"),
        ("", "OnnxParser"),
    ]:
        assert pair in used


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_that_is_used_is_in_every_version(recorded: dict[str, dict[str, list[str]]], version: str) -> None:
    api = recorded[version]
    absent = []
    for owner, name in sorted(used_names()):
        known = set(api[""]) | set(api) if owner == "" else set(api[owner])
        if name not in known | UNRECORDED and not name.startswith("__"):
            absent.append(f"{owner}.{name}")
    assert absent == []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("external", [False, True])
def test_settings_name_only_members_of_their_version(
    recorded: dict[str, dict[str, list[str]]], version: str, tf32: bool, external: bool
) -> None:
    api = api_of(recorded, version)
    for wish in ("weak", "strong"):
        try:
            typing = typing_of(api, wish)
        except UsageError:
            continue
        found = settings(api, typing, types={"FLOAT", "HALF"}, tf32=tf32, external_tactics=external)
        assert set(network_flags(api, typing)) <= set(api.members["NetworkDefinitionCreationFlag"])
        assert {*found.flags_on, *found.flags_off} <= set(api.members["BuilderFlag"])
        assert {*found.sources_on, *found.sources_off} <= set(api.members["TacticSource"])
        assert {name for name, _ in found.previews} <= set(api.members["PreviewFeature"])
        assert ("TF32" in found.flags_on, "TF32" in found.flags_off) == (tf32, not tf32)


def test_what_we_compare_by_name_is_in_every_version(recorded: dict[str, dict[str, list[str]]]) -> None:
    """Words that are no attributes in our source: the kind of a layer, the types of tensors."""
    for version in VERSIONS:
        assert "QUANTIZE" in recorded[version]["LayerType"]
        kinds = set(recorded[version]["DataType"])
        assert {"FLOAT", "HALF", "INT8", "INT32", "UINT8", "BOOL"} <= kinds
    assert set(NUMPY) <= set(recorded["11.1"]["DataType"])


def test_typing_is_strong_where_it_can_be(recorded: dict[str, dict[str, list[str]]]) -> None:
    assert {v: typing_of(api_of(recorded, v), "auto") for v in VERSIONS} == {
        v: "weak" if v == "8.6.1" else "strong" for v in VERSIONS
    }
    assert typing_of(api_of(recorded, "10.7.0"), "weak") == "weak"
    with pytest.raises(UsageError, match=r"typing=strong is not in TensorRT 8\.6\.1: typing=weak"):
        typing_of(api_of(recorded, "8.6.1"), "strong")
    with pytest.raises(UsageError, match=r"typing=weak is not in TensorRT 11\.0: typing=strong"):
        typing_of(api_of(recorded, "11.0"), "weak")


def test_how_a_network_is_created(recorded: dict[str, dict[str, list[str]]]) -> None:
    assert network_flags(api_of(recorded, "8.6.1"), "weak") == ("EXPLICIT_BATCH",)
    for version in VERSIONS[1:]:
        assert network_flags(api_of(recorded, version), "strong") == ("STRONGLY_TYPED",)
    assert network_flags(api_of(recorded, "10.0.0"), "weak") == ()


def test_a_half_precision_model_needs_a_flag_only_where_typing_is_weak(
    recorded: dict[str, dict[str, list[str]]],
) -> None:
    for version in ("8.6.1", "10.0.0"):
        assert "FP16" in settings(api_of(recorded, version), "weak", types={"HALF", "FLOAT"}).flags_on
        assert "FP16" not in settings(api_of(recorded, version), "weak", types={"FLOAT"}).flags_on
    for version in VERSIONS[1:]:
        assert settings(api_of(recorded, version), "strong", types={"HALF", "INT8"}).flags_on == ()
    assert settings(api_of(recorded, "8.6.1"), "weak", types={"INT8", "FLOAT"}).flags_on == ("INT8",)


def test_a_type_that_the_version_lacks_is_said(recorded: dict[str, dict[str, list[str]]]) -> None:
    with pytest.raises(MeasurementError, match=r"BF16 tensors are not in TensorRT 8\.6\.1"):
        settings(api_of(recorded, "8.6.1"), "weak", types={"BF16"})
    assert settings(api_of(recorded, "10.0.0"), "weak", types={"BF16"}).flags_on == ("BF16",)
    for kind in FLAG_OF_TYPE:
        assert any(kind in recorded[version]["DataType"] for version in VERSIONS)


def test_libraries_beside_it_by_version(recorded: dict[str, dict[str, list[str]]]) -> None:
    old = api_of(recorded, "8.6.1")
    on, off = (settings(old, "weak", external_tactics=wish) for wish in (True, False))
    assert on == Settings((), ("TF32",), EXTERNAL, (), ((CORE_ONLY, False),), ())
    assert off == Settings((), ("TF32",), (), EXTERNAL, (), ())
    ten = settings(api_of(recorded, "10.13.3"), "strong", external_tactics=True)
    assert (ten.sources_on, ten.previews, ten.notes) == (EXTERNAL, (), ())
    eleven = settings(api_of(recorded, "11.1"), "strong", external_tactics=True)
    assert (eleven.sources_on, eleven.notes) == ((), ("external_tactics are not in TensorRT 11.1",))


@pytest.mark.parametrize(
    ("version", "capability", "words"),
    [
        ("8.6.1", (6, 1), None),
        ("8.6.1", (9, 0), None),
        ("10.0.0", (6, 1), r"the newest that does is 8\.6: pip install 'tensorrt==8\.6\.\*'"),
        ("11.1", (6, 1), r"the newest that does is 8\.6:"),
        ("10.4.0", (7, 0), None),
        ("10.5.0", (7, 0), r"the newest that does is 10\.4:"),
        ("11.0", (7, 5), None),
        ("8.6.1", (12, 0), r"older than the device; run: pip install 'tensorrt>=10\.8'"),
        ("10.13.3", (12, 0), None),
        ("11.1", (3, 5), "no version from 8.6 on does"),
        ("11.1", (20, 0), "pip install --upgrade tensorrt"),
    ],
)
def test_which_device_a_version_runs_on(version: str, capability: tuple[int, int], words: str | None) -> None:
    import re

    said = unsupported(version, capability, "NVIDIA TITAN Xp")
    if words is None:
        assert said is None
    else:
        assert said is not None
        assert re.search(words, said)
        assert "\n" not in said


def test_profiles_name_the_same_newest_version_as_the_support_matrices() -> None:
    for profile in devices.profiles().values():
        if profile.compute_capability is not None:
            assert profile.newest_tensorrt == newest_for(release_of(profile.compute_capability)), profile.name


def test_what_is_no_version_is_said() -> None:
    assert release_of("10.13.3.9") == (10, 13)
    with pytest.raises(MeasurementError, match="that is no version"):
        release_of("dev")


LAYERS = [
    {"Name": "conv + relu", "LayerType": "CaskConvolution", "TacticName": "sm61_xmma", "TacticValue": "0x1"},
    {"Name": "{ForeignNode[pool...fc]}", "LayerType": "Myelin", "TacticName": "", "TacticValue": "0x0"},
]


def test_the_inspectors_two_forms_say_the_same() -> None:
    """8.6 and 10: names of bindings. 11: objects (docs.nvidia.com, Migrating IEngineInspector Usage)."""
    old = parse(json.dumps({"Layers": LAYERS, "Bindings": ["x", "y"]}))
    new = parse(
        json.dumps(
            {
                "Layers": LAYERS,
                "I/O Tensors": [
                    {"Name": "x", "IOMode": "Input", "DataType": "Float", "Dimensions": [1, 3, 8, 8]},
                    {"Name": "y", "IOMode": "Output", "DataType": "Float", "Dimensions": [1, 10]},
                ],
            }
        )
    )
    assert old == new
    assert old.tensors == ("x", "y")
    assert old.layers[0] == EngineLayer("conv + relu", "CaskConvolution", "sm61_xmma")
    assert old.layers[1] == EngineLayer("{ForeignNode[pool...fc]}", "Myelin", "0x0")


def test_an_engine_with_names_only() -> None:
    assert parse('{"Layers": ["conv + relu"], "Bindings": []}').layers == (EngineLayer("conv + relu", "", ""),)


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", '{"Layers": 3, "Bindings": []}', '{"Layers": []}', '{"Layers": [1], "Bindings": []}'],
)
def test_another_form_is_said(text: str) -> None:
    with pytest.raises(MeasurementError, match="no known form"):
        parse(text)
