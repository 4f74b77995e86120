"""Splits that leak nothing: whole series, or stretches of time with a gap between them.

    parts = split_by_series(series, {"train": 0.7, "target": 0.1, "gate": 0.1, "report": 0.1})
    parts = split_by_time(series, {"train": 0.7, "target": 0.15, "report": 0.15}, gap=24)

Windows of one series overlap and resemble each other, so a split by window tells a scorer its
targets. By series, each series is in one part only. By time, earlier parts come first and `gap`
rows after each cut belong to none, so that no window of a later part touches, or directly follows,
one of an earlier part; scalings fitted on the first part then never see later values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metagrad_filter.errors import ConfigError, WindowError

from .series import Series


def split_by_series(
    series: Sequence[Series], shares: Mapping[str, float], *, seed: int = 0
) -> dict[str, list[Series]]:
    """Gives every series to one part; stretches of one series stay together.

    Args:
      series: what to split.
      shares: part to its share of the series (by number), summing to 1.
      seed: of the order in which series are dealt out.

    Returns:
      Part to its series, in the order of `series`; each part has at least one.

    Raises:
      ConfigError: the shares are no shares of one.
      WindowError: there are fewer series than parts.
    """
    _check_shares(shares)
    names = list(dict.fromkeys(one.name for one in series))
    if len(names) < len(shares):
        raise WindowError(
            f"There are {len(names)} series for the {len(shares)} parts {list(shares)}, expected "
            "at least one for each; split by time instead."
        )
    order = np.random.default_rng(seed).permutation(len(names))
    part_of: dict[str, str] = {}
    for part, (a, b) in zip(shares, _cuts(len(names), list(shares.values()))):
        part_of |= {names[i]: part for i in order[a:b]}
    return {part: [one for one in series if part_of[one.name] == part] for part in shares}


def split_by_time(
    series: Sequence[Series],
    shares: Mapping[str, float],
    *,
    gap: int,
    cuts: Sequence[Any] | None = None,
) -> dict[str, list[Series]]:
    """Cuts every series into stretches, earlier parts first.

    Args:
      series: what to split.
      shares: part to its share of each series' rows, in the order of time, summing to 1. With
        `cuts` only the names and their order count.
      gap: rows after each cut that belong to no part; at least the length of a window, so that
        the last step of a window before the cut and the first step of one after it are more than a
        window apart.
      cuts: times at which parts end, one fewer than parts, ascending; a row at the time of a cut
        belongs to the later part. Series then need times (dates as int64 nanoseconds).

    Returns:
      Part to its stretches; a series too short for a part is missing from it.

    Raises:
      ConfigError: shares, gap or cuts are out of their domain.
      WindowError: `cuts` are given and a series has no times, or a part is empty.
    """
    _check_shares(shares)
    if isinstance(gap, bool) or not isinstance(gap, int) or gap < 0:
        raise ConfigError(f"gap is {gap!r}, expected an int >= 0: rows that belong to no part.")
    if cuts is not None and (len(cuts) != len(shares) - 1 or list(cuts) != sorted(cuts)):
        raise ConfigError(
            f"cuts are {list(cuts)}, expected {len(shares) - 1} ascending times between the parts "
            f"{list(shares)}."
        )
    parts: dict[str, list[Series]] = {part: [] for part in shares}
    for one in series:
        edges = _cuts(len(one), list(shares.values())) if cuts is None else _at(one, cuts)
        for number, (part, (a, b)) in enumerate(zip(shares, edges)):
            first = a + gap if number else a
            if first < b:
                parts[part].append(one.part(first, b))
    for part, found in parts.items():
        if not found:
            raise WindowError(
                f"No series reaches into the part {part!r} ({len(series)} series, gap {gap}); "
                "move the cuts, or use a smaller gap."
            )
    return parts


def _at(one: Series, cuts: Sequence[Any]) -> list[tuple[int, int]]:
    times = one.times_of(0, len(one))
    if times is None:
        raise WindowError(
            f"Series {one.name!r} has no times to cut at; give times=, or split by shares."
        )
    edges = [0, *np.searchsorted(times, np.asarray(cuts), side="left").tolist(), len(one)]
    return list(itertools.pairwise(edges))


def _cuts(count: int, shares: Sequence[float]) -> list[tuple[int, int]]:
    """Consecutive stretches of `range(count)` with these shares, none empty where possible."""
    edges = [0]
    for number in range(1, len(shares)):
        left = len(shares) - number
        wanted = round(count * math.fsum(shares[:number]))
        edges.append(max(edges[-1], min(max(wanted, edges[-1] + 1), count - left)))
    edges.append(count)
    return list(itertools.pairwise(edges))


def _check_shares(shares: Mapping[str, float]) -> None:
    values = list(shares.values())
    if not values or not all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v <= 1 for v in values
    ):
        raise ConfigError(f"shares are {dict(shares)}, expected a share in (0, 1] for each part.")
    if abs(math.fsum(values) - 1) > 1e-9:
        raise ConfigError(f"shares {dict(shares)} sum to {math.fsum(values)}, expected 1.")
