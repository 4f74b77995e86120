"""Callable checks of metagradients, from the cheapest claim to the one that matters.

    compare_with_autodiff      is the adjoint the derivative of this inner loop?
    check_metagradients        does the derivative predict a small change of one weight?
    split_half_reliability     do two independent estimates rank windows alike?
    tilt_check                 does training on more of a class do what its mean score says?
    linear_datamodeling_score  do scores predict training on random halves of the data?

A score can pass the first three and still choose badly, for they look at one trajectory; the last
two retrain and look at what selection is for.
"""

from metagrad_filter.metagradient.diagnostics.autodiff import (
    AutodiffComparison,
    compare_with_autodiff,
)
from metagrad_filter.metagradient.diagnostics.finite_differences import (
    FiniteDifferences,
    check_metagradients,
)
from metagrad_filter.metagradient.diagnostics.lds import (
    Interval,
    LinearDatamodelingScore,
    SubsetRetrainings,
    linear_datamodeling_score,
    retrain_on_subsets,
)
from metagrad_filter.metagradient.diagnostics.reliability import (
    Reliability,
    spearman_brown,
    split_half_reliability,
)
from metagrad_filter.metagradient.diagnostics.tilt import TiltCheck, tilt_check

__all__ = [
    "AutodiffComparison",
    "FiniteDifferences",
    "Interval",
    "LinearDatamodelingScore",
    "Reliability",
    "SubsetRetrainings",
    "TiltCheck",
    "check_metagradients",
    "compare_with_autodiff",
    "linear_datamodeling_score",
    "retrain_on_subsets",
    "spearman_brown",
    "split_half_reliability",
    "tilt_check",
]
