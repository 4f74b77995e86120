"""Domain match: the rival that asks "does this window look like the target?".

Logistic regression on hashed unigrams and bigrams of token ids (square-rooted counts times inverse
document frequency), target windows against pool windows: the method behind most quality filters
that production pipelines run. Input is token windows, output one log-odds per pool window; about
six seconds for 36,000 windows on two cores, nearly all of it for choosing the regularisation.

It is tuned as well as it can be, since a rival that is easy to beat proves nothing: the strength of
the regularisation is chosen by cross-validation, and each half of the pool is scored by a model
that was fitted on the other half (a window that served as a negative would be pushed down for
having been drawn). Read next: `metagrad_filter.demo.report`.

References:
  Moore and Lewis, Intelligent Selection of Language Model Training Data, 2010 (select by the
  contrast between a target and the pool); Joulin et al., Bag of Tricks for Efficient Text
  Classification, 2016 (linear models on hashed n-grams).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from metagrad_filter.errors import ConfigError, WindowError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# Buckets that bigrams are hashed into: twice the 247,000 different pairs that occur in the demo's
# stream. More cost little, since columns that stay empty are dropped before fitting.
BIGRAM_BUCKETS = 1 << 19
# Inverse strengths of the L2 penalty that are tried.
PENALTIES = (3e-4, 1e-3, 3e-3, 1e-2, 1e-1, 1.0)
_FOLDS = 4
_MIN_TARGET, _MIN_POOL = 8, 16
_MAX_IDF = 6.0


def domain_match_scores(
    target: np.ndarray, pool: np.ndarray, *, train_windows: int = 16384, seed: int
) -> np.ndarray:
    """Scores each pool window by its log-odds of being a target window rather than a pool window.

    Args:
      target: `(n, T)` integer token ids of target text. Rows that come from one document should be
        adjacent: the folds of the cross-validation are contiguous, and a document on both sides of
        a fold rewards memorising its subject.
      pool: `(N, T)` integer token ids to score, unlabelled.
      train_windows: at most so many pool windows of one half are negatives of one fit.
      seed: decides which half a window falls into and which windows are negatives.

    Returns:
      `(N,)` float32 log-odds up to one constant; higher is closer to the target.

    Raises:
      WindowError: an array is not two-dimensional integers, the lengths differ, or there are fewer
        than 8 target or 16 pool windows.
      ConfigError: `train_windows` is not positive, or scikit-learn and scipy are not installed.
    """
    _check(target, pool, train_windows)
    vocabulary = int(max(target.max(), pool.max())) + 1
    features: Any = ngram_features(np.concatenate([target, pool]), vocabulary=vocabulary)
    # An n-gram of one window alone says nothing about any other; without it L-BFGS has less to do.
    features = features[:, np.bincount(features.indices, minlength=features.shape[1]) > 1]
    positives, candidates = features[: len(target)], features[len(target) :]

    order = np.random.default_rng(seed).permutation(len(pool))
    halves = np.array_split(order, 2)
    scores = np.empty(len(pool), np.float32)
    # Sparse products run on one thread; BLAS threads for the short vectors of L-BFGS only wait for
    # each other, five times slower when the cores are shared.
    with _libraries()[3](limits=1, user_api="blas"):
        penalty = _choose_penalty(positives, candidates[halves[0][:train_windows]])
        for fit_on, scored in (halves, halves[::-1]):
            model = _fit(positives, candidates[fit_on[:train_windows]], penalty)
            scores[scored] = model.decision_function(candidates[scored])
    return scores


def ngram_features(windows: np.ndarray, *, vocabulary: int) -> csr_matrix:
    """Counts hashed unigrams and bigrams: sqrt(count) times inverse document frequency.

    Args:
      windows: `(M, T)` token ids, each in `[0, vocabulary)`.
      vocabulary: number of token ids; each has a column of its own.

    Returns:
      `(M, vocabulary + BIGRAM_BUCKETS)` float32 sparse rows.

    Raises:
      ConfigError: scipy is not installed.
    """
    sparse, *_ = _libraries()
    ids = windows.astype(np.uint32)
    columns = np.concatenate([ids, _bigram_buckets(ids) + np.uint32(vocabulary)], axis=1)
    rows, width = columns.shape
    total = vocabulary + BIGRAM_BUCKETS
    counts: Any = sparse.csr_matrix(
        (
            np.ones(rows * width, np.float32),
            columns.ravel().astype(np.int32),
            np.arange(0, rows * width + 1, width),
        ),
        shape=(rows, total),
    )
    counts.sum_duplicates()
    document_frequency = np.bincount(counts.indices, minlength=total)
    # The cap keeps n-grams that were seen once or twice from outweighing everything else.
    idf = np.minimum(np.log((1 + rows) / (1 + document_frequency)), _MAX_IDF) / 3
    counts.data = np.sqrt(counts.data) * idf.astype(np.float32)[counts.indices]
    return counts


def _bigram_buckets(ids: np.ndarray) -> np.ndarray:
    """Mixes neighbouring ids of `(M, T)` uint32 into `(M, T - 1)` buckets (murmur's finaliser)."""
    mixed = ids[:, :-1] * np.uint32(2654435761) ^ (ids[:, 1:] * np.uint32(40503) + np.uint32(97))
    mixed = (mixed ^ mixed >> 15) * np.uint32(2246822519)
    return (mixed ^ mixed >> 13) % np.uint32(BIGRAM_BUCKETS)


def _choose_penalty(positives: Any, negatives: Any) -> float:
    """Returns the penalty whose models rank held-out target windows best above pool windows.

    Ranking (area under the curve) decides rather than log loss because only the ranking is used.
    """
    roc_auc_score = _libraries()[2]
    target_folds = np.array_split(np.arange(positives.shape[0]), _FOLDS)
    pool_folds = np.array_split(np.arange(negatives.shape[0]), _FOLDS)
    areas = np.zeros(len(PENALTIES))
    for i in range(_FOLDS):
        fit_target = np.concatenate(target_folds[:i] + target_folds[i + 1 :])
        fit_pool = np.concatenate(pool_folds[:i] + pool_folds[i + 1 :])
        fit_sets = positives[fit_target], negatives[fit_pool]
        checks = positives[target_folds[i]], negatives[pool_folds[i]]
        truth = np.repeat([1, 0], [checks[0].shape[0], checks[1].shape[0]])
        for j, penalty in enumerate(PENALTIES):
            model = _fit(*fit_sets, penalty)
            odds = np.concatenate([model.decision_function(part) for part in checks])
            areas[j] += roc_auc_score(truth, odds) / _FOLDS
    # The first of equals is the strongest penalty: on easy data all rank perfectly.
    return PENALTIES[int(np.argmax(areas))]


def _fit(positives: Any, negatives: Any, penalty: float) -> Any:
    sparse, logistic_regression, *_ = _libraries()
    truth = np.repeat([1, 0], [positives.shape[0], negatives.shape[0]])
    model = logistic_regression(C=penalty, max_iter=1000)
    return model.fit(sparse.vstack([positives, negatives]).tocsr(), truth)


def _libraries() -> tuple[Any, Any, Any, Any]:
    try:
        from scipy import sparse
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ConfigError(
            f"The module {error.name!r} is not installed; domain match needs scipy and"
            " scikit-learn. Run `pip install metagrad-filter[demo]`."
        ) from error
    return sparse, LogisticRegression, roc_auc_score, threadpool_limits


def _check(target: np.ndarray, pool: np.ndarray, train_windows: int) -> None:
    for name, windows, least in (("target", target, _MIN_TARGET), ("pool", pool, _MIN_POOL)):
        if windows.ndim != 2 or not np.issubdtype(windows.dtype, np.integer):
            raise WindowError(
                f"{name} has shape {windows.shape} and dtype {windows.dtype}; expected"
                " two-dimensional integer token ids."
            )
        if len(windows) < least:
            raise WindowError(
                f"{name} has {len(windows)} windows; expected at least {least}. Pass more."
            )
        if windows.shape[1] < 2 or windows.min() < 0:
            raise WindowError(
                f"{name} has {windows.shape[1]} tokens per window and smallest id {windows.min()};"
                " expected at least 2 tokens per window and no negative id."
            )
    if target.shape[1] != pool.shape[1]:
        raise WindowError(
            f"target has {target.shape[1]} tokens per window, pool has {pool.shape[1]}; expected"
            " the same. Cut both with one length: a difference in length gives the class away."
        )
    if train_windows < _FOLDS:
        raise ConfigError(f"train_windows is {train_windows}; expected at least {_FOLDS}.")
