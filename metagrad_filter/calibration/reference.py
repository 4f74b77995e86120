"""How well the scorer in use ranks: against fresh metagradients of windows that stay the same.

    pool = ReferencePool.open_or_create(run_dir, source, to_label, 2048)
    agreement(halves_of_pool, scorer.score(pool.windows), version=7)    # rho and its interval

The first round draws the pool, uniformly and by a seed of its own, and stores it under
`run_dir/reference`; later rounds score the same windows with the probe of the moment. So two
figures of two rounds differ by what has changed, and not by which windows were drawn. Windows of
the pool must not be fitted on (`contains` finds them), or the figure would be that of a training
set.

The pool is the truest number there is about drift, and the dearest: one forward-mode product a
window and round. Read next: `round.py`, `monitor/alarms.py` (what is made of the number).
"""

from __future__ import annotations

import io
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metagrad_filter.calibration.source import WindowSource
from metagrad_filter.errors import ConfigError, DataError, WindowError
from metagrad_filter.files import make_directory, replace_file, write_once
from metagrad_filter.labels import split_half_reliability
from metagrad_filter.monitor.drift import rank_agreement

FOLDER = "reference"
SIZE = 2048

_LARGEST_SHARE = 1 / 8  # of the windows that may be labelled; the others are for the fit
_LEAST = 3


@dataclass(frozen=True)
class Agreement:
    """Rank correlation of a version with fresh labels of the reference pool.

    Attributes:
      rho: Spearman's, in [-1, 1].
      low, high: its 95 % bootstrap interval.
      version: whose scores they are, or None.
      windows: in the pool.
      reliability: split-half rank correlation of the fresh labels; noise in them lowers `rho`.
    """

    rho: float
    low: float
    high: float
    version: int | None = None
    windows: int = 0
    reliability: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def agreement(
    halves: np.ndarray, scores: np.ndarray, *, version: int | None = None, seed: int = 0
) -> Agreement:
    """Compares fresh labels with the scores of a version.

    Args:
      halves: `(2, N)` fresh probe scores -dPhi/dw of two disjoint sets of trajectories.
      scores: `(N,)` of the version's scorer for the same windows.
      version: for the record.
      seed: of the resampling.

    Raises:
      ConfigError: shapes do not agree, N is below 3, or a value is not finite.
    """
    halves = np.asarray(halves, np.float64)
    if halves.ndim != 2 or len(halves) != 2 or halves.shape[1:] != np.shape(scores):
        raise ConfigError(
            f"halves and scores have shapes {halves.shape} and {np.shape(scores)}; expected (2, N) "
            "and (N,)."
        )
    rho, low, high = rank_agreement(scores, halves.sum(axis=0), seed)
    reliability = split_half_reliability(halves)
    return Agreement(rho, low, high, version, halves.shape[1], reliability)


class ReferencePool:
    """Windows that every round scores anew.

    Attributes:
      windows: `(N, T)` int32 or `(N, T, C)` float32.
    """

    def __init__(self, windows: np.ndarray):
        self.windows = windows
        self._known = Counter(map(np.ndarray.tobytes, windows))

    @classmethod
    def open_or_create(
        cls,
        run_dir: str | Path,
        source: WindowSource,
        index: np.ndarray,
        size: int = SIZE,
        *,
        seed: int = 0,
    ) -> ReferencePool:
        """Reads the pool of a run directory, or draws and stores it.

        Windows of another shape have another pool. A damaged one is drawn anew, with a warning.

        Args:
          run_dir: the run directory.
          source: raw windows.
          index: `(n,)` positions in `source` of windows that may be labelled.
          size: windows to draw, >= 3; at most an eighth of `index` is taken.
          seed: of the draw.

        Raises:
          ConfigError: `size` is out of its domain.
          WindowError: `index` is too short to spare three windows.
          OSError: the pool cannot be written.
        """
        if type(size) is not int or size < _LEAST:
            raise ConfigError(f"size={size!r}; expected an integer >= {_LEAST}.")
        shape = source.take(np.asarray(index[:1])).shape[1:]
        path = Path(run_dir) / FOLDER / f"pool-{'x'.join(map(str, shape))}.npz"
        try:
            return cls(_read(path, shape))
        except FileNotFoundError:
            pass
        except DataError as error:
            warnings.warn(
                f"{error}; another pool is drawn, agreement before and after cannot be compared.",
                RuntimeWarning,
                stacklevel=2,
            )
        count = min(size, int(len(index) * _LARGEST_SHARE))
        if count < _LEAST:
            raise WindowError(
                f"{len(index)} windows may be labelled, too few to spare {_LEAST} for a reference "
                f"pool; expected {int(_LEAST / _LARGEST_SHARE)} or more, name a larger source."
            )
        rng = np.random.default_rng([seed, 1])
        chosen = np.sort(rng.choice(np.asarray(index), count, replace=False))
        pool = cls(source.take(chosen))
        pool._store(path)
        return pool

    def contains(self, windows: np.ndarray) -> np.ndarray:
        """`(n,)` bool: which of `(n, ...)` windows are in the pool.

        Of several copies of a window as many are as the pool holds: where windows repeat, the
        others are not the pool's.
        """
        left = Counter(self._known)
        found = np.zeros(len(windows), bool)
        for i, window in enumerate(np.ascontiguousarray(windows, self.windows.dtype)):
            key = window.tobytes()
            found[i] = left[key] > 0
            left[key] -= 1
        return found

    def _store(self, path: Path) -> None:
        make_directory(path.parent)
        buffer = io.BytesIO()
        np.savez(buffer, windows=self.windows)
        if not write_once(path, buffer.getvalue()):
            replace_file(path, buffer.getvalue())


def _read(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as data:
            windows = data["windows"]
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy and zipfile raise a dozen types on damaged bytes
        raise DataError(f"the reference pool cannot be read from {path}: {error}") from error
    if windows.shape[1:] != shape or len(windows) < _LEAST:
        raise DataError(
            f"the reference pool in {path} holds windows of shape {windows.shape}; expected "
            f"(N, {', '.join(map(str, shape))}), N >= {_LEAST}"
        )
    return windows
