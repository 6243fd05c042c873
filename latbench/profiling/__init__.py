"""Profiling: from a search space to a latency table."""

from latbench.profiling.profile import Outcome, Target, duration_s, median_weight_bytes, profile, wanted

__all__ = ["Outcome", "Target", "duration_s", "median_weight_bytes", "profile", "wanted"]
