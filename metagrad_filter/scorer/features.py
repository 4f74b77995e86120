"""Hashed n-grams: which table rows a window of token ids reads, and the mean of those rows.

    windows (N, T) int32 -> rows (N, 2T-1) uint32 -> mean row (N, D) float64

Unigrams and bigrams of ids are hashed into `2**bits` rows. This file is the definition; the C++
kernel `kernels/scorer/ngram_bag.cpp` computes the same numbers, bit for bit, and
faster. Integer hashing and sequential float64 sums make a window's result independent of the
batch it arrives in and of the machine, which is what lets two workers rank a block alike.

Read next: `scorer.py` (what is done with the mean), `fit.py` (how the table is learned).
"""

from __future__ import annotations

import numpy as np

from metagrad_filter.errors import ConfigError, WindowError

MAX_BITS = 24

_UNIGRAM = np.uint32(0x9E3779B1)
_FIRST = np.uint32(0x85EBCA77)
_SECOND = np.uint32(0xC2B2AE3D)
_BIGRAM_SEED = 0x27D4EB2F

_INT32 = np.iinfo(np.int32)

# Bounds the row temporaries of the reference to about a megabyte whatever the batch.
_CHUNK_ROWS = 1 << 18


def check_windows(windows: np.ndarray) -> np.ndarray:
    """Returns integer `windows` as a C-contiguous `(N, T)` int32 array, or raises `WindowError`."""
    array = np.asarray(windows)
    if array.ndim != 2:
        raise WindowError(
            f"Windows have shape {array.shape}, expected (N, T) token ids; "
            "stack the windows of a batch along a new first axis."
        )
    if array.shape[1] == 0:
        raise WindowError("Windows have length 0, expected at least one token per window.")
    if array.dtype.kind not in "iu":
        raise WindowError(f"Windows have dtype {array.dtype}, expected integer token ids.")
    if array.dtype != np.int32 and array.size:
        low, high = int(array.min()), int(array.max())
        if low < _INT32.min or high > _INT32.max:
            raise WindowError(f"Token ids reach from {low} to {high}, expected ids that fit int32.")
    return np.ascontiguousarray(array, np.int32)


def check_ids(windows: np.ndarray, vocab_size: int, *, pad_id: int | None = None) -> None:
    """Raises `WindowError` naming the first window with an id outside `[0, vocab_size)`.

    Args:
      windows: `(N, T)` int32.
      vocab_size: number of token ids the scorer was fitted for.
      pad_id: an id that is allowed even outside the range, because padding is never scored.
    """
    bad = (windows < 0) | (windows >= vocab_size)
    if pad_id is not None:
        bad &= windows != pad_id
    if bad.any():
        raise id_error(windows, int(np.argmax(bad)), vocab_size)


def id_error(windows: np.ndarray, position: int, vocab_size: int) -> WindowError:
    """Builds the error for the id at flat `position` of `windows`."""
    row, column = divmod(position, windows.shape[1])
    return WindowError(
        f"Window {row} of the batch holds id {int(windows[row, column])} at position {column}, "
        f"expected ids in [0, {vocab_size}); use the tokenizer that the scorer was fitted with, "
        "or name the padding id with TextWindows(pad_id=...)."
    )


def check_bits(bits: int) -> None:
    """Raises `ConfigError` unless `bits` is an int in `[1, 24]`."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise ConfigError(f"bits is {bits!r}, expected an int in [1, {MAX_BITS}].")


def _mix(values: np.ndarray) -> np.ndarray:
    """Full-avalanche bijection of uint32 (the constants are the published `lowbias32`)."""
    values = values ^ (values >> np.uint32(16))
    values = values * np.uint32(0x7FEB352D)
    values ^= values >> np.uint32(15)
    values *= np.uint32(0x846CA68B)
    values ^= values >> np.uint32(16)
    return values


def ngram_rows(windows: np.ndarray, *, bits: int, hash_seed: int) -> np.ndarray:
    """Hashes unigrams and bigrams to table rows.

    Args:
      windows: `(N, T)` integer token ids that fit int32, T >= 1.
      bits: the table has `2**bits` rows.
      hash_seed: uint32; two seeds give two unrelated hash functions.

    Returns:
      `(N, 2T-1)` uint32 below `2**bits`: the T unigrams of a window, then its T-1 bigrams.

    Example:
      >>> ngram_rows(np.array([[1, 2, 3]], np.int32), bits=4, hash_seed=0).shape
      (1, 5)
    """
    check_bits(bits)
    ids = check_windows(windows).view(np.uint32)
    length = ids.shape[1]
    shift = np.uint32(32 - bits)
    seed = np.uint32(hash_seed)
    bigram_seed = _mix(np.array([hash_seed ^ _BIGRAM_SEED], np.uint32))[0]
    rows = np.empty((ids.shape[0], 2 * length - 1), np.uint32)
    rows[:, :length] = _mix(ids * _UNIGRAM + seed) >> shift
    first = ids[:, :-1] * _FIRST + bigram_seed
    first ^= first >> np.uint32(15)
    rows[:, length:] = _mix(first + ids[:, 1:] * _SECOND) >> shift
    return rows


def present_ngrams(windows: np.ndarray, pad_id: int | None) -> np.ndarray:
    """Returns `(N, 2T-1)` bool: False where an n-gram holds `pad_id`."""
    if pad_id is None:
        return np.ones((windows.shape[0], 2 * windows.shape[1] - 1), bool)
    real = windows != pad_id
    return np.concatenate([real, real[:, :-1] & real[:, 1:]], axis=1)


def ngram_mean(
    table: np.ndarray,
    windows: np.ndarray,
    *,
    bits: int,
    hash_seed: int,
    pad_id: int | None = None,
) -> np.ndarray:
    """Averages the table rows of each window's present n-grams: the numpy reference.

    An n-gram that holds `pad_id` is absent; a window without a present n-gram gives zeros.

    Args:
      table: `(2**bits, D)` float32.
      windows: `(N, T)` int32.
      bits: log2 of the number of table rows.
      hash_seed: uint32.
      pad_id: the padding id, or None when every id counts.

    Returns:
      `(N, D)` float64, summed in n-gram order.
    """
    windows = check_windows(windows)
    check_bits(bits)
    if table.ndim != 2 or table.shape[0] != 1 << bits or table.dtype != np.float32:
        raise ConfigError(
            f"table is {table.dtype}{table.shape}, expected float32 with 2**{bits} rows."
        )
    count, length = windows.shape
    out = np.zeros((count, table.shape[1]), np.float64)
    step = max(1, _CHUNK_ROWS // (2 * length - 1))
    for start in range(0, count, step):
        chunk = windows[start : start + step]
        rows = ngram_rows(chunk, bits=bits, hash_seed=hash_seed)
        present = present_ngrams(chunk, pad_id)
        sums = out[start : start + step]
        # One position at a time over all windows: numpy's own reductions add pairwise, and the
        # order of the sum is part of the definition.
        for gram in range(rows.shape[1]):
            values = table[rows[:, gram]].astype(np.float64)
            values[~present[:, gram]] = 0.0
            sums += values
        sums /= np.maximum(present.sum(axis=1), 1)[:, None]
    return out
