"""The linear datamodeling score (LDS): do scores predict training on random halves of the data?

A pool is halved at random many times, the model is trained on each half from the same start, and
the outer metric of each half is compared with the sum of the scores of its windows. This asks for
what selection needs and no single-weight derivative can show: that scores add up over many windows
and many steps of real training.

Cost: `subsets x seeds` retrainings of `steps` gradients, once for any number of scores.

References:
  Ilyas et al., 2022, https://arxiv.org/abs/2202.00622 (datamodels).
  Park et al., 2023, https://arxiv.org/abs/2303.14186, section 2 (TRAK; defines the LDS).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import optax
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from metagrad_filter.errors import ConfigError, NonFiniteMetagradient
from metagrad_filter.metagradient.diagnostics.reliability import spearman_brown
from metagrad_filter.metagradient.diagnostics.retraining import (
    check_positive,
    outer_after_training,
    passes_over,
    pool_size,
)
from metagrad_filter.statistics import rank_correlation
from metagrad_filter.types import Loss, Outer, PyTree

_LARGEST_SPLITS = 64  # of seeds into halves that the reliability averages over


@dataclass(frozen=True)
class Interval:
    """A statistic with its percentile bootstrap interval over subsets."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LinearDatamodelingScore:
    """Agreement of scores with retraining on half-subsets.

    Attributes:
      rho: Spearman's rho between the sums of scores and -Phi over subsets.
      low, high: bootstrap confidence interval of rho over subsets.
      reliability: of the measured -Phi: split-half over seeds, by Spearman-Brown; NaN for one seed.
      ceiling: its root, the correlation that exact expectations of -Phi would reach.
      predicted: `(S,)` sum of scores over each subset.
      measured: `(S,)` -Phi of each subset, the mean over seeds.
    """

    rho: float
    low: float
    high: float
    reliability: float
    ceiling: float
    predicted: np.ndarray
    measured: np.ndarray


@dataclass(frozen=True)
class SubsetRetrainings:
    """The outer metric after training on random halves of a pool; the truth that LDS compares with.

    Attributes:
      members: `(S, N)` bool, the windows of each subset.
      phi: `(S, K)` float64, the outer metric for each subset and seed of the order.
    """

    members: np.ndarray
    phi: np.ndarray

    def __post_init__(self):
        if self.members.ndim != 2 or self.phi.ndim != 2 or len(self.members) != len(self.phi):
            raise ConfigError(
                f"members {self.members.shape} and phi {self.phi.shape} do not belong together; "
                "expected (S, N) and (S, K)."
            )

    @property
    def measured(self) -> np.ndarray:
        """`(S,)` -Phi, the mean over seeds."""
        return -self.phi.mean(axis=1)

    @property
    def reliability(self) -> float:
        """Of `measured`, for a new draw of seeds; NaN where there is one seed."""
        seeds = self.phi.shape[1]
        if seeds < 2:
            return math.nan
        half = seeds // 2
        splits = [s for s in combinations(range(seeds), half) if 2 * half < seeds or 0 in s]
        found = []
        for chosen in splits[:_LARGEST_SPLITS]:
            inside = np.isin(np.arange(seeds), chosen)
            first, second = self.phi[:, inside].mean(axis=1), self.phi[:, ~inside].mean(axis=1)
            found.append(rank_correlation(first, second))
        return spearman_brown(float(np.mean(found)))

    def agreement(
        self, scores: ArrayLike, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> LinearDatamodelingScore:
        """LDS of `(N,)` scores, higher = worth training on.

        Args:
          scores: one for each window of the pool.
          confidence: coverage of the interval, in (0, 1).
          draws: bootstrap samples of the subsets.
          seed: of the bootstrap.

        Raises:
          ConfigError: `scores` are not one for each window, or an argument is out of its domain.
          NonFiniteMetagradient: a score is not finite.
        """
        predicted = self._sums(scores)
        rho = rank_correlation(predicted, self.measured)
        low, high = _interval(self._bootstrap(predicted, draws, seed), confidence)
        reliability = self.reliability
        return LinearDatamodelingScore(
            rho=rho,
            low=low,
            high=high,
            reliability=reliability,
            ceiling=math.nan if math.isnan(reliability) else math.sqrt(max(reliability, 0.0)),
            predicted=predicted,
            measured=self.measured,
        )

    def difference(
        self,
        scores: ArrayLike,
        others: ArrayLike,
        *,
        confidence: float = 0.95,
        draws: int = 2000,
        seed: int = 0,
    ) -> Interval:
        """LDS of `scores` minus that of `others`, with a paired bootstrap over subsets."""
        first, second = self._sums(scores), self._sums(others)
        value = rank_correlation(first, self.measured) - rank_correlation(second, self.measured)
        # The same seed draws the same subsets for both, which is what makes the difference paired.
        found = self._bootstrap(first, draws, seed) - self._bootstrap(second, draws, seed)
        return Interval(value, *_interval(found, confidence))

    def _sums(self, scores: ArrayLike) -> np.ndarray:
        scores = np.asarray(scores, np.float64)
        if scores.shape != self.members.shape[1:]:
            raise ConfigError(
                f"scores have shape {scores.shape}; expected {self.members.shape[1:]}, one for "
                "each window of the pool."
            )
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            raise NonFiniteMetagradient(
                f"{len(bad)} of {len(scores)} scores are not finite, the first for window "
                f"{bad[0]}; leave such windows out of the pool."
            )
        return self.members @ scores

    def _bootstrap(self, predicted: np.ndarray, draws: int, seed: int) -> np.ndarray:
        check_positive(draws=draws)
        count = len(predicted)
        index = np.random.default_rng(seed).integers(0, count, (draws, count))
        first = rankdata(predicted[index], axis=1)
        second = rankdata(self.measured[index], axis=1)
        first -= first.mean(axis=1, keepdims=True)
        second -= second.mean(axis=1, keepdims=True)
        spread = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
        products = (first * second).sum(axis=1)
        return np.divide(products, spread, out=np.zeros(draws), where=spread > 0)


def linear_datamodeling_score(
    loss: Loss,
    outer: Outer,
    params: PyTree,
    opt_state: PyTree,
    pool: PyTree,
    scores: ArrayLike,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    batch_windows: int,
    subsets: int = 96,
    seeds: int = 4,
    strata: ArrayLike | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    microbatch: int | None = None,
    parallel: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LinearDatamodelingScore:
    """Retrains on random half-subsets of a pool and compares with the sums of scores.

    To judge several scores by one set of retrainings, call `retrain_on_subsets` and then its
    `agreement` and `difference`.

    Args:
      scores: `(N,)`, higher = worth training on.
      confidence: coverage of the bootstrap interval.
      loss, outer, params, opt_state, pool, optimizer, steps, batch_windows, subsets, seeds, strata,
        seed, microbatch, parallel, progress: as for `retrain_on_subsets`.

    Raises:
      ConfigError: an argument is out of its domain.
      WindowError: the arrays of the pool disagree in their leading axis.
      NonFiniteMetagradient: a retraining diverged, or a score is not finite.

    References:
      Park et al., 2023, https://arxiv.org/abs/2303.14186, section 2.
    """
    count = pool_size(pool)
    if np.shape(scores) != (count,):
        # Before minutes of retraining, not after.
        raise ConfigError(
            f"scores have shape {np.shape(scores)}; expected {(count,)}, one for each window of "
            "the pool."
        )
    found = retrain_on_subsets(
        loss,
        outer,
        params,
        opt_state,
        pool,
        optimizer=optimizer,
        steps=steps,
        batch_windows=batch_windows,
        subsets=subsets,
        seeds=seeds,
        strata=strata,
        seed=seed,
        microbatch=microbatch,
        parallel=parallel,
        progress=progress,
    )
    return found.agreement(scores, confidence=confidence, seed=seed)


def retrain_on_subsets(
    loss: Loss,
    outer: Outer,
    params: PyTree,
    opt_state: PyTree,
    pool: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    batch_windows: int,
    subsets: int = 96,
    seeds: int = 4,
    strata: ArrayLike | None = None,
    seed: int = 0,
    microbatch: int | None = None,
    parallel: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SubsetRetrainings:
    """Trains on random halves of a pool, the same number of steps each.

    Args:
      loss, outer, params, opt_state, optimizer, microbatch: as for `metagradients`, with one outer
        metric.
      pool: pytree of arrays with a leading axis `N`.
      steps: optimizer steps of a retraining; a half is passed over as often as that takes.
      batch_windows: B, windows per step.
      subsets: S, random halves.
      seeds: orders in which each half is trained on.
      strata: `(N,)` labels; each subset holds half of the windows of every label, so that what is
        compared is not the mixture of labels. None for plain halves.
      seed: of subsets and orders.
      parallel: runs side by side, see `outer_after_training`.
      progress: called with retrainings done and in total.

    Raises:
      ConfigError: an argument is out of its domain.
      WindowError: the arrays of the pool disagree in their leading axis.
      NonFiniteMetagradient: a retraining diverged.
    """
    check_positive(steps=steps, batch_windows=batch_windows, seeds=seeds)
    if not isinstance(subsets, int) or subsets < 3:
        raise ConfigError(f"subsets={subsets!r}; expected an integer >= 3, a rank correlation's.")
    count = pool_size(pool)
    labels = np.zeros(count, int) if strata is None else np.asarray(strata)
    if labels.shape != (count,):
        raise ConfigError(
            f"strata have shape {labels.shape}; expected {(count,)}, a label for each window."
        )
    rng = np.random.default_rng([seed, 0])
    members = np.stack([_half(rng, labels) for _ in range(subsets)])
    wanted = steps * batch_windows
    rows = np.empty((subsets, seeds, steps, batch_windows), np.int32)
    for i in range(subsets):
        inside = np.flatnonzero(members[i])
        for k in range(seeds):
            order = np.random.default_rng([seed, 1, i, k])
            rows[i, k] = passes_over(order, inside, wanted).reshape(steps, batch_windows)
    phi = outer_after_training(
        loss,
        outer,
        params,
        opt_state,
        pool,
        rows.reshape(-1, steps, batch_windows),
        optimizer=optimizer,
        microbatch=microbatch,
        parallel=parallel,
        progress=progress,
    )
    return SubsetRetrainings(members, phi.reshape(subsets, seeds))


def _half(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """`(N,)` bool: half of the windows of every label, the odd ones at random."""
    inside = np.zeros(len(labels), bool)
    leftover = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        inside[rows[: len(rows) // 2]] = True
        leftover += list(rows[2 * (len(rows) // 2) :])
    # Odd ones are shared out so that every subset has the same size.
    inside[rng.permutation(np.asarray(leftover, int))[: len(leftover) // 2]] = True
    return inside


def _interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence={confidence!r}; expected a number in (0, 1).")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
