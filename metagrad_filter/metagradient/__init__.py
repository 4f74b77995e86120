"""Metagradients: how much each training window's weight would lower an outer metric.

Read `adjoint.py` first: it holds the derivation and the sweep. `trajectory.py` is the inner loop,
`optimizer.py` the derivative of one optimizer update, `probe.py` scores windows that were not in
the trajectory, `checks.py` lists the checks: finite differences, autodiff, reliability, retraining.
"""

from metagrad_filter.metagradient.adjoint import Metagradients, metagradients
from metagrad_filter.metagradient.checks import (
    FiniteDifferences,
    LinearDatamodelingScore,
    TiltCheck,
    check_metagradients,
    linear_datamodeling_score,
    split_half_reliability,
    tilt_check,
)
from metagrad_filter.metagradient.probe import probe_scores

__all__ = [
    "FiniteDifferences",
    "LinearDatamodelingScore",
    "Metagradients",
    "TiltCheck",
    "check_metagradients",
    "linear_datamodeling_score",
    "metagradients",
    "probe_scores",
    "split_half_reliability",
    "tilt_check",
]
