"""Split-half reliability: do two independent estimates of the same scores rank windows alike?

Input is two `(N,)` estimates, for instance the probe scores of two disjoint sets of trajectories.
It costs nothing beyond them. It says how repeatable a score is, never whether it is right: short
horizons give the most reliable scores and the worst selections.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from metagrad_filter.errors import ConfigError, NonFiniteMetagradient
from metagrad_filter.statistics import rank_correlation


@dataclass(frozen=True)
class Reliability:
    """Agreement of two halves of the evidence.

    Attributes:
      half: Spearman's rho between the halves: the reliability of one half.
      whole: the Spearman-Brown estimate of the reliability of both halves taken together.
    """

    half: float
    whole: float


def split_half_reliability(first: ArrayLike, second: ArrayLike) -> Reliability:
    """Compares two independent estimates of the scores of the same windows.

    Args:
      first, second: arrays of the same shape, at least three scores each.

    Raises:
      ConfigError: the shapes differ, or there are fewer than three scores.
      NonFiniteMetagradient: a score is not finite.

    Example:
      >>> found = split_half_reliability([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 3.0, 4.0])
      >>> round(found.half, 2), round(found.whole, 2)
      (0.8, 0.89)

    References:
      Spearman, 1910, "Correlation calculated from faulty data"; Brown, 1910, "Some experimental
      results in the correlation of mental abilities".
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.size < 3:
        raise ConfigError(
            f"the halves have the shapes {first.shape} and {second.shape}; expected the same "
            "shape and at least three scores: two estimates of the same windows, in one order."
        )
    bad = int(np.sum(~np.isfinite(first)) + np.sum(~np.isfinite(second)))
    if bad:
        raise NonFiniteMetagradient(
            f"{bad} of {2 * first.size} scores are not finite; find the trajectory that they come "
            "from and lower its learning rate."
        )
    half = rank_correlation(first.ravel(), second.ravel())
    return Reliability(half, spearman_brown(half))


def spearman_brown(correlation: float, *, factor: float = 2.0) -> float:
    """Reliability of `factor` times as much evidence, from the reliability of one part.

    A correlation that is not positive is returned as it is: the formula speaks of parallel
    measurements, and parts that disagree are not such.

    Raises:
      ConfigError: `correlation` is not in [-1, 1], or `factor` is not positive.
    """
    if not -1 - 1e-9 <= correlation <= 1 + 1e-9:
        raise ConfigError(f"correlation={correlation!r}; expected a number in [-1, 1].")
    if not 0 < factor < float("inf"):
        raise ConfigError(f"factor={factor!r}; expected a positive number.")
    if correlation <= 0:
        return correlation
    return factor * correlation / (1 + (factor - 1) * correlation)
