"""The text scorer in numpy: the definition that the native code equals bit for bit.

    row g of a window's n-grams -> table (2**bits, D) int8 | float16 | float32
    mean[d] = sum_g table[row_g, d] * scale[d] / number of present n-grams
    score   = bias + sum_d skip[d] mean[d]
              [ + sum_h relu(hidden_bias[h] + sum_d mean[d] hidden_kernel[d, h]) output_kernel[h] ]

Every sum has one order, which `ngram_core.h` spells out, and nothing goes through BLAS: a product
there rounds differently for different batch sizes, and then a block would be ranked differently by
different worker counts.

Cost: about 5 ns a token for D = 1; for wide tables a tenth of the native speed or less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metagrad_filter.scorer import features

_WEIGHT_PARTIALS, _ROW_PARTIALS, _HEAD_PARTIALS = 16, 2, 8

# Bounds the temporaries of a chunk to a few megabytes whatever the batch.
_CHUNK_VALUES = 1 << 18


@dataclass(frozen=True, eq=False)
class NgramModel:
    """The numbers of a text scorer, validated by their owner.

    Attributes:
      vocab_size: ids lie in `[0, vocab_size)`.
      hash_seed: uint32.
      orders: 1, 2 or 3.
      table: `(2**bits, D)` int8, float16 or float32.
      scale: `(D,)` float32.
      skip: `(D,)` float32.
      hidden_kernel: `(D, H)` float32, or None without hidden part.
      hidden_bias: `(H,)` float32, or None.
      output_kernel: `(H,)` float32, or None.
      bias: added to every score.
    """

    vocab_size: int
    hash_seed: int
    orders: int
    table: np.ndarray
    scale: np.ndarray
    skip: np.ndarray
    hidden_kernel: np.ndarray | None
    hidden_bias: np.ndarray | None
    output_kernel: np.ndarray | None
    bias: float

    @property
    def bits(self) -> int:
        return self.table.shape[0].bit_length() - 1


def score(model: NgramModel, windows: np.ndarray, *, pad_id: int | None = None) -> np.ndarray:
    """Scores windows whose ids are checked.

    An n-gram that holds `pad_id` is absent; a window without a present n-gram scores `bias`.

    Args:
      model: the scorer's numbers.
      windows: `(N, T)` int32.
      pad_id: the padding id, or None when every id counts.

    Returns:
      `(N,)` float32.
    """
    count, length = windows.shape
    width = model.table.shape[1]
    out = np.empty(count, np.float32)
    grams = features.count_ngrams(length, model.orders)
    step = max(1, _CHUNK_VALUES // (grams + width))
    # Overflow to infinity is an answer: the filter ranks such a window last and counts it.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, count, step):
            chunk = windows[start : start + step]
            out[start : start + step] = _head(model, _mean(model, chunk, pad_id))
    return out


def _mean(model: NgramModel, windows: np.ndarray, pad_id: int | None) -> np.ndarray:
    """Mean table row of the present n-grams, `(D, N)` float64."""
    columns = features.ngram_columns(
        windows, bits=model.bits, hash_seed=model.hash_seed, orders=model.orders
    )
    absent, present = None, np.full(len(windows), len(columns))
    if pad_id is not None:
        found = features.present_ngrams(windows, pad_id, orders=model.orders)
        absent, present = ~found.T, found.sum(axis=1)
    if model.table.shape[1] == 1:
        sums = _sum_weights(model.table[:, 0], columns, absent)[None]
    else:
        sums = _sum_rows(model.table, columns, absent)
    return sums.astype(np.float64) * model.scale[:, None] / np.maximum(present, 1)


def _sum_weights(weights: np.ndarray, columns: np.ndarray, absent: np.ndarray | None) -> np.ndarray:
    """`(N,)` int32 of int8 weights, else float32."""
    values = weights.take(columns)
    if absent is not None:
        values[absent] = 0
    if weights.dtype == np.int8:
        return values.sum(axis=0, dtype=np.int32)
    partials = np.zeros((_WEIGHT_PARTIALS, columns.shape[1]), np.float32)
    for start in range(0, len(values), _WEIGHT_PARTIALS):
        part = values[start : start + _WEIGHT_PARTIALS]
        partials[: len(part)] += part
    return _in_order(partials)


def _sum_rows(table: np.ndarray, columns: np.ndarray, absent: np.ndarray | None) -> np.ndarray:
    """`(D, N)` int32 of int8 rows, else float32."""
    exact = table.dtype == np.int8
    shape = (_ROW_PARTIALS, columns.shape[1], table.shape[1])
    partials = np.zeros(shape, np.int32 if exact else np.float32)
    for gram, rows in enumerate(columns):
        values = table.take(rows, axis=0)
        if absent is not None:
            values[absent[gram]] = 0
        partials[gram % _ROW_PARTIALS] += values
    return _in_order(partials).T


def _head(model: NgramModel, mean: np.ndarray) -> np.ndarray:
    """`(D, N)` float64 means to `(N,)` float64 scores."""
    scores = model.bias + _dot(model.skip, mean)
    if (
        model.hidden_kernel is not None
        and model.hidden_bias is not None
        and model.output_kernel is not None
    ):
        kernel = model.hidden_kernel.astype(np.float64)
        hidden = np.repeat(model.hidden_bias.astype(np.float64)[:, None], mean.shape[1], axis=1)
        for weights, values in zip(kernel, mean):
            hidden += weights[:, None] * values
        scores += _dot(model.output_kernel, np.where(hidden > 0, hidden, 0.0))
    return scores


def _dot(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`(K,)` float32 times `(K, N)` float64, as `(N,)` float64."""
    products = weights.astype(np.float64)[:, None] * values
    partials = np.zeros((_HEAD_PARTIALS, values.shape[1]))
    for start in range(0, len(products), _HEAD_PARTIALS):
        part = products[start : start + _HEAD_PARTIALS]
        partials[: len(part)] += part
    return _in_order(partials)


def _in_order(partials: np.ndarray) -> np.ndarray:
    """Adds along the first axis, one after the other; numpy's own sum may add in pairs."""
    total = partials[0].copy()
    for part in partials[1:]:
        total += part
    return total
