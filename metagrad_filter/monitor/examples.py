"""Windows at both ends of the score, as the version in use ranks them: what it likes and dislikes.

    examples = Examples(run_dir, 5, tokenizer="tokenizer.json")
    view = run_view(run_dir, examples=examples)          # view["examples"]

Windows are the newest that a filter has spooled (`score_filter(spool_share=...)`), or else those of
the newest label file. They are text of the stream, which may be private: nothing is shown unless a
number is asked for, and the live page then listens on this machine alone.

Output: JSON types; text whose every character shows, at most 2,000 of them, or ids, or for series
the channels thinned to 96 points. Cost: reading the spool (at most 256 MiB, only what is new when
called again) and scoring 8,192 windows, some tens of milliseconds.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np

from metagrad_filter.errors import ConfigError, MetagradFilterError, WindowError
from metagrad_filter.labels import LabelStore
from metagrad_filter.monitor.decoding import Decoder, ids_text, load_decoder, visible
from metagrad_filter.registry import Registry
from metagrad_filter.spool import FOLDER as SPOOL
from metagrad_filter.spool import SpooledWindows
from metagrad_filter.store import LocalStore, Store, open_store

MOST = 50

_SCORED = 8192
_CHARACTERS = 2000
_IDS = 256
_POINTS = 96
_CHANNELS = 8


class Examples:
    """Finds, scores and decodes windows for a view; keeps what it has read for the next call.

    Args:
      run_dir: a directory, a URL (see `open_store`), or a store.
      count: windows at each end of the score, in [1, 50].
      tokenizer: as for `load_decoder`; None shows token ids.

    Raises:
      ConfigError: an argument is out of its domain, or the tokenizer cannot be read.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str] | Store,
        count: int,
        *,
        tokenizer: str | os.PathLike[str] | None = None,
    ):
        if type(count) is not int or not 1 <= count <= MOST:
            raise ConfigError(f"examples is {count!r}, expected an int in [1, {MOST}].")
        self._store, self._count = open_store(run_dir), count
        self._decode = None if tokenizer is None else load_decoder(tokenizer)
        self._registry = Registry(self._store)
        self._spools: dict[str, SpooledWindows] = {}
        self._scorer: tuple[int, Any] | None = None

    def __call__(self, view: dict[str, Any]) -> dict[str, Any]:
        """Returns the examples of a view.

        Args:
          view: of `run_view`; its filters say which version is in use.

        Returns:
          `version`, `origin` of the windows in words, `windows` that were scored, and `high` and
          `low`, each a list of `{"score", "share", "text"}` or `{"score", "share", "series",
          "length"}`, the extreme first; `share` is that of the windows that score less. Without
          windows or version, `missing` says in words what there is not. Raises `OSError`.
        """
        found: dict[str, Any] = {"version": None, "origin": None, "high": [], "low": []}
        version, scorer = self._acting(view)
        if scorer is None:
            return found | {"missing": "no version is published yet, so nothing has a score"}
        windows, origin = self._windows(view)
        found |= {"version": version, "origin": origin}
        if windows is None:
            return found | {
                "missing": "no windows are set aside; pass score_filter(spool_share=0.02), or wait "
                "for the first round's labels"
            }
        try:
            scores = scorer.score(windows)
        except WindowError as error:
            return found | {"missing": f"version {version} cannot score them: {error}"}
        usable = np.flatnonzero(np.isfinite(scores))
        order = usable[np.argsort(scores[usable], kind="stable")]
        if not len(order):
            return found | {"missing": f"version {version} gives none of them a finite score"}
        count = min(self._count, -(-len(order) // 2))
        low, high = order[:count], order[len(order) - min(count, len(order) // 2) :][::-1]
        ranks = np.empty(len(windows))
        ranks[order] = np.arange(len(order)) / max(len(order) - 1, 1)
        return found | {
            "windows": len(order),
            "high": [self._one(windows[i], float(scores[i]), float(ranks[i])) for i in high],
            "low": [self._one(windows[i], float(scores[i]), float(ranks[i])) for i in low],
        }

    def _acting(self, view: dict[str, Any]) -> tuple[int | None, Any]:
        name = _busiest(view)
        version = view["filters"][name]["version"] if name is not None else None
        published = [v["version"] for v in view["versions"] if v["state"] == "ok"]
        # Before a version acts, the newest that is published is the one that will.
        version = version if version in published else max(published, default=None)
        if version is None:
            return None, None
        if self._scorer is None or self._scorer[0] != version:
            self._scorer = version, self._registry.load(version)
        return self._scorer

    def _windows(self, view: dict[str, Any]) -> tuple[np.ndarray | None, str | None]:
        named = set(self._store.names(SPOOL))
        busiest = _busiest(view)
        for name in sorted(named & set(view["filters"]), key=lambda n: (n != busiest, n)):
            spool = self._spools.get(name)
            with warnings.catch_warnings():
                # Damaged files are the calibrator's to warn about; here they are only fewer.
                warnings.simplefilter("ignore", RuntimeWarning)
                if spool is None:
                    spool = SpooledWindows(_place(self._store), name, newest=_SCORED)
                    self._spools[name] = spool
                else:
                    spool.refresh()
            if len(spool):
                windows = spool.take(np.arange(len(spool)))
                return _distinct(windows), f"the newest that filter {name} set aside"
        if isinstance(self._store, LocalStore):
            labels = LabelStore(self._store.directory)
            for number in reversed(labels.rounds()):
                try:
                    windows = labels.load(number).windows
                except MetagradFilterError:
                    continue  # an older round does as well
                if windows.ndim in (2, 3) and len(windows):
                    return _distinct(windows[:_SCORED]), f"labelled in round {number}"
        return None, None

    def _one(self, window: np.ndarray, score: float, share: float) -> dict[str, Any]:
        common = {"score": score, "share": share}
        if window.ndim == 2:
            return common | {"series": _thinned(window), "length": len(window)}
        return common | {"text": _text(window, self._decode)}


def _text(window: np.ndarray, decode: Decoder | None) -> str:
    if decode is None:
        return ids_text(window, _IDS)
    return visible(decode(window), _CHARACTERS)


def _thinned(window: np.ndarray) -> list[list[float]]:
    """`(T, C)` as at most 8 channels of at most 96 points, each the mean of its stretch."""
    parts = np.array_split(window, min(len(window), _POINTS))
    means = np.array([part.mean(axis=0) for part in parts], np.float64)
    return means.T[:_CHANNELS].tolist()


def _distinct(windows: np.ndarray) -> np.ndarray:
    """The same window is shown once, however often the stream repeats it."""
    rows = np.ascontiguousarray(windows).reshape(len(windows), -1)
    return windows[np.sort(np.unique(rows, axis=0, return_index=True)[1])]


def _busiest(view: dict[str, Any]) -> str | None:
    filters = view["filters"]
    return max(sorted(filters), key=lambda name: filters[name]["windows"], default=None)


def _place(store: Store) -> Any:
    return store.directory if isinstance(store, LocalStore) else str(store.describe())
