"""What latbench raises. The command line turns each into one line and its exit status; anything else is a bug and keeps
its traceback.

LatbenchError                      exit 1: usage or user error
├── GraphError                     operators that do not fit together
├── UsageError                     a value that is malformed, unknown or contradictory
├── ModelError                     a model file that cannot be read, or cannot be measured as it is
├── TableError                     a table that cannot be read or written
│   ├── SchemaMismatchError        written by another schema
│   ├── ProvenanceConflictError    tables whose conditions differ
│   ├── TableBusyError             another run is writing it
│   └── MissingEntryError          no row for this block (also a KeyError)
├── InfeasibleTargetError          a budget below the cheapest network
├── MeasurementError               a worker could not measure (turned into a row where one is being made)
└── EnvironmentUnfitError          exit 4: no such device or back-end here
    ├── BackendUnavailableError    the runtime is missing or cannot run
    └── DeviceUnavailableError     the device asked for is not in this machine
"""

from __future__ import annotations

LONGEST = 2000  # letters of a message: names and values in it may come from a foreign file, of any length


class LatbenchError(Exception):
    """Says what is wrong, where, and what to do. Its text is one printable line, whatever a file put into it."""

    exit_status = 1

    def __str__(self) -> str:
        return one_line(super().__str__(), LONGEST)


class GraphError(LatbenchError):
    """Operators that do not fit together."""


class UsageError(LatbenchError):
    """A value that is malformed, unknown or contradictory."""


class ModelError(LatbenchError):
    """A model file that cannot be read, or cannot be measured as it is."""


class TableError(LatbenchError):
    """A table that cannot be read or written."""


class SchemaMismatchError(TableError):
    """A file written by another schema, or by something else."""


class ProvenanceConflictError(TableError):
    """Tables measured under different conditions; names the fields that differ."""


class TableBusyError(TableError):
    """Another run holds the table's lock."""


class MissingEntryError(TableError, KeyError):
    """No row for a block: names its signature, the nearest entry and the command that would measure it."""

    def __str__(self) -> str:  # KeyError would print the repr
        return one_line(self.args[0], LONGEST) if self.args else ""


class InfeasibleTargetError(LatbenchError):
    """No network of the space meets the budget; names the fastest architecture. Raised before any training."""


class MeasurementError(LatbenchError):
    """A runtime refused or failed; carries the runtime's own words."""


class EnvironmentUnfitError(LatbenchError):
    """This machine lacks what was asked for."""

    exit_status = 4


class BackendUnavailableError(EnvironmentUnfitError):
    """The runtime is not installed or cannot run here; says the command that would mend it."""


class DeviceUnavailableError(EnvironmentUnfitError):
    """The device asked for is not in this machine."""


# ---- foreign text in a message --------------------------------------------------------------------------------------


def one_line(text: object, limit: int = 300) -> str:
    """At most `limit` letters, on one line; what is not printable (it could rewrite a terminal) is spelled out."""
    words = " ".join(str(text).split())
    if not words.isprintable():
        words = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words[:limit] + "…" * (len(words) > limit))
    return words if len(words) <= limit else f"{words[: limit - 3]}..."


def shown(value: object, limit: int = 80) -> str:
    """A foreign value as Python spells it, short; no more than its type where it is nested or enormous."""
    if isinstance(value, str):
        return repr(value) if len(value) <= limit else f"{value[:limit]!r}..."
    if isinstance(value, int) and abs(value) >= 10**limit:  # Python refuses to spell 4,300 digits and more
        return f"a whole number of {value.bit_length()} bits"
    plain = isinstance(value, (int, float, type(None)))
    return repr(value) if plain else f"a value of type {type(value).__name__}"
