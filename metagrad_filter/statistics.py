"""Small statistics that labels, fits and checks share."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rho of two `(n,)` sequences; 0 where either is constant, for it ranks nothing."""
    a, b = np.asarray(a), np.asarray(b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
