"""Hashed n-grams: which table rows a window of token ids reads.

    windows (N, T) int32 -> rows (N, G) uint32, present (N, G) bool

Unigrams, bigrams and trigrams of ids are hashed into `2**bits` rows. This file is the definition;
`kernels/scorer/ngram_core.h` computes the same rows, and faster. Published tables depend on every
constant here, so none of them ever changes.

Read next: `kernels/scorer/ngram_reference.py` (what is summed), `scorer.py`, `fit.py`.
"""

from __future__ import annotations

import numpy as np

from metagrad_filter.errors import ConfigError, WindowError

MAX_BITS = 24
MAX_ORDERS = 3
MAX_LENGTH = 1 << 22  # tokens of a window, so that sums of int8 weights fit 32 bits

_UNIGRAM = np.uint32(0x9E3779B1)
_FIRST = np.uint32(0x85EBCA77)
_SECOND = np.uint32(0xC2B2AE3D)
_THIRD = np.uint32(0x165667B1)
_BIGRAM_SEED = 0x27D4EB2F
_TRIGRAM_SEED = 0x94D049BB

_INT32 = np.iinfo(np.int32)


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
    if array.shape[1] > MAX_LENGTH:
        raise WindowError(
            f"Windows have length {array.shape[1]}, expected at most {MAX_LENGTH} tokens; cut "
            "documents into windows before they are scored."
        )
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


def check_orders(orders: int) -> None:
    """Raises `ConfigError` unless `orders` is 1, 2 or 3."""
    if isinstance(orders, bool) or not isinstance(orders, int) or not 1 <= orders <= MAX_ORDERS:
        raise ConfigError(
            f"orders is {orders!r}, expected 1 (unigrams), 2 (and bigrams) or 3 (and trigrams)."
        )


def count_ngrams(length: int, orders: int) -> int:
    """Returns G, the number of n-grams of a window of `length` tokens."""
    return sum(max(0, length - n) for n in range(orders))


def _mix(values: np.ndarray) -> np.ndarray:
    """Full-avalanche bijection of uint32 (the constants are the published `lowbias32`)."""
    values = values ^ (values >> np.uint32(16))
    values = values * np.uint32(0x7FEB352D)
    values ^= values >> np.uint32(15)
    values *= np.uint32(0x846CA68B)
    values ^= values >> np.uint32(16)
    return values


def ngram_rows(windows: np.ndarray, *, bits: int, hash_seed: int, orders: int = 2) -> np.ndarray:
    """Hashes the n-grams of windows to table rows.

    Args:
      windows: `(N, T)` integer token ids that fit int32, T >= 1.
      bits: the table has `2**bits` rows.
      hash_seed: uint32; two seeds give two unrelated hash functions.
      orders: 1 unigrams, 2 bigrams as well, 3 trigrams as well.

    Returns:
      `(N, G)` uint32 below `2**bits`: the T unigrams of a window, its T-1 bigrams, its T-2
      trigrams.

    Example:
      >>> ngram_rows(np.array([[1, 2, 3]], np.int32), bits=4, hash_seed=0).shape
      (1, 5)
    """
    check_bits(bits)
    check_orders(orders)
    ids = check_windows(windows).view(np.uint32)
    return np.concatenate(_hashes(ids, hash_seed, orders), axis=1) >> np.uint32(32 - bits)


def ngram_columns(windows: np.ndarray, *, bits: int, hash_seed: int, orders: int) -> np.ndarray:
    """Returns `ngram_rows` transposed, `(G, N)`: one n-gram of all windows lies together."""
    ids = np.ascontiguousarray(windows.T).view(np.uint32)
    hashes = [part.T for part in _hashes(ids.T, hash_seed, orders)]
    return np.concatenate(hashes, axis=0) >> np.uint32(32 - bits)


def _hashes(ids: np.ndarray, hash_seed: int, orders: int) -> list[np.ndarray]:
    """Full 32-bit hashes by order of n-gram, `(N, T)`, `(N, T-1)`, `(N, T-2)` uint32."""
    found = [_mix(ids * _UNIGRAM + np.uint32(hash_seed))]
    if orders > 1:
        first = ids[:, :-1] * _FIRST + _mix(np.array([hash_seed ^ _BIGRAM_SEED], np.uint32))
        first ^= first >> np.uint32(15)
        found.append(_mix(first + ids[:, 1:] * _SECOND))
    if orders > 2:
        # Both slices are empty for windows of one token.
        first = found[1][:, :-1] ^ _mix(np.array([hash_seed ^ _TRIGRAM_SEED], np.uint32))
        found.append(_mix(first + ids[:, 2:] * _THIRD))
    return found


def present_ngrams(windows: np.ndarray, pad_id: int | None, *, orders: int = 2) -> np.ndarray:
    """Returns `(N, G)` bool: False where an n-gram holds `pad_id`."""
    if pad_id is None:
        return np.ones((windows.shape[0], count_ngrams(windows.shape[1], orders)), bool)
    real = windows != pad_id
    found = [real]
    for n in range(1, orders):
        found.append(found[-1][:, :-1] & real[:, n:])
    return np.concatenate(found, axis=1)
