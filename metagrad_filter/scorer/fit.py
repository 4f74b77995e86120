"""Distillation: labels -> scorer, fitted in JAX.

The start is ridge regression on hashed unigrams and bigrams (counts x inverse document frequency),
solved by conjugate gradients; its strength of regularisation is chosen by rank correlation on
labels that the fit has not seen. The embedding presets then train a bag with a small head on what
the linear solution leaves over, and keep it only where it improves that same rank correlation. A
linear model on n-grams averages the labels' noise away and can select better than its teacher; a
bag without this discipline memorises the noise. Last, the table is rounded to int8, and what that
costs is measured and stored.

Cost: seconds for tens of thousands of windows on two CPU cores; the embedding presets take several
times as long as the linear one.

Read next: `fit_series.py` (the same for time series), `scorer.py`.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.scipy.sparse.linalg import cg

from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.labels import gaussian_ranks
from metagrad_filter.scorer.features import (
    check_ids,
    check_windows,
    ngram_rows,
    present_ngrams,
)
from metagrad_filter.scorer.scorer import DTYPES, Scorer
from metagrad_filter.scorer.series import SeriesScorer
from metagrad_filter.statistics import rank_correlation


class Preset(NamedTuple):
    """A size of scorer.

    Attributes:
      bits: log2 of the number of table rows.
      width: columns of the table; 1 is the linear scorer alone.
      orders: longest n-gram.
    """

    bits: int
    width: int
    orders: int = 2


PRESETS = {
    "linear": Preset(20, 1),  # 1 MiB in int8
    "trigram": Preset(20, 1, 3),
    "embedding": Preset(18, 16),  # 4 MiB
    "small": Preset(16, 32),  # 2 MiB
    "large": Preset(20, 32),  # 32 MiB
}

_RIDGE = (1000.0, 300.0, 100.0, 30.0)  # descending: each solution starts the next
_MAX_IDF = 6.0
_HIDDEN = 32
_BAG_DOCUMENTS = 3  # windows that an n-gram must occur in to be embedded
_BAG_EPOCHS, _BAG_BATCH = 6, 256
_BAG_OPTIMIZER = optax.adamw(3e-3, weight_decay=0.1)
_BAG_MARGIN = 0.005  # rank correlation that the bag must add to be worth its cost
_MINIMUM = 50
_REFERENCE_QUANTILES, _REFERENCE_WINDOWS = 257, 4096


@overload
def fit_scorer(
    windows: np.ndarray,
    labels: np.ndarray,
    *,
    kind: Literal["text"] = "text",
    vocab_size: int | None = None,
    seed: int = 0,
    pad_id: int | None = None,
    preset: str = "linear",
    dtype: str = "int8",
    weights: np.ndarray | None = None,
    reference: np.ndarray | None = None,
) -> Scorer: ...


@overload
def fit_scorer(
    windows: np.ndarray,
    labels: np.ndarray,
    *,
    kind: Literal["series"],
    seed: int = 0,
    weights: np.ndarray | None = None,
    reference: np.ndarray | None = None,
) -> SeriesScorer: ...


def fit_scorer(
    windows: np.ndarray,
    labels: np.ndarray,
    *,
    kind: str = "text",
    vocab_size: int | None = None,
    seed: int = 0,
    pad_id: int | None = None,
    preset: str = "linear",
    dtype: str = "int8",
    weights: np.ndarray | None = None,
    reference: np.ndarray | None = None,
) -> Scorer | SeriesScorer:
    """Fits a scorer that ranks windows as their labels do.

    Labels are replaced by Gaussian ranks first, for the raw tails of metagradients ruin a
    least-squares fit. Ten per cent of the windows choose the regularisation and the form, another
    ten per cent are never fitted and give the reported rank correlation.

    Args:
      windows: `(N, T)` int32 token ids, or `(N, T, C)` float32 series; N >= 50.
      labels: `(N,)` scores, higher is better.
      kind: "text" or "series".
      vocab_size: ids lie in [0, vocab_size); the loader refuses others. Text only, like what
        follows, save `seed`, `weights` and `reference`.
      seed: of the hash, the split and the bag (series: of the split and its network).
      pad_id: id that pads windows and never counts.
      preset: "linear" (2^20 rows), "trigram" (the same with trigrams), or one that tries an
        embedding bag as well: "embedding" (2^18 rows of 16), "small" (2^16 x 32), "large"
        (2^20 x 32).
      dtype: of the table: "int8", "float16" or "float32".
      weights: `(N,)` positive, how much each label counts (an integer: as often as that); None for
        once each.
      reference: other raw windows of the stream, whose scores drift is measured against, for scores
        of fitted windows are spread wider than those of new ones; at most 4096 are used. None takes
        the windows that were held out.

    Returns:
      The scorer, with `metadata` of `rank_correlation` (held out), `form` ("linear" or
      "linear+bag"), `preset`, `ridge`, `labels`, `quantization` (the `dtype`, the rank correlation
      of the unrounded scorer, and that between both), `reference` (257 quantiles of its scores,
      levels 0 to 1, of windows that it was not fitted on) and `reference_windows` (how many).
      `fit_series` says what series scorers have.

    Raises:
      ConfigError: `kind`, `preset` or `dtype` is not available, or `vocab_size` is missing.
      WindowError: windows or labels cannot be used; says what was seen.
    """
    if kind == "series":
        from metagrad_filter.scorer.fit_series import fit_series

        return fit_series(windows, labels, seed=seed, weights=weights, reference=reference)
    if kind != "text":
        raise ConfigError(f"kind is {kind!r}, expected 'text' or 'series'.")
    if preset not in PRESETS:
        raise ConfigError(f"preset is {preset!r}, expected one of {', '.join(PRESETS)}.")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
    if vocab_size is None:
        raise ConfigError(
            "vocab_size is missing; pass the tokenizer's, the loader checks ids by it."
        )
    windows = check_windows(windows)
    check_ids(windows, vocab_size, pad_id=pad_id)
    labels = np.asarray(labels, np.float64)
    if labels.shape != (len(windows),) or not np.isfinite(labels).all():
        raise WindowError(
            f"labels have shape {labels.shape} and {int((~np.isfinite(labels)).sum())} non-finite "
            f"values; expected {len(windows)} finite numbers, one per window."
        )
    count = len(labels)
    weights = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != (count,) or not (np.isfinite(weights) & (weights > 0)).all():
        raise WindowError(
            f"weights have shape {weights.shape}; expected {count} positive finite numbers, one "
            "per label."
        )
    windows, targets, counts = merge_windows(windows, gaussian_ranks(labels, weights), weights)
    if len(windows) < _MINIMUM:
        raise WindowError(
            f"{len(windows)} distinct labelled windows; expected at least {_MINIMUM} to fit and to "
            "judge."
        )
    bits, width, orders = PRESETS[preset]
    features = _Features.of(windows, pad_id, bits, seed, orders)
    test = held_out(len(windows), seed)
    rest = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(len(windows)), test))
    choose, fit = rest[: len(test)], rest[len(test) :]

    def linear(weights: jax.Array, bias: jax.Array) -> Scorer:
        return Scorer(
            vocab_size,
            seed & 0xFFFFFFFF,
            features.table(np.asarray(weights), bits),
            orders=orders,
            pad_id=pad_id,
            bias=float(bias),
        )

    candidates = []
    solution = jnp.zeros(features.count)
    for ridge in _RIDGE:
        solution, bias = _ridge(
            features.take(fit), jnp.asarray(targets[fit]), solution, ridge, jnp.asarray(counts[fit])
        )
        predicted = _predict(features.take(choose), solution) + bias
        candidates.append((rank_correlation(predicted, targets[choose]), ridge, solution, bias))
    chosen, ridge, solution, bias = max(candidates, key=lambda c: c[0])

    bag = None
    if width > 1:
        start = linear(solution, bias)
        bag = _fit_bag(start, features, windows, targets, counts, fit, choose, chosen, width, seed)
    if bag is not None:
        scorer, form = bag, "linear+bag"
    else:
        # The choosing windows have done their work, so the linear solution may have them too.
        whole = (features.take(rest), jnp.asarray(targets[rest]), solution, ridge)
        scorer = linear(*_ridge(*whole, jnp.asarray(counts[rest])))
        form = "linear"
    exact = scorer
    scorer = exact.quantized(dtype, frequencies=features.frequencies(rest, bits))
    scores, exact_scores = scorer.score(windows[test]), exact.score(windows[test])
    metadata: dict[str, Any] = {
        "form": form,
        "preset": preset,
        "ridge": ridge,
        "labels": count,
        "rank_correlation": rank_correlation(scores, targets[test]),
        "quantization": {
            "dtype": dtype,
            "rank_correlation_float32": rank_correlation(exact_scores, targets[test]),
            "rank_correlation_with_float32": rank_correlation(scores, exact_scores),
        },
        **reference_of(scorer, windows[test] if reference is None else reference),
    }
    return replace(scorer, metadata=metadata)


def reference_of(scorer: Scorer | SeriesScorer, windows: np.ndarray) -> dict[str, Any]:
    """What later scores are compared with, by the filter's threshold and the drift monitor.

    Args:
      scorer: a fitted scorer.
      windows: `(N, ...)` that it was not fitted on; up to 4096, evenly spaced, are scored.

    Returns:
      `reference`: 257 quantiles of their scores at levels 0, 1/256, ..., 1, each a float32 value;
      `reference_windows`: how many were scored.
    """
    chosen = windows[:: -(-len(windows) // _REFERENCE_WINDOWS)]
    levels = np.linspace(0, 1, _REFERENCE_QUANTILES)
    found = np.quantile(scorer.score(chosen), levels).astype(np.float32).astype(float).tolist()
    return {"reference": found, "reference_windows": len(chosen)}


def distinct_windows(windows: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merges repeated windows, in order of first occurrence, and averages their values.

    A window labelled in two rounds must not be fitted with one label and judged with the other.
    """
    found, means, _ = merge_windows(windows, values, np.ones(len(values)))
    return found, means


def merge_windows(
    windows: np.ndarray, values: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`distinct_windows` for weighted values: distinct windows, weighted means, sums of weights."""
    rows = windows.reshape(len(windows), -1).view(np.dtype((np.void, windows[0].nbytes)))[:, 0]
    _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    counts = np.bincount(inverse, weights=weights)
    means = np.bincount(inverse, weights=weights * values) / counts
    order = np.argsort(first)
    return (
        windows[first[order]],
        means[order].astype(np.float32),
        counts[order].astype(np.float32),
    )


def held_out(count: int, seed: int) -> np.ndarray:
    """Positions among `count` distinct windows that a fit with this seed never sees."""
    return np.random.default_rng(seed).permutation(count)[: count // 10]


class _Features(NamedTuple):
    """Sparse design matrix: for each window, which columns and with what value.

    Columns are the table rows that occur at all, renumbered; `rows[c]` is column c's table row.
    """

    columns: np.ndarray  # (N, G) int32
    values: np.ndarray  # (N, G) float32: idf x length normalisation, 0 for absent n-grams
    rows: np.ndarray  # (F,) uint32
    idf: np.ndarray  # (F,) float32
    documents: np.ndarray  # (F,) int64: windows that it occurs in
    grams: int  # n-grams of a full window

    @classmethod
    def of(
        cls, windows: np.ndarray, pad_id: int | None, bits: int, seed: int, orders: int
    ) -> _Features:
        hashed = ngram_rows(windows, bits=bits, hash_seed=seed & 0xFFFFFFFF, orders=orders)
        present = present_ngrams(windows, pad_id, orders=orders)
        rows, columns = np.unique(hashed, return_inverse=True)
        columns = columns.reshape(hashed.shape).astype(np.int32)
        ordered = np.sort(np.where(present, columns, -1), axis=1)
        first = np.diff(ordered, axis=1, prepend=-1) > 0
        documents = np.bincount(ordered[first], minlength=len(rows))
        idf = np.clip(np.log(len(windows) / (1 + documents)), 0, _MAX_IDF).astype(np.float32) / 3
        # The scorer averages over present n-grams; rescaling to a full window's count keeps the
        # ridge parameter on one scale whatever the padding.
        scale = hashed.shape[1] / np.maximum(present.sum(axis=1, keepdims=True), 1)
        values = idf[columns] * present * scale.astype(np.float32)
        return cls(columns, values, rows, idf, documents, hashed.shape[1])

    @property
    def count(self) -> int:
        return len(self.rows)

    def take(self, index: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(self.columns[index]), jnp.asarray(self.values[index])

    def table(self, weights: np.ndarray, bits: int) -> np.ndarray:
        """Folds idf and the number of n-grams into `(2**bits, 1)` weights of a mean."""
        table = np.zeros((1 << bits, 1), np.float32)
        table[self.rows, 0] = weights * self.idf * self.grams
        return table

    def frequencies(self, index: np.ndarray, bits: int) -> np.ndarray:
        """Returns how often the windows `index` read each table row, `(2**bits,)` int64."""
        found = np.zeros(1 << bits, np.int64)
        # Absent n-grams have value 0, and so have those in (nearly) all windows, whose weight is 0.
        read = self.columns[index][self.values[index] != 0]
        found[self.rows] = np.bincount(read, minlength=self.count)
        return found


@jax.jit
def _predict(matrix: tuple[jax.Array, jax.Array], weights: jax.Array) -> jax.Array:
    columns, values = matrix
    return jnp.sum(values * weights[columns], axis=1)


@jax.jit
def _ridge(matrix, targets, start, ridge, counts) -> tuple[jax.Array, jax.Array]:
    """Minimises `sum counts (X w + b - y)^2 + ridge |w|^2` from `start`; b is the mean residual."""
    columns, values = matrix
    total = jnp.sum(counts)

    def mean(x):
        return jnp.sum(counts * x) / total

    def transpose(residual):
        return jnp.zeros_like(start).at[columns].add(values * (counts * residual)[:, None])

    def center(x):
        return x - mean(x)

    def normal(weights):
        return transpose(center(_predict(matrix, weights))) + ridge * weights

    weights, _ = cg(normal, transpose(center(targets)), x0=start, tol=1e-3, maxiter=80)
    return weights, mean(targets - _predict(matrix, weights))


class _Bag(nnx.Module):
    """Mean of n-gram embeddings -> hidden layer -> scalar; starts at exactly zero."""

    def __init__(self, rows: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(
            rows, width, embedding_init=nnx.initializers.normal(0.3), rngs=rngs
        )
        self.hidden = nnx.Linear(width, _HIDDEN, rngs=rngs)
        self.output = nnx.Linear(
            _HIDDEN, 1, use_bias=False, kernel_init=nnx.initializers.zeros, rngs=rngs
        )

    def __call__(self, rows: jax.Array, weight: jax.Array) -> jax.Array:
        mean = jnp.einsum("ngd,ng->nd", self.embedding(rows), weight)
        return self.output(jax.nn.relu(self.hidden(mean)))[:, 0]


def _fit_bag(
    scorer: Scorer,
    features: _Features,
    windows: np.ndarray,
    targets: np.ndarray,
    counts: np.ndarray,
    fit: np.ndarray,
    choose: np.ndarray,
    chosen: float,
    width: int,
    seed: int,
) -> Scorer | None:
    """Trains `width - 1` columns on the linear residual; returns that scorer if it ranks better.

    `scorer` must not have seen the windows of `choose`, by which `chosen` was measured. An n-gram
    that is too rare to be learned keeps a row of zeros in those columns.
    """
    residual = (targets - scorer.score(windows)).astype(np.float32)
    common = np.flatnonzero(features.documents >= _BAG_DOCUMENTS)
    if not len(common):
        return None
    position = np.full(features.count, -1)
    position[common] = np.arange(len(common))
    rows = position[features.columns].astype(np.int32)
    present = present_ngrams(windows, scorer.pad_id, orders=scorer.orders)
    weight = present / np.maximum(present.sum(axis=1, keepdims=True), 1) * (rows >= 0)
    rows, weight = np.maximum(rows, 0), weight.astype(np.float32)
    graph, state = nnx.split(_Bag(len(common), width - 1, rngs=nnx.Rngs(seed)), nnx.Param)
    params = nnx.to_pure_dict(state)
    opt_state = _BAG_OPTIMIZER.init(params)
    epoch = functools.partial(_bag_epoch, graph=graph)
    rng = np.random.default_rng(seed)
    size = min(_BAG_BATCH, len(fit))
    best: tuple[float, Scorer] | None = None
    for _ in range(_BAG_EPOCHS):
        order = rng.permutation(fit)[: len(fit) // size * size].reshape(-1, size)
        batch = (rows[order], weight[order], residual[order], counts[order])
        params, opt_state = epoch(params, opt_state, batch)
        deeper = _with_bag(scorer, features.rows[common], params)
        found = rank_correlation(deeper.score(windows[choose]), targets[choose])
        if best is not None and found < best[0]:
            break
        best = (found, deeper)
    return best[1] if best is not None and best[0] > chosen + _BAG_MARGIN else None


def _with_bag(scorer: Scorer, rows: np.ndarray, params: dict[str, Any]) -> Scorer:
    """Puts a trained bag beside the weights of a linear scorer."""
    embedding = np.asarray(params["embedding"]["embedding"])
    kernel = np.asarray(params["hidden"]["kernel"])
    table = np.zeros((len(scorer.table), 1 + embedding.shape[1]), np.float32)
    table[:, 0] = scorer.table[:, 0]
    table[rows, 1:] = embedding
    return replace(
        scorer,
        table=table,
        scale=None,
        skip=None,
        hidden_kernel=np.concatenate([np.zeros_like(kernel[:1]), kernel]),
        hidden_bias=np.asarray(params["hidden"]["bias"]),
        output_kernel=np.asarray(params["output"]["kernel"])[:, 0],
    )


@functools.partial(jax.jit, static_argnames="graph")
def _bag_epoch(params, opt_state, batches, *, graph):
    def objective(params, batch):
        rows, weight, residual, counts = batch
        return jnp.mean(counts * (nnx.merge(graph, params)(rows, weight) - residual) ** 2)

    def step(carry, batch):
        params, opt_state = carry
        updates, opt_state = _BAG_OPTIMIZER.update(
            jax.grad(objective)(params, batch), opt_state, params
        )
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, opt_state), batches)[0]
