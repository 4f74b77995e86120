"""Tables of fewer bits: one scale per column, clipped where that loses least.

    quantize_columns(table (R, D) float32, weights (R,)) -> (R, D) int8, scale (D,) float32

Ridge weights have heavy tails: a scale that covers the largest weight leaves most weights in a few
of the 255 steps. Each column's scale is therefore the one, among a geometric grid of clipping
levels, with the least squared error over the table's rows as often as windows read them. Cost: one
pass over the table per grid point and column.
"""

from __future__ import annotations

import numpy as np

LARGEST = 127
_LEVELS = 0.9 ** np.arange(36)  # down to a fortieth of the largest weight


def quantize_columns(
    table: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rounds a table to int8.

    Args:
      table: `(R, D)` finite float32.
      weights: `(R,)` how often each row is read; None weighs all rows alike.

    Returns:
      `(R, D)` int8 in [-127, 127] and `(D,)` float32 scales > 0: `table ~ quantized * scale`.
    """
    quantized = np.empty(table.shape, np.int8)
    scale = np.ones(table.shape[1], np.float32)
    for d, column in enumerate(table.T):
        # Rows that no window reads, or that hold nothing, say nothing about the scale.
        used = np.flatnonzero(column if weights is None else column * (weights > 0))
        values = column[used].astype(np.float64)
        if len(values):
            shares = None if weights is None else weights[used].astype(np.float64)
            scale[d] = _scale(values, shares)
        quantized[:, d] = _round(column.astype(np.float64), scale[d])
    return quantized, scale


def _scale(values: np.ndarray, shares: np.ndarray | None) -> np.float32:
    largest = np.abs(values).max() / LARGEST
    tiny = float(np.finfo(np.float32).tiny)
    candidates = [np.float32(max(largest * level, tiny)) for level in _LEVELS]
    errors = [
        np.average((_round(values, scale) * np.float64(scale) - values) ** 2, weights=shares)
        for scale in candidates
    ]
    return candidates[int(np.argmin(errors))]


def _round(values: np.ndarray, scale: np.float32) -> np.ndarray:
    return np.clip(np.rint(values / np.float64(scale)), -LARGEST, LARGEST).astype(np.int8)
