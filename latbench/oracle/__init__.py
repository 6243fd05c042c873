"""Latency oracles: what a table knows of whole architectures: one, a million at a time, or in expectation."""
