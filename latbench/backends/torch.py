"""torch: eager modules and ``torch.compile``, on the CPU and on NVIDIA GPUs.

The one back-end whose worker imports torch (750 ms, 220 MB). Weights are drawn from the graph, as for its ONNX file.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata, util
from itertools import repeat as times
from pathlib import Path
from time import perf_counter_ns
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latbench.backends import cuda
from latbench.backends.base import MAX_THREADS, Buffers, LayerTime, Scalar, checked
from latbench.errors import BackendUnavailableError, GraphError, MeasurementError, UsageError
from latbench.graph.ir import Graph
from latbench.graph.passes import random_weights

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
MAX_GRAPH_BYTES = 1 << 26  # beyond it, a file is no description of a graph


class TorchBackend:
    """Options: `threads` (intra-op, default 1), `device` ("cpu", or the number of a GPU), `channels_last` (default
    false), `tf32` (may a GPU compute float32 in TF32? default false), `keep_heap` (default true: see ``keep_heap``).

    On a GPU, cuDNN tries its algorithms on the first inference and keeps the quickest, and time is that between two
    CUDA events around the enqueued kernels: of small networks it is the time to enqueue them.
    """

    name: ClassVar[str] = "torch"
    artifact: ClassVar[Literal["onnx", "graph"]] = "graph"
    clock: ClassVar[Literal["host", "cuda_event", "model"]] = "host"
    kinds: ClassVar[tuple[str, ...]] = ("cpu", "gpu")
    defaults: ClassVar[Mapping[str, Scalar]] = {
        "threads": 1,
        "device": "cpu",
        "channels_last": False,
        "tf32": False,
        "keep_heap": True,
    }
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        self.options = checked(
            self.name,
            self.defaults,
            options,
            counts={"threads": (1, MAX_THREADS)},
            choices=self.choices,
            flags=("channels_last", "tf32", "keep_heap"),
        )
        device = self.options["device"]
        if device != "cpu" and (not isinstance(device, int) or isinstance(device, bool) or device < 0):
            raise UsageError(f"{self.name}: device must be cpu or the number of a GPU, got {device!r}")
        self._torch: Any = None
        self._buffers = Buffers()
        if self.options["device"] != "cpu":  # of this instance: the class speaks for the CPU
            vars(self).update(clock="cuda_event", timer_ns=cuda.EVENT_NS)

    def open(self) -> None:
        """Imports torch and sets it up for this process: a worker's affair. Raises BackendUnavailableError."""
        if self._torch is not None:
            return
        self.available()
        # Else kernels are compiled by a pool of processes that lives on beside the measurement.
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        if self.options["keep_heap"]:
            keep_heap()
        import torch

        torch.set_num_threads(int(self.options["threads"]))
        with contextlib.suppress(RuntimeError):  # can be set once in a process, before the first parallel work
            torch.set_num_interop_threads(1)
        if self.options["device"] != "cpu":
            _use_gpu(torch, int(self.options["device"]), tf32=bool(self.options["tf32"]))
        self._torch = torch

    @classmethod
    def available(cls) -> None:
        if util.find_spec("torch") is None:
            raise BackendUnavailableError("torch is not installed; run: pip install 'latbench[search]'")

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {**_installed("torch"), **cuda.driver()}

    @contextmanager
    def load(self, artifact: Path) -> Iterator[TorchRunner]:
        """In inference mode until the model is given back: entering it for every sample costs 1 us."""
        self.open()
        with self._torch.inference_mode():
            try:
                runner = self._runner(_read_graph(artifact))
            except (OSError, ValueError, GraphError) as error:  # ValueError: no text
                raise MeasurementError(str(error)) from error
            except Exception as error:  # torch and its compiler raise what they like
                raise MeasurementError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
            try:
                yield runner
            finally:
                runner.release()
                self._release()

    def _runner(self, graph: Graph) -> TorchRunner:
        from latbench.graph.torch import to_module

        torch, device = self._torch, self.options["device"]
        where = "cpu" if device == "cpu" else f"cuda:{device}"
        layout = torch.channels_last if self.options["channels_last"] else torch.contiguous_format
        module = to_module(graph, random_weights(graph)).to(where).to(memory_format=layout)
        inputs = []
        for i, (_, shape) in enumerate(graph.inputs):
            tensor = torch.from_numpy(self._buffers.get("input", i, shape, graph.dtype)).to(where)
            inputs.append(tensor.contiguous(memory_format=layout) if len(shape) == 4 else tensor)
        return (TorchRunner if device == "cpu" else CudaTorchRunner)(torch, graph, module, module, inputs)

    def _release(self) -> None:
        """Gives back what a model leaves behind: the worker itself never collects."""
        gc.collect()
        if self.options["device"] != "cpu":
            self._torch.cuda.empty_cache()


def keep_heap() -> None:
    """Lets glibc keep freed memory instead of giving it back to the system, for this process.

    Eager torch allocates every output anew. Whether glibc then maps fresh pages depends on thresholds that follow what
    the process happened to free before: one MobileNet took 6.7 to 7.4 ms by the process, and 13 with the lowest one.
    Servers preload an allocator that keeps memory; so does this. Elsewhere than on glibc it does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


class TorchCompileBackend(TorchBackend):
    """Options: those of torch, and `mode` (default | reduce-overhead | max-autotune | max-autotune-no-cudagraphs).

    A model is compiled while it is loaded, seconds each: for networks and a few hundred blocks, not for thousands.
    """

    name: ClassVar[str] = "torch_compile"
    defaults: ClassVar[Mapping[str, Scalar]] = {**TorchBackend.defaults, "mode": "default"}
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"mode": MODES}
    timer_ns: ClassVar[float] = 100  # what runs between samples costs its guards their caches, 1 us: two calls a sample

    @classmethod
    def available(cls) -> None:
        super().available()
        if not _compiler():
            raise BackendUnavailableError("torch_compile needs a C++ compiler; run: apt-get install g++")

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Its kernels are the compiler's, so that moves numbers too."""
        said = subprocess.run([_compiler(), "--version"], capture_output=True, text=True, timeout=10).stdout
        return {**super().versions(), **_installed("triton"), "compiler": said.partition("\n")[0].strip()}

    def _runner(self, graph: Graph) -> TorchRunner:
        runner = super()._runner(graph)
        mode = str(self.options["mode"])
        runner.call = self._torch.compile(runner.module, fullgraph=True, dynamic=False, mode=mode)
        runner.profiled = False
        for _ in range(3):  # compiles; with CUDA graphs the second records, the third replays
            runner.sample(1)
        return runner

    def _release(self) -> None:
        self._torch._dynamo.reset()  # its limit on versions of one function counts all models of the process
        super()._release()


class TorchRunner:
    """A module on the CPU, its inputs resident."""

    def __init__(self, torch: Any, graph: Graph, module: Any, call: Callable[..., Any], inputs: Sequence[Any]) -> None:
        self._torch, self._graph, self._inputs = torch, graph, inputs
        self.module, self.call = module, call
        self.profiled = True  # whether `layers` can time the layers one by one

    def sample(self, repeat: int) -> float:
        call, inputs = self.call, self._inputs
        start = perf_counter_ns()
        for _ in times(None, repeat):
            call(*inputs)
        return (perf_counter_ns() - start) / 1e6

    def outputs(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        tensors = []
        for (name, _), resident in zip(self._graph.inputs, self._inputs, strict=True):
            tensors.append(self._torch.empty_like(resident).copy_(self._torch.from_numpy(np.array(inputs[name]))))
        result = self.call(*tensors)
        results = result if isinstance(result, tuple) else (result,)
        return {name: t.cpu().numpy().copy() for name, t in zip(self._graph.outputs, results, strict=True)}

    def layers(self) -> list[LayerTime] | None:
        """Median of each layer over 20 inferences, timed by hooks; None once compiled: kernels are no layers."""
        if not self.profiled:
            return None
        spent: dict[str, list[float]] = {node.name: [] for node in self._graph.nodes}
        begun: dict[str, Any] = {}
        hooks = []
        for name in spent:
            layer = self.module._modules[name]
            hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: begun.update({name: self._now()})))
            hooks.append(
                layer.register_forward_hook(lambda *_, name=name: spent[name].append(self._since(begun[name])))
            )
        try:
            for _ in range(25):
                self.sample(1)
        finally:
            for hook in hooks:
                hook.remove()
        return [
            LayerTime(node.name, type(node.op).__name__, float(np.median(spent[node.name][5:])))
            for node in self._graph.nodes
        ]

    def _now(self) -> Any:
        return perf_counter_ns()

    def _since(self, start: Any) -> float:
        return (perf_counter_ns() - int(start)) / 1e6

    def release(self) -> None:
        """Drops the model; the runner is of no use afterwards."""
        del self.module, self.call, self._inputs


class CudaTorchRunner(TorchRunner):
    """A module on a GPU: times are those between two events on its stream."""

    def __init__(self, torch: Any, graph: Graph, module: Any, call: Callable[..., Any], inputs: Sequence[Any]) -> None:
        super().__init__(torch, graph, module, call, inputs)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._sweep: Any = None

    def sample(self, repeat: int) -> float:
        call, inputs = self.call, self._inputs
        self._start.record()
        for _ in times(None, repeat):
            call(*inputs)
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end))

    def evict(self, nbytes: int) -> None:
        """Writes twice the L2 cache's size, or `nbytes` where that is more, before what is enqueued next."""
        if self._sweep is None:
            cache = self._torch.cuda.get_device_properties(self._inputs[0].device).L2_cache_size
            size = max(nbytes, 2 * cache)
            self._sweep = self._torch.empty(size, dtype=self._torch.uint8, device=self._inputs[0].device)
        self._sweep.zero_()

    def _now(self) -> Any:
        self._torch.cuda.synchronize()
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _since(self, start: Any) -> float:
        end = self._torch.cuda.Event(enable_timing=True)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def release(self) -> None:
        self._sweep = None
        super().release()


def _use_gpu(torch: Any, index: int, *, tf32: bool) -> None:
    """Makes it the current device. Raises BackendUnavailableError where torch sees no such GPU."""
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise BackendUnavailableError(
            f"torch {torch.__version__} ({built}) sees no GPU {index}; see what the driver does: nvidia-smi"
        )
    torch.cuda.set_device(index)  # numbered as nvidia-smi does: CUDA_DEVICE_ORDER is set before CUDA starts
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32


def _read_graph(artifact: Path) -> Graph:
    if artifact.stat().st_size > MAX_GRAPH_BYTES:
        raise MeasurementError(f"{artifact.name} is too large for a graph as JSON")
    return Graph.from_json(artifact.read_text())


def _compiler() -> str:
    """The C++ compiler that torch.compile would call; "" where there is none."""
    return next(filter(None, (shutil.which(c) for c in (os.environ.get("CXX", ""), "g++", "clang++") if c)), "")


def _installed(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
