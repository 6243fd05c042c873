from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from latbench import devices, host
from latbench.errors import DeviceUnavailableError, UsageError

# What nvidia-smi and /proc/cpuinfo say, and the profile that is meant; None: another chip of a similar name.
NAMES = [
    ("gpu", "NVIDIA TITAN Xp", "titanxp"),
    ("gpu", "TITAN Xp", "titanxp"),
    ("gpu", "NVIDIA TITAN X (Pascal)", None),
    ("gpu", "NVIDIA GeForce GTX 1080 Ti", "1080ti"),
    ("gpu", "NVIDIA GeForce GTX 1080", None),
    ("gpu", "NVIDIA GeForce RTX 2080 Ti", "2080ti"),
    ("gpu", "NVIDIA TITAN RTX", "titan_rtx"),
    ("gpu", "Tesla V100-SXM2-16GB", "v100"),
    ("gpu", "Tesla V100S-PCIE-32GB", "v100"),
    ("gpu", "NVIDIA A100-SXM4-80GB", "a100"),
    ("gpu", "NVIDIA A100 80GB PCIe", "a100"),
    ("gpu", "NVIDIA A10", None),
    ("gpu", "NVIDIA H100 80GB HBM3", "h100"),
    ("gpu", "NVIDIA H200", "h200"),
    ("gpu", "NVIDIA GH200 480GB", None),
    ("gpu", "NVIDIA L4", "l4"),
    ("gpu", "NVIDIA L40S", None),
    ("gpu", "NVIDIA GeForce RTX 3090", "rtx3090"),
    ("gpu", "NVIDIA GeForce RTX 3090 Ti", None),
    ("gpu", "NVIDIA GeForce RTX 4090", "rtx4090"),
    ("gpu", "NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("gpu", "Orin (nvgpu)", "jetson_orin"),
    ("gpu", "NVIDIA Jetson AGX Orin Developer Kit", "jetson_orin"),
    ("cpu", "Raspberry Pi 4 Model B Rev 1.5", "raspi4"),
    ("cpu", "Raspberry Pi Compute Module 4 Rev 1.0", "raspi4"),
    ("cpu", "Raspberry Pi 5 Model B Rev 1.0", "raspi5"),
    ("cpu", "Apple M2 Pro", "apple_m"),
    ("cpu", "AMD EPYC 7B13", "epyc"),
    ("cpu", "Intel(R) Xeon(R) Processor @ 2.20GHz", "xeon"),
    ("cpu", "13th Gen Intel(R) Core(TM) i7-1360P", None),
]


@pytest.fixture(autouse=True)
def no_profiles_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LATBENCH_DEVICES", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def fake_smi(folder: Path, *rows: str, fields: str = "name,driver_version,compute_cap") -> str:
    """A program that answers as nvidia-smi does, and refuses a query of fields it does not know."""
    path = folder / "nvidia-smi"
    path.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"if sys.argv[1:] != ['--query-gpu={fields}', '--format=csv,noheader']:\n    sys.exit(2)\n"
        f"print({chr(10).join(rows)!r})\n"
    )
    path.chmod(0o755)
    return str(path)


def machine(*matches: devices.Selection) -> devices.Machine:
    return devices.Machine(host.read(), (), (*matches, devices.Selection(devices.resolve("cpu"), None)))


def write(folder: Path, text: str) -> Path:
    path = folder / "devices.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("kind", "said", "name"), NAMES)
def test_each_name_is_recognised_by_one_profile_at_most(kind: str, said: str, name: str | None) -> None:
    found = [p.name for p in devices.profiles().values() if p.kind == kind and any(re.search(m, said) for m in p.match)]
    assert found == ([name] if name else [])


def test_every_shipped_profile_but_the_generic_one_is_covered_above() -> None:
    assert set(devices.profiles()) == {name for _, _, name in NAMES if name} | {"cpu"}


def test_shipped_names_are_unambiguous() -> None:
    for profile in devices.profiles().values():
        for word in (profile.name, profile.title, *profile.aliases):
            assert devices.resolve(word) == profile


@pytest.mark.parametrize("name", ["titanxp", "titan-xp", "titan_xp", "TITAN Xp", "NVIDIA TITAN Xp"])
def test_case_and_punctuation_do_not_matter(name: str) -> None:
    assert devices.resolve(name).name == "titanxp"


def test_an_unknown_name_is_guessed_and_all_are_listed() -> None:
    with pytest.raises(UsageError, match=r"'titanx': did you mean titanxp\?.* auto, 1080ti, .*xeon$"):
        devices.resolve("titanx")


def test_datasheets_agree_with_cores_times_clock() -> None:
    known = devices.profiles()
    for name, cores, boost_ghz in [("titanxp", 3840, 1.582), ("1080ti", 3584, 1.582), ("2080ti", 4352, 1.545)]:
        assert known[name].peak_gflops_fp32 == pytest.approx(2 * cores * boost_ghz, rel=0.005)
    for name, cores, boost_ghz in [("titan_rtx", 4608, 1.77), ("a100", 6912, 1.41), ("h100", 16896, 1.98)]:
        assert known[name].peak_gflops_fp32 == pytest.approx(2 * cores * boost_ghz, rel=0.005)
    for name, cores, boost_ghz in [("v100", 5120, 1.53), ("rtx3090", 10496, 1.695), ("rtx4090", 16384, 2.52)]:
        assert known[name].peak_gflops_fp32 == pytest.approx(2 * cores * boost_ghz, rel=0.005)
    for name in ("titanxp", "1080ti"):  # GP102 has one fp16 unit beside 64 fp32 ones
        fp32, fp16 = known[name].peak_gflops_fp32, known[name].peak_gflops_fp16
        assert fp32 is not None
        assert fp16 == pytest.approx(fp32 / 64, rel=0.005)
        assert known[name].newest_tensorrt == "8.6"


def test_gpus_as_the_driver_lists_them(tmp_path: Path) -> None:
    smi = fake_smi(tmp_path, "NVIDIA TITAN Xp, 525.85.05, 6.1", "NVIDIA H100 80GB HBM3, 525.85.05, 9.0")
    assert devices.nvidia_gpus(smi) == (
        devices.Gpu(0, "NVIDIA TITAN Xp", "525.85.05", "6.1"),
        devices.Gpu(1, "NVIDIA H100 80GB HBM3", "525.85.05", "9.0"),
    )


def test_an_old_driver_does_not_know_the_compute_capability(tmp_path: Path) -> None:
    smi = fake_smi(tmp_path, "TITAN Xp, 470.82", fields="name,driver_version")
    assert devices.nvidia_gpus(smi) == (devices.Gpu(0, "TITAN Xp", "470.82", None),)


def test_no_driver_no_gpu(tmp_path: Path) -> None:
    assert devices.nvidia_gpus(str(tmp_path / "absent")) == ()
    assert devices.nvidia_gpus(fake_smi(tmp_path, fields="none")) == ()


def test_gpus_come_first_and_the_generic_cpu_last(tmp_path: Path) -> None:
    smi = fake_smi(tmp_path, "NVIDIA A10, 1.0, 8.6", "NVIDIA TITAN Xp, 1.0, 6.1")
    found = devices.detect(nvidia_smi=smi)
    assert (found.matches[0].profile.name, found.matches[0].index) == ("titanxp", 1)
    assert (found.matches[-1].profile.name, found.matches[-1].index) == ("cpu", None)
    assert "NVIDIA A10 + NVIDIA TITAN Xp" in found.summary


def test_boards_are_recognised_by_the_device_tree(tmp_path: Path) -> None:
    model = tmp_path / "proc/device-tree/model"
    model.parent.mkdir(parents=True)
    model.write_text("Raspberry Pi 5 Model B Rev 1.0\0")
    assert [s.profile.name for s in devices.detect(tmp_path, nvidia_smi="absent").matches] == ["raspi5", "cpu"]


def test_auto_takes_the_first_gpu_whose_back_end_works() -> None:
    cpu, gpu = devices.Selection(devices.resolve("epyc"), None), devices.Selection(devices.resolve("titanxp"), 1)
    broken = {"tensorrt": "not installed"}.get
    assert devices.select("auto", machine=machine(gpu, cpu), problem=lambda _: None) == gpu
    assert devices.select("auto", machine=machine(gpu, cpu), problem=broken) == cpu
    assert devices.select("auto", machine=machine(), problem=broken).profile.name == "cpu"


def test_the_cpu_is_everywhere() -> None:
    assert devices.select("cpu") == devices.Selection(devices.resolve("cpu"), None)
    assert devices.select("auto").profile.kind in ("cpu", "gpu")


def test_a_device_that_is_here_is_selected_even_if_its_back_end_is_broken() -> None:
    gpu = devices.Selection(devices.resolve("titanxp"), 2)
    assert devices.select("TITAN Xp", machine=machine(gpu), problem=lambda _: "broken") == gpu


def test_a_device_that_is_not_here_ends_with_three_ways_on() -> None:
    with pytest.raises(DeviceUnavailableError) as caught:
        devices.select("titanxp", machine=machine())
    text = str(caught.value)
    assert caught.value.exit_status == 4
    assert "\n" not in text
    for word in ("NVIDIA TITAN Xp", host.read().cpu_model, "--device auto", "--fleet ADDRESS", "latbench import"):
        assert word in text


def test_what_is_simulated_need_not_be_here() -> None:
    assert devices.select("titanxp", simulated=True) == devices.Selection(devices.resolve("titanxp"), None)
    assert devices.select("auto", simulated=True, machine=machine()).profile.name == "cpu"


def test_back_ends_say_why_they_do_not_work() -> None:
    assert devices.backend_problem("onnxruntime") is None
    problem = devices.backend_problem("onnxruntimes")
    assert problem is not None
    assert "onnxruntime" in problem


def test_users_add_profiles_and_override_keys(tmp_path: Path) -> None:
    text = """
        [titanxp]
        worker_python = "/opt/tensorrt-8.6/bin/python"
        aliases = ["xp"]
        [my_board]
        title = "My board"
        kind = "cpu"
        match = ['^My CPU']
        bandwidth_gbs = 12.8
    """
    shipped, known = devices.profiles(), devices.profiles(write(tmp_path, text))
    assert known["titanxp"].worker_python == "/opt/tensorrt-8.6/bin/python"
    assert known["titanxp"].peak_gflops_fp32 == shipped["titanxp"].peak_gflops_fp32
    assert devices.resolve("XP", known).name == "titanxp"
    assert known["my_board"].default_backend == "onnxruntime"
    assert list(known)[:-1] == list(shipped)


def test_users_profiles_are_found_by_variable_and_in_their_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = "[mine]\ntitle = 'Mine'\nkind = 'cpu'\nmatch = []\n"
    folder = tmp_path / "home/.config/latbench"
    folder.mkdir(parents=True)
    write(folder, added)
    assert "mine" in devices.profiles()
    monkeypatch.setenv("LATBENCH_DEVICES", str(write(tmp_path, added.replace("mine", "other"))))
    assert "other" in devices.profiles()
    assert "mine" not in devices.profiles()
    monkeypatch.setenv("LATBENCH_DEVICES", str(tmp_path / "absent.toml"))
    with pytest.raises(UsageError, match=r"absent\.toml: cannot be read"):
        devices.profiles()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[titanxp\n", r"Expected"),
        ("title = 'x'\n", r"title = \.\.\. stands outside a profile"),
        (
            "[titanxp]\npeak_gflop_fp32 = 1\n",
            r"\[titanxp\] peak_gflop_fp32: unknown key; did you mean peak_gflops_fp32",
        ),
        ("[titanxp]\nbandwidth_gbs = 'fast'\n", r"\[titanxp\] bandwidth_gbs = 'fast': must be a number above zero"),
        ("[titanxp]\nmemory_gb = true\n", r"must be a number"),
        ("[titanxp]\nmemory_gb = nan\n", r"must be a number"),
        ("[titanxp]\nkind = 'tpu'\n", r"\[titanxp\] kind = 'tpu': must be gpu or cpu"),
        ("[titanxp]\nmatch = ['(']\n", r"\[titanxp\] match = .*no regular expression"),
        ("[titanxp]\naliases = 'xp'\n", r"must be a list of strings"),
        ("[titanxp]\ntitle = 3\n", r"must be a string"),
        ("[titanxp]\naliases = ['h-100']\n", r"\[titanxp\]: 'h100' is a name of h100 already"),
        ("[new]\nkind = 'cpu'\n", r"\[new\] has no title"),
        ("[auto]\nkind = 'cpu'\n", r"\[auto\]: a profile cannot have this name"),
    ],
)
def test_a_malformed_file_is_one_line_with_path_and_key(tmp_path: Path, text: str, complaint: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError, match=complaint) as caught:
        devices.profiles(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
