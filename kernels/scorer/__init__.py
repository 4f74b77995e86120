"""The text scorer's inner loop: native code where it loads, the numpy reference elsewhere.

    kernel = NgramKernel(model)
    kernel.score(windows, pad_id=None) -> (N,) float32

Both give the same bits, on every instruction set, so which one runs is a matter of speed only.
Native code that does not load, or fails in a call, is replaced by the reference with one warning
per process; METAGRAD_FILTER_NO_NATIVE=1 asks for the reference without a warning, and
METAGRAD_FILTER_ISA=portable, avx2 or avx512 for one instruction set.

Read next: `ngram_reference.py` (the definition), `ngram_core.h` (the native code).
"""

from __future__ import annotations

import os
import re
from types import ModuleType
from typing import Any

import numpy as np

from metagrad_filter.errors import ConfigError
from metagrad_filter.kernels.scorer import ngram_reference  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.scorer.loading import (  # pyright: ignore[reportMissingImports]
    ISA,
    NO_NATIVE,
    forced_reference,
    load,
    warn,
)
from metagrad_filter.kernels.scorer.ngram_reference import NgramModel  # pyright: ignore[reportMissingImports]
from metagrad_filter.scorer import features

_POSITION = re.compile(r"position (\d+)$")

fallback_calls = 0
"""Calls answered by the reference because the native code did not load or failed (this process)."""


_SCORER = "scorer"


def _native() -> ModuleType | None:
    return load("_ngram_bag", _SCORER)


def native_available() -> bool:
    """Whether scorers run native code in this process."""
    return not forced_reference() and _native() is not None


def isa() -> str:
    """Returns the instruction set that scorers built now run: one of `available_isas()`.

    Raises:
      ConfigError: METAGRAD_FILTER_ISA names one that this processor or build does not have.
    """
    known = available_isas()
    wanted = os.environ.get(ISA, "")
    if wanted and known != ["numpy"] and wanted not in known:
        raise ConfigError(
            f"{ISA} is {wanted!r}, expected one of {known} on this machine; unset it to use the "
            "fastest."
        )
    return wanted if wanted in known else known[0]


def available_isas() -> list[str]:
    """Returns what this processor and build can run, the fastest first; ["numpy"] without native
    code."""
    native = None if forced_reference() else _native()
    return ["numpy"] if native is None else native.available_isas()


class NgramKernel:
    """One scorer's numbers, ready to score; thread-safe.

    The first call decides between native code and numpy, and copies the table where it is native.

    Args:
      model: the scorer's numbers, which must not change afterwards.
    """

    def __init__(self, model: NgramModel):
        self._model = model
        self._native: Any = None
        self._reference = False

    def score(self, windows: np.ndarray, pad_id: int | None = None) -> np.ndarray:
        """Scores windows after checking their ids.

        Args:
          windows: `(N, T)` integer token ids in `[0, vocab_size)`, or equal to `pad_id`.
          pad_id: an n-gram that holds this id is absent.

        Returns:
          `(N,)` float32. Raises `WindowError` for ids out of range and unreadable windows.
        """
        native, error = self._native, None
        if native is not None:
            try:
                # The common case, an int32 batch, needs no look at the array from Python.
                return native(windows, pad_id)
            except Exception as caught:
                error = caught
        return self._explain(error, windows, pad_id)

    def _explain(self, error: Exception | None, windows: np.ndarray, pad_id: int | None):
        """Answers what native code did not: the first call, bad ids, other dtypes, a failure."""
        checked = features.check_windows(windows)
        if pad_id is not None and not -(2**31) <= pad_id < 2**31:
            raise ConfigError(f"pad_id is {pad_id!r}, expected an id that fits int32, or None.")
        if self._native is None and not self._reference:
            self._native = self._build()
            self._reference = self._native is None
            if self._native is not None:
                return self.score(checked, pad_id)
        if self._native is not None:
            if isinstance(error, IndexError) and (found := _POSITION.search(str(error))):
                raise features.id_error(checked, int(found[1]), self._model.vocab_size)
            if checked is not windows:
                return self.score(checked, pad_id)
            warn(_SCORER, f"failed ({type(error).__name__}: {error})")
            self._native, self._reference = None, True
        return self._fall_back(checked, pad_id)

    def _build(self) -> Any:
        native = None if forced_reference() else _native()
        if native is None:
            return None
        model = self._model
        return native.NgramScorer(
            model.table,
            model.vocab_size,
            model.hash_seed,
            model.bits,
            model.orders,
            model.scale,
            model.skip,
            model.hidden_kernel,
            model.hidden_bias,
            model.output_kernel,
            model.bias,
            isa(),
        ).score

    def _fall_back(self, windows: np.ndarray, pad_id: int | None) -> np.ndarray:
        global fallback_calls
        fallback_calls += not forced_reference()
        features.check_ids(windows, self._model.vocab_size, pad_id=pad_id)
        return ngram_reference.score(self._model, windows, pad_id=pad_id)


__all__ = ["ISA", "NO_NATIVE", "NgramKernel", "available_isas", "isa", "native_available"]
