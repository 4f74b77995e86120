"""What every adapter takes and how it finds its framework.

    config = configure("run", keep_ratio=0.25, windows=TextWindows("tokens"))

The keywords are those of `metagrad_filter.score_filter`, with the same defaults and checks. Read
next: `stream.py`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any, Required, TypedDict, Unpack

from metagrad_filter.blocks import FilterConfig
from metagrad_filter.errors import ConfigError
from metagrad_filter.selection import Cap
from metagrad_filter.windows import Windows

_INSTALL = "pip install 'metagrad-filter[adapters]', or the framework by itself"


class Options(TypedDict, total=False):
    """The keywords of every adapter, those of `metagrad_filter.score_filter`.

    Attributes:
      keep_ratio: share of windows kept, in (0, 1].
      windows: how an element becomes an array, `TextWindows` or `SeriesWindows`.
      block_windows: M, windows ranked together; default 512.
      swap_every_blocks: blocks between possible changes of the scorer version; default 64.
      seed: keys the uniform choice, the exploration share and Gumbel ranking; default 0.
      name: one per filter of a run; default "default".
      explore: share of the kept windows drawn uniformly, in [0, 1]; default 0.
      annotate: add `score` and `scorer_version` to copies of the kept elements; default False.
      caps: limits per group of windows within a block; default none.
      rule: "block", the default, or "threshold" where windows arrive one at a time.
      bad_windows: "raise", the default, or "last" to rank windows that cannot be read last.
      source_key: the entry that names a window's source, for the monitor; default none.
      statistics: append what was seen and kept to the run's `metrics`; default True.
      spool_share: share of raw windows set aside for calibration; default 0.
    """

    keep_ratio: Required[float]
    windows: Required[Windows]
    block_windows: int
    swap_every_blocks: int
    seed: int
    name: str
    explore: float
    annotate: bool
    caps: Cap | Sequence[Cap]
    rule: str
    bad_windows: str
    source_key: str | None
    statistics: bool
    spool_share: float


def configure(
    run_dir: str | os.PathLike[str], *, order: str = "iterator", **options: Unpack[Options]
) -> FilterConfig:
    """Returns the configuration of an adapter's filter.

    Args:
      run_dir: directory shared with the calibrator.
      order: "iterator" for `FilteredStream`, "index" for `FilteredSequence`.
      options: see `Options`.

    Raises:
      ConfigError: an argument is out of its domain.
    """
    if order == "index":
        refuse_threshold(options.get("rule"), "a dataset with random access has no such order")
    return FilterConfig(run_dir=os.fspath(run_dir), order=order, **options)  # pyright: ignore


def refuse_threshold(rule: str | None, why: str) -> None:
    """Raises `ConfigError` for the threshold rule where it has no meaning."""
    if rule == "threshold":
        raise ConfigError(
            f"rule='threshold' decides in the order of arrival, and {why}; use rule='block'."
        )


def framework(package: str, adapter: str, *, install: str = _INSTALL) -> Any:
    """Imports what an adapter is for; raises `ConfigError` where it is not installed."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"metagrad_filter.adapters.{adapter} cannot be used: {error}; {install}."
        ) from error
