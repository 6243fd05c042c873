"""What people look at: pictures of tables and of validations, and the page that tells all of a session."""

from latbench.report.oracle import plot_predictions
from latbench.report.table import plot_table
from latbench.report.words import conditions, noise

__all__ = ["conditions", "noise", "plot_predictions", "plot_table"]
