"""Neural architecture search under latency budgets."""
