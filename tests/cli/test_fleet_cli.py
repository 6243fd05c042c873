"""``latbench fleet``, and ``profile --fleet`` where there is no fleet; on real nodes: tests/measure/test_fleet.py."""

from __future__ import annotations

import builtins
import json
import socket
import subprocess
import sys
import threading
from contextlib import nullcontext
from typing import Any

import pytest
from command_line import refused, run

from latbench import __version__, devices
from latbench.cli.fleet import _address, _next_steps, nodes_in_json, ray_start
from latbench.cli.fleet_nodes import described, device_name, nodes_of, target_there
from latbench.errors import DeviceUnavailableError, EnvironmentUnfitError, UsageError
from latbench.measure import fleet
from latbench.measure.base import SamplingPlan
from latbench.measure.fleet import Fleet, NodeLostError, Place, wait_for

WORDS = {"backend": "roofline", "dtype": None, "threads": 1, "options": ()}


class Scripted(Fleet):
    """Nodes that announce these devices; a question is answered in this process, or as `wrong` says for a node."""

    def __init__(self, held: dict[str, list[str]], wrong: dict[str, Exception] | None = None, busy: str = "") -> None:
        super().__init__(None, "ray://somewhere")
        self.held, self.wrong, self.busy = held, wrong or {}, busy

    def nodes(self) -> list[Place]:
        return [Place(f"id-{name}", name, "10.0.0.1", dict.fromkeys(held, 1.0)) for name, held in self.held.items()]

    def ask_each(self, nodes: Any, function: Any, args: Any) -> list[Any]:
        found = []
        for node, own in zip(nodes, args, strict=True):
            found.append(self.wrong[node.name] if node.name in self.wrong else function(*own))
        return found

    def free(self, devices: Any) -> list[bool]:
        return [place.name != self.busy for place, _ in devices]


def test_without_ray_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    result = run("fleet", "status", "auto")
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr == "Error: a fleet needs Ray: No module named 'ray'. Run: pip install 'latbench[fleet]'\n"


@pytest.mark.parametrize(
    "address", ["nonsense", "127.0.0.1:1", "ray://127.0.0.1:1"]
)  # auto would find a fleet that somebody runs here
def test_where_nobody_answers_one_line_says_how_to_start(address: str) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'latbench[fleet]'")
    code = "import sys; from latbench.cli import main; main()"
    command = [sys.executable, "-W", "error", "-c", code, "fleet", "status", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1), done.stderr
    assert done.stderr.startswith(f"Error: no fleet at {address}: ")
    assert "latbench fleet join --head" in done.stderr


def test_a_node_is_asked_what_it_is() -> None:
    fleet = Scripted({"a": ["titanxp"], "b": ["cpu"], "c": ["titanxp", "cpu"]})
    found, dtype = nodes_of(fleet, "TITAN Xp", WORDS, SamplingPlan(), print)
    assert [node.name for node in found] == ["a", "c"]
    assert {node.target.device for node in found} == {"titanxp"}
    assert dtype == devices.profiles()["titanxp"].default_dtype
    assert found[0].target.options["peak_gflops"] == devices.profiles()["titanxp"].peak_gflops_fp32


def test_nodes_that_cannot_measure_are_left_out_and_told() -> None:
    said: list[str] = []
    fleet = Scripted({"a": ["cpu"], "b": ["cpu"]}, {"a": NodeLostError("a is lost: gone")})
    found, _ = nodes_of(fleet, "cpu", WORDS, SamplingPlan(), said.append)
    assert [node.name for node in found] == ["b"]
    assert said == ["a is left out: a is lost: gone"]
    fleet.wrong["b"] = EnvironmentUnfitError("it has another latbench")
    with pytest.raises(EnvironmentUnfitError, match=r"^b: it has another latbench$"):
        nodes_of(fleet, "cpu", WORDS, SamplingPlan(), said.append)


def test_another_latbench_is_refused() -> None:
    with pytest.raises(EnvironmentUnfitError, match=rf"it has latbench {__version__}, this machine 9.9"):
        target_there("9.9", "cpu", WORDS, SamplingPlan())


def test_a_device_that_no_node_announces_names_those_there_are() -> None:
    fleet = Scripted({"a": ["titanxp"], "b": [], "c": ["cpu", "epyc"]})
    with pytest.raises(DeviceUnavailableError, match=r"announces rtx3090: a holds titanxp; c holds cpu, epyc\."):
        fleet.holding("rtx3090")
    with pytest.raises(DeviceUnavailableError, match="none announces any device"):
        Scripted({"b": []}).holding("cpu")


def test_words_for_devices() -> None:
    fleet = Scripted({"a": ["epyc", "cpu"], "b": ["my-own-board"]})
    assert device_name(fleet, "my-own-board") == "my-own-board"  # of a profile that only its node knows
    assert device_name(fleet, "Titan XP") == "titanxp"
    assert device_name(Scripted({"a": ["epyc", "cpu"]}), "auto") == "epyc"
    assert device_name(Scripted({"a": ["cpu"]}), "auto") == "cpu"
    with pytest.raises(UsageError, match="holds epyc, my-own-board: say which"):
        device_name(fleet, "auto")
    with pytest.raises(UsageError, match="unknown device 'toaster'"):
        device_name(fleet, "toaster")


def test_status_tells_devices_states_and_problems() -> None:
    fleet = Scripted(
        {"a": ["cpu"], "b": ["cpu", "none-such"], "c": []}, {"c": NodeLostError("c is lost: gone")}, busy="b"
    )
    a, b, c = nodes_in_json(fleet)
    assert (a["latbench"], [d["state"] for d in a["devices"]]) == (__version__, ["free"])
    assert a["devices"][0]["backend"] == "onnxruntime"
    assert [(d["name"], d["state"]) for d in b["devices"]] == [("cpu", "busy"), ("none-such", "busy")]
    assert b["devices"][1]["is"] == "no profile of this name there"
    assert c["problem"] == "c is lost: gone"
    json.dumps([a, b, c])


def test_what_a_node_says_of_itself_is_plain_data() -> None:
    told = json.loads(json.dumps(described(("cpu", "titanxp"))))
    assert told["devices"]["cpu"]["present"] is True
    assert told["nice"] >= 0


def test_the_command_that_joins_is_printed_on_request() -> None:
    result = run("fleet", "join", "10.0.0.1:6379", "--device", "TITAN Xp", "--device", "cpu", "--print")
    assert result.stdout == (
        "RAY_worker_niceness=0 ray start --address=10.0.0.1:6379 --disable-usage-stats "
        '\'--resources={"latbench:titanxp": 1, "latbench:cpu": 1}\'\n'
    )
    words, _ = ray_start(None, ["cpu"])
    assert "--head" in words
    assert "latbench:cpu" in run("fleet", "join", "--head", "--print").stdout


def test_joining_nothing_or_two_fleets_is_refused() -> None:
    assert "HOST:PORT of its first machine, or --head" in refused("fleet", "join")
    assert "HOST:PORT of its first machine, or --head" in refused("fleet", "join", "10.0.0.1:6379", "--head")
    assert "unknown device" in refused("fleet", "join", "--head", "--device", "toaster", "--print")


def test_the_first_machine_is_told_how_others_join() -> None:
    assert _address("nothing of the kind") == ""
    said = _next_steps("To add another node, run\n  ray start --address='192.0.2.2:6379'\n", "epyc")
    assert "latbench fleet join 192.0.2.2:6379" in said
    assert "--fleet ray://192.0.2.2:10001 --device epyc" in said


def test_a_server_that_begins_to_listen_is_waited_for():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"ray://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(OSError, match="refused"):
            wait_for(address, 0.2)
        later = threading.Timer(0.3, server.listen)
        later.start()
        wait_for(address, 30.0)
        later.join()


class _HalfRay:
    """What of Ray fails: the first clients of a head."""

    def __init__(self, failures: int) -> None:
        self.failures, self.asked = failures, 0

    def init(self, *_: object, **__: object) -> None:
        self.asked += 1
        if self.asked <= self.failures:
            raise RuntimeError("Starting Ray client server failed. See ray_client_server_23000.err")


@pytest.mark.parametrize(("address", "failures", "asked"), [("ray://h:1", 1, 2), ("ray://h:1", 2, 2), ("auto", 1, 1)])
def test_a_head_is_asked_twice_for_a_client(
    address: str, failures: int, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet.time, "sleep", lambda _: None)
    ray = _HalfRay(failures)
    with pytest.raises(RuntimeError) if failures == asked else nullcontext():
        fleet._init(ray, address)
    assert ray.asked == asked
