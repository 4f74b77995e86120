"""The text scorer's inner loop: native code where it loads, the numpy reference elsewhere.

Both give the same bits, so which one runs is a matter of speed only. `ngram_mean` falls back with
one warning per process; METAGRAD_FILTER_NO_NATIVE=1 asks for the reference without a warning.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import warnings
from types import ModuleType

import numpy as np

from metagrad_filter.scorer import features

NO_NATIVE = "METAGRAD_FILTER_NO_NATIVE"

fallback_calls = 0
"""Calls answered by the reference because the native module did not load (this process)."""


@functools.cache
def _native() -> ModuleType | None:
    try:
        return importlib.import_module("metagrad_filter.kernels.scorer._ngram_bag")
    except ImportError as error:
        warnings.warn(
            f"The native scorer did not load ({error}); scoring continues with numpy, same "
            f"results, several times slower. Reinstall the package, or set {NO_NATIVE}=1 to "
            "choose numpy without this warning.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def _forced_reference() -> bool:
    return os.environ.get(NO_NATIVE) == "1"


def native_available() -> bool:
    """Whether `ngram_mean` runs native code in this process."""
    return not _forced_reference() and _native() is not None


def ngram_mean(
    table: np.ndarray,
    windows: np.ndarray,
    *,
    bits: int,
    hash_seed: int,
    vocab_size: int,
    pad_id: int | None = None,
) -> np.ndarray:
    """Averages the hashed n-gram rows of each window, after checking the ids.

    Args:
      table: `(2**bits, D)` float32.
      windows: `(N, T)` int32 with ids in `[0, vocab_size)`, or equal to `pad_id`.
      bits: log2 of the number of table rows.
      hash_seed: uint32.
      vocab_size: number of token ids.
      pad_id: an n-gram that holds this id is absent.

    Returns:
      `(N, D)` float64. Raises `WindowError` for ids out of range and unreadable windows.
    """
    global fallback_calls
    windows = features.check_windows(windows)
    native = None if _forced_reference() else _native()
    if native is None:
        fallback_calls += not _forced_reference()
        features.check_ids(windows, vocab_size, pad_id=pad_id)
        return features.ngram_mean(table, windows, bits=bits, hash_seed=hash_seed, pad_id=pad_id)
    try:
        return native.ngram_mean(
            np.ascontiguousarray(table), windows, bits, hash_seed, pad_id, vocab_size
        )
    except IndexError as error:
        found = re.search(r"\d+$", str(error))
        if found is None:
            raise
        raise features.id_error(windows, int(found.group()), vocab_size) from None
