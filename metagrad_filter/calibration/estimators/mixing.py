"""RHO-loss's ranks mixed into the labels, and what that adds.

RHO-loss sees what one forward pass each of two models sees, a metagradient what training does; on
real text the mean of both ranks selects better than either. Whether it does here is measured: two
scorers are fitted on the windows of the round, to labels without RHO-loss and to mixed ones, and
compared on windows that neither was fitted on.

Cost: that of `rho_loss.py`, and two fits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from metagrad_filter.labels import gaussian_ranks, split_half_reliability
from metagrad_filter.scorer.fit import distinct_windows, fit_scorer, held_out
from metagrad_filter.statistics import rank_correlation


@dataclass(frozen=True)
class RhoShare:
    """What RHO-loss did to the labels of a round. Correlations are Spearman's.

    Attributes:
      weight: of its ranks in the labels.
      label_correlation: of the estimator's own labels with RHO-loss.
      mixed_correlation: of the estimator's own labels with the mixed ones.
      reliability_without: split-half correlation of the estimator's own labels.
      rank_correlation_without: held out, of a scorer fitted to the estimator's own labels with
        those labels.
      rank_correlation_with: held out, of a scorer fitted to mixed labels with mixed labels.
      own_rank_correlation_with: held out, of that scorer with the estimator's own labels: above
        `rank_correlation_without` where mixing helps the scorer to what it is meant to learn.
      gradients: what RHO-loss cost, in window gradients.
      seconds: the same with the two fits, in wall time.
    """

    weight: float
    label_correlation: float
    mixed_correlation: float
    reliability_without: float
    rank_correlation_without: float
    rank_correlation_with: float
    own_rank_correlation_with: float
    gradients: float = 0.0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def mixed_halves(own: np.ndarray, reducible: np.ndarray, weight: float) -> np.ndarray:
    """`(2, N)` float32: weighted means of the Gaussian ranks of two `(2, N)` scores, by halves."""
    ranks = [
        (1 - weight) * gaussian_ranks(a) + weight * gaussian_ranks(b)
        for a, b in zip(own, reducible)
    ]
    return np.stack(ranks).astype(np.float32)


def what_rho_adds(
    windows: np.ndarray,
    own: np.ndarray,
    reducible: np.ndarray,
    weight: float,
    options: dict[str, Any],
) -> RhoShare:
    """Fits scorers to labels without and with RHO-loss.

    Args:
      windows: `(N, T)` int32 or `(N, T, C)` float32.
      own: `(2, N)` scores of the estimator.
      reducible: `(2, N)` RHO-loss.
      weight: of its ranks.
      options: keyword arguments of `fit_scorer`: the kind, the seed and what goes with them.
    """
    mixed = mixed_halves(own, reducible, weight).sum(axis=0)
    without = gaussian_ranks(own.astype(np.float64).sum(axis=0))
    first, second = (fit_scorer(windows, labels, **options) for labels in (without, mixed))
    distinct, labels = distinct_windows(windows, without)
    unseen = held_out(len(distinct), options["seed"])
    return RhoShare(
        weight=weight,
        label_correlation=rank_correlation(without, reducible.sum(axis=0)),
        mixed_correlation=rank_correlation(without, mixed),
        reliability_without=split_half_reliability(own),
        rank_correlation_without=first.metadata["rank_correlation"],
        rank_correlation_with=second.metadata["rank_correlation"],
        own_rank_correlation_with=rank_correlation(second.score(distinct[unseen]), labels[unseen]),
    )
