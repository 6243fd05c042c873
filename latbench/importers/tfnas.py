"""TF-NAS's latency tables (AberHu/TF-NAS, ``latency_pkl/``): a pickle of block key -> mid channels -> ms, and "base".

Of the published 36,480 entries a device, 21,954 are blocks of the space; the rest are narrower than any operation may
be (the authors extrapolated them, some below zero) and are left out. Values are kept bit by bit: a key of the file and
a width determine a graph, and no two of them the same one (checked).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from latbench.errors import UsageError, shown
from latbench.graph.ir import Graph
from latbench.importers import plain_pickle
from latbench.importers.base import Source, block_row, to_ms
from latbench.spaces.mbconv import OPERATIONS, STAGES, SWISH, BlockSite, TFNASSpace
from latbench.tables import LatencyTable, Row

BASE = "base"
_KEY = re.compile(r"MBInvertedResBlock_\d+_\d+_\d+_\d+_k\d_s\d_(relu|swish)")
_NOTE = (
    "base was published as one sum over stem and head: it is divided between the two by their MACs, only the sum is "
    "measured; widths that are no multiple of 8 were interpolated by the authors; timed without device synchronisation"
)

# The two published files by sha256: what the repository's README says of them.
PUBLISHED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "743b2d77331a7741eb5c4ff6b3728394e2145407c05bf69f0e0f614193ed2fd3": {
            "batch": 32,
            "device": "titan_rtx",
            "device_name": "NVIDIA TITAN RTX",
            "versions": {"pytorch": "1.1", "cudnn": "7.6.0"},
        },
        "dfb5363d71a8421a81499c9191431305968fb1d2e1467a6fdd41153d6153ca23": {
            "batch": 1,
            "device": "xeon",
            "device_name": "Intel Xeon Gold 6130 @ 2.10GHz",
            "versions": {"pytorch": "1.1"},
        },
    }
)


def read(source: Source, settings: Mapping[str, Any]) -> LatencyTable:
    """A table of tfnas with ``width_step=1``. `settings`: batch (unless the file is a published one), resolution, ...

    Raises TableError where the file is not such a table, UsageError where the batch is unknown or contradicts it.
    """
    raw = _checked(source, plain_pickle.loads(source.data, str(source.path)))
    known = PUBLISHED.get(source.sha256, {})
    if known and source.device == "unknown":
        source = replace(
            source,
            device=known["device"],
            device_name=known["device_name"],
            framework="pytorch",
            versions=known["versions"],
        )
    batch = settings.get("batch", known.get("batch"))
    if batch is None:
        raise UsageError("the file does not say its batch size: add --batch N (the latencies are ms per batch)")
    if known and batch != known["batch"]:
        raise UsageError(f"{source.path} is the published table for batch {known['batch']}, not {batch}")
    space = TFNASSpace.from_settings({**settings, "batch": batch, "width_step": 1})
    frame = list(_frame_rows(source, space, raw))
    rows, n_used = _block_rows(source, space, raw)
    left_out = sum(len(curve) for key, curve in raw.items() if key != BASE) - n_used
    provenance = source.provenance(space, "tfnas", unit="ms")
    return LatencyTable.from_rows([*frame, *rows], provenance, {"import": _NOTE, "left_out": left_out})


def _checked(source: Source, raw: Any) -> Mapping[str, Any]:
    """The right containers and key texts, or TableError."""
    if not isinstance(raw, dict) or BASE not in raw:
        raise source.wrong("the pickle", 'no dict with an entry "base": not a TF-NAS latency table')
    for key, curve in raw.items():
        if key == BASE:
            continue
        if not isinstance(key, str) or _KEY.fullmatch(key) is None:
            raise source.wrong(f"key {shown(key)}", "not MBInvertedResBlock_{side}_{in}_{se}_{out}_k_s_act")
        if not isinstance(curve, dict) or any(type(width) is not int for width in curve):
            raise source.wrong(key, "no dict of mid channels")
        for width, value in curve.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
                raise source.wrong(f"{key}, {width} mid channels", f"{shown(value)} is no latency")
    return raw


def _frame_rows(source: Source, space: TFNASSpace, raw: Mapping[str, Any]) -> Iterator[Row]:
    """Stem and head: shares of "base" that add up to it exactly."""
    base = to_ms(source, raw[BASE], "ms", BASE)
    stem, head = (site for site in space.sites if not site.scope)
    stem_graph, head_graph = space.block(stem, ()), space.block(head, ())
    assert stem_graph is not None
    assert head_graph is not None
    share = stem_graph.macs / (stem_graph.macs + head_graph.macs)
    larger = base * max(share, 1 - share)
    smaller = base - larger  # exact, as larger is at least half of base (Sterbenz)
    stem_ms, head_ms = (larger, smaller) if share > 0.5 else (smaller, larger)
    yield block_row(stem_graph, space, stem, stem_ms, warnings=("share_of_base",))
    yield block_row(head_graph, space, head, head_ms, warnings=("share_of_base",))


def _block_rows(source: Source, space: TFNASSpace, raw: Mapping[str, Any]) -> tuple[list[Row], int]:
    """The searchable blocks' rows, and how many entries of the file they used."""
    rows: dict[str, Row] = {}
    origins: dict[str, tuple[str, int]] = {}
    known = {_key(site, operation) for site in space.block_sites for operation in range(len(OPERATIONS))}
    for key in raw.keys() - known - {BASE}:
        raise source.wrong(key, f"no block of {space.name} at resolution {space.resolution}")
    for site, operation, mid_channels, graph in _entries(space):
        key = _key(site, operation)
        if mid_channels not in raw.get(key, {}):
            raise source.wrong(key, f"no entry for {mid_channels} mid channels: cut off, or of another resolution")
        if graph.key in rows:
            if origins[graph.key] != (key, mid_channels):
                raise source.wrong(key, f"describes the block of {origins[graph.key]} once more")
            continue
        ms = to_ms(source, raw[key][mid_channels], "ms", f"{key}, {mid_channels} mid channels")
        rows[graph.key] = block_row(graph, space, site, ms)
        origins[graph.key] = key, mid_channels
    return list(rows.values()), len(origins)


def _entries(space: TFNASSpace) -> Iterator[tuple[BlockSite, int, int, Graph]]:
    """Every searchable (site, operation, mid channels, block)."""
    for site in space.block_sites:
        for i, operation in enumerate(OPERATIONS):
            most = operation.max_expansion * site.in_channels
            for mid_channels in range(most // 2, most + 1):
                graph = space.block(site, space.picks_of(site, i, mid_channels))
                assert graph is not None
                yield site, i, mid_channels, graph


def _key(site: BlockSite, operation: int) -> str:
    """The file's key of an operation at a site."""
    kernel, squeeze = OPERATIONS[operation].kernel_size, OPERATIONS[operation].squeeze * site.in_channels
    activation = "swish" if STAGES[site.stage].activation == SWISH else "relu"
    return (
        f"MBInvertedResBlock_{site.side}_{site.in_channels}_{squeeze}_{site.out_channels}"
        f"_k{kernel}_s{site.stride}_{activation}"
    )
