"""A fleet: machines that hold devices, found and used through Ray. The only module that imports ray.

A node announces the devices that it holds as custom resources, ``latbench:titanxp`` and its like. Whoever measures on
one takes the whole resource for as long as it lives (``Fleet.hold``), so that Ray itself never places a second one
there, from whichever run it comes; questions that disturb nobody (``Fleet.ask``) take nothing. What runs on the nodes
is handed in: this module knows nothing of profiles and back-ends.

An address is Ray's: ``ray://HOST:10001`` from any machine, ``auto`` on a machine that is a node itself.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from latbench.errors import DeviceUnavailableError, EnvironmentUnfitError, LatbenchError, MeasurementError, one_line

PREFIX = "latbench:"  # of the resources that nodes announce; Ray takes any characters but its own prefixes
ASK_LIMIT_S = 90.0  # for an answer to a question: a node may have to start a process, and that to import packages
KNOCK_LIMIT_S = 10.0  # for a machine to answer at all
CLOSE_LIMIT_S = 3.0  # for a process on a node to tidy up before it is killed
PLACED_S = 4.0  # within which a process that exists already takes a free device

# Ray reads these when it is imported: its reports of usage and of its scheduler stay off the terminal.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SCHEDULER_EVENTS": "0"}


class NodeLostError(MeasurementError):
    """A node of the fleet is gone: its process was killed, its machine fell silent, or the way there is cut."""


@dataclass(frozen=True)
class Place:
    """A node of the fleet, as Ray knows it."""

    id: str  # Ray's, new at each start
    name: str  # its host's; a second Ray node of one host has -2 behind it
    address: str
    devices: dict[str, float]  # name of the device profile -> how much of the resource it announces
    gpus: float = 0.0  # that Ray gives to whoever asks for them


class Fleet:
    """A connection to the nodes of one Ray cluster. Made by ``connect``."""

    def __init__(self, ray: Any, address: str) -> None:
        self._ray, self.address = ray, address

    def nodes(self) -> list[Place]:
        """Those that are alive, by name. Raises NodeLostError where the cluster cannot be reached any more."""
        try:
            found = [raw for raw in self._ray.nodes() if raw["Alive"]]
        except Exception as error:
            raise self._lost(self.address, error) from None
        found.sort(key=lambda raw: (raw["NodeManagerHostname"], raw["NodeName"], raw["NodeID"]))
        nodes: list[Place] = []
        for raw in found:
            host = re.sub(r"[^A-Za-z0-9.-]", "_", raw["NodeManagerHostname"])
            twins = sum(re.sub(r"-\d+$", "", node.name) == host or node.name == host for node in nodes)
            held = {
                name.removeprefix(PREFIX): float(amount)
                for name, amount in sorted(raw["Resources"].items())
                if name.startswith(PREFIX)
            }
            nodes.append(
                Place(
                    raw["NodeID"],
                    f"{host}-{twins + 1}" if twins else host,
                    raw["NodeManagerAddress"],
                    held,
                    float(raw["Resources"].get("GPU", 0.0)),
                )
            )
        return nodes

    def holding(self, device: str) -> list[Place]:
        """The nodes that announce a device. Raises DeviceUnavailableError, naming what there is, where none does."""
        nodes = self.nodes()
        found = [node for node in nodes if device in node.devices]
        if not found:
            have = "; ".join(f"{node.name} holds {', '.join(node.devices)}" for node in nodes if node.devices)
            raise DeviceUnavailableError(
                f"no node of the fleet at {self.address} announces {device}: {have or 'none announces any device'}. "
                "On the machine that has one, run: latbench fleet join HOST:PORT (latbench fleet status shows all)"
            )
        return found

    def ask(self, nodes: Sequence[Place], function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(*args)`` on every node at once, holding nothing; answers in order.

        A LatbenchError raised there, or a node that does not answer, is an answer too.
        """
        return self.ask_each(nodes, function, [args] * len(nodes))

    def ask_each(
        self, nodes: Sequence[Place], function: Callable[..., Any], args: Sequence[tuple[Any, ...]]
    ) -> list[Any]:
        """As ``ask``, with arguments for each."""
        task = self._ray.remote(num_cpus=0, max_retries=0)(function)
        refs = [
            task.options(scheduling_strategy=self._on(node)).remote(*own) for node, own in zip(nodes, args, strict=True)
        ]
        return [self._as_value(ref, node.name, ASK_LIMIT_S) for ref, node in zip(refs, nodes, strict=True)]

    def free(self, devices: Sequence[tuple[Place, str]]) -> list[bool]:
        """Whether each device of a node could be held now. Ask the nodes something first: only placing is timed."""
        task = self._ray.remote(num_cpus=0, max_retries=0)(_nothing)
        refs = [
            task.options(scheduling_strategy=self._on(place), resources=_whole(place, name)).remote()
            for place, name in devices
        ]
        placed, waiting = self._ray.wait(refs, num_returns=len(refs), timeout=PLACED_S) if refs else ([], [])
        for ref in waiting:
            with suppress(Exception):  # it may be placed at this very moment, and ends by itself
                self._ray.cancel(ref)
        return [ref in placed for ref in refs]

    def hold(self, node: Place, device: str | None, made: Callable[..., Any], *args: Any) -> Held:
        """``made(*args)``, an object on a node that holds the device until it is closed, or with None all its devices
        and GPUs. It may not be there yet."""
        devices = node.devices if device is None else [device]
        resources = {name: amount for one in devices for name, amount in _whole(node, one).items()}
        actor = (
            self._ray.remote(made)
            .options(
                num_cpus=0,
                num_gpus=node.gpus if device is None else 0,
                max_restarts=0,
                resources=resources,
                scheduling_strategy=self._on(node),
            )
            .remote(*args)
        )
        return Held(self, actor, node)

    def done(self, calls: Sequence[Any], wait_s: float) -> list[Any]:
        """Those of the calls that have an answer, or never will; waits for the first of them, `wait_s` at most."""
        if not calls:
            time.sleep(wait_s)
            return []
        ready, _ = self._ray.wait(list(calls), num_returns=1, timeout=wait_s)
        more, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0) if ready else ([], [])
        return list(more)

    def answer(self, ref: Any, name: str, limit_s: float) -> Any:
        """What a call came to. Raises the LatbenchError that it raised; NodeLostError where no answer comes."""
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(ref, timeout=limit_s)
        except exceptions.GetTimeoutError:
            raise NodeLostError(f"{name} gave no answer within {limit_s:g} s") from None
        except exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, LatbenchError):
                raise cause from None
            if isinstance(cause, ImportError) or "failed to import" in str(error):
                raise EnvironmentUnfitError(f"{name} cannot run latbench: {_last_line(error)}") from None
            raise  # a bug: with the traceback from there
        except (exceptions.RayError, ConnectionError, OSError) as error:
            raise self._lost(name, error) from None

    def _as_value(self, ref: Any, name: str, limit_s: float) -> Any:
        try:
            return self.answer(ref, name, limit_s)
        except LatbenchError as error:
            return error

    def _on(self, node: Place) -> Any:
        return self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node.id, soft=False)

    def _lost(self, name: str, error: Exception) -> NodeLostError:
        return NodeLostError(f"{name} is lost: {_reason(error)}")


class Held:
    """An object of ours on a node, the device held for it. Calls run one at a time, in the order they were sent."""

    def __init__(self, fleet: Fleet, actor: Any, node: Place) -> None:
        self._fleet, self._actor, self.node = fleet, actor, node
        self._ready = actor.__ray_ready__.remote()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None or (issubclass(kind, (KeyboardInterrupt, LatbenchError)) and kind is not NodeLostError):
            with suppress(Exception):  # what it leaves behind, the next one on that node clears away
                self.call("close", limit_s=CLOSE_LIMIT_S)
        self.kill()

    def placed(self, wait_s: float) -> bool:
        """Whether it holds the device by now. Raises NodeLostError where it never will."""
        ready, _ = self._fleet._ray.wait([self._ready], timeout=wait_s)
        if ready:
            self._fleet.answer(self._ready, self.node.name, wait_s)
        return bool(ready)

    def send(self, method: str, *args: Any) -> Any:
        """Calls a method without waiting: what ``receive`` takes."""
        try:
            return getattr(self._actor, method).remote(*args)
        except Exception as error:  # the way to the cluster is cut
            raise self._fleet._lost(self.node.name, error) from None

    def receive(self, sent: Any, limit_s: float) -> Any:
        """The answer to a call; raises as ``Fleet.answer``."""
        return self._fleet.answer(sent, self.node.name, limit_s)

    def call(self, method: str, *args: Any, limit_s: float) -> Any:
        """Calls a method and waits; raises as ``Fleet.answer``."""
        return self.receive(self.send(method, *args), limit_s)

    def kill(self) -> None:
        """Ends its process at once, and gives the device back; calls under way raise NodeLostError."""
        with suppress(Exception):  # gone already, with its node or with the cluster
            self._fleet._ray.kill(self._actor)


@contextmanager
def connect(address: str) -> Iterator[Fleet]:
    """The fleet at an address of Ray's. Raises EnvironmentUnfitError where Ray is missing or nobody answers."""
    os.environ.update({name: value for name, value in _QUIET.items() if name not in os.environ})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray = _import()
        ours = not ray.is_initialized()
        if ours:
            handler = signal.getsignal(signal.SIGTERM)
            try:
                _knock(address)
                _init(ray, address)
            except ImportError as error:
                raise EnvironmentUnfitError(
                    f"Ray's client is incomplete: {error}. Run: pip install 'latbench[fleet]'"
                ) from None
            except Exception as error:  # ConnectionError, ValueError, RuntimeError, by the kind of address
                raise EnvironmentUnfitError(
                    f"no fleet at {address}: {_last_line(error)}. Start one: latbench fleet join --head; addresses are "
                    "ray://HOST:10001, or auto on a machine that is a node itself"
                ) from None
            finally:  # Ray takes it, in the main thread
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, handler)
    try:
        yield Fleet(ray, address)
    finally:
        if ours:
            with suppress(Exception):
                ray.shutdown()


def _init(ray: Any, address: str) -> None:
    """Ray's own, twice where need be: a head starts a process for each client, and now and then one dies early."""
    for last in (False, True):
        try:
            ray.init(address, namespace="latbench", log_to_driver=False, logging_level=logging.CRITICAL)
            return
        except (RuntimeError, ConnectionError):
            if last or not address.startswith("ray://"):
                raise
        time.sleep(1.0)


def _import() -> Any:
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise EnvironmentUnfitError(f"a fleet needs Ray: {error}. Run: pip install 'latbench[fleet]'") from None
    # Ray prints what befell its workers to our stdout even with log_to_driver=False (as of 2.60).
    with suppress(AttributeError):
        ray._private.worker._worker_logs_enabled = False
    return ray


def wait_for(address: str, limit_s: float) -> None:
    """Until somebody listens at HOST:PORT, or ray://HOST:PORT; raises OSError where nobody does in time.

    `ray start --head` returns before its clients' server listens.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return _knock(address)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _knock(address: str) -> None:
    """Raises OSError where nobody listens at HOST:PORT: Ray would try for half a minute, and print on stderr."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_LIMIT_S).close()


def _nothing() -> None:
    """Runs where a device is free."""


def _whole(node: Place, device: str) -> dict[str, float]:
    return {PREFIX + device: node.devices[device]}


def _reason(error: BaseException) -> str:
    """The line of Ray's many that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("The actor is dead because")]
    return one_line((told or lines or [type(error).__name__])[0], 200)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line((lines or [type(error).__name__])[-1], 200)
