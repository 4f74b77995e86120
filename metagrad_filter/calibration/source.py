"""Where calibration gets raw windows from: an array, a .npy file, a dataset, or a spool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metagrad_filter.errors import ConfigError, DataError, WindowError
from metagrad_filter.scorer.features import check_ids
from metagrad_filter.spool import SpooledWindows
from metagrad_filter.windows import SeriesWindows, TextWindows


@dataclass(frozen=True)
class WindowCheck:
    """Refuses windows of text with ids that the model's embedding has no row for.

    Attributes:
      vocab_size: ids lie in [0, vocab_size).
      pad_id: an id allowed outside of that, or None.
    """

    vocab_size: int
    pad_id: int | None = None

    def __call__(self, windows: np.ndarray) -> None:
        """Raises `WindowError` naming the first bad id; windows of floats pass."""
        if np.issubdtype(windows.dtype, np.integer):
            check_ids(windows, self.vocab_size, pad_id=self.pad_id)


@dataclass(frozen=True)
class SeriesCheck:
    """Refuses windows that are not series of so many channels.

    Attributes:
      channels: C of `(N, T, C)`.
    """

    channels: int

    def __call__(self, windows: np.ndarray) -> None:
        """Raises `WindowError` that says what was seen."""
        if windows.ndim != 3 or windows.dtype.kind != "f" or windows.shape[2] != self.channels:
            raise WindowError(
                f"windows are {windows.dtype}{windows.shape}; expected float32 (N, T, "
                f"{self.channels}), as the target's windows are."
            )


class WindowSource:
    """Random access to raw (unfiltered) windows.

    Args:
      windows: `(N, T)` int32 or `(N, T, C)` float32 array; the path of a .npy file of one, which
        is memory-mapped; `SpooledWindows`, what the filter has sampled from a stream up to the last
        `refresh`; or anything with `len` and integer indexing whose elements hold one
        window each (a `grain.MapDataset`, a Hugging Face dataset).
      elements: how such an element becomes an array, for datasets only.
      check: applied to whatever is taken.
      sources: where each window is from: `(N,)` names, or the entry of a dataset's elements that
        holds the name; None where that is not known. A spool knows it of filters that were given
        `source_key`.

    Raises:
      ConfigError, WindowError, DataError: the source cannot be read as windows.
    """

    def __init__(
        self,
        windows: Any,
        elements: TextWindows | SeriesWindows | None = None,
        check: WindowCheck | SeriesCheck | None = None,
        sources: Sequence[str] | np.ndarray | str | None = None,
    ):
        if (
            isinstance(windows, list)
            or hasattr(windows, "__jax_array__")
            or (hasattr(windows, "__array__") and not isinstance(windows, np.ndarray))
        ):
            windows = np.asarray(windows)
        self._path = Path(windows).absolute() if isinstance(windows, str | Path) else None
        self._windows: Any = windows if self._path is None else _memory_map(self._path)
        self._elements, self._check = elements, check
        windows = self._windows
        self._sources = sources if sources is None or isinstance(sources, str) else _names(sources)
        if isinstance(windows, SpooledWindows):
            if sources is not None:
                raise ConfigError(
                    "sources were given with a spool, which stores them itself; leave them out and "
                    "give the filter source_key=."
                )
            return  # it fills while training runs
        if not isinstance(windows, np.ndarray):
            if not hasattr(windows, "__getitem__") or not hasattr(windows, "__len__"):
                raise ConfigError(
                    f"windows is a {type(windows).__name__}; expected an array, a .npy path, or a "
                    "dataset with random access (for an IterDataset name the MapDataset it is "
                    "built from)."
                )
            if elements is None:
                raise ConfigError(
                    "windows is a dataset; say how an element becomes an array, for instance "
                    "elements=mgf.TextWindows('tokens')."
                )
        if isinstance(windows, np.ndarray) and windows.ndim < 2:
            raise WindowError(
                f"windows have shape {windows.shape}; expected (N, T) token ids or (N, T, C)."
            )
        if len(self) == 0:
            raise WindowError("the source of windows is empty; check its path or its filter.")
        if isinstance(self._sources, str):
            if isinstance(windows, np.ndarray):
                raise ConfigError(
                    f"sources={sources!r} names an entry of a dataset's elements, but windows are "
                    "an array; pass one name for each window."
                )
        elif self._sources is not None and len(self._sources) != len(self):
            raise ConfigError(
                f"sources holds {len(self._sources)} names for {len(self)} windows; pass one name "
                "for each window."
            )

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def spool(self) -> SpooledWindows | None:
        """The spool that this reads, or None; its windows change at `refresh`."""
        return self._windows if isinstance(self._windows, SpooledWindows) else None

    @property
    def lots(self) -> np.ndarray | None:
        """`(N,)` in [0, 1), the same for a window in every snapshot of a spool; None elsewhere."""
        return None if self.spool is None else self.spool.lots

    def refresh(self) -> int:
        """Looks for new windows, where the source grows; returns how many there are now."""
        return len(self) if self.spool is None else self.spool.refresh()

    def sources(self, index: np.ndarray) -> np.ndarray | None:
        """Names of where the windows at `(n,)` positions are from, or None where not known.

        Raises:
          DataError: an element of the dataset has no such entry.
        """
        if self.spool is not None:
            found = self.spool.sources[index]
            return np.where(found == "", "unknown", found) if np.any(found != "") else None
        if self._sources is None:
            return None
        if not isinstance(self._sources, str):
            return self._sources[index]
        names = []
        for i in index:
            element = self._windows[int(i)]
            if not isinstance(element, Mapping) or self._sources not in element:
                raise DataError(
                    f"element {int(i)} has no entry {self._sources!r} to tell its source by; name "
                    "an entry that every element has, or leave sources out."
                )
            names.append(str(element[self._sources]))
        return np.array(names)

    def check_with(self, check: WindowCheck | SeriesCheck) -> None:
        """Applies another check to whatever is taken from now on."""
        self._check = check

    def take(self, index: np.ndarray) -> np.ndarray:
        """Windows at `(n,)` positions: `(n, T)` int32 or `(n, T, C)` float32."""
        if isinstance(self._windows, SpooledWindows):
            windows = self._windows.take(index)
        elif isinstance(self._windows, np.ndarray):
            windows = np.ascontiguousarray(self._windows[index])
        else:
            assert self._elements is not None
            windows = self._elements.stack([self._windows[int(i)] for i in index])
        if self._check is not None:
            self._check(windows)
        return windows

    def __getstate__(self) -> dict[str, Any]:
        """For the worker process, which maps the file itself instead of being sent a copy."""
        return {**self.__dict__, "_windows": self._windows if self._path is None else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._path is not None:
            self._windows = _memory_map(self._path)


def _memory_map(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"windows cannot be read from {path}: {error}; expected a .npy file."
        ) from error


def _names(sources: Sequence[str] | np.ndarray) -> np.ndarray:
    names = np.asarray(sources)
    if names.ndim != 1 or names.dtype.kind not in "UOS":
        raise ConfigError(
            f"sources are {names.dtype}{names.shape}; expected (N,) names, one for each window."
        )
    return names.astype(str)
