"""Clusters of windows where nobody has named classes: k-means on hashed n-grams.

Input is `(N, T)` windows, output the cluster of each. Counts of hashed uni- and bigrams, as roots,
are centred and reduced to their largest principal components, on which Lloyd's algorithm starts
from seeded far points. Series are described by mean, spread and mean change of each channel. Good
enough to tilt a mixture by; nothing is fitted on it.

Cost: a singular value decomposition of `(N, 1024)` floats, a second for thousands of windows.

References:
  Arthur and Vassilvitskii, 2007, "k-means++: the advantages of careful seeding".
"""

from __future__ import annotations

import numpy as np

from metagrad_filter.errors import ConfigError
from metagrad_filter.scorer.features import ngram_rows

_BITS, _COMPONENTS, _ITERATIONS = 10, 16, 50


def clusters_of(windows: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """`(N,)` int cluster of each window, ascending by size: 0 is the largest.

    Args:
      windows: `(N, T)` int32 or `(N, T, C)` float32.
      count: clusters; fewer come back where points coincide.
      seed: of the hash and the start.

    Raises:
      ConfigError: `count` is below 2 or above N.
    """
    if not isinstance(count, int) or not 2 <= count <= len(windows):
        raise ConfigError(f"clusters={count!r}; expected an integer from 2 to {len(windows)}.")
    points = _described(windows) if windows.ndim > 2 else _projected(windows, seed)
    return _by_size(_k_means(points, count, np.random.default_rng(seed)))


def _projected(windows: np.ndarray, seed: int) -> np.ndarray:
    rows = ngram_rows(windows, bits=_BITS, hash_seed=seed)
    counts = np.zeros((len(windows), 1 << _BITS), np.float32)
    np.add.at(counts, (np.arange(len(windows))[:, None], rows), 1.0)
    roots = np.sqrt(counts)
    left, values, _ = np.linalg.svd(roots - roots.mean(axis=0), full_matrices=False)
    return left[:, :_COMPONENTS] * values[:_COMPONENTS]


def _described(windows: np.ndarray) -> np.ndarray:
    found = np.nan_to_num(windows.astype(np.float64))
    change = np.abs(np.diff(found, axis=1)).mean(axis=1)
    points = np.concatenate([found.mean(axis=1), found.std(axis=1), change], axis=1)
    spread = points.std(axis=0)
    return (points - points.mean(axis=0)) / np.where(spread > 0, spread, 1)


def _k_means(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`(N,)` nearest centre of each point."""
    centres = points[rng.integers(len(points))][None]
    noise = 1e-6 * np.square(points).sum(axis=1).mean()  # rounding tells copies apart, too
    while len(centres) < count:
        distance = _squared(points, centres).min(axis=1)
        distance[distance <= noise] = 0
        if not distance.any():
            break
        centres = np.vstack([centres, points[rng.choice(len(points), p=distance / distance.sum())]])
    nearest = _squared(points, centres).argmin(axis=1)
    for _ in range(_ITERATIONS):
        for c in np.unique(nearest):  # a centre that lost all its points stays where it is
            centres[c] = points[nearest == c].mean(axis=0)
        moved = _squared(points, centres).argmin(axis=1)
        if np.array_equal(moved, nearest):
            break
        nearest = moved
    return nearest


def _squared(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """`(N, C)` squared distances."""
    return np.stack([np.square(points - centre).sum(axis=1) for centre in centres], axis=1)


def _by_size(labels: np.ndarray) -> np.ndarray:
    _, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.empty(len(sizes), int)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return rank[inverse]
