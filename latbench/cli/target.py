"""From ``--device``, ``--backend`` and their like to a ``Target``: shared by profile and bench."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from latbench import devices, plugins
from latbench.errors import BackendUnavailableError, UsageError, shown
from latbench.graph.ir import DType
from latbench.measure.base import SamplingPlan
from latbench.measure.monitor import Nvml, locked_clock
from latbench.profiling import Target


def target_of(
    device: str,
    backend: str | None,
    dtype: DType | None,
    threads: int,
    options: Iterable[str],
    plan: SamplingPlan,
    clock_mhz: int | None = None,
    **rest: Any,
) -> tuple[Target, DType]:
    """The target, and the dtype: the one asked for, else the device's. Raises UsageError, EnvironmentUnfitError.

    Its plan is `plan` with the back-end's own limit on loading, where it has one: builds take minutes.
    """
    simulated = backend is not None and plugins.load("latbench.backends", backend).clock == "model"
    selection = devices.select(device, simulated=simulated)
    profile = selection.profile
    backend = backend or profile.default_backend
    backend_class = plugins.load("latbench.backends", backend)
    python = profile.worker_python if backend == profile.default_backend else None
    if python is None:
        backend_class.available()
    elif problem := devices.worker_problem(backend, python):
        raise BackendUnavailableError(problem)
    if profile.kind not in backend_class.kinds and not simulated:
        raise UsageError(f"{backend} does not run on {profile.title}: it runs on {' and '.join(backend_class.kinds)}")
    dtype = dtype or profile.default_dtype
    chosen: dict[str, Any] = {}
    if simulated:
        gflops = profile.peak_gflops_fp16 if dtype == "float16" else profile.peak_gflops_fp32
        peaks = {"peak_gflops": gflops, "bandwidth_gbs": profile.bandwidth_gbs}
        chosen |= {name: peak for name, peak in peaks.items() if peak is not None}
    else:
        chosen["threads"] = threads
        if profile.kind == "gpu":
            chosen["device"] = selection.index or 0
    chosen |= dict(assignment(text) for text in options)
    backend_class(chosen)  # refuses unknown options before any work
    if clock_mhz is not None and (simulated or profile.kind != "gpu"):
        raise UsageError(f"--lock-clocks holds a GPU's clock still; {profile.title} is none (see: latbench doctor)")
    name = profile.title if simulated else _name(selection)
    plan = replace(plan, load_limit_s=getattr(backend_class, "load_limit_s", plan.load_limit_s))
    return Target(profile.name, name, backend, chosen, plan, python=python, clock_mhz=clock_mhz, **rest), dtype


@contextmanager
def clock_held(target: Target) -> Iterator[None]:
    """The target's clock held where it asks for it, and free again however the block ends.

    Raises EnvironmentUnfitError where that needs rights that we lack, or the device cannot.
    """
    if target.clock_mhz is None:
        yield
        return
    with locked_clock(Nvml(int(target.options["device"])), target.clock_mhz):
        yield


def _name(selection: devices.Selection) -> str:
    """What the driver or the kernel calls the device."""
    machine = devices.detect()
    if selection.index is None:
        return machine.host.cpu_model
    return machine.gpus[selection.index].name if machine.gpus else selection.profile.title


def assignment(text: str) -> tuple[str, Any]:
    """ "channels=16" -> ("channels", 16): a number or a truth value where it reads as one. Raises UsageError."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"{shown(text)} is no setting: write NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
