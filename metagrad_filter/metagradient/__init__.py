"""Metagradients: how much each training window's weight would lower an outer metric.

Read `adjoint.py` first: it holds the derivation and the sweep. `trajectory.py` is the inner loop,
`optimizer.py` the derivative of one optimizer update, `probe.py` scores windows that were not in
the trajectory, `checks.py` compares everything with finite differences.
"""

from metagrad_filter.metagradient.adjoint import Metagradients, metagradients
from metagrad_filter.metagradient.checks import FiniteDifferences, check_metagradients
from metagrad_filter.metagradient.probe import probe_scores

__all__ = [
    "FiniteDifferences",
    "Metagradients",
    "check_metagradients",
    "metagradients",
    "probe_scores",
]
