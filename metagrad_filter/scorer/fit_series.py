"""Distillation for time series: labels -> series scorer, fitted in JAX.

The start is ridge regression on the standardised statistics of each channel, in closed form; its
strength of regularisation is chosen by rank correlation on labels that the fit has not seen. A
small network is then trained on what the linear solution leaves over, and kept only where it
improves that same rank correlation: labels are noisy, and a network without this discipline
memorises the noise.

Cost: seconds for tens of thousands of windows on two CPU cores.

Read next: `kernels/scorer/series.py` (the statistics), `series.py` (the scorer).
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from metagrad_filter.errors import WindowError
from metagrad_filter.kernels.scorer import series  # pyright: ignore[reportMissingImports]
from metagrad_filter.labels import gaussian_ranks
from metagrad_filter.scorer.fit import (
    held_out,
    merge_windows,
    reference_of,
)
from metagrad_filter.scorer.series import SeriesScorer
from metagrad_filter.statistics import rank_correlation

_RIDGE = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # per window, in standardised units
_HIDDEN = 32
_EPOCHS, _PATIENCE, _BATCH = 40, 5, 256
_OPTIMIZER = optax.adamw(3e-3, weight_decay=0.1)
_MARGIN = 0.005  # rank correlation that the network must add to be worth its cost
_MINIMUM = 50


def fit_series(
    windows: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int = 0,
    weights: np.ndarray | None = None,
    reference: np.ndarray | None = None,
    deeper: bool = True,
) -> SeriesScorer:
    """Fits a scorer that ranks time series windows as their labels do.

    Labels are replaced by Gaussian ranks first, for the raw tails of metagradients ruin a
    least-squares fit. Ten per cent of the windows choose the regularisation and the depth, another
    ten per cent are never fitted and give the reported rank correlation.

    Args:
      windows: `(N, T, C)` float32, N >= 50; NaN and inf count as missing.
      labels: `(N,)` scores, higher is better.
      seed: of the split and the network.
      weights: `(N,)` positive, how much each label counts; None for once each.
      reference: other raw windows, as for `fit_scorer`.
      deeper: whether to try the network.

    Returns:
      `SeriesScorer` with `metadata` of `rank_correlation` (held out), `ridge`, `form` ("linear" or
      "linear+mlp"), `labels`, and `reference` and `reference_windows` as of `fit_scorer`.

    Raises:
      WindowError: windows or labels cannot be used; says what was seen.
    """
    windows = series.check_windows(windows)
    labels = np.asarray(labels, np.float64)
    if labels.shape != (len(windows),) or not np.isfinite(labels).all():
        raise WindowError(
            f"labels have shape {labels.shape} and {int((~np.isfinite(labels)).sum())} non-finite "
            f"values; expected {len(windows)} finite numbers, one per window."
        )
    shares = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != labels.shape or not (np.isfinite(shares) & (shares > 0)).all():
        raise WindowError(
            f"weights have shape {shares.shape}; expected {len(labels)} positive finite numbers, "
            "one per label."
        )
    if len(windows) >= _MINIMUM:
        ranks = gaussian_ranks(labels, None if weights is None else shares)
        windows, targets, counts = merge_windows(windows, ranks, shares)
    if len(windows) < _MINIMUM:
        raise WindowError(
            f"{len(windows)} distinct labelled windows; expected at least {_MINIMUM} to fit and to "
            "judge."
        )
    test = held_out(len(windows), seed)
    rest = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(len(windows)), test))
    choose, fit = rest[: len(test)], rest[len(test) :]

    found = series.statistics(windows)
    unfitted = _unfitted(found[fit])
    z = unfitted.standardized(found)
    candidates = []
    # Without weights a repeated window counts once, as it is one window of the stream.
    counts = None if weights is None else counts.astype(np.float64)
    for ridge, skip, bias in _ridge_path(z[fit], targets[fit], counts=_rows(counts, fit)):
        predicted = z[choose] @ skip + bias
        candidates.append((rank_correlation(predicted, targets[choose]), ridge, skip, bias))
    chosen, ridge, skip, bias = max(candidates, key=lambda c: c[0])
    scorer = _with_weights(unfitted, skip, bias)

    network = None
    if deeper:
        network = _fit_network(scorer, windows, z, targets, counts, fit, choose, chosen, seed)
    if network is not None:
        scorer, form = network, "linear+mlp"
    else:
        # The choosing windows have done their work, so the linear solution may have them too.
        whole = _ridge_path(z[rest], targets[rest], (ridge,), counts=_rows(counts, rest))
        ((_, skip, bias),) = whole
        scorer, form = _with_weights(unfitted, skip, bias), "linear"
    metadata = {
        "form": form,
        "ridge": ridge,
        "labels": len(labels),
        "rank_correlation": rank_correlation(scorer.score(windows[test]), targets[test]),
        **reference_of(scorer, windows[test] if reference is None else reference),
    }
    return replace(scorer, metadata=metadata)


def _unfitted(found: np.ndarray) -> SeriesScorer:
    """A scorer of zeros that standardises by the median and the 16th to 84th percentile.

    Robust, because a few broken windows would otherwise set the scale for all others.
    """
    flat = found.reshape(len(found), -1).astype(np.float64)
    low, center, high = np.quantile(flat, [0.16, 0.5, 0.84], axis=0)
    scale = (high - low) / 2
    # A statistic that is mostly one value, as the share of zero differences is, has no quantiles.
    scale = np.where(scale > 0, scale, flat.std(axis=0))
    # What differs by less than the rounding of float32 does not differ.
    scale = np.where(scale > 1e-6 * np.abs(center), scale, 1.0)
    limits = np.finfo(np.float32)
    scale = np.clip(scale, limits.tiny, limits.max).astype(np.float32)
    center = center.astype(np.float32)
    return SeriesScorer(found.shape[1], center, scale, skip=np.zeros_like(center))


def _with_weights(scorer: SeriesScorer, weights: np.ndarray, bias: float) -> SeriesScorer:
    return replace(scorer, skip=weights.astype(np.float32), bias=float(bias))


def _ridge_path(
    z: np.ndarray,
    targets: np.ndarray,
    penalties: tuple[float, ...] = _RIDGE,
    *,
    counts: np.ndarray | None = None,
) -> list[tuple[float, np.ndarray, float]]:
    """Minimises `mean (z @ w + b - y)^2 + ridge |w|^2`: one `(ridge, w, b)` a penalty.

    With `counts` the mean is weighted by them.
    """
    if counts is None:
        middle, level = z.mean(axis=0), float(targets.mean())
        x, y = z - middle, targets - level
    else:
        shares = counts / counts.sum()
        middle, level = shares @ z, float(shares @ targets)
        roots = np.sqrt(shares * len(z))
        x, y = roots[:, None] * (z - middle), roots * (targets - level)
    count, features = x.shape
    # The smaller of the two Gram matrices; one decomposition serves all penalties.
    wide = features > count
    values, basis = np.linalg.eigh((x @ x.T if wide else x.T @ x) / count)
    values = np.maximum(values, 0.0)
    rotated = basis.T @ (y if wide else x.T @ y) / count
    solutions = []
    for ridge in penalties:
        solved = basis @ (rotated / (values + ridge))
        weights = x.T @ solved if wide else solved
        solutions.append((ridge, weights, level - float(middle @ weights)))
    return solutions


def _rows(counts: np.ndarray | None, index: np.ndarray) -> np.ndarray | None:
    return None if counts is None else counts[index]


class _Network(nnx.Module):
    """Standardised statistics -> hidden layer -> scalar; starts at exactly zero."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(features, _HIDDEN, rngs=rngs)
        self.output = nnx.Linear(
            _HIDDEN, 1, use_bias=False, kernel_init=nnx.initializers.zeros, rngs=rngs
        )

    def __call__(self, z: jax.Array) -> jax.Array:
        return self.output(jax.nn.relu(self.hidden(z)))[:, 0]


def _fit_network(
    scorer: SeriesScorer,
    windows: np.ndarray,
    z: np.ndarray,
    targets: np.ndarray,
    counts: np.ndarray | None,
    fit: np.ndarray,
    choose: np.ndarray,
    chosen: float,
    seed: int,
) -> SeriesScorer | None:
    """Trains the network on the linear residual; returns the deeper scorer if it ranks better.

    `scorer` must not have seen the windows of `choose`, by which `chosen` was measured.
    """
    residual = (targets - z @ scorer.skip.astype(np.float64) - scorer.bias).astype(np.float32)
    # A statistic that never varied among the fitted windows teaches nothing, and its untrained
    # weights would add noise the day it does vary.
    varies = (np.ptp(z[fit], axis=0) > 0).astype(np.float32)
    z = z.astype(np.float32)
    shares = np.ones(len(z)) if counts is None else counts / counts[fit].mean()
    shares = shares.astype(np.float32)
    graph, state = nnx.split(_Network(z.shape[1], rngs=nnx.Rngs(seed)), nnx.Param)
    params = nnx.to_pure_dict(state)
    opt_state = _OPTIMIZER.init(params)
    epoch = functools.partial(_epoch, graph=graph)
    rng = np.random.default_rng(seed)
    size = min(_BATCH, len(fit))
    best: tuple[float, SeriesScorer] | None = None
    since = 0
    for _ in range(_EPOCHS):
        order = rng.permutation(fit)[: len(fit) // size * size].reshape(-1, size)
        params, opt_state = epoch(params, opt_state, (z[order], residual[order], shares[order]))
        deeper = replace(
            scorer,
            hidden_kernel=np.asarray(params["hidden"]["kernel"]) * varies[:, None],
            hidden_bias=np.asarray(params["hidden"]["bias"]),
            output_kernel=np.asarray(params["output"]["kernel"])[:, 0],
        )
        found = rank_correlation(deeper.score(windows[choose]), targets[choose])
        since += 1
        if best is None or found > best[0]:
            best, since = (found, deeper), 0
        if since == _PATIENCE:
            break
    return best[1] if best is not None and best[0] > chosen + _MARGIN else None


@functools.partial(jax.jit, static_argnames="graph")
def _epoch(params: Any, opt_state: Any, batches: Any, *, graph: Any) -> tuple[Any, Any]:
    def objective(params, batch):
        z, residual, shares = batch
        return jnp.mean(shares * (nnx.merge(graph, params)(z) - residual) ** 2)

    def step(carry, batch):
        params, opt_state = carry
        updates, opt_state = _OPTIMIZER.update(
            jax.grad(objective)(params, batch), opt_state, params
        )
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, opt_state), batches)[0]
