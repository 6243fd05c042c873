"""The command line: one command a file, imported when it is called, so that ``latbench --help`` answers at once.

This is the boundary where failures become one line on stderr and an exit status; what is not foreseen is a bug and
keeps its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import signal
import sys
from importlib import import_module
from typing import Any, NoReturn

import click

from latbench import __version__
from latbench.cli import interrupts
from latbench.errors import LatbenchError

COMMANDS = {  # name -> (module:attribute, one line of help)
    "devices": ("latbench.cli.devices:command", "What this host is, and which devices and back-ends work here."),
    "doctor": ("latbench.cli.doctor:command", "What makes timings noisy here, and the command that mends each."),
    "profile": ("latbench.cli.profile:command", "Measure the blocks of a search space into a latency table."),
    "fleet": ("latbench.cli.fleet:command", "Machines that measure together: who they are, and how to join."),
    "bench": ("latbench.cli.bench:command", "Measure one network: ONNX file, torchvision:NAME or SPACE:ARCH."),
    "fit": ("latbench.cli.fit:command", "Fit a model that predicts whole networks, and say how far off it is."),
    "validate": ("latbench.cli.validate:command", "A model against measured networks that it has not seen."),
    "predict": ("latbench.cli.predict:command", "Latencies of architectures, from a model or a table."),
    "import": ("latbench.cli.import_:command", "Published latencies into a table: TF-NAS, AOWS, OFA, HELP, trtexec."),
    "search": ("latbench.cli.search:command", "The best network of a space under latency budgets: aows, tfnas, ..."),
    "train": ("latbench.cli.train:command", "Train the network that a search found from scratch."),
    "verify": ("latbench.cli.verify:command", "Measure the found network on the device: predicted, measured, target."),
    "compare": ("latbench.cli.compare:command", "What became faster or slower between two tables."),
    "report": ("latbench.cli.report:command", "One page that tells of tables, models and searches."),
    "show": (
        "latbench.cli.show:command",
        "What a table or a model holds: rows, noise, failures, provenance, validation.",
    ),
}

EPILOG = """\b
Exit status:
  0  ok
  1  usage or user error
  2  some rows failed, or a target was missed
  3  regression
  4  environment unfit: no such device or back-end here
  130  interrupted (143 terminated): what could be saved is saved
"""


class LazyGroup(click.Group):
    """Knows its commands' names and one-line helps; imports a command's module only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"Did you mean '{close[0]}'?" if close else f"There are: {', '.join(COMMANDS)}."
            raise click.UsageError(f"No such command '{args[0]}'. {hint}", ctx)
        self.running = args[0]
        return super().resolve_command(ctx, args)

    running: str | None = None  # the command's name

    def invoke(self, ctx: click.Context) -> Any:
        """An interrupt that an extension module turned into an error of its own is an interrupt."""
        try:
            interrupts.find_tempdir()
            return super().invoke(ctx)
        except Exception as error:
            number = interrupts.came()
            if number is None and (module := _cut_short(error)) is not None:
                raise LatbenchError(
                    f"{module} is cut short, as a disk that is full leaves it: remove it, and run the same command"
                ) from error
            if number is None or isinstance(error, click.exceptions.Exit):
                raise
            raise interrupts.Interrupted(number) from error

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Runs the command line and exits. A command ends with ``ctx.exit(status)``, or returns a status."""
        try:
            result = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "latbench"
            _fail(f"{error.format_message()} (see: {path} --help)", 1)
        except click.ClickException as error:
            _fail(error.format_message(), 1)
        except click.Abort as error:  # click's form of KeyboardInterrupt; the line's ^C is closed by now
            if isinstance(error.__cause__, EOFError):  # and of a terminal's end, which no command reads: a bug
                raise error.__cause__ from None
            number = getattr(error.__cause__, "number", int(signal.SIGINT))
            _fail(interrupts.message(number, self.running), 128 + number)
        except LatbenchError as error:
            _fail(str(error), error.exit_status)
        except MemoryError as error:
            _fail(_no_memory(str(error)), 1)
        except RuntimeError as error:  # the class that torch's CPU allocator has
            if "can't allocate memory" not in str(error):
                raise
            _fail(_no_memory(str(error)), 1)
        except OSError as error:
            if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = "" if error.filename is None else f"{error.filename}: "
            _fail(f"{where}{error.strerror or error}", 1)
        sys.exit(result if isinstance(result, int) else 0)


def _cut_short(error: Exception) -> str | None:
    """The compiled module (.pyc) that an import found too short: Python writes what there is room for."""
    at = error.__traceback__ if isinstance(error, EOFError) else None
    while at is not None:
        known = at.tb_frame.f_locals
        if at.tb_frame.f_code.co_filename == "<frozen importlib._bootstrap_external>" and "bytecode_path" in known:
            return str(known["bytecode_path"])
        at = at.tb_next
    return None


def _no_memory(words: str) -> str:
    told = f" ({' '.join(words.split())[:160]})" if words else ""
    return f"out of memory{told}; files are intact: free some, or ask for less, and run the same command again"


def _fail(message: str, status: int) -> NoReturn:
    with contextlib.suppress(OSError):  # where stderr takes nothing, the status still tells
        click.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(status)


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"max_content_width": 120, "help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="latbench")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Measure what networks and their blocks cost on a device, keep it in tables, and search networks under a latency
    budget."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> NoReturn:
    """Entry point of the ``latbench`` command."""
    with interrupts.heeded(lambda: cli.running):
        cli.main(prog_name="latbench")
