"""From what the user gives to the page's sections, with what they say of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from latbench.oracle.store import StoredModel
from latbench.report.model_section import model_section
from latbench.report.parts import Section
from latbench.report.search_section import search_section
from latbench.report.table_section import table_section
from latbench.tables import LatencyTable

Input = LatencyTable | StoredModel | Path  # a table, a fitted model, the folder of a search


def gather(given: Sequence[tuple[str, Input]]) -> list[Section]:
    """(where it was read, what it is) -> one section each, in their order.

    Models are compared with the networks of the tables beside them. Tables of other devices or conditions than the
    first one's say so. Raises UsageError where a folder holds no search.
    """
    tables = [value for _, value in given if isinstance(value, LatencyTable)]
    sections = []
    for number, (source, value) in enumerate(given, 1):
        name = f"part{number}"
        if isinstance(value, LatencyTable):
            section = table_section(value, name, source)
            section = replace(section, missing=(*section.missing, *_unlike(tables[0], value)))
        elif isinstance(value, StoredModel):
            section = model_section(value, name, source, tables)
        else:
            section = search_section(value, name)
        sections.append(section)
    return sections


def _unlike(first: LatencyTable, table: LatencyTable) -> list[str]:
    """Why a table is not to be read beside the first one."""
    conflicts = first.provenance.conflicts(table.provenance)
    if not conflicts:
        return []
    shown = "; ".join(conflicts[:6]) + (f"; and {len(conflicts) - 6} more" if len(conflicts) > 6 else "")
    return [f"A comparison with the page's first table: conditions differ ({shown}); see latbench compare --across."]
