"""What this host is and how it is doing, read from /proc and /sys (macOS: sysctl). Nothing is changed, nothing raises:
a fact that cannot be read is None or empty. Every reader takes the file system's root, so tests hand it a made-up one.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
CPUS = "sys/devices/system/cpu"
MAX_CPUS = 2**16  # in one range: Linux is built for 8,192 at most

# Arm cores name themselves by number only: part number (implementer 0x41) -> name, as in lscpu.
_ARM_CORES = {
    "0xd03": "Cortex-A53",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
}


@dataclass(frozen=True)
class Cache:
    """One cache of the first CPU."""

    level: int
    kind: str  # Data | Instruction | Unified
    nbytes: int
    shared_by: int  # logical CPUs


@dataclass(frozen=True)
class Host:
    """What can move a number on this machine. None and (): not to be read here."""

    system: str  # Linux | Darwin | ...
    kernel: str
    arch: str  # x86_64 | aarch64 | arm64 | ...
    cpu_model: str
    board: str | None  # "Raspberry Pi 5 Model B Rev 1.0"
    cpus: int  # logical, online
    cores: int  # physical
    affinity: tuple[int, ...]  # logical CPUs that this process may use
    memory_bytes: int | None
    caches: tuple[Cache, ...]
    governors: tuple[str, ...]  # distinct, sorted
    turbo: bool | None
    hypervisor: str | None  # None: none seen
    load_average: float | None  # runnable tasks, mean of the last minute


@dataclass(frozen=True)
class CpuTimes:
    """Clock ticks of all CPUs together since boot."""

    total: int
    idle: int
    steal: int  # wanted to run, but the hypervisor ran somebody else


def read(root: Path = ROOT) -> Host:
    """The host, from the files below `root`."""
    if platform.system() == "Darwin" and root == ROOT:
        return parse_sysctl(_sysctl())
    cpus = online_cpus(root)
    load = read_text(root / "proc/loadavg").split()
    return Host(
        system=platform.system(),
        kernel=read_text(root / "proc/sys/kernel/osrelease") or platform.release(),
        arch=platform.machine(),
        cpu_model=cpu_model(root),
        board=read_text(root / "proc/device-tree/model") or None,
        cpus=len(cpus) or os.cpu_count() or 1,
        cores=_cores(root, cpus) or os.cpu_count() or 1,
        affinity=affinity(root),
        memory_bytes=memory_bytes(root, "MemTotal"),
        caches=caches(root),
        governors=governors(root),
        turbo=turbo(root),
        hypervisor=hypervisor(root),
        load_average=float(load[0]) if load and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", load[0]) else None,
    )


def read_text(path: Path) -> str:
    """A file's text without the white space and NUL bytes around it; "" where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip("\0 \t\n")
    except OSError:
        return ""


def read_int(path: Path) -> int | None:
    """A file's integer; None where there is none."""
    text = read_text(path)
    return int(text) if re.fullmatch(r"-?[0-9]{1,30}", text) else None


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """The kernel's list of CPUs: "0-2,5" -> (0, 1, 2, 5)."""
    cpus: list[int] = []
    for first, last in re.findall(r"\b([0-9]{1,9})(?:-([0-9]{1,9}))?\b", text):
        cpus += range(int(first), min(int(last or first), int(first) + MAX_CPUS) + 1)
    return tuple(cpus)


def online_cpus(root: Path = ROOT) -> tuple[int, ...]:
    """Logical CPUs that are switched on."""
    listed = parse_cpu_list(read_text(root / CPUS / "online"))
    named = _fields(root / "proc/cpuinfo").get("processor", [])
    return listed or tuple(int(n) for n in named if re.fullmatch(r"[0-9]{1,9}", n))


def affinity(root: Path = ROOT) -> tuple[int, ...]:
    """Logical CPUs that this process may use."""
    return parse_cpu_list("".join(_fields(root / "proc/self/status").get("Cpus_allowed_list", [])[:1]))


def cpu_model(root: Path = ROOT) -> str:
    """ "AMD EPYC 7B13", "Cortex-A76"; the machine's architecture where the kernel knows no more."""
    fields = _fields(root / "proc/cpuinfo")
    for name in ("model name", "Processor", "cpu model", "uarch"):
        if fields.get(name):
            return " ".join(fields[name][0].split())
    # big.LITTLE machines list several kinds of core: all of them, in the kernel's order
    parts = [_ARM_CORES.get(part, f"Arm part {part}") for part in fields.get("CPU part", [])]
    return " + ".join(dict.fromkeys(parts)) or platform.machine()


def smt_siblings(root: Path = ROOT) -> tuple[tuple[int, ...], ...]:
    """Groups of two or more online logical CPUs that share a core."""
    online = set(online_cpus(root))
    groups = {
        parse_cpu_list(read_text(root / CPUS / f"cpu{cpu}/topology/thread_siblings_list")) for cpu in sorted(online)
    }
    return tuple(sorted(group for group in groups if len(online.intersection(group)) > 1))


def caches(root: Path = ROOT) -> tuple[Cache, ...]:
    """Caches of the first CPU, by level."""
    found = []
    for index in sorted((root / CPUS / "cpu0/cache").glob("index*")):
        level, size = read_int(index / "level"), re.fullmatch(r"([0-9]{1,12})([KM])", read_text(index / "size"))
        if level is not None and size is not None:
            nbytes = int(size[1]) * {"K": 2**10, "M": 2**20}[size[2]]
            shared_by = len(parse_cpu_list(read_text(index / "shared_cpu_list"))) or 1
            found.append(Cache(level, read_text(index / "type"), nbytes, shared_by))
    return tuple(sorted(found, key=lambda cache: (cache.level, cache.kind)))


def governors(root: Path = ROOT) -> tuple[str, ...]:
    """Distinct frequency governors of the CPUs; empty where the kernel does not set the clock (virtual machines)."""
    return tuple(sorted({read_text(path) for path in (root / CPUS).glob("cpu[0-9]*/cpufreq/scaling_governor")} - {""}))


def turbo(root: Path = ROOT) -> bool | None:
    """Whether the clock may rise above its base; None where no driver says so."""
    no_turbo = read_int(root / CPUS / "intel_pstate/no_turbo")
    boost = read_int(root / CPUS / "cpufreq/boost")
    if no_turbo is not None:
        return no_turbo == 0
    return None if boost is None else boost == 1


def hypervisor(root: Path = ROOT) -> str | None:
    """Who runs this virtual machine, as far as it says; None on bare metal."""
    dmi = " ".join(
        dict.fromkeys(read_text(root / f"sys/class/dmi/id/{field}") for field in ("sys_vendor", "product_name"))
    ).strip()
    flags = _fields(root / "proc/cpuinfo").get("flags", [""])[0].split()
    if "hypervisor" in flags:  # x86 tells; its DMI may name the cloud on bare metal as well
        return dmi or read_text(root / "sys/hypervisor/type") or "unnamed hypervisor"
    if not flags and re.search(r"KVM|QEMU|Virtual|VMware|Compute Engine", dmi):
        return dmi
    return read_text(root / "proc/device-tree/hypervisor/compatible") or None


def memory_bytes(root: Path, field: str) -> int | None:
    """One field of /proc/meminfo: "MemTotal", "MemAvailable", "SwapTotal", "SwapFree"."""
    words = "".join(_fields(root / "proc/meminfo").get(field, [])[:1]).split()
    return int(words[0]) * 1024 if words and re.fullmatch(r"[0-9]{1,30}", words[0]) else None


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs' worth of time that the control groups above this process grant it; None: no limit."""
    quotas = []
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        version2 = controllers == ""
        base = root / "sys/fs/cgroup" / ("" if version2 else "cpu")
        if not version2 and "cpu" not in controllers.split(","):
            continue
        group = Path(path.lstrip("/"))
        for folder in (base / group, *(base / parent for parent in group.parents)):
            if version2:
                words = read_text(folder / "cpu.max").split()
            else:
                words = [read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us")]
            if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]):
                quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def cpu_times(root: Path = ROOT) -> CpuTimes | None:
    """Since boot, all CPUs together; None where there is no /proc/stat."""
    first = read_text(root / "proc/stat").partition("\n")[0].split()
    if len(first) < 9 or first[0] != "cpu":
        return None
    ticks = [int(word) for word in first[1:9]]  # guest time, which follows, is in user time already
    return CpuTimes(total=sum(ticks), idle=ticks[3] + ticks[4], steal=ticks[7])


def idle_cores(seconds: float, root: Path = ROOT) -> float | None:
    """CPUs' worth of time that nothing ran in while we looked; None where there is no /proc/stat."""
    before = cpu_times(root)
    time.sleep(seconds)
    after = cpu_times(root)
    if before is None or after is None or after.total == before.total:
        return None
    return len(online_cpus(root)) * (after.idle - before.idle) / (after.total - before.total)


def process_ticks(root: Path = ROOT) -> dict[int, tuple[str, int]]:
    """Process id -> its name and the clock ticks it has run."""
    found = {}
    for path in (root / "proc").glob("[0-9]*/stat"):
        name, _, rest = read_text(path).partition("(")[2].rpartition(")")  # names may hold brackets and blanks
        words = rest.split()
        if len(words) > 12:  # otherwise it ended while we looked
            found[int(path.parent.name)] = (name, int(words[11]) + int(words[12]))
    return found


def parse_sysctl(text: str) -> Host:
    """The host, from the lines "name: value" that macOS' sysctl prints."""
    values = {name: value for name, _, value in (line.partition(": ") for line in text.splitlines())}
    found = [
        Cache(level, kind, int(values[name]), 1)
        for level, kind, name in (
            (1, "Data", "hw.l1dcachesize"),
            (1, "Instruction", "hw.l1icachesize"),
            (2, "Unified", "hw.l2cachesize"),
        )
        if values.get(name, "").isdecimal()
    ]
    load = re.search(r"[0-9.]+", values.get("vm.loadavg", ""))
    memory = values.get("hw.memsize", "")
    return Host(
        system="Darwin",
        kernel=values.get("kern.osrelease", platform.release()),
        arch=platform.machine(),
        cpu_model=values.get("machdep.cpu.brand_string", platform.machine()),
        board=values.get("hw.model"),
        cpus=int(values.get("hw.logicalcpu", os.cpu_count() or 1)),
        cores=int(values.get("hw.physicalcpu", os.cpu_count() or 1)),
        affinity=(),
        memory_bytes=int(memory) if memory.isdecimal() else None,
        caches=tuple(found),
        governors=(),
        turbo=None,
        hypervisor="unnamed hypervisor" if values.get("kern.hv_vmm_present") == "1" else None,
        load_average=float(load[0]) if load else None,
    )


def _sysctl() -> str:
    names = "machdep.cpu.brand_string hw.model hw.logicalcpu hw.physicalcpu hw.memsize hw.l1dcachesize hw.l1icachesize"
    names += " hw.l2cachesize kern.osrelease kern.hv_vmm_present vm.loadavg"
    try:
        # an unknown name is a line on stderr and a status, the others are printed all the same
        return subprocess.run(["sysctl", *names.split()], capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _fields(path: Path) -> dict[str, list[str]]:
    """ "name : value" lines -> every value of each name, in order."""
    fields: dict[str, list[str]] = {}
    for line in read_text(path).splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), []).append(value.strip())
    return fields


def _cores(root: Path, cpus: tuple[int, ...]) -> int:
    """Distinct cores among `cpus`; all of them where the kernel tells no topology."""
    topology = [root / CPUS / f"cpu{cpu}/topology" for cpu in cpus]
    return len({(read_text(t / "physical_package_id"), read_text(t / "core_id") or t.parent.name) for t in topology})
