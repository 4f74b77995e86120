"""A score distribution in 64 counts and its moments: small, exact to add, made from records.

    sketch = ScoreSketch.from_record(record) + ScoreSketch.of(scores, reference)

The bins lie between quantiles of the scorer version's reference sample, so without drift each holds
1/64 of the windows, whatever the scale of the scores. Counts add exactly; moments add up to
rounding. Cost: one search per score when it is made, 64 additions when two are added.

Read next: `drift.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metagrad_filter.blockstats import BINS, bin_edges
from metagrad_filter.errors import ConfigError, DataError, ScorerRejected
from metagrad_filter.registry import Registry
from metagrad_filter.store import Store


@dataclass(frozen=True)
class ScoreSketch:
    """How many scores fell in each bin, and their moments.

    Attributes:
      bins: 64 counts; bin i holds scores from the reference quantile at level i/64 up to, without,
        the one at (i + 1)/64, the outer two are open.
      mean: of the scores; 0 when there are none.
      m2: sum of squared deviations from the mean.
      minimum: inf when there are none.
      maximum: -inf when there are none.

    Raises:
      DataError: the counts are not 64 natural numbers, or the moments do not belong to them.
    """

    bins: tuple[int, ...] = (0,) * BINS
    mean: float = 0.0
    m2: float = 0.0
    minimum: float = math.inf
    maximum: float = -math.inf

    def __post_init__(self):
        natural = all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in self.bins)
        if len(self.bins) != BINS or not natural:
            raise DataError(
                f"bins is {self.bins!r}, expected {BINS} counts >= 0; make sketches with "
                "ScoreSketch.of or from_record."
            )
        if self.count and not (
            math.isfinite(self.mean)
            and 0 <= self.m2 < math.inf
            and -math.inf < self.minimum <= self.maximum < math.inf
        ):
            raise DataError(
                f"mean {self.mean!r}, m2 {self.m2!r}, minimum {self.minimum!r} and maximum "
                f"{self.maximum!r} are no moments of {self.count} finite scores."
            )

    @property
    def count(self) -> int:
        """Scores in the sketch."""
        return sum(self.bins)

    @property
    def deviation(self) -> float:
        """Standard deviation of the scores; 0 for fewer than two."""
        return math.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else 0.0

    @classmethod
    def of(cls, scores: np.ndarray, reference: Sequence[float]) -> ScoreSketch:
        """Returns the sketch of scores; non-finite ones are left out.

        Args:
          scores: `(n,)` scores of one version.
          reference: the version's `metadata["reference"]`.

        Raises:
          ConfigError: `reference` is not an ascending list of two or more finite quantiles.
        """
        edges = bin_edges(reference)
        if edges is None:
            raise ConfigError(
                f"reference is {str(reference)[:80]}, expected two or more ascending quantiles as "
                "in a scorer's metadata; publish a version that was fitted with them."
            )
        scores = np.asarray(scores, np.float32).ravel()
        scores = scores[np.isfinite(scores)]
        if not len(scores):
            return cls()
        wide = scores.astype(np.float64)
        counts = np.bincount(edges.searchsorted(scores, side="right"), minlength=BINS)
        mean = float(wide.mean())
        squares = float(((wide - mean) ** 2).sum())
        return cls(tuple(counts.tolist()), mean, squares, float(scores.min()), float(scores.max()))

    @classmethod
    def from_record(cls, record: Mapping[str, Any], *, kept: bool = False) -> ScoreSketch | None:
        """Returns the sketch of a record's windows.

        Args:
          record: of `read_records`.
          kept: of the kept windows; the moments, which records hold for all windows only, are then
            those of all windows.

        Returns:
          The sketch; None when the record has no scores or no bins.
        """
        scores = record["scores"]
        if scores is None:
            return None
        bins = scores["kept_bins" if kept else "bins"]
        if bins is None:
            return None
        return cls(tuple(bins), *(scores[f] for f in ("mean", "m2", "minimum", "maximum")))

    def to_record(self) -> dict[str, Any] | None:
        """Returns the `scores` of a record, without `kept_bins`; None when there are no scores."""
        if not self.count:
            return None
        return {
            "count": self.count,
            "mean": self.mean,
            "m2": self.m2,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "bins": list(self.bins),
            "kept_bins": None,
        }

    def __add__(self, other: ScoreSketch) -> ScoreSketch:
        """Adds a sketch of the same version; bins of other versions mean other scores.

        References:
          Chan, Golub and LeVeque, 1983, Algorithms for computing the sample variance, equation 1.5.
        """
        if not isinstance(other, ScoreSketch):
            return NotImplemented
        a, b = self.count, other.count
        if not a or not b:
            return self if a else other
        delta = other.mean - self.mean
        return ScoreSketch(
            tuple(x + y for x, y in zip(self.bins, other.bins, strict=True)),
            self.mean + delta * b / (a + b),
            self.m2 + other.m2 + delta * delta * a * b / (a + b),
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
        )


def references(
    run_dir: str | os.PathLike[str] | Store,
) -> Callable[[int], list[float] | None]:
    """Returns a function from a version to its reference quantiles, or None where it has none.

    Args:
      run_dir: a directory, a URL (see `open_store`), or a store; versions are read when asked for.
    """
    registry = Registry(run_dir)

    def reference(version: int) -> list[float] | None:
        if version < 1:
            return None
        try:
            values = registry.manifest(version)["metadata"].get("reference")
        except ScorerRejected:
            # The filter refuses such a version itself and says why; here it only has no reference.
            return None
        return values if bin_edges(values) is not None else None

    return reference
