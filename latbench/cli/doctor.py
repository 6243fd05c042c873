"""``latbench doctor``: what makes timings noisy on this machine, and the command that mends each.

A check reads facts (files below `root`, or figures taken over the same two seconds) and gives a Finding; None where
the facts are not to be had here. MEASUREMENT.md says what each costs.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click

from latbench import host
from latbench.cli.values import format_bytes, format_ms

Level = Literal["ok", "note", "warn"]

NOTHING = "nothing to do here"
WINDOW_S = 2.0
BUSY_LOAD = 0.3  # runnable tasks per logical CPU
CAP_SYS_NICE = 23  # linux/capability.h


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    level: Level
    what: str
    why: str
    mend: str = NOTHING


@dataclass(frozen=True)
class Busy:
    """A process that ran while we looked."""

    pid: int
    name: str
    cores: float  # CPU seconds per second


@dataclass(frozen=True)
class Window:
    """What was seen while the clock probe ran."""

    probes_us: Sequence[float]
    busy: Sequence[Busy]  # other processes, busiest first
    steal: float | None  # share of the time that we and others wanted to run
    timer_cost_ns: float
    timer_step_ns: int  # smallest step of the clock


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """What makes timings noisy here, and the command that mends each. Looks for two seconds and changes nothing."""
    findings = diagnose(watch())
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for finding in findings:
        colour = {"ok": "green", "note": "cyan", "warn": "bold yellow"}[finding.level]
        grid.add_row(Text(finding.level, colour), finding.check, Text(finding.what))
        if finding.level != "ok":
            grid.add_row("", "", Text(finding.why, "dim"))
            grid.add_row("", "", Text(f"mend: {finding.mend}" if finding.mend != NOTHING else NOTHING))
    console = Console(highlight=False)
    console.print(grid)
    counts = {level: sum(finding.level == level for finding in findings) for level in ("warn", "note", "ok")}
    console.print(f"\n{counts['warn']} to mend, {counts['note']} to know, {counts['ok']} in order.")


def watch(seconds: float = WINDOW_S, root: Path = host.ROOT) -> Window:
    """Keeps one core busy with the clock probe for `seconds`, and sees who else ran."""
    from latbench.measure.probe import probe_us, timer_cost_ns

    cost_ns, step_ns = timer_cost_ns(), _timer_step_ns()
    cpu_before, ran_before, start = host.cpu_times(root), host.process_ticks(root), time.perf_counter()
    probes_us = [probe_us()]
    while time.perf_counter() - start < seconds:
        probes_us.append(probe_us())
    elapsed, cpu_after, ran_after = time.perf_counter() - start, host.cpu_times(root), host.process_ticks(root)
    ticks = elapsed * (os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100)
    busy = [
        Busy(pid, name, (ran - ran_before.get(pid, (name, 0))[1]) / ticks)
        for pid, (name, ran) in ran_after.items()
        if pid != os.getpid() and ran > ran_before.get(pid, (name, 0))[1]
    ]
    steal = None
    if cpu_before is not None and cpu_after is not None:
        wanted = (cpu_after.total - cpu_before.total) - (cpu_after.idle - cpu_before.idle)
        steal = (cpu_after.steal - cpu_before.steal) / max(1, wanted)
    return Window(probes_us, sorted(busy, key=lambda process: -process.cores), steal, cost_ns, step_ns)


def diagnose(window: Window, root: Path = host.ROOT) -> list[Finding]:
    """Every finding, worst first."""
    found = [
        check_governor(root),
        check_turbo(root),
        check_clock(window.probes_us, root),
        check_load(window.busy, root),
        check_cores(root),
        check_siblings(root),
        check_quota(root),
        check_virtual(window.steal, root),
        check_memory(root),
        check_priority(root),
        check_power(root),
        check_heat(root),
        check_timer(window.timer_cost_ns, window.timer_step_ns, root),
    ]
    return sorted((f for f in found if f is not None), key=lambda f: ("warn", "note", "ok").index(f.level))


def check_governor(root: Path = host.ROOT) -> Finding | None:
    """Anything but `performance` lets the clock follow the load."""
    governors = host.governors(root)
    if not governors:
        return None
    fixed = governors == ("performance",)
    return Finding(
        "governor",
        "ok" if fixed else "warn",
        f"the governor is {' and '.join(governors)}",
        "The clock follows the load: the first samples after a pause run at another clock than the last.",
        NOTHING if fixed else "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
    )


def check_turbo(root: Path = host.ROOT) -> Finding | None:
    """A clock above its base depends on heat and on the other cores."""
    turbo = host.turbo(root)
    if turbo is None:
        return None
    intel = (root / host.CPUS / "intel_pstate/no_turbo").exists()
    switch = "echo 1 | sudo tee /sys/devices/system/cpu/intel_pstate/no_turbo"
    return Finding(
        "turbo",
        "note" if turbo else "ok",
        f"turbo is {'on' if turbo else 'off'}",
        "The clock depends on heat and on what the other cores do. Off: slower and steadier.",
        NOTHING if not turbo else switch if intel else "echo 0 | sudo tee /sys/devices/system/cpu/cpufreq/boost",
    )


def check_clock(probes_us: Sequence[float], root: Path = host.ROOT) -> Finding:
    """How far the core's clock wandered: (95th - 5th percentile) / median of the clock probe."""
    ordered = sorted(probes_us)
    low, middle, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.05, 0.5, 0.95))
    spread = (high - low) / middle
    settable = bool(host.governors(root)) or host.turbo(root) is not None
    return Finding(
        "clock",
        "ok" if spread < 0.01 else "note" if spread < 0.05 else "warn",
        f"the clock wandered by {spread:.1%} (a chain of 8,000 multiplications: {format_ms(middle / 1e3)})",
        "Two runs of one network differ as much; latbench records the clock beside every block of samples.",
        "governor performance, turbo off: see there" if settable and spread >= 0.01 else NOTHING,
    )


def check_load(busy: Sequence[Busy], root: Path = host.ROOT) -> Finding | None:
    """Other work on these cores: the load average, and who ran while we looked."""
    words = host.read_text(root / "proc/loadavg").split()
    cpus = len(host.online_cpus(root))
    if not words or not cpus:
        return None
    load, running = float(words[0]), sum(process.cores for process in busy)
    loaded = max(load, running) / cpus > BUSY_LOAD
    worst = [process for process in busy if process.cores >= 0.02][:3]
    names = ", ".join(f"{process.name} (pid {process.pid}, {process.cores:.0%} of a core)" for process in worst)
    return Finding(
        "load",
        "warn" if loaded else "ok",
        f"load average {load:.2f} on {cpus} CPUs; busy just now: {names or 'nobody else'}",
        "Other work takes turns on the core, empties its caches and shares its memory bus.",
        (f"stop or await them: ps -o pid,pcpu,etime,args -p {','.join(str(p.pid) for p in worst)}" if worst else "wait")
        if loaded
        else NOTHING,
    )


def check_cores(root: Path = host.ROOT) -> Finding | None:
    """With one CPU, everything else that runs here runs in the middle of a measurement."""
    cpus = host.affinity(root) or host.online_cpus(root)
    if not cpus:
        return None
    return Finding(
        "cores",
        "warn" if len(cpus) == 1 else "note" if len(cpus) == 2 else "ok",
        f"{len(cpus)} logical CPU{'s' if len(cpus) > 1 else ''} for this process",
        "The measurement, its parent and the system share them; networks on several threads wait for each other.",
    )


def check_siblings(root: Path = host.ROOT) -> Finding | None:
    """Two logical CPUs of one core share its units."""
    groups = host.smt_siblings(root)
    if not groups:
        return None
    pair = "+".join(map(str, groups[0]))
    return Finding(
        "siblings",
        "note",
        f"{len(groups)} cores run two threads or more (CPUs {pair}, ...)",
        "What runs on a sibling takes up to half of the core, and its load is not seen on this CPU.",
        "echo off | sudo tee /sys/devices/system/cpu/smt/control",
    )


def check_quota(root: Path = host.ROOT) -> Finding | None:
    """A control group that has used up its time stands still until the period ends."""
    quota = host.cpu_quota(root)
    if quota is None:
        return None
    return Finding(
        "quota",
        "warn",
        f"the control group grants {quota:g} CPUs' worth of time",
        "When it is used up, every process of the container stands still for tens of milliseconds.",
        "start the container with pinned cores instead of a quota: docker run --cpuset-cpus 2,3 (no --cpus)",
    )


def check_virtual(steal: float | None, root: Path = host.ROOT) -> Finding | None:
    """On a virtual machine the host decides when and where its CPUs run."""
    hypervisor = host.hypervisor(root)
    if hypervisor is None:
        return None
    stolen = f"{steal:.1%} of the busy time was stolen" if steal is not None else "stolen time cannot be read"
    return Finding(
        "virtual",
        "warn" if steal is not None and steal > 0.01 else "note",
        f"a virtual machine ({hypervisor}); {stolen}",
        "The host moves and interrupts virtual CPUs, and sets their clock: compare within one session, "
        "or rent dedicated cores.",
    )


def check_memory(root: Path = host.ROOT) -> Finding | None:
    """Pages that were swapped out come back in the middle of a measurement."""
    total, free = host.memory_bytes(root, "SwapTotal"), host.memory_bytes(root, "SwapFree")
    available = host.memory_bytes(root, "MemAvailable")
    if total is None or free is None or available is None:
        return None
    used, room = total - free, format_bytes(available)
    return Finding(
        "memory",
        "ok" if used == 0 else "note" if used < available else "warn",
        f"{room} of memory available" + (f", {format_bytes(used)} swapped out" if used else ", nothing swapped out"),
        "A page that was swapped out costs milliseconds when it is touched.",
        NOTHING if used == 0 else "sudo swapoff -a" if used < available else "close what fills the memory",
    )


def check_priority(root: Path = host.ROOT) -> Finding | None:
    """Whether a measurement may go before other work."""
    autogroup = host.read_int(root / "proc/sys/kernel/sched_autogroup_enabled")
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)", host.read_text(root / "proc/self/status"), re.MULTILINE)
    if capabilities is None:
        return None
    may = bool(int(capabilities[1], 16) >> CAP_SYS_NICE & 1)
    grouped = autogroup == 1
    return Finding(
        "priority",
        "ok" if may else "note",
        f"{'may' if may else 'may not'} raise its own priority; sessions {'are' if grouped else 'are not'} grouped",
        "Without the right, a measurement waits its turn"
        + (", and `nice` on other work has no effect across sessions (autogroup)." if grouped else "."),
        NOTHING if may or not grouped else "sudo sysctl kernel.sched_autogroup_enabled=0, then `nice` the other work",
    )


def check_power(root: Path = host.ROOT) -> Finding | None:
    """On battery, firmware lowers the clock as it sees fit."""
    supplies = sorted((root / "sys/class/power_supply").glob("*"))
    batteries = [supply for supply in supplies if host.read_text(supply / "type") == "Battery"]
    system = [supply for supply in batteries if host.read_text(supply / "scope") != "Device"]  # not a mouse's
    if not system:
        return None
    drained = any(host.read_text(supply / "status") == "Discharging" for supply in system)
    return Finding(
        "power",
        "warn" if drained else "ok",
        "running on battery" if drained else "on mains power",
        "On battery, firmware lowers the clock as it sees fit.",
        "plug it in" if drained else NOTHING,
    )


def check_heat(root: Path = host.ROOT) -> Finding | None:
    """How far the hottest zone is from the trip point where its clock is lowered."""
    margins = []  # (degrees left, degrees, zone)
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        now = host.read_int(zone / "temp")
        for kind in zone.glob("trip_point_*_type"):
            trip = host.read_int(kind.with_name(kind.name.replace("_type", "_temp")))
            if host.read_text(kind) in ("passive", "hot") and now is not None and trip is not None and trip > 0:
                margins.append(((trip - now) / 1e3, now / 1e3, host.read_text(zone / "type") or zone.name))
    if not margins:
        return None
    left, degrees, name = min(margins)
    return Finding(
        "heat",
        "warn" if left <= 5 else "ok",
        f"{name} is at {degrees:.0f} °C, {left:.0f} °C below the point where its clock is lowered"
        if left > 0
        else f"{name} is at {degrees:.0f} °C: its clock is being lowered",
        "A hot device lowers its clock in the middle of a table.",
        "let it cool, or cool it better" if left <= 5 else NOTHING,
    )


def check_timer(cost_ns: float, step_ns: int, root: Path = host.ROOT) -> Finding:
    """What reading the clock costs; a sample repeats the inference until this is a thousandth of it."""
    source = "sys/devices/system/clocksource/clocksource0"
    current = host.read_text(root / source / "current_clocksource")
    slow = cost_ns > 1000
    has_tsc = "tsc" in host.read_text(root / source / "available_clocksource").split()
    return Finding(
        "timer",
        "warn" if slow else "ok",
        f"reading the clock costs {format_ms(cost_ns / 1e6)}, its step is {step_ns} ns",
        "Short operators are repeated within a sample until the clock costs a thousandth of it.",
        f"echo tsc | sudo tee /{source}/current_clocksource" if slow and has_tsc and current != "tsc" else NOTHING,
    )


def _timer_step_ns() -> int:
    steps = []
    for _ in range(1000):
        start = end = time.perf_counter_ns()
        while end == start:
            end = time.perf_counter_ns()
        steps.append(end - start)
    return min(steps)
