"""Measuring: plan, worker, launcher."""
