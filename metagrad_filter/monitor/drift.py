"""How far scores, groups and features have moved, and how far chance alone moves them.

    psi(counts) > psi_limit(n)          the scores of n windows have left their version's reference

Every statistic has a limit: its quantile, at a stated false-alarm level, when nothing has changed.
Both the windows and the reference (4096 windows by default) are samples, and both are counted in
the limit. The limits take windows as independent; where neighbouring windows come from one
document, pass the number of documents as `n`. Everything here is pure; simulated limits are seeded
and cached. Cost: microseconds per statistic, tenths of a second for a limit the first time.

References:
  Yurdakul and Naranjo, 2020, Statistical properties of the population stability index, Journal of
    Risk Model Validation 14(4): PSI is (1/n + 1/m) chi-squared with K - 1 degrees of freedom.
  Massart, 1990, The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality.
  Page, 1954, Continuous inspection schemes, Biometrika 41 (the cumulative sum).
  Bifet and Gavalda, 2007, Learning from time-changing data with adaptive windowing (ADWIN).

Read next: `alarms.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.stats import rankdata

from metagrad_filter.blockstats import BINS
from metagrad_filter.errors import ConfigError
from metagrad_filter.monitor.sketch import ScoreSketch
from metagrad_filter.statistics import rank_correlation

REFERENCE_WINDOWS = 4096

_DRAWS = 20_000
_SIMULATED_LEVEL = 20 / _DRAWS  # a quantile with fewer draws beyond it is no estimate
_ANALYTIC_COUNT = 50  # expected windows a bin from which the chi-squared form holds


def psi(counts: ArrayLike, reference: ArrayLike | None = None) -> float:
    """Returns the population stability index of binned windows.

    Args:
      counts: `(K,)` windows per bin.
      reference: `(K,)` windows per bin, or positive shares as floats that sum to 1, to compare
        with; None for equal shares.

    Returns:
      The sum over bins of `(p - q) log(p / q)`, in nats; half a window is added to every bin of
      counts, so that an empty bin is finite.

    Raises:
      ConfigError: the counts are not finite numbers >= 0 of equal length, or are all zero.
    """
    p, q = _shares(counts, reference)
    return float(np.sum((p - q) * np.log(p / q)))


def ks(counts: ArrayLike, reference: ArrayLike | None = None) -> float:
    """Returns the largest distance of two distribution functions at the bins' edges, in [0, 1].

    Args:
      counts: `(K,)` windows per bin.
      reference: as for `psi`.
    """
    p, q = _shares(counts, reference, smoothing=0.0)
    return float(np.max(np.abs(np.cumsum(p - q)[:-1])))


def wasserstein(sketch: ScoreSketch, reference: Sequence[float]) -> float:
    """Returns the Wasserstein-1 distance of a sketch from its reference, in units of the score.

    Between two edges the distribution functions are taken as straight, and the tails beyond as
    shaped like the reference's; the distance of the means, a lower bound of the true value, covers
    scores that left the reference altogether.

    Args:
      sketch: at least one score.
      reference: the version's reference quantiles.
    """
    if not sketch.count:
        raise ConfigError("the sketch is empty, expected at least one score.")
    grid = _grid(np.asarray(reference, np.float64))
    gap = np.cumsum(np.asarray(sketch.bins) / sketch.count - 1 / BINS)
    binned = _area(np.concatenate([[0.0], gap[:-1], [0.0]]), np.diff(grid))
    return max(float(binned), abs(sketch.mean - reference_moments(reference)[0]))


def reference_moments(reference: Sequence[float]) -> tuple[float, float]:
    """Returns mean and standard deviation of the scores whose quantiles are given.

    The distribution function is straight between two quantiles, so the moments are exact for it.
    """
    values = np.asarray(reference, np.float64)
    left, right = values[:-1], values[1:]
    mean = float(np.mean((left + right) / 2))
    square = float(np.mean((left**2 + left * right + right**2) / 3))
    return mean, math.sqrt(max(square - mean * mean, 0.0))


def merge_atoms(counts: ArrayLike, reference: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Joins bins whose common edge is a score that many windows share.

    Such a score lies in one bin, though its windows fill several levels, so equal shares would be
    expected in vain.

    Args:
      counts: `(64,)` windows per bin.
      reference: the version's reference quantiles.

    Returns:
      `(K,)` counts and the `(K,)` shares that the reference expects, K from 1 to 64.
    """
    values = np.asarray(reference, np.float64)
    levels = np.linspace(0, 1, len(values))
    near = np.arange(1, BINS) / BINS
    step = 1 / (len(values) - 1)
    middle = np.interp(near, levels, values)
    below = np.interp(near - step, levels, values)
    above = np.interp(near + step, levels, values)
    group = np.concatenate([[0], np.cumsum((below < middle) & (middle < above))])
    joined = np.bincount(group, weights=np.asarray(counts, np.float64))
    return joined.astype(np.int64), np.bincount(group) / BINS


def psi_limit(
    n: int, *, bins: int = BINS, reference: int = REFERENCE_WINDOWS, level: float = 1e-3
) -> float:
    """Returns the PSI that n windows exceed with probability `level` when nothing has changed.

    Analytic with 50 or more windows a bin, or for levels below 0.001; else simulated.

    Args:
      n: windows.
      bins: K.
      reference: windows of the reference sample, or of the other sketch.
      level: false-alarm probability of one look.

    Raises:
      ConfigError: an argument is out of its domain.
    """
    _check(n, bins, reference, level)
    chi = float(stats.chi2.isf(level, bins - 1)) * (1 / n + 1 / reference)
    if min(n, reference) >= _ANALYTIC_COUNT * bins:
        return chi
    simulated, _ = _null(_rounded(n), bins, _rounded(reference))
    if level >= _SIMULATED_LEVEL:
        return float(np.quantile(simulated, 1 - level))
    # Where the simulation ends, it scales the tail that the theory gives.
    anchor = float(np.quantile(simulated, 1 - _SIMULATED_LEVEL))
    theory = float(stats.chi2.isf(_SIMULATED_LEVEL, bins - 1)) * (1 / n + 1 / reference)
    return chi * max(anchor / theory, 1.0)


def ks_limit(
    n: int, *, bins: int = BINS, reference: int = REFERENCE_WINDOWS, level: float = 1e-3
) -> float:
    """Returns the binned KS distance that n windows exceed with probability `level` by chance.

    Simulated; below level 0.001 Massart's bound, which is never too small a limit.

    Args:
      n: windows.
      bins: K.
      reference: windows of the reference sample, or of the other sketch.
      level: false-alarm probability of one look.

    Raises:
      ConfigError: an argument is out of its domain.
    """
    _check(n, bins, reference, level)
    effective = n * reference / (n + reference)
    if level >= _SIMULATED_LEVEL:
        _, simulated = _null(_rounded(n), bins, _rounded(reference))
        return float(np.quantile(simulated, 1 - level))
    return math.sqrt(math.log(2 / level) / (2 * effective))


def wasserstein_limit(
    n: int,
    values: Sequence[float],
    *,
    reference: int = REFERENCE_WINDOWS,
    level: float = 1e-3,
) -> float:
    """Returns the `wasserstein` distance that n windows exceed with probability `level` by chance.

    A union of a simulated limit for the binned part and the normal limit of the means.

    Args:
      n: windows.
      values: the version's reference quantiles.
      reference: windows of the reference sample.
      level: false-alarm probability, 0.002 or more.

    Raises:
      ConfigError: an argument is out of its domain.
    """
    _check(n, BINS, reference, level)
    if level < 2 * _SIMULATED_LEVEL:
        raise ConfigError(
            f"level is {level!r}, expected >= {2 * _SIMULATED_LEVEL}: rarer distances are not "
            "simulated; use ks_limit."
        )
    widths = np.diff(_grid(np.asarray(values, np.float64)))
    binned = _area(_null_gaps(_rounded(n), BINS, _rounded(reference)), widths)
    spread = reference_moments(values)[1] * math.sqrt(1 / n + 1 / reference)
    return max(float(np.quantile(binned, 1 - level / 2)), float(stats.norm.isf(level / 4)) * spread)


@dataclass(frozen=True)
class Cusum:
    """A two-sided cumulative sum of standardised values: finds small lasting shifts of a mean.

    Attributes:
      allowance: drift that is let go, in standard deviations of one value.
      high: sum towards larger values, >= 0.
      low: sum towards smaller values, >= 0.

    References:
      Page, 1954, Biometrika 41, section 2.
    """

    allowance: float = 0.5
    high: float = 0.0
    low: float = 0.0

    def add(self, value: float) -> Cusum:
        """Returns the sums after one more value."""
        return Cusum(
            self.allowance,
            max(0.0, self.high + value - self.allowance),
            max(0.0, self.low - value - self.allowance),
        )

    @property
    def value(self) -> float:
        """The larger of both sums."""
        return max(self.high, self.low)


@functools.lru_cache(maxsize=64)
def cusum_limit(allowance: float, run_length: float, *, seed: int = 0) -> float:
    """Returns the limit at which `Cusum` alarms once in `run_length` values without a shift.

    Simulated for run lengths up to 2000; beyond, the simulated limit grows at the rate of
    Siegmund's approximation, in which the run length is exponential in twice allowance times limit.

    Args:
      allowance: as in `Cusum`, in (0, 2].
      run_length: mean number of standard normal values between false alarms, >= 10.
      seed: of the simulation.

    Raises:
      ConfigError: an argument is out of its domain.

    References:
      Siegmund, 1985, Sequential Analysis, section 2.6.
    """
    if not 0 < allowance <= 2 or not 10 <= run_length < math.inf:
        raise ConfigError(
            f"allowance is {allowance!r} and run_length is {run_length!r}, expected (0, 2] and a "
            "finite number >= 10."
        )
    steps, chains = math.ceil(min(run_length, 2000)), 500
    rng = np.random.default_rng([seed, 1])
    high, low, peak = np.zeros((3, chains))
    grid = np.linspace(0, 30, 601)
    survived = np.zeros(len(grid))
    alive = np.ones(len(grid))
    for _ in range(steps):
        # The share of chains whose peak is below each limit, summed over steps, is the mean
        # run length to that limit, cut off at `steps`.
        survived += alive
        values = rng.standard_normal(chains)
        high = np.maximum(0, high + values - allowance)
        low = np.maximum(0, low - values - allowance)
        peak = np.maximum(peak, np.maximum(high, low))
        alive = np.searchsorted(np.sort(peak), grid) / chains
    # Run lengths are nearly geometric, so what is cut off is the survivors' share again.
    length = survived / np.maximum(1 - alive, 1 / chains)
    limit = float(np.interp(steps, np.maximum.accumulate(length), grid))
    return limit + math.log(run_length / steps) / (2 * allowance) if run_length > steps else limit


def adwin_changes(values: Iterable[float], *, delta: float = 0.002) -> list[int]:
    """Returns the positions at which ADWIN finds that the mean of a sequence has changed.

    Args:
      values: for instance mean scores per record.
      delta: bound on the false-alarm probability, in (0, 1).

    Raises:
      ConfigError: river is not installed, or `delta` is out of its domain.

    References:
      Bifet and Gavalda, 2007, theorem 3.1.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta is {delta!r}, expected a number between 0 and 1.")
    try:
        from river.drift import ADWIN  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "ADWIN needs the package river, which is not installed; "
            "pip install 'metagrad-filter[drift]'."
        ) from error
    detector = ADWIN(delta=delta, grace_period=10, clock=1)
    changes = []
    for position, value in enumerate(values):
        detector.update(float(value))
        if detector.drift_detected:
            changes.append(position)
    return changes


@dataclass(frozen=True)
class GroupShare:
    """What a group is of the stream and of what is kept.

    Attributes:
      seen: windows of the group in the stream.
      kept: of these, kept.
      stream_share: share of the stream, in [0, 1].
      kept_share: share of the kept windows, in [0, 1].
      low: lower confidence limit of `kept_share`.
      high: upper confidence limit; above `stream_share` on both sides means favoured.
    """

    seen: int
    kept: int
    stream_share: float
    kept_share: float
    low: float
    high: float


def group_shares(
    table: Mapping[str, Sequence[int]], *, confidence: float = 0.95
) -> dict[str, GroupShare]:
    """Compares each group's share of the kept windows with its share of the stream.

    Args:
      table: label -> (seen, kept), as `groups[key]` of a record.
      confidence: of the limits, in (0, 1).

    Returns:
      Shares by label; limits are Wilson's, a little wide since a block keeps an exact number.

    References:
      Wilson, 1927, Journal of the American Statistical Association 22.
    """
    seen = sum(counts[0] for counts in table.values())
    kept = sum(counts[1] for counts in table.values())
    answer = {}
    for label, (mine, chosen) in table.items():
        low, high = wilson(chosen, kept, confidence=confidence)
        share = chosen / kept if kept else 0.0
        answer[label] = GroupShare(mine, chosen, mine / seen if seen else 0.0, share, low, high)
    return answer


def wilson(successes: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Returns Wilson's confidence limits of a share; (0, 1) for n = 0."""
    if not 0 <= successes <= n or not 0 < confidence < 1:
        raise ConfigError(
            f"successes is {successes!r} of n {n!r} at confidence {confidence!r}, expected "
            "0 <= successes <= n and a confidence between 0 and 1."
        )
    if not n:
        return 0.0, 1.0
    z = float(stats.norm.isf((1 - confidence) / 2))
    share, square = successes / n, z * z / n
    middle = share + square / 2
    half = math.sqrt(max(square * (share * (1 - share) + square / 4), 0.0))
    return max((middle - half) / (1 + square), 0.0), min((middle + half) / (1 + square), 1.0)


def mean_shift(
    before: Mapping[str, float], after: Mapping[str, float], *, level: float = 1e-3
) -> tuple[float, float]:
    """Compares the means of a feature.

    Args:
      before: `count` (>= 2), `mean` and `m2`, as `features[name]` of a record.
      after: the same of later blocks.
      level: false-alarm probability, two-sided.

    Returns:
      The difference of the means in its standard errors, inf where neither varies, and the limit
      that its size exceeds with probability `level` when the mean has not changed.

    References:
      Welch, 1947, Biometrika 34.
    """
    if min(before["count"], after["count"]) < 2 or not 0 < level < 1:
        raise ConfigError(
            f"counts are {before['count']} and {after['count']} at level {level!r}, expected two "
            "or more blocks on each side and a level between 0 and 1."
        )
    parts = [(f["m2"] / (f["count"] - 1) / f["count"], f["count"] - 1) for f in (before, after)]
    total = sum(part for part, _ in parts)
    shift = after["mean"] - before["mean"]
    if total <= 0:
        return math.copysign(math.inf, shift) if shift else 0.0, float(stats.norm.isf(level / 2))
    # Each part relative to the total, so that squares of small variances do not underflow.
    freedom = 1 / sum((part / total) ** 2 / n for part, n in parts)
    return shift / math.sqrt(total), float(stats.t.isf(level / 2, freedom))


def rank_agreement(
    scores: ArrayLike,
    labels: ArrayLike,
    seed: int,
    *,
    draws: int = 1000,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Returns Spearman's rho of a scorer with fresh labels, and its bootstrap interval.

    Args:
      scores: `(n,)` of windows drawn uniformly from the stream, n >= 3; drawn from what was kept,
        they say nothing about what was not.
      labels: `(n,)` fresh scores -dPhi/dw of the same windows.
      seed: of the resampling.
      draws: resamples.
      confidence: of the interval, in (0, 1).

    Returns:
      `(rho, low, high)`; 0 where either is constant. Cost: `draws` sorts of n.

    Raises:
      ConfigError: the lengths differ or are below 3, a value is not finite, or an option is out of
        its domain.

    References:
      Efron and Tibshirani, 1993, An Introduction to the Bootstrap, section 13.3 (percentiles).
    """
    a, b = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 3:
        raise ConfigError(
            f"scores and labels have shapes {a.shape} and {b.shape}, expected (n,) twice, n >= 3."
        )
    if not (np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
        raise ConfigError("scores or labels hold NaN or inf, expected finite numbers.")
    if draws < 1 or not 0 < confidence < 1:
        raise ConfigError(
            f"draws is {draws!r} and confidence {confidence!r}, expected >= 1 and between 0 and 1."
        )
    rng = np.random.default_rng(seed)
    rhos = []
    rows = max(1, min(draws, 2**20 // len(a)))
    for start in range(0, draws, rows):
        index = rng.integers(0, len(a), (min(rows, draws - start), len(a)))
        ranks = [rankdata(values[index], axis=1) for values in (a, b)]
        x, y = (r - r.mean(axis=1, keepdims=True) for r in ranks)
        scale = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
        rhos.append((x * y).sum(axis=1) / np.where(scale > 0, scale, 1.0))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(rhos), [tail, 1 - tail])
    return rank_correlation(a, b), float(low), float(high)


def _shares(
    counts: ArrayLike, reference: ArrayLike | None, smoothing: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    p = np.asarray(counts, np.float64)
    q = np.ones_like(p) if reference is None else np.asarray(reference, np.float64)
    usable = all(np.all(np.isfinite(v)) and np.all(v >= 0) and v.sum() > 0 for v in (p, q))
    if p.ndim != 1 or p.shape != q.shape or len(p) < 2 or not usable:
        raise ConfigError(
            f"counts and reference have shapes {p.shape} and {q.shape}, expected the same (K,), "
            "K >= 2, of finite numbers >= 0 that are not all zero."
        )
    p = p + smoothing
    # Shares sum to 1 and are exact; counts are a sample, smoothed as the other one is. A sample of
    # one window sums to 1 as well, so integers are always counts.
    counted = reference is not None and np.asarray(reference).dtype.kind in "iu"
    if counted or (reference is not None and q.sum() > 1.5):
        q = q + smoothing
    return p / p.sum(), q / q.sum()


def _grid(values: np.ndarray) -> np.ndarray:
    """Returns `(65,)` edges; the outer two so that a straight tail has the reference's area."""
    levels = np.linspace(0, 1, len(values))
    grid = np.interp(np.arange(BINS + 1) / BINS, levels, values)
    within = (np.arange(64) + 0.5) / 64 / BINS
    grid[0] = 2 * np.interp(within, levels, values).mean() - grid[1]
    grid[-1] = 2 * np.interp(1 - within, levels, values).mean() - grid[-2]
    return grid


def _area(gaps: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Integrates |gap| over steps of `widths`, the gap being straight within each."""
    left, right = gaps[..., :-1], gaps[..., 1:]
    size = np.abs(left) + np.abs(right)
    # A sign change within a step leaves two triangles, not a trapezium.
    crossing = np.where(size > 0, (left**2 + right**2) / np.where(size > 0, size, 1.0), 0.0)
    return np.where(left * right >= 0, size, crossing) @ widths / 2


def _rounded(n: int) -> int:
    """Returns n rounded down to three binary digits: few simulations, limits a little large."""
    step = 1 << max(n.bit_length() - 3, 0)
    return n // step * step


@functools.lru_cache(maxsize=8)
def _null_gaps(n: int, bins: int, reference: int) -> np.ndarray:
    """Returns `(draws, bins + 1)` differences of two samples' distribution functions."""
    p, q = _null_shares(n, bins, reference)
    gaps = np.cumsum(p / n - q, axis=1)
    gaps[:, -1] = 0.0
    return np.concatenate([np.zeros((len(gaps), 1)), gaps], axis=1)


def _null_shares(n: int, bins: int, reference: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([n, bins, reference])
    # Bins between quantiles of a sample hold Dirichlet shares of what it was drawn from.
    shares = rng.dirichlet(np.full(bins, reference / bins), _DRAWS)
    shares /= shares.sum(axis=1, keepdims=True)
    return rng.multinomial(n, shares), np.full(bins, 1 / bins)


@functools.lru_cache(maxsize=64)
def _null(n: int, bins: int, reference: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(draws,)` sorted PSI and KS of unchanged windows."""
    counts, expected = _null_shares(n, bins, reference)
    smooth = (counts + 0.5) / (n + bins / 2)
    psis = np.sum((smooth - expected) * np.log(smooth / expected), axis=1)
    distances = np.max(np.abs(np.cumsum(counts / n - expected, axis=1)[:, :-1]), axis=1)
    return np.sort(psis), np.sort(distances)


def _check(n: int, bins: int, reference: int, level: float) -> None:
    if n < 1 or bins < 2 or reference < 2 * bins or not 0 < level < 1:
        raise ConfigError(
            f"n is {n!r}, bins {bins!r}, reference {reference!r} and level {level!r}, expected "
            "n >= 1, bins >= 2, a reference of two or more windows a bin and a level between 0 and "
            "1."
        )
