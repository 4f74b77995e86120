"""Class tilts: does training on more of a class do what its mean score says?

For every class the model is trained on a mixture that holds more of it and on one that holds less,
and the change of the outer metric is compared with how far the class's mean score stands above the
others'. With a handful of classes this is the cheapest check of an estimator that retrains.

Cost: `2 x classes x seeds` retrainings of `steps` gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import optax
from numpy.typing import ArrayLike

from metagrad_filter.errors import ConfigError, NonFiniteMetagradient
from metagrad_filter.metagradient.diagnostics.retraining import (
    check_positive,
    outer_after_training,
    passes_over,
    pool_size,
)
from metagrad_filter.statistics import rank_correlation
from metagrad_filter.types import Loss, Outer, PyTree


@dataclass(frozen=True)
class TiltCheck:
    """What more of each class does, against what its scores say. All arrays `(C,)`, class order.

    Attributes:
      classes: the class labels, ascending.
      shares: share of each class in the pool.
      mean_score: mean score of each class.
      predicted: mean score of the class minus that of all other windows; a tilt replaces the ones
        by the others, so this is what its effect should follow.
      effect: fall of the outer metric for each unit of share, mean over seeds; positive where
        training on more of the class helps.
      standard_error: of the effect, over paired seeds; NaN for one seed.
      rank_correlation: Spearman's rho between predicted and effect.
      sign_agreement: share of the classes in which both have the same sign.
    """

    classes: np.ndarray
    shares: np.ndarray
    mean_score: np.ndarray
    predicted: np.ndarray
    effect: np.ndarray
    standard_error: np.ndarray
    rank_correlation: float
    sign_agreement: float


def tilt_check(
    loss: Loss,
    outer: Outer,
    params: PyTree,
    opt_state: PyTree,
    pool: PyTree,
    classes: ArrayLike,
    scores: ArrayLike,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    batch_windows: int,
    tilt: float = 0.2,
    seeds: int = 3,
    seed: int = 0,
    microbatch: int | None = None,
    parallel: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TiltCheck:
    """Trains on mixtures tilted towards and away from each class.

    Args:
      loss, outer, params, opt_state, optimizer, microbatch: as for `metagradients`, with one outer
        metric.
      pool: pytree of arrays with a leading axis `N`.
      classes: `(N,)` class or cluster of each window, two or more different ones.
      scores: `(N,)`, higher = worth training on.
      steps: optimizer steps of a retraining; a class is passed over as often as its share takes.
      batch_windows: B, windows per step.
      tilt: change of a class's share, in (0, 1): .2 is twenty points. A share stays within 0 and
        1, and the others shrink or grow in proportion.
      seeds: orders of each mixture, paired between the two tilts of a class.
      seed: of the orders.
      parallel: runs side by side, see `outer_after_training`.
      progress: called with retrainings done and in total.

    Raises:
      ConfigError: an argument is out of its domain, or there is one class only.
      WindowError: the arrays of the pool disagree in their leading axis.
      NonFiniteMetagradient: a retraining diverged, or a score is not finite.
    """
    check_positive(steps=steps, batch_windows=batch_windows, seeds=seeds)
    if not 0 < tilt < 1:
        raise ConfigError(f"tilt={tilt!r}; expected a change of share in (0, 1).")
    count = pool_size(pool)
    classes, scores = np.asarray(classes), np.asarray(scores, np.float64)
    if classes.shape != (count,) or scores.shape != (count,):
        raise ConfigError(
            f"classes have shape {classes.shape} and scores {scores.shape}; expected {(count,)}, "
            "one of each for every window of the pool."
        )
    if not np.isfinite(scores).all():
        raise NonFiniteMetagradient(
            f"{np.sum(~np.isfinite(scores))} of {count} scores are not finite; leave such windows "
            "out of the pool."
        )
    names, sizes = np.unique(classes, return_counts=True)
    if len(names) < 2:
        raise ConfigError(f"the only class is {names[0]!r}; expected two or more to compare.")
    shares = sizes / count
    members = [np.flatnonzero(classes == name) for name in names]
    rows, changes = [], []
    for c in range(len(names)):
        tilted = [_tilted(shares, c, sign * tilt) for sign in (1, -1)]
        changes.append(tilted[0][c] - tilted[1][c])
        for k in range(seeds):
            for mixture in tilted:
                # One generator state for both tilts: their orders share what they can.
                rng = np.random.default_rng([seed, c, k])
                rows.append(_draw(rng, members, mixture, steps, batch_windows))
    phi = outer_after_training(
        loss,
        outer,
        params,
        opt_state,
        pool,
        np.stack(rows),
        optimizer=optimizer,
        microbatch=microbatch,
        parallel=parallel,
        progress=progress,
    ).reshape(len(names), seeds, 2)
    effects = -(phi[..., 0] - phi[..., 1]) / np.asarray(changes)[:, None]
    total = scores.sum()
    means = np.asarray([scores[m].mean() for m in members])
    others = np.asarray([(total - scores[m].sum()) / (count - len(m)) for m in members])
    effect, predicted = effects.mean(axis=1), means - others
    errors = (
        effects.std(axis=1, ddof=1) / np.sqrt(seeds) if seeds > 1 else np.full(len(names), np.nan)
    )
    return TiltCheck(
        classes=names,
        shares=shares,
        mean_score=means,
        predicted=predicted,
        effect=effect,
        standard_error=errors,
        rank_correlation=rank_correlation(predicted, effect),
        sign_agreement=float(np.mean(np.sign(predicted) == np.sign(effect))),
    )


def _tilted(shares: np.ndarray, c: int, change: float) -> np.ndarray:
    """Shares `(C,)` with that of class `c` changed and the others scaled to make room."""
    new = np.clip(shares[c] + change, 0.0, 1.0)
    mixture = shares * (1 - new) / (1 - shares[c])
    mixture[c] = new
    return mixture


def _draw(
    rng: np.random.Generator,
    members: list[np.ndarray],
    mixture: np.ndarray,
    steps: int,
    batch_windows: int,
) -> np.ndarray:
    """`(T, B)` positions in the pool with the shares of the mixture, to the nearest window."""
    wanted = steps * batch_windows
    ends = np.rint(np.cumsum(mixture) * wanted).astype(int)
    quotas = np.diff(ends, prepend=0)
    drawn = [passes_over(rng, rows, wanted)[:quota] for rows, quota in zip(members, quotas)]
    return rng.permutation(np.concatenate(drawn)).reshape(steps, batch_windows)
