"""One window at a time: a score threshold that moves so that the keep ratio holds.

    rule = Threshold(ratio, seed=0, name="default")
    rule.begin(reference, strength)          a version of the scorer starts to act
    rule.offer(score) -> bool                kept or not
    rule.state() / rule.restore(state)       JSON types, about six kilobytes

For loaders that cannot read a block ahead. A histogram of the scores, each window weighing half of
one that comes 16,384 later, gives the score that the wanted share lies above. A quantile alone
cannot hold a ratio while scores drift, so two things are added. The *debt* (windows that should
have been kept, minus those that were) moves the wanted share until it is paid, over about 1,024
windows: integral control, as in adaptive conformal inference. And a *clamp* never lets the debt
leave a fixed band, whatever the scores do, so over any 10,000 windows the kept share is within one
percentage point of the ratio by construction.

Every decision is a function of the scores so far, the ratio, the seed and the name; arithmetic is
IEEE and in a fixed order, so a restored rule goes on bit for bit. Cost: a microsecond or two a
window, 4 KiB of state. Blocks (`selection.py`) keep better windows where a loader can read ahead.

References:
  Gibbs and Candes, Adaptive Conformal Inference Under Distribution Shift, 2021, equation 2.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from statistics import NormalDist
from typing import Any

import numpy as np

from metagrad_filter.errors import StateMismatch
from metagrad_filter.selection import as_uniform, philox_bits

_BINS = 1024
_UPDATE = 128  # windows between two looks at the histogram
_DECAY = np.float32(0.5 ** (_UPDATE / 16_384))
_HORIZON = 1024  # windows over which a debt is paid
_BAND = 48.0
_REFERENCE_WEIGHT = 2048.0  # windows that a version's reference counts for
_PURPOSES = (2, 3, 4)  # Philox streams: coin, ties, Gumbel; 0 and 1 belong to selection.py

_FIELDS = ("seen", "kept", "middle", "spread", "threshold", "strength", "counts", "pending")


class Threshold:
    """The rule and its state.

    Attributes:
      seen: windows offered.
      kept: windows kept.
      score: the score that a window must exceed to be kept now; NaN while there is no histogram or
        where the ranking is randomised.
    """

    def __init__(
        self,
        ratio: Fraction,
        *,
        seed: int = 0,
        name: str = "default",
        explore: Fraction | float = 0.0,
    ):
        self.seen = 0
        self.kept = 0
        self._numerator, self._denominator = ratio.numerator, ratio.denominator
        self._ratio = float(ratio)
        self._seed, self._name = seed, name
        self._explore = float(explore)
        # A ratio near 0 or 1 leaves fewer windows to correct with, so its band is narrower.
        self._band = max(4.0, _BAND * min(1.0, float(min(ratio, 1 - ratio)) / 0.3))
        self._middle, self._spread = 0.0, 0.0
        self._strength = math.inf
        self._reference: np.ndarray | None = None
        self._counts = np.zeros(_BINS, np.float32)
        self._threshold = 0.0
        self._pending: list[float] = []
        self._encoded: str | None = None
        self._noise: tuple[int, list[list[float]]] = (-1, [])

    @property
    def score(self) -> float:
        if not self._spread or not math.isinf(self._strength):
            return math.nan
        squashed = min(max(self._threshold / _BINS * 2 - 1, -0.999999), 0.999999)
        return self._middle + self._spread * squashed / (1 - abs(squashed))

    def begin(self, reference: Sequence[float] | None, strength: float) -> None:
        """Starts a version: its scores have a scale of their own.

        Args:
          reference: quantiles of the version's scores at equal steps from 0 to 1, two or more; None
            when it has none. Then the next 128 windows are kept by lot, and give the scale.
          strength: as in `Scorer.strength`.
        """
        self._strength = strength
        self._pending = []
        self._counts[:] = 0
        self._encoded = None
        self._spread = 0.0
        self._reference = None if reference is None else np.asarray(reference, np.float64)
        if self._reference is not None:
            levels = np.linspace(0, len(self._reference) - 1, 4097)[:-1] + 0.5 / 4096
            sample = np.interp(levels, np.arange(len(self._reference)), self._reference)
            if not math.isinf(strength):
                noise = as_uniform(philox_bits(self._seed, self._name, 0, 5, len(sample)))
                ranks = np.interp(levels, [0, len(self._reference) - 1], [0, 1])
                sample = np.array([self._logit(r, u) for r, u in zip(ranks, noise)])
            self._calibrate(sample, _REFERENCE_WEIGHT)

    def offer(self, score: float | None) -> bool:
        """Decides on the next window.

        Args:
          score: a non-finite score ranks last; None decides by lot and leaves the histogram alone.

        Returns:
          Whether the window is kept.
        """
        coin, tie, gumbel = self._draw()
        share = self._wanted_share()
        self.seen += 1
        wanted = self.seen * self._numerator / self._denominator
        if score is None:
            keep = coin < share
        elif not self._spread:
            keep = coin < share
            self._pending.append(self._value(score, gumbel))
        else:
            value = self._value(score, gumbel)
            position = self._position(value) + tie - 0.5
            self._pending.append(position)
            # The lower end of the coin's range chooses who is decided by lot, the rest of it how.
            if coin < self._explore:
                keep = coin < self._explore * share
            else:
                keep = position > self._threshold
        if keep and self.kept + 1 > wanted + self._band:
            keep = False
        elif not keep and self.kept < wanted - self._band:
            keep = True
        self.kept += bool(keep)
        if len(self._pending) == _UPDATE:
            self._update()
        return bool(keep)

    def state(self) -> dict[str, Any]:
        """Returns the state as JSON types of constant structure."""
        if self._encoded is None:
            self._encoded = _encode(self._counts)
        return {
            "seen": self.seen,
            "kept": self.kept,
            "middle": self._middle,
            "spread": self._spread,
            "threshold": self._threshold,
            "strength": str(self._strength),
            "counts": self._encoded,
            "pending": _encode(np.array(self._pending, np.float64)),
        }

    def restore(self, state: Mapping[str, Any], reference: Sequence[float] | None = None) -> None:
        """Goes on from a state.

        Args:
          state: from `state`.
          reference: of the version that acts, which ranks of a randomised choice are read from.

        Raises:
          StateMismatch: the state has other fields or sizes.
        """
        if not isinstance(state, Mapping) or set(state) != set(_FIELDS):
            seen = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise StateMismatch(
                f"The threshold's state has fields {seen}, expected {sorted(_FIELDS)}; it was "
                "written by another pipeline or version, restore it with that one."
            )
        counts = _decode("counts", state["counts"], np.float32)
        pending = _decode("pending", state["pending"], np.float64)
        if counts.shape != (_BINS,) or len(pending) >= _UPDATE:
            raise StateMismatch(
                f"The threshold's state holds {len(counts)} counts and {len(pending)} pending "
                f"windows, expected {_BINS} and fewer than {_UPDATE}; it was written by another "
                "version, restore it with that one."
            )
        self.seen, self.kept = int(state["seen"]), int(state["kept"])
        self._middle, self._spread = float(state["middle"]), float(state["spread"])
        self._threshold = float(state["threshold"])
        self._strength = float(state["strength"])
        self._counts, self._pending = counts.copy(), pending.tolist()
        self._encoded = state["counts"]
        self._reference = None if reference is None else np.asarray(reference, np.float64)
        self._noise = (-1, [])

    def _draw(self) -> tuple[float, float, float]:
        """Returns three uniforms of the window's number."""
        group, offset = divmod(self.seen, _UPDATE)
        if self._noise[0] != group:
            drawn = [
                as_uniform(philox_bits(self._seed, self._name, group, purpose, _UPDATE)).tolist()
                for purpose in _PURPOSES
            ]
            self._noise = (group, drawn)
        coin, tie, gumbel = self._noise[1]
        return coin[offset], tie[offset], gumbel[offset]

    def _value(self, score: float, uniform: float) -> float:
        """Returns what is compared: the score, or with finite strength a noisy rank."""
        if not math.isfinite(score):
            return -math.inf
        if math.isinf(self._strength):
            return score
        if self._reference is None:
            rank = 0.5  # no scale to rank on: by lot
        else:
            levels = np.linspace(0, 1, len(self._reference))
            rank = float(np.interp(score, self._reference, levels))
        return self._logit(rank, uniform)

    def _logit(self, rank: float, uniform: float) -> float:
        quantile = NormalDist().inv_cdf(min(max(rank, 1e-3), 1 - 1e-3))
        return self._strength * quantile - math.log(-math.log(uniform))

    def _position(self, value: float) -> float:
        """Maps a value into [0, bins): linear near the middle, finite everywhere."""
        if value == -math.inf:
            return 0.0
        z = (value - self._middle) / self._spread
        # z / (1 + |z|) and no logarithm: the same bits with every mathematical library.
        return min((z / (1 + abs(z)) + 1) / 2 * _BINS, _BINS - 1.0)

    def _wanted_share(self) -> float:
        debt = self.seen * self._numerator / self._denominator - self.kept
        return min(max(self._ratio + debt / _HORIZON, 0.0), 1.0)

    def _update(self) -> None:
        if not self._spread:
            finite = np.array([value for value in self._pending if math.isfinite(value)])
            if len(finite):
                self._calibrate(finite, float(len(finite)))
            self._pending = []
            return
        self._counts *= _DECAY
        bins = np.clip(np.floor(self._pending), 0, _BINS - 1).astype(np.int64)
        self._counts += np.bincount(bins, minlength=_BINS).astype(np.float32)
        self._pending = []
        self._encoded = None
        self._threshold = self._quantile(1 - self._wanted_share())

    def _calibrate(self, values: np.ndarray, weight: float) -> None:
        """Sets the scale and the first histogram from a sample of values."""
        low, middle, high = np.quantile(values, [0.159, 0.5, 0.841])
        self._middle = float(middle)
        self._spread = float(high - low) / 2 or float(np.ptp(values)) or 1.0
        positions = [math.floor(self._position(float(value))) for value in values]
        counts = np.bincount(positions, minlength=_BINS)
        self._counts = (counts * (weight / len(values))).astype(np.float32)
        self._encoded = None
        self._threshold = self._quantile(1 - self._wanted_share())

    def _quantile(self, level: float) -> float:
        """Returns the position below which the share `level` of the histogram lies."""
        cumulative = np.cumsum(self._counts, dtype=np.float64)
        target = level * float(cumulative[-1])
        bin_ = min(int(np.searchsorted(cumulative, target)), _BINS - 1)
        count = float(self._counts[bin_])
        before = float(cumulative[bin_]) - count
        return bin_ + (min(max((target - before) / count, 0.0), 1.0) if count else 0.0)


def _encode(array: np.ndarray) -> str:
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def _decode(field: str, text: Any, dtype: Any) -> np.ndarray:
    try:
        data = base64.b64decode(text, validate=True)
        return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype)
    except (TypeError, ValueError) as error:
        raise StateMismatch(
            f"{field} of the threshold's state cannot be read ({error}); the checkpoint is "
            "damaged, restore an earlier one."
        ) from None
