"""Comparisons: what became faster or slower between two tables, by more than noise and many looks explain."""

from latbench.compare.tables import ACROSS, VERDICTS, Change, Comparison, Overall, compare

__all__ = ["ACROSS", "VERDICTS", "Change", "Comparison", "Overall", "compare"]
