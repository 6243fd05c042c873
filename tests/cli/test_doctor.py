from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from latbench import host
from latbench.cli import cli, doctor
from latbench.cli.doctor import NOTHING, Busy, Finding, Window

QUIET = Window(probes_us=[6.0] * 100, busy=(), steal=0.0, timer_cost_ns=40.0, timer_step_ns=10)


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def must(finding: Finding | None) -> Finding:
    assert finding is not None
    return finding


def test_where_nothing_can_be_read_only_what_was_measured_is_said(tmp_path: Path) -> None:
    assert [f.check for f in doctor.diagnose(QUIET, tmp_path)] == ["clock", "timer"]


def test_a_warning_comes_before_what_is_in_order(tmp_path: Path) -> None:
    put(tmp_path, {f"{host.CPUS}/cpu0/cpufreq/scaling_governor": "powersave", f"{host.CPUS}/cpufreq/boost": "1"})
    found = doctor.diagnose(QUIET, tmp_path)
    assert [(f.check, f.level) for f in found[:2]] == [("governor", "warn"), ("turbo", "note")]


def test_what_needs_mending_comes_with_a_command(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            f"{host.CPUS}/online": "0-1",
            f"{host.CPUS}/cpu0/cpufreq/scaling_governor": "schedutil",
            f"{host.CPUS}/cpu0/topology/thread_siblings_list": "0-1",
            f"{host.CPUS}/cpufreq/boost": "1",
            "proc/loadavg": "2.00 1.00 0.50 3/100 7",
            "proc/self/cgroup": "0::/",
            "proc/self/status": "CapEff:\t0000000000000000\n",
            "proc/sys/kernel/sched_autogroup_enabled": "1",
            "sys/fs/cgroup/cpu.max": "150000 100000",
            "proc/meminfo": "MemAvailable: 8000 kB\nSwapTotal: 4000 kB\nSwapFree: 1000 kB\n",
            "sys/class/power_supply/BAT0/type": "Battery",
            "sys/class/power_supply/BAT0/status": "Discharging",
        },
    )
    window = Window([6.0, 9.0] * 50, [Busy(77, "firefox", 0.8)], None, 40.0, 10)
    found = {f.check: f for f in doctor.diagnose(window, tmp_path)}
    expected = {"governor", "turbo", "clock", "load", "siblings", "quota", "memory", "priority", "power"}
    assert {name for name, f in found.items() if f.mend != NOTHING} == expected
    assert "firefox (pid 77" in found["load"].what
    assert "-p 77" in found["load"].mend
    assert "1.5 CPUs" in found["quota"].what
    assert "2.93 MiB swapped out" in found["memory"].what


def test_turbo_is_switched_by_the_driver_that_has_it(tmp_path: Path) -> None:
    assert "cpufreq/boost" in must(doctor.check_turbo(put(tmp_path, {f"{host.CPUS}/cpufreq/boost": "1"}))).mend
    assert "no_turbo" in must(doctor.check_turbo(put(tmp_path, {f"{host.CPUS}/intel_pstate/no_turbo": "0"}))).mend
    assert must(doctor.check_turbo(put(tmp_path, {f"{host.CPUS}/intel_pstate/no_turbo": "1"}))).level == "ok"


@pytest.mark.parametrize(("wander", "level"), [(0.0, "ok"), (0.009, "ok"), (0.02, "note"), (0.2, "warn")])
def test_the_clocks_spread_is_that_of_the_middle_nine_tenths(tmp_path: Path, wander: float, level: str) -> None:
    probes_us = [1.0] * 50 + [1.0 + wander] * 48 + [50.0] * 2  # the last two were interrupted
    finding = doctor.check_clock(probes_us, tmp_path)
    assert finding.level == level
    assert finding.mend == NOTHING  # nothing here sets the clock


def test_load_counts_what_runs_now_as_well_as_the_last_minute(tmp_path: Path) -> None:
    put(tmp_path, {f"{host.CPUS}/online": "0-3", "proc/loadavg": "0.10 0 0 1/9 7"})
    assert must(doctor.check_load([Busy(1, "systemd", 0.01)], tmp_path)).level == "ok"
    assert must(doctor.check_load([Busy(9, "cc1plus", 2.0)], tmp_path)).level == "warn"
    put(tmp_path, {"proc/loadavg": "1.30 0 0 1/9 7"})
    waiting = must(doctor.check_load([], tmp_path))
    assert (waiting.level, waiting.mend) == ("warn", "wait")


def test_stolen_time_is_a_warning(tmp_path: Path) -> None:
    assert doctor.check_virtual(0.5, tmp_path) is None  # bare metal
    put(tmp_path, {"proc/cpuinfo": "flags : hypervisor\n", "sys/class/dmi/id/sys_vendor": "QEMU"})
    assert must(doctor.check_virtual(0.0, tmp_path)).level == "note"
    assert must(doctor.check_virtual(0.05, tmp_path)).level == "warn"
    assert "5.0% of the busy time" in must(doctor.check_virtual(0.05, tmp_path)).what


def test_the_right_to_raise_priority_is_cap_sys_nice(tmp_path: Path) -> None:
    put(tmp_path, {"proc/self/status": f"CapEff:\t{1 << 23:016x}\n"})
    assert must(doctor.check_priority(tmp_path)).level == "ok"
    put(tmp_path, {"proc/self/status": f"CapEff:\t{(1 << 41) - 1 & ~(1 << 23):016x}\n"})
    assert must(doctor.check_priority(tmp_path)).level == "note"


def test_a_mouses_battery_is_none(tmp_path: Path) -> None:
    mouse = "sys/class/power_supply/hid/"
    put(tmp_path, {mouse + "type": "Battery", mouse + "scope": "Device", mouse + "status": "Discharging"})
    assert doctor.check_power(tmp_path) is None


@pytest.mark.parametrize(("now", "level"), [(60_000, "ok"), (81_000, "warn"), (90_000, "warn")])
def test_heat_is_the_distance_to_where_the_clock_is_lowered(tmp_path: Path, now: int, level: str) -> None:
    zone = "sys/class/thermal/thermal_zone0/"
    put(tmp_path, {zone + "temp": str(now), zone + "type": "x86_pkg_temp"})
    assert doctor.check_heat(tmp_path) is None
    put(tmp_path, {zone + "trip_point_0_type": "critical", zone + "trip_point_0_temp": "100000"})
    put(tmp_path, {zone + "trip_point_1_type": "passive", zone + "trip_point_1_temp": "85000"})
    assert must(doctor.check_heat(tmp_path)).level == level


def test_a_slow_clock_is_exchanged_where_there_is_a_better_one(tmp_path: Path) -> None:
    source = "sys/devices/system/clocksource/clocksource0/"
    put(tmp_path, {source + "current_clocksource": "hpet", source + "available_clocksource": "tsc hpet acpi_pm"})
    assert doctor.check_timer(2500.0, 70, tmp_path).mend == f"echo tsc | sudo tee /{source}current_clocksource"
    put(tmp_path, {source + "available_clocksource": "hpet acpi_pm"})
    assert doctor.check_timer(2500.0, 70, tmp_path).mend == NOTHING


@pytest.mark.skipif(platform.system() != "Linux", reason="reads this machine's /proc")
def test_watching_sees_who_runs_beside_us() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as busy:
        try:
            assert busy.stdout is not None
            busy.stdout.readline()  # it spins from here on
            window = doctor.watch(0.5)
        finally:
            busy.kill()
    seen = {process.pid: process.cores for process in window.busy}
    assert seen[busy.pid] > 0.05
    assert os.getpid() not in seen
    assert min(window.probes_us) > 0
    assert window.timer_step_ns >= 1


def test_doctor_as_text_and_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "watch", partial(doctor.watch, 0.1))
    text, plain = (CliRunner().invoke(cli, ["doctor", *args]) for args in ([], ["--json"]))
    assert (text.exit_code, plain.exit_code) == (0, 0)
    findings = json.loads(plain.stdout)
    assert {"check", "level", "what", "why", "mend"} == set(findings[0])
    for finding in findings:
        assert finding["check"] in text.stdout
    assert "in order." in text.stdout
