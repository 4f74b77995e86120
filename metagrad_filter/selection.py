"""Exactly k of M: which windows of a block are kept.

    as_ratio(keep_ratio) -> Fraction     kept_before(n, ratio) -> int     select(...) -> indices
    Cap("source", share=0.5)             no group fills more than its part of a block's choice

Pure functions. The quota is a function of position alone, in exact arithmetic, so every host and
every worker keeps the same number at every step. Randomness comes from the bits of a Philox
counter keyed by (seed, name, block): no state, no generator method whose algorithm could change
between numpy versions.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import Any

import numpy as np

from metagrad_filter.errors import ConfigError

_RANKING, _EXPLORATION = 0, 1


@dataclass(frozen=True)
class Cap:
    """A limit on how many of a block's kept windows may belong to one group.

    Attributes:
      key: the entry of a dict element that names its group (a source, a cluster); None groups
        windows with equal content, so that copies can be limited.
      share: at most `max(1, floor(share * k))` of k kept windows per group, in (0, 1].
      count: at most this many per group; give either `share` or `count`.

    Example:
      >>> Cap("source", share=0.5).limit(64)
      32
    """

    key: str | None = None
    share: Fraction | float | None = None
    count: int | None = None

    def __post_init__(self):
        if self.key is not None and not isinstance(self.key, str):
            raise ConfigError(
                f"key of a Cap is {self.key!r}, expected the name of an entry, or None for equal "
                "windows."
            )
        if (self.share is None) == (self.count is None):
            raise ConfigError(
                f"A Cap has share={self.share!r} and count={self.count!r}, expected exactly one "
                "of the two."
            )
        if self.share is not None:
            object.__setattr__(self, "share", as_ratio(self.share, "share of a Cap"))
        elif isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ConfigError(f"count of a Cap is {self.count!r}, expected an int >= 1.")

    def limit(self, k: int) -> int:
        """Returns how many of k kept windows one group may hold."""
        if self.share is None:
            assert self.count is not None
            return self.count
        return max(1, math.floor(self.share * k))

    def record(self) -> list[str | int | None]:
        """Returns the fields as JSON types."""
        return [self.key, None if self.share is None else str(self.share), self.count]


def as_ratio(keep_ratio: Any, name: str = "keep_ratio") -> Fraction:
    """Returns a keep ratio as an exact fraction in (0, 1]; raises `ConfigError`.

    A float stands for its shortest decimal, so 0.1 is 1/10 and not the nearest binary fraction.

    Example:
      >>> as_ratio(0.1)
      Fraction(1, 10)
    """
    ratio = _as_fraction(keep_ratio, name, "(0, 1]")
    if not 0 < ratio <= 1:
        raise _domain_error(name, keep_ratio, "(0, 1]")
    return ratio


def as_share(share: Any, name: str = "explore") -> Fraction:
    """Returns a share as an exact fraction in [0, 1]; raises `ConfigError`."""
    fraction = _as_fraction(share, name, "[0, 1]")
    if not 0 <= fraction <= 1:
        raise _domain_error(name, share, "[0, 1]")
    return fraction


def _as_fraction(value: Any, name: str, domain: str) -> Fraction:
    if isinstance(value, (bool, np.bool_)) or not isinstance(
        value, (int, float, Fraction, np.integer, np.floating)
    ):
        raise _domain_error(name, value, domain)
    if not math.isfinite(value):
        raise _domain_error(name, value, domain)
    return value if isinstance(value, Fraction) else Fraction(str(value))


def _domain_error(name: str, value: Any, domain: str) -> ConfigError:
    return ConfigError(
        f"{name} is {value!r}, expected a number in {domain}; pass a float such as 0.25, or "
        "fractions.Fraction(1, 3)."
    )


def kept_before(windows_seen: int, ratio: Fraction) -> int:
    """Returns how many of the first `windows_seen` windows are kept: floor(n r), exactly."""
    return windows_seen * ratio.numerator // ratio.denominator


def block_of_kept(index: int, ratio: Fraction, block_windows: int) -> int:
    """Returns the block that holds the `index`-th kept window (from 0)."""
    # The smallest n with floor(n r) > index is ceil((index + 1) / r).
    windows_seen = -(-(index + 1) * ratio.denominator // ratio.numerator)
    return (windows_seen - 1) // block_windows


def select(
    scores: np.ndarray | None,
    n: int,
    k: int,
    *,
    strength: float = math.inf,
    explore: Fraction | float = 0,
    seed: int = 0,
    name: str = "default",
    block: int = 0,
    groups: Sequence[tuple[np.ndarray, int]] = (),
) -> np.ndarray:
    """Chooses exactly k of n windows.

    Without scores the choice is uniform. With scores, `k - floor(explore * k)` windows are chosen
    by score: the best for infinite `strength`, else a draw without replacement with logits
    `strength * gaussian rank score` (Gumbel top-k, uniform for 0). The `floor(explore * k)`
    others are drawn uniformly from those not chosen by score. Ties go to the earlier position,
    -0.0 equals 0.0, and non-finite scores rank last. A window whose group is full is passed over;
    where the limits leave fewer than k, the best of those passed over make up for it, because the
    quota is exact. The exploration share knows no limits.

    Args:
      scores: `(n,)` float, higher is better, or None.
      n: number of windows in the block.
      k: number kept, `0 <= k <= n`.
      strength: `0 <= strength <= inf`.
      explore: share of k drawn uniformly, in [0, 1].
      seed: the run's seed.
      name: the filter's name.
      block: index of the block; with seed and name it keys all randomness.
      groups: for each limit, the group of every window as `(n,)` integers, and the limit.

    Returns:
      `(k,)` int64 ascending positions.

    References:
      Kool et al., Stochastic Beams and Where to Find Them, 2019, section 2.3 (Gumbel top-k).

    Example:
      >>> select(np.array([0.1, 0.9, 0.5]), 3, 2)
      array([1, 2])
    """
    if not 0 <= k <= n:
        raise ConfigError(f"k is {k} for a block of {n} windows, expected 0 <= k <= n.")
    if scores is None:
        chosen = _smallest(philox_bits(seed, name, block, _RANKING, n), k, groups)
    else:
        if scores.shape != (n,):
            raise ConfigError(f"scores have shape {scores.shape}, expected ({n},).")
        explored = math.floor(as_share(explore) * k)
        chosen = _smallest(_costs(scores, strength, seed, name, block), k - explored, groups)
        if explored:
            rest = np.setdiff1d(np.arange(n), chosen)
            draw = _smallest(philox_bits(seed, name, block, _EXPLORATION, len(rest)), explored)
            chosen = np.concatenate([chosen, rest[draw]])
    return np.sort(chosen).astype(np.int64)


def keep_blocks(
    scores: np.ndarray | None,
    count: int,
    *,
    block_windows: int,
    keep_ratio: Fraction | float,
    strength: float = math.inf,
    seed: int = 0,
    name: str = "default",
) -> np.ndarray:
    """Positions that a filter keeps of windows in hand, block by block as the filter does.

    Args:
      scores: `(count,)` float, higher is better; None keeps uniformly.
      count: number of windows; the last block may be shorter.
      block_windows: windows that are ranked together.
      keep_ratio: share that is kept, in (0, 1].
      strength: `0 <= strength <= inf`.
      seed: the run's seed.
      name: the filter's name.

    Returns:
      `(floor(count * keep_ratio),)` int64 ascending positions.

    Example:
      >>> keep_blocks(np.array([1.0, 2.0, 4.0, 3.0]), 4, block_windows=2, keep_ratio=0.5)
      array([1, 2])
    """
    ratio = as_ratio(keep_ratio)
    kept = [np.zeros(0, np.int64)]
    for block, first in enumerate(range(0, count, block_windows)):
        last = min(first + block_windows, count)
        chosen = select(
            None if scores is None else scores[first:last],
            last - first,
            kept_before(last, ratio) - kept_before(first, ratio),
            strength=strength,
            seed=seed,
            name=name,
            block=block,
        )
        kept.append(first + chosen)
    return np.concatenate(kept)


def _smallest(
    costs: np.ndarray, k: int, groups: Sequence[tuple[np.ndarray, int]] = ()
) -> np.ndarray:
    """Positions of the k smallest costs within the groups' limits, ties to the earlier position."""
    order = np.argsort(costs, kind="stable")
    if not groups:
        return order[:k]
    members = [labels.tolist() for labels, _ in groups]
    limits = [limit for _, limit in groups]
    held: list[dict[int, int]] = [{} for _ in groups]
    chosen: list[int] = []
    passed: list[int] = []
    for position in order.tolist():
        if len(chosen) == k:
            break
        counts = [mine.get(labels[position], 0) for mine, labels in zip(held, members)]
        if any(count >= limit for count, limit in zip(counts, limits)):
            passed.append(position)
            continue
        chosen.append(position)
        for mine, labels, count in zip(held, members, counts):
            mine[labels[position]] = count + 1
    return np.array(chosen + passed[: k - len(chosen)], np.int64)


def _costs(scores: np.ndarray, strength: float, seed: int, name: str, block: int) -> np.ndarray:
    """Returns `(n,)` float64 costs whose k smallest are kept; non-finite scores cost inf."""
    finite = np.isfinite(scores)
    costs = -scores.astype(np.float64)
    if not math.isinf(strength):
        uniform = as_uniform(philox_bits(seed, name, block, _RANKING, len(scores)))
        costs = -strength * rank_scores(scores) + np.log(-np.log(uniform))
    return np.where(finite, costs, np.inf)


def rank_scores(scores: np.ndarray) -> np.ndarray:
    """Maps scores to `(n,)` float64 standard normal quantiles of their ranks; ties share one.

    Non-finite scores count as equal and lowest.
    """
    low = np.where(np.isfinite(scores), scores, -np.inf)
    _, inverse, counts = np.unique(low, return_inverse=True, return_counts=True)
    quantiles = np.array(_normal_quantiles(len(scores)))
    ends = np.cumsum(counts)
    sums = np.concatenate([[0.0], np.cumsum(quantiles)])
    return ((sums[ends] - sums[ends - counts]) / counts)[inverse]


@functools.lru_cache(maxsize=8)
def _normal_quantiles(n: int) -> tuple[float, ...]:
    normal = NormalDist()
    return tuple(normal.inv_cdf((rank + 0.5) / n) for rank in range(n))


def philox_bits(seed: int, name: str, block: int, purpose: int, n: int) -> np.ndarray:
    """Returns `(n,)` uint64 Philox bits, a pure function of the arguments."""
    return np.random.Philox(counter=[0, 0, block, purpose], key=_key(seed, name)).random_raw(n)


def as_uniform(bits: np.ndarray) -> np.ndarray:
    """Turns uint64 bits into float64 strictly between 0 and 1."""
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


@functools.lru_cache(maxsize=64)
def _key(seed: int, name: str) -> np.ndarray:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.frombuffer(digest[:16], "<u8").astype(np.uint64)
