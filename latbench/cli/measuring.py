"""Options that ``profile`` and ``bench`` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Decorated = Callable[[Any], Any]

DEVICE = click.option(
    "--device", default="auto", show_default=True, help="Profile name, `cpu`, or `auto` (latbench devices)."
)
BACKEND = click.option("--backend", help="Back-end; default: the device's.")
THREADS = click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="Of the runtime, on CPUs."
)
SETTINGS = click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Another setting of the space.")
OPTIONS = click.option(
    "--option", "options", multiple=True, metavar="NAME=VALUE", help="Another option of the back-end."
)
LOCK_CLOCKS = click.option(
    "--lock-clocks",
    type=click.IntRange(1),
    metavar="MHZ",
    help="Hold the GPU's clock there while measuring, and free it again (needs root).",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def together(*options: Decorated) -> Decorated:
    """One decorator of several, listed in this order by ``--help``."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


RUNTIME = together(THREADS, SETTINGS, OPTIONS)
