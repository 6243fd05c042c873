"""Latency tables: rows by graph key with the provenance they share, kept in one parquet file."""

from latbench.provenance import Provenance
from latbench.tables.rows import Row
from latbench.tables.stored import SCHEMA_VERSION
from latbench.tables.table import LatencyTable

__all__ = ["SCHEMA_VERSION", "LatencyTable", "Provenance", "Row"]
