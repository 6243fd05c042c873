"""From ``--fleet ADDRESS`` to the nodes that hold a device, each with its target as it found it itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from latbench import __version__, devices, host
from latbench.cli.devices import backend_status
from latbench.cli.target import target_of
from latbench.errors import EnvironmentUnfitError, LatbenchError, UsageError

if TYPE_CHECKING:
    from latbench.graph.ir import DType
    from latbench.measure.base import SamplingPlan
    from latbench.measure.fleet import Fleet
    from latbench.profiling import Target
    from latbench.profiling.fleet_node import FleetNode


def nodes_of(
    fleet: Fleet,
    device: str,
    words: Mapping[str, Any],
    plan: SamplingPlan,
    say: Callable[[str], None],
) -> tuple[list[FleetNode], DType]:
    """The nodes that announce the device and can measure, and the dtype. `words`: further arguments of ``target_of``.

    `say` is told of nodes that are left out. Raises DeviceUnavailableError where none announces it, what the last one
    says where none can measure.
    """
    from latbench.profiling.fleet_node import FleetNode

    name = device_name(fleet, device)
    places = fleet.holding(name)
    answers = fleet.ask(places, target_there, __version__, name, dict(words), plan)
    failures = [(place.name, answer) for place, answer in zip(places, answers, strict=True) if _failed(answer)]
    if len(failures) == len(places):
        where, error = failures[-1]
        raise type(error)(str(error) if str(error).startswith(f"{where} ") else f"{where}: {error}")
    for where, error in failures:
        say(f"{where} is left out: {error}")
    able = [(place, answer) for place, answer in zip(places, answers, strict=True) if not _failed(answer)]
    return [FleetNode(fleet, place, target) for place, (target, _) in able], able[0][1][1]


def _failed(answer: Any) -> bool:
    return isinstance(answer, LatbenchError)


def device_name(fleet: Fleet, device: str) -> str:
    """The profile that a user's word means in a fleet: "auto" is the only one there. Raises UsageError."""
    announced = {name for node in fleet.nodes() for name in node.devices}
    if device in announced:
        return device
    if device != "auto":
        return devices.resolve(device).name
    closest = announced - {devices.GENERIC} or announced  # a CPU is announced under its own name and as "cpu"
    if len(closest) > 1:
        raise UsageError(f"--device auto: the fleet at {fleet.address} holds {', '.join(sorted(closest))}: say which")
    return next(iter(closest), devices.GENERIC)


# ---- run on the nodes -----------------------------------------------------------------------------------------------


def target_there(version: str, device: str, words: Mapping[str, Any], plan: SamplingPlan) -> tuple[Target, DType]:
    """``target_of`` on the machine that it runs on. Raises EnvironmentUnfitError where its latbench is another."""
    if version != __version__:
        raise EnvironmentUnfitError(f"it has latbench {__version__}, this machine {version}: install the same on both")
    return target_of(device, plan=plan, **words)


def described(names: tuple[str, ...]) -> dict[str, Any]:
    """What the machine that it runs on says of itself and of the devices that it announces."""
    from latbench.profiling.fleet_node import lowered_priority, machine_is_busy

    known = devices.profiles()
    machine = devices.detect(known=known)
    here = {selection.profile.name for selection in machine.matches}
    found: dict[str, Any] = {}
    for name in names:
        profile = known.get(name)
        if profile is None:
            found[name] = {"is": "no profile of this name there", "present": False}
            continue
        status = backend_status(profile.default_backend, profile.worker_python)
        found[name] = {
            "is": profile.title,
            "present": name in here,
            "backend": status.name,
            "versions": dict(status.versions),
            "problem": status.problem,
        }
    return {
        "latbench": __version__,
        "cpu": host.read().cpu_model,
        "nice": lowered_priority(),
        "measuring": machine_is_busy(),
        "devices": found,
    }
