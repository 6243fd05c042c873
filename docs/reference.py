"""The reference, made while the documentation is built: a page of every package from its docstrings, and the commands.

Nothing is listed by hand: a module that is added appears, one that no page would hold fails the build.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {  # page -> what it says, and the modules or packages that it holds
    "tables": (
        "Tables and provenance",
        ["latbench.tables", "latbench.provenance", "latbench.spool", "latbench.signatures"],
    ),
    "graph": ("Graphs", ["latbench.graph"]),
    "spaces": ("Search spaces", ["latbench.spaces"]),
    "backends": ("Back-ends", ["latbench.backends"]),
    "measure": ("Measuring", ["latbench.measure"]),
    "profiling": ("Profiling", ["latbench.profiling", "latbench.verify"]),
    "oracle": ("Oracles", ["latbench.oracle"]),
    "compare": ("Comparisons", ["latbench.compare"]),
    "report": ("Reports", ["latbench.report"]),
    "importers": ("Importers", ["latbench.importers"]),
    "ground": (
        "Devices, plug-ins, errors",
        ["latbench.devices", "latbench.host", "latbench.plugins", "latbench.interpreter", "latbench.files",
         "latbench.foreign", "latbench.archives", "latbench.parquet", "latbench.seals", "latbench.errors",
         "latbench.testing"],
    ),
    "searchers": ("Searchers", ["searchers"]),
}  # fmt: skip
LEFT_OUT = ("latbench.cli",)  # told by its commands


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages. Raises PluginError where a module belongs to no page."""
    left = {name for name in modules() if not name.startswith(LEFT_OUT)} - {"latbench"}
    for page, (title, roots) in PAGES.items():
        held = [name for name in sorted(left) if any(name == root or name.startswith(f"{root}.") for root in roots)]
        left -= set(held)
        text = "\n\n".join([f"# {title}", *(f"::: {name}" for name in held)])
        files.append(File.generated(config, f"reference/{page}.md", content=text + "\n"))
    if left:
        raise PluginError(f"docs/reference.py: no page of the reference holds {', '.join(sorted(left))}")
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    return files


def modules() -> Iterator[str]:
    """Names of all modules of both packages; nothing is imported."""
    for package in ("latbench", "searchers"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def commands() -> str:
    """Every command's ``--help``."""
    import click

    from latbench.cli import COMMANDS, cli

    lines = ["# Commands", "", "`--json` on every command; durations are written `4ms`, `350us`, `2.5s`.", ""]
    for name, (place, _) in COMMANDS.items():
        module, _, attribute = place.partition(":")
        command = getattr(import_module(module), attribute)
        context = click.Context(command, info_name=f"latbench {name}", parent=None, max_content_width=100)
        lines += [f"## latbench {name}", "", "```text", command.get_help(context), "```", ""]
    return "\n".join([*lines, "```text", str(cli.epilog).replace("\b\n", "").strip(), "```", ""])
