"""Latencies that others published, as tables: one module per format, each with a ``read``.

Nothing is guessed: what a file does not say (unit, batch, device) is asked for, and what does not fit is refused in one
line that names file and place. Rows carry ``origin="imported"`` (a fitted model's ``"fitted"``).
"""
