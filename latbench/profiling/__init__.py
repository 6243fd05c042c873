"""Profiling: from a search space to a latency table."""

from latbench.profiling.profile import Outcome, Target, duration_s, profile, wanted

__all__ = ["Outcome", "Target", "duration_s", "profile", "wanted"]
