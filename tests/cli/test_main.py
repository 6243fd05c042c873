from __future__ import annotations

import py_compile
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from latbench import __version__, cli

HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "numpy", "pandas", "pyarrow", "scipy", "rich", "matplotlib")

FAILING = """
import errno
import click
from latbench.errors import DeviceUnavailableError, MissingEntryError, TableError

@click.command("fail")
@click.argument("how")
@click.option("--size", type=int)
@click.pass_context
def command(ctx, how, size):
    if how == "open":
        open("/no/such/file")
    if how == "exit":
        ctx.exit(2)
    if how == "return":
        return 3
    raise {
        "table": TableError("a table\\n  on two lines"),
        "key": MissingEntryError("no entry for this"),
        "device": DeviceUnavailableError("no such device"),
        "full": OSError(errno.ENOSPC, "No space left on device"),
        "denied": PermissionError(errno.EACCES, "Permission denied", "t.parquet"),
        "os": OSError(errno.EINVAL, "Invalid argument"),
        "interrupt": KeyboardInterrupt(),
        "bug": ZeroDivisionError("a bug"),
        "eof": EOFError("Ran out of input"),
    }[how]
"""


@pytest.fixture
def fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A command that fails as told."""
    (tmp_path / "failing_command.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "failing_command", raising=False)
    monkeypatch.setitem(cli.COMMANDS, "fail", ("failing_command:command", "Fails."))
    return "fail"


def run(*args: str) -> Result:
    return CliRunner().invoke(cli.cli, args)


@pytest.mark.parametrize(
    ("how", "status", "line"),
    [
        ("table", 1, "Error: a table on two lines"),
        ("key", 1, "Error: no entry for this"),
        ("device", 4, "Error: no such device"),
        ("open", 1, "Error: /no/such/file: No such file or directory"),
        ("denied", 1, "Error: t.parquet: Permission denied"),
        ("full", 1, "Error: No space left on device"),
        ("interrupt", 130, "Error: interrupted; the same command starts again"),
    ],
)
def test_what_is_foreseen_is_one_line_and_a_status(fail: str, how: str, status: int, line: str) -> None:
    result = run(fail, how)
    assert (result.exit_code, result.stderr.strip(), result.stdout) == (status, line, "")


@pytest.mark.parametrize(("how", "error"), [("bug", ZeroDivisionError), ("os", OSError), ("eof", EOFError)])
def test_a_bug_keeps_its_traceback(fail: str, how: str, error: type[Exception]) -> None:
    assert isinstance(run(fail, how).exception, error)


def test_a_compiled_module_that_a_full_disk_cut_short_is_named(fail: str, tmp_path: Path) -> None:
    """Python up to 3.12.7 leaves them; click would call it an interrupt."""
    compiled = Path(py_compile.compile(str(tmp_path / "failing_command.py"), doraise=True))
    compiled.write_bytes(compiled.read_bytes()[:100])
    result = run(fail, "exit")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: {compiled} is cut short")
    compiled.unlink()
    assert run(fail, "exit").exit_code == 2


@pytest.mark.parametrize(("how", "status"), [("exit", 2), ("return", 3)])
def test_a_command_ends_with_its_own_status(fail: str, how: str, status: int) -> None:
    assert run(fail, how).exit_code == status


@pytest.mark.parametrize(
    "args", [["--foo"], ["fail"], ["fail", "exit", "--size", "x"], ["fail", "exit", "--foo"], ["nothing"]]
)
def test_usage_errors_are_one_line_and_exit_1(fail: str, args: list[str]) -> None:
    result = run(*args)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "--help" in result.stderr


def test_a_mistyped_command_is_guessed() -> None:
    assert "No such command 'profle'. Did you mean 'profile'?" in run("profle").stderr


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"latbench, version {__version__}\n")


def test_help_lists_every_command_and_every_exit_status() -> None:
    for args in (["--help"], ["-h"], []):
        result = run(*args)
        assert result.exit_code == 0
        for name, (_, line) in cli.COMMANDS.items():
            assert f"  {name} " in result.stdout
            assert line.split()[0] in result.stdout
        for status in "01234":
            assert f"\n    {status}  " in result.stdout


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["profle"], ["devices", "--help"], ["doctor", "--help"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = f"""
import sys
from latbench.cli import cli
try:
    cli.main({args!r})
except SystemExit:
    pass
print(sorted(set(sys.modules) & set({HEAVY!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["devices", "doctor"])
def test_the_short_help_and_the_command_agree_on_their_name(name: str) -> None:
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None
    assert command.name == name


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    code = "from latbench.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "devices", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
