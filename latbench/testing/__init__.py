"""Conformance suites, shipped so that third parties hold their plug-ins to the laws that ours keep.

Subclass in a test module, name the class ``Test...``, and pytest collects the laws::

    class TestMySpace(FactoredSpaceConformance):
        space = MySpace(resolution=64)
"""

from latbench.testing.backends import BackendConformance
from latbench.testing.oracles import FactorOracleConformance, OracleConformance
from latbench.testing.spaces import MAX_SCOPE, FactoredSpaceConformance, SpaceConformance

__all__ = [
    "MAX_SCOPE",
    "BackendConformance",
    "FactorOracleConformance",
    "FactoredSpaceConformance",
    "OracleConformance",
    "SpaceConformance",
]
