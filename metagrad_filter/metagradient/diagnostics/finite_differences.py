"""Finite differences: the second opinion on a metagradient, and how smooth the outer metric is.

Input is the trajectory itself, output the scores of some of its windows by the adjoint and by
retraining. Cost: `2 entries + 3` trajectories without derivatives and one sweep.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagrad_filter.errors import ConfigError
from metagrad_filter.metagradient.adjoint import metagradients
from metagrad_filter.metagradient.trajectory import run
from metagrad_filter.statistics import rank_correlation
from metagrad_filter.types import Loss, Outer, PyTree

# Two steps along a random direction: larger ones would make weights negative, which is ascent.
_SMOOTHNESS_STEP = 0.3


@dataclass(frozen=True)
class FiniteDifferences:
    """Adjoint scores against central differences of retraining.

    Attributes:
      entries: `(n, 2)` int, the (step, window) pairs that were compared.
      adjoint: `(n,)` scores of the adjoint.
      differences: `(n,)` scores by central differences.
      rank_correlation: Spearman's rho between the two.
      relative_error: L2 norm of the difference over that of `differences`.
      sign_agreement: share of pairs with the same sign.
      metasmoothness: in [-1, 1]; 1 means that the trained parameters move steadily along a random
        direction of the weights.
      epsilon: the step in weight that was taken.
    """

    entries: np.ndarray
    adjoint: np.ndarray
    differences: np.ndarray
    rank_correlation: float
    relative_error: float
    sign_agreement: float
    metasmoothness: float
    epsilon: float


def check_metagradients(
    loss: Loss,
    outer: Outer,
    params: PyTree,
    opt_state: PyTree,
    batches: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    weights: Any = None,
    entries: int | None = None,
    epsilon: float = 0.3,
    seed: int = 0,
    microbatch: int | None = None,
) -> FiniteDifferences:
    """Compares metagradients with finite differences of real retraining.

    For each of `entries` windows, spread evenly over the ranks of the scores, the trajectory is run
    twice, with that window's weight raised and lowered by `epsilon`.

    Cost: `2 entries + 3` trajectories without derivatives and one sweep.

    Args:
      loss, outer, params, opt_state, batches, optimizer, weights, microbatch: as for
        `metagradients`, with one outer metric.
      entries: windows to compare; None for 24, or all if there are fewer.
      epsilon: step in weight. Too small drowns in float32 rounding of Phi, too large in curvature.
        Metasmoothness, which moves all weights at once, takes at most 0.3.
      seed: of the choice of windows within each rank stratum and of the smoothness direction.

    Raises:
      ConfigError: `outer` is a dict, `epsilon` is not positive, or there are too few windows.

    References:
      Engstrom et al., 2025, https://arxiv.org/abs/2503.13751, section 4 (metasmoothness).
    """
    if not callable(outer):
        raise ConfigError("check_metagradients compares one outer metric; pass one of the dict.")
    if not epsilon > 0:
        raise ConfigError(f"epsilon={epsilon!r}; expected a positive step in weight.")
    result = metagradients(
        loss,
        outer,
        params,
        opt_state,
        batches,
        optimizer=optimizer,
        weights=weights,
        microbatch=microbatch,
    )
    scores = np.asarray(result.scores)
    entries = min(24, scores.size) if entries is None else entries
    if not 2 <= entries <= scores.size:
        raise ConfigError(f"entries={entries}; expected 2 to {scores.size}, the windows there are.")
    base = jnp.ones(scores.shape, scores.dtype) if weights is None else jnp.asarray(weights)
    rng = np.random.default_rng(seed)
    order = np.argsort(scores, axis=None, kind="stable")
    chosen = [rng.choice(stratum) for stratum in np.array_split(order, entries)]
    pairs = np.stack(np.unravel_index(chosen, scores.shape), axis=1)
    retrain = functools.partial(
        _retrain, params, opt_state, batches, loss=loss, optimizer=optimizer, microbatch=microbatch
    )
    phi = np.asarray(retrain(base, pairs, epsilon, outer=outer), np.float64)
    differences = -(phi[:, 0] - phi[:, 1]) / (2 * epsilon)
    adjoint = scores[pairs[:, 0], pairs[:, 1]].astype(np.float64)
    direction = jnp.asarray(rng.choice([-1.0, 1.0], scores.shape), base.dtype)
    return FiniteDifferences(
        entries=pairs,
        adjoint=adjoint,
        differences=differences,
        rank_correlation=rank_correlation(adjoint, differences),
        relative_error=float(
            np.linalg.norm(adjoint - differences) / max(np.linalg.norm(differences), 1e-300)
        ),
        sign_agreement=float(np.mean(np.sign(adjoint) == np.sign(differences))),
        metasmoothness=_metasmoothness(retrain, base, direction, min(epsilon, _SMOOTHNESS_STEP)),
        epsilon=epsilon,
    )


@functools.partial(jax.jit, static_argnames=("loss", "outer", "optimizer", "microbatch"))
def _retrain(
    params, opt_state, batches, weights, pairs, epsilon, *, loss, outer, optimizer, microbatch
):
    """Phi at `weights +- epsilon` for each pair `(n, 2)`; or, with `outer=None`, the trained
    parameters for each direction `(n, T, B)` scaled by epsilon."""

    def train(w):
        end, _, _ = run(loss, optimizer, params, opt_state, batches, w, microbatch=microbatch)
        return end if outer is None else outer(end)

    if outer is None:
        return jax.lax.map(lambda direction: train(weights + epsilon * direction), pairs)

    def both(pair):
        step, window = pair
        return jnp.stack(
            [train(weights.at[step, window].add(sign * epsilon)) for sign in (1.0, -1.0)]
        )

    return jax.lax.map(both, pairs)


def _metasmoothness(retrain, weights, direction, epsilon) -> float:
    steps = jnp.stack([0 * direction, direction, 2 * direction])
    trained = retrain(weights, steps, epsilon, outer=None)
    flat = np.concatenate(
        [np.asarray(x, np.float64).reshape(3, -1) for x in jax.tree.leaves(trained)], axis=1
    )
    first, second = flat[1] - flat[0], flat[2] - flat[1]
    return float(np.sum(np.abs(first) * np.sign(first) * np.sign(second)) / np.abs(first).sum())
