"""The two ends of measuring on a node of a fleet: ``NodeMeasurer`` there, ``FleetLauncher`` here.

The node's end owns a ``LocalLauncher``, so a row is measured there exactly as it would be by hand: the isolated worker,
its limits, its process group. This end has a launcher's methods, so a ``Session`` does not know where it measures.
Nodes share no disk: an artifact travels with the first request that names it, and is kept in the node's scratch folder
until requests name another folder of ours.

The local launcher looks AHEAD requests ahead, so that its worker never waits. ``feed`` hands one request over and gives
the measurement of the one AHEAD before it; a few calls are always on their way, so the line's delay costs nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from latbench.errors import EnvironmentUnfitError
from latbench.interpreter import START_LIMIT_S
from latbench.measure.base import Measurement, Request, SamplingPlan
from latbench.measure.fleet import Fleet, Held, NodeLostError, Place
from latbench.measure.launcher import AHEAD
from latbench.measure.monitor import Nvml, locked_clock
from latbench.profiling.profile import Target
from latbench.profiling.scratch import scratch
from latbench.provenance import Provenance
from latbench.spaces.base import SearchSpace

LOCK = "latbench-measuring.lock"  # in the temporary folder of a machine: held while something is measured there
UNDER_WAY = 4  # calls sent and not answered: more than the line's delay over a block of samples (7 ms)
POLL_S = 1.0  # between two looks whether it is free
MARGIN_S = 60.0  # beyond a request's own limits, before a silent node counts as lost


class NodeMeasurer:
    """Measures for a head elsewhere, on the machine that it lives on. One call at a time."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._stack = ExitStack()
        self._launcher = target.launcher()
        self._source: deque[Request | None] = deque()  # None: the end
        self._measured: Iterator[Measurement] = iter(())
        self._fed = 0  # requests since ``begin``
        self._folder, self._artifacts = Path(), ""  # ours, and the head's folder that its files come from
        self._nice = lowered_priority()

    def acquire(self) -> bool:
        """Takes this machine for measuring; False where somebody else measures here, through any fleet."""
        if self._target.simulated:
            return True
        lock = machine_lock()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        self._stack.callback(os.close, lock)
        return True

    def open(self, space: SearchSpace) -> tuple[Mapping[str, Any], Provenance]:
        """Starts a worker: its conditions, and what a table made here says of itself.

        Raises MeasurementError, EnvironmentUnfitError in the runtime's words.
        """
        if self._target.clock_mhz is not None:
            self._stack.enter_context(locked_clock(Nvml(int(self._target.options["device"])), self._target.clock_mhz))
        self._folder = self._stack.enter_context(scratch())
        self._stack.enter_context(self._launcher)
        conditions = self._launcher.start()
        provenance = self._target.provenance(space, conditions)
        if self._nice and provenance.environment:
            provenance = replace(provenance, environment={**provenance.environment, "nice": self._nice})
        return conditions, provenance

    def prepare(self, workers: int) -> None:
        """As the launcher's."""
        self._launcher.prepare(workers)

    def begin(self, folder: str) -> None:
        """The requests that follow are one call of the launcher's ``measure``; artifacts of another folder go."""
        if folder != self._artifacts:
            for path in self._folder.iterdir():
                path.unlink()
            self._artifacts = folder
        self._source = deque()
        self._measured = self._launcher.measure(iter(self._source.popleft, None))
        self._fed = 0

    def feed(self, request: Request, data: bytes | None) -> Measurement | None:
        """Takes a request, with its artifact if that is not here; gives the measurement of the one AHEAD before it."""
        path = self._folder / Path(request.artifact).name
        if data is not None:
            path.write_bytes(data)
        self._source.append(replace(request, artifact=str(path)))
        self._fed += 1
        return next(self._measured) if self._fed > AHEAD else None

    def end(self) -> None:
        """No more requests for this call of ``measure``."""
        self._source.append(None)

    def give(self) -> Measurement:
        """After ``end``: the next of the last AHEAD measurements."""
        return next(self._measured)

    def close(self) -> None:
        """Ends the worker, removes what lies here."""
        self._stack.close()


class FleetLauncher:
    """Measures on a node that is held: as ``SessionLauncher``. Raises NodeLostError where the node goes away."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self.conditions: Mapping[str, Any] = {}
        self._folder: Path | None = None  # of ours, whose artifacts are there
        self._there: set[str] = set()

    def acquire(self) -> bool:
        """Whether nobody else measures on the node's machine: from then on nobody can."""
        free: bool = self._held.call("acquire", limit_s=MARGIN_S)
        return free

    def start(self, space: SearchSpace) -> Provenance:
        """Starts a worker on the node; gives what a table made there says of itself."""
        provenance: Provenance
        self.conditions, provenance = self._held.call("open", space, limit_s=START_LIMIT_S + MARGIN_S)
        return provenance

    def prepare(self, workers: int) -> None:
        """As the local launcher's; nobody waits for it."""
        self._held.send("prepare", workers)

    def measure(self, requests: Iterable[Request]) -> Iterator[Measurement]:
        """One Measurement per Request, in order, as they finish."""
        calls: deque[tuple[Any, float]] = deque()  # under way, oldest first; and for how long to wait for each
        n_sent, limit_s = 0, MARGIN_S
        for request in requests:
            path, limit_s = Path(request.artifact), _limit_s(request.plan)
            if not n_sent:
                if path.parent != self._folder:
                    self._folder, self._there = path.parent, set()
                calls.append((self._held.send("begin", str(path.parent)), limit_s))
            data = None if path.name in self._there else path.read_bytes()
            self._there.add(path.name)
            calls.append((self._held.send("feed", request, data), limit_s))
            n_sent += 1
            yield from self._answers(calls, UNDER_WAY)
        calls.append((self._held.send("end"), limit_s))
        calls += [(self._held.send("give"), limit_s) for _ in range(min(n_sent, AHEAD))]
        yield from self._answers(calls, 0)

    def _answers(self, calls: deque[tuple[Any, float]], n_left: int) -> Iterator[Measurement]:
        """Waits for the oldest calls until so many are left; gives the measurements among their answers."""
        while len(calls) > n_left:
            answer = self._held.receive(*calls.popleft())
            if answer is not None:
                yield answer


class FleetNode:
    """A node of Ray's with its device: as ``fleet.Node``."""

    def __init__(self, fleet: Fleet, where: Place, target: Target) -> None:
        self._fleet, self._where, self.target = fleet, where, target
        self.name = where.name
        self._held: Held | None = None
        self._aborted = False

    @contextmanager
    def open(self, space: SearchSpace, waiting: Callable[[str], None]) -> Iterator[tuple[FleetLauncher, Provenance]]:
        """Raises NodeLostError where the node goes away, MeasurementError or EnvironmentUnfitError in its words."""
        device = self.target.device
        if not self._fleet.free([(self._where, device)])[0]:
            waiting(f"{self.name}: its {device} is not free, another run may hold it; waiting for it")
        with self._fleet.hold(self._where, device, NodeMeasurer, self.target) as held:
            self._held = held
            while not held.placed(POLL_S):
                self._go_on()
            launcher = FleetLauncher(held)
            if not launcher.acquire():
                waiting(f"{self.name}: something is being measured on its machine; waiting")
                while not launcher.acquire():
                    time.sleep(POLL_S)
                    self._go_on()
            yield launcher, launcher.start(space)

    def _go_on(self) -> None:
        if self._aborted:
            raise NodeLostError(f"{self.name} was given up")

    def abort(self) -> None:
        """Kills the process there; whoever waits for it raises NodeLostError."""
        self._aborted = True
        if self._held is not None:
            self._held.kill()


def _limit_s(plan: SamplingPlan) -> float:
    """For one request: its stages, once more where the worker died, and two starts."""
    return 2 * (plan.load_limit_s + plan.warmup_limit_s + plan.measure_limit_s + START_LIMIT_S) + MARGIN_S


def machine_is_busy() -> bool:
    """Whether something is being measured on this machine through a fleet."""
    lock = machine_lock()
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def lowered_priority() -> int:
    """This process's niceness where it stays above 0. Ray starts its processes at 15, and their children inherit it."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, min(0, os.getpriority(os.PRIO_PROCESS, 0)))
    return max(0, os.getpriority(os.PRIO_PROCESS, 0))


def machine_lock() -> int:
    """The machine's lock file, open: exclusive for measuring, shared for other work. One for all users, and none needs
    to own it."""
    path = Path("/tmp") / LOCK if os.access("/tmp", os.W_OK) else Path(tempfile.gettempdir()) / LOCK
    with contextlib.suppress(FileNotFoundError):
        return os.open(path, os.O_RDONLY)
    mask = os.umask(0)
    try:
        return os.open(path, os.O_RDONLY | os.O_CREAT, 0o444)
    except OSError as error:
        raise EnvironmentUnfitError(f"cannot open {path}: {error.strerror}; remove it") from None
    finally:
        os.umask(mask)
