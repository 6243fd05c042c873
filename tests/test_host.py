from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from latbench import host

PI = """processor\t: 0
BogoMIPS\t: 108.00
CPU implementer\t: 0x41
CPU part\t: 0xd0b
processor\t: 1
CPU part\t: 0xd0b

Revision\t: c04170
Model\t\t: Raspberry Pi 5 Model B Rev 1.0
"""


def put(root: Path, files: dict[str, str]) -> Path:
    """Files below a made-up root."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_an_empty_root_gives_a_host_without_facts(tmp_path: Path) -> None:
    found = host.read(tmp_path)
    assert (found.board, found.memory_bytes, found.caches, found.governors) == (None, None, (), ())
    assert (found.turbo, found.hypervisor, found.load_average, found.affinity) == (None, None, None, ())
    assert found.cpu_model == platform.machine()
    assert found.cores >= 1
    assert host.cpu_quota(tmp_path) is None
    assert host.cpu_times(tmp_path) is None
    assert host.process_ticks(tmp_path) == {}
    assert host.smt_siblings(tmp_path) == ()


@pytest.mark.skipif(platform.system() != "Linux", reason="reads this machine's /proc")
def test_this_host_agrees_with_the_standard_library() -> None:
    found = host.read()
    assert found.cpus == os.sysconf("SC_NPROCESSORS_ONLN")
    assert set(found.affinity) == os.sched_getaffinity(0)
    assert found.memory_bytes is not None
    assert abs(found.memory_bytes - os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) < 2**20
    assert found.kernel == platform.release()
    assert os.getpid() in host.process_ticks()
    times = host.cpu_times()
    assert times is not None
    assert times.total >= times.idle + times.steal


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-2,5", (0, 1, 2, 5)), ("0", (0,)), ("", ()), ("0-1,4-5", (0, 1, 4, 5)), ("3,1", (3, 1))]
)
def test_lists_of_cpus(text: str, cpus: tuple[int, ...]) -> None:
    assert host.parse_cpu_list(text) == cpus


def test_models_of_cpus(tmp_path: Path) -> None:
    x86 = put(tmp_path / "x86", {"proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD EPYC  7B13\n"})
    pi = put(tmp_path / "pi", {"proc/cpuinfo": PI})
    little = put(tmp_path / "little", {"proc/cpuinfo": "CPU part : 0xd03\nCPU part : 0xd08\nCPU part : 0xd08\n"})
    new = put(tmp_path / "new", {"proc/cpuinfo": "CPU part : 0xfff\n"})
    assert host.cpu_model(x86) == "AMD EPYC 7B13"
    assert host.cpu_model(pi) == "Cortex-A76"
    assert host.cpu_model(little) == "Cortex-A53 + Cortex-A72"
    assert host.cpu_model(new) == "Arm part 0xfff"


def test_the_board_loses_the_device_trees_nul(tmp_path: Path) -> None:
    assert (
        host.read(put(tmp_path, {"proc/device-tree/model": "Raspberry Pi 5 Model B\0"})).board
        == "Raspberry Pi 5 Model B"
    )


def test_two_cores_of_two_threads(tmp_path: Path) -> None:
    files = {f"{host.CPUS}/online": "0-3\n"}
    for cpu, (core, siblings) in enumerate([(0, "0,2"), (1, "1,3"), (0, "0,2"), (1, "1,3")]):
        files[f"{host.CPUS}/cpu{cpu}/topology/core_id"] = f"{core}\n"
        files[f"{host.CPUS}/cpu{cpu}/topology/physical_package_id"] = "0\n"
        files[f"{host.CPUS}/cpu{cpu}/topology/thread_siblings_list"] = siblings
    put(tmp_path, files)
    assert (host.read(tmp_path).cpus, host.read(tmp_path).cores) == (4, 2)
    assert host.smt_siblings(tmp_path) == ((0, 2), (1, 3))
    put(tmp_path, {f"{host.CPUS}/online": "0-1\n"})  # siblings switched off
    assert host.smt_siblings(tmp_path) == ()


def test_numbers_without_end_are_no_figures(tmp_path: Path) -> None:
    cache = tmp_path / host.CPUS / "cpu0/cache/index0"
    cache.mkdir(parents=True)
    (cache / "level").write_text("1")
    (cache / "size").write_text("9" * 5000 + "K")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor : 0\nprocessor : {'9' * 5000}\nprocessor : processor : 1\n")
    assert host.caches(tmp_path) == ()
    assert host.online_cpus(tmp_path) == (0,)


def test_caches_by_level(tmp_path: Path) -> None:
    files: dict[str, str] = {}
    for index, (level, kind, size, shared) in enumerate([(3, "Unified", "32M", "0-3"), (1, "Data", "48K", "0")]):
        folder = f"{host.CPUS}/cpu0/cache/index{index}"
        files |= {f"{folder}/level": str(level), f"{folder}/type": kind, f"{folder}/size": size}
        files[f"{folder}/shared_cpu_list"] = shared
    assert host.caches(put(tmp_path, files)) == (
        host.Cache(1, "Data", 48 * 1024, 1),
        host.Cache(3, "Unified", 32 * 2**20, 4),
    )


def test_governors_and_turbo(tmp_path: Path) -> None:
    put(tmp_path, {f"{host.CPUS}/cpu{n}/cpufreq/scaling_governor": "powersave\n" for n in (0, 1)})
    put(tmp_path, {f"{host.CPUS}/cpu10/cpufreq/scaling_governor": "performance\n"})
    assert host.governors(tmp_path) == ("performance", "powersave")
    assert host.turbo(tmp_path) is None
    put(tmp_path, {f"{host.CPUS}/cpufreq/boost": "1\n"})
    assert host.turbo(tmp_path) is True
    put(tmp_path, {f"{host.CPUS}/intel_pstate/no_turbo": "1\n"})
    assert host.turbo(tmp_path) is False


@pytest.mark.parametrize(
    ("flags", "vendor", "product", "said"),
    [
        ("flags : fpu hypervisor sse", "QEMU", "Standard PC", "QEMU Standard PC"),
        ("flags : fpu hypervisor sse", "", "", "unnamed hypervisor"),
        ("flags : fpu sse", "Amazon EC2", "m5.metal", None),  # bare metal of a cloud
        ("CPU part : 0xd0c", "QEMU", "KVM Virtual Machine", "QEMU KVM Virtual Machine"),
        ("CPU part : 0xd0c", "GIGABYTE", "R272", None),
    ],
)
def test_hypervisors(tmp_path: Path, flags: str, vendor: str, product: str, said: str | None) -> None:
    dmi = "sys/class/dmi/id/"
    root = put(tmp_path, {"proc/cpuinfo": flags, dmi + "sys_vendor": vendor, dmi + "product_name": product})
    assert host.hypervisor(root) == said


def test_the_tightest_quota_above_a_process_counts(tmp_path: Path) -> None:
    put(tmp_path, {"proc/self/cgroup": "0::/pod/box\n", "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n"})
    assert host.cpu_quota(tmp_path) is None
    put(tmp_path, {"sys/fs/cgroup/pod/cpu.max": "150000 100000\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"})
    assert host.cpu_quota(tmp_path) == 1.5


def test_quotas_of_the_first_version_of_control_groups(tmp_path: Path) -> None:
    put(tmp_path, {"proc/self/cgroup": "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n"})
    put(tmp_path, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"})
    assert host.cpu_quota(tmp_path) is None
    put(tmp_path, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n"})
    assert host.cpu_quota(tmp_path) == 0.5


def test_ticks_of_processes_whatever_their_name(tmp_path: Path) -> None:
    put(tmp_path, {"proc/7/stat": "7 (a) (b c) S 1 7 7 0 -1 4194560 1 0 0 0 30 12 0 0 20 0 1 0 5\n"})
    put(tmp_path, {"proc/8/stat": ""})  # ended while we looked
    assert host.process_ticks(tmp_path) == {7: ("a) (b c", 42)}


def test_steal_and_idle_of_all_cpus(tmp_path: Path) -> None:
    put(tmp_path, {"proc/stat": "cpu  100 1 20 700 50 2 3 24 9 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n"})
    assert host.cpu_times(tmp_path) == host.CpuTimes(total=900, idle=750, steal=24)


def test_idle_cores_are_what_ran_nothing_while_we_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, {"proc/stat": "cpu  100 0 0 700 0 0 0 0 0 0\n", "sys/devices/system/cpu/online": "0-3\n"})
    monkeypatch.setattr(
        "time.sleep", lambda seconds: put(tmp_path, {"proc/stat": "cpu  120 0 4 730 6 0 0 20 0 0\n"}) and None
    )
    assert host.idle_cores(0.3, tmp_path) == pytest.approx(4 * 36 / 80)
    assert host.idle_cores(0.3, tmp_path) is None  # no tick has passed


def test_idle_cores_of_a_host_that_does_not_tell(tmp_path: Path) -> None:
    assert host.idle_cores(0.0, tmp_path) is None


def test_macos() -> None:
    text = "\n".join(
        [
            "machdep.cpu.brand_string: Apple M2 Pro",
            "hw.model: Mac14,9",
            "hw.logicalcpu: 10",
            "hw.physicalcpu: 10",
            "hw.memsize: 17179869184",
            "hw.l1dcachesize: 65536",
            "hw.l2cachesize: 4194304",
            "kern.osrelease: 23.1.0",
            "kern.hv_vmm_present: 0",
            "vm.loadavg: { 1.87 2.01 2.10 }",
        ]
    )
    found = host.parse_sysctl(text)
    assert (found.cpu_model, found.board, found.cpus, found.memory_bytes) == ("Apple M2 Pro", "Mac14,9", 10, 2**34)
    assert (found.load_average, found.hypervisor, found.kernel) == (1.87, None, "23.1.0")
    assert found.caches == (host.Cache(1, "Data", 65536, 1), host.Cache(2, "Unified", 2**22, 1))
    assert host.parse_sysctl("").cpu_model == platform.machine()
