"""Where calibration gets raw windows from: an array, a .npy file, or a random-access dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from metagrad_filter.errors import ConfigError, DataError, WindowError
from metagrad_filter.windows import SeriesWindows, TextWindows


class WindowSource:
    """Random access to raw (unfiltered) windows.

    Args:
      windows: `(N, T)` int32 or `(N, T, C)` float32 array; the path of a .npy file of one, which
        is memory-mapped; or anything with `len` and integer indexing whose elements hold one
        window each (a `grain.MapDataset`, a Hugging Face dataset).
      elements: how such an element becomes an array, for datasets only.

    Raises:
      ConfigError, WindowError, DataError: the source cannot be read as windows.
    """

    def __init__(self, windows: Any, elements: TextWindows | SeriesWindows | None = None):
        if isinstance(windows, str | Path):
            try:
                windows = np.load(windows, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(
                    f"windows cannot be read from {windows}: {error}; expected a .npy file."
                ) from error
        if not isinstance(windows, np.ndarray) and elements is None:
            if not hasattr(windows, "__getitem__") or not hasattr(windows, "__len__"):
                raise ConfigError(
                    f"windows is a {type(windows).__name__}; expected an array, a .npy path, or a "
                    "dataset with random access (for an IterDataset name the MapDataset it is "
                    "built from)."
                )
            raise ConfigError(
                "windows is a dataset; say how an element becomes an array, for instance "
                "elements=mgf.TextWindows('tokens')."
            )
        if isinstance(windows, np.ndarray) and windows.ndim < 2:
            raise WindowError(
                f"windows have shape {windows.shape}; expected (N, T) token ids or (N, T, C)."
            )
        self._windows, self._elements = windows, elements
        if len(self) == 0:
            raise WindowError("the source of windows is empty; check its path or its filter.")

    def __len__(self) -> int:
        return len(self._windows)

    def take(self, index: np.ndarray) -> np.ndarray:
        """Windows at `(n,)` positions: `(n, T)` int32 or `(n, T, C)` float32."""
        if isinstance(self._windows, np.ndarray):
            return np.ascontiguousarray(self._windows[index])
        assert self._elements is not None
        return self._elements.stack([self._windows[int(i)] for i in index])
