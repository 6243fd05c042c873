"""Commands run in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from latbench.cli import cli


def run(*args: object) -> Result:
    """stdout, stderr and exit status of ``latbench ARGS``; an exception that is no exit is a bug and goes on."""
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*args: object) -> str:
    """The one line that a command which ends with status 1 prints, on stderr alone."""
    result = run(*args)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr
