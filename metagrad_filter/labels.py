"""Labels: a window's aggregated score from one calibration round, and how reliable it is.

Raw probe scores have monstrous tails (a coordinate with almost no second moment divides by its
root), so labels are the Gaussian quantiles of ranks. Each round appends one file that is never
rewritten; a version is fitted on the pooled labels of recent rounds, because the average of two
rounds selects better than the newest alone.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import norm, rankdata

from metagrad_filter.errors import DataError, NonFiniteMetagradient
from metagrad_filter.files import write_once
from metagrad_filter.statistics import rank_correlation

_FILE = re.compile(r"round-(\d{6})\.npz")


def gaussian_ranks(scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Normal quantiles of the ranks of `(N,)` scores: `(N,)` float32, ties share their mean rank.

    A weight counts how often a score is there: integer weights rank as repetitions would.

    Example:
      >>> gaussian_ranks(np.array([5.0, -1.0, 1000.0])).round(2).tolist()
      [0.0, -0.97, 0.97]
    """
    if weights is None:
        return norm.ppf((rankdata(scores) - 0.5) / max(len(scores), 1)).astype(np.float32)
    _, inverse = np.unique(scores, return_inverse=True)
    held = np.bincount(inverse, weights=weights)
    below = np.cumsum(held) - held
    return norm.ppf((below + held / 2)[inverse] / held.sum()).astype(np.float32)


def split_half_reliability(halves: np.ndarray) -> float:
    """Spearman correlation between the two halves of `(2, N)` scores.

    It says how repeatable a label is, not whether it is right; see `check_metagradients`. A half
    that ranks nothing, because all its scores are equal, has reliability 0.
    """
    return rank_correlation(halves[0], halves[1])


@dataclass(frozen=True)
class RoundLabels:
    """Labels of one round.

    Attributes:
      windows: `(N, T)` int32 or `(N, T, C)` float32.
      halves: `(2, N)` float32 raw scores of two independent measurements, such as the probes of
        two disjoint sets of trajectories; twice the same where the estimator has no randomness.
      target: identifies the outer metric and the estimator; labels that differ in it are never
        pooled.
      norms: `(N,)` float32 gradient norms that the scores were divided by, or None.
    """

    windows: np.ndarray
    halves: np.ndarray
    target: str = ""
    norms: np.ndarray | None = None

    @property
    def values(self) -> np.ndarray:
        """`(N,)` float32 labels: Gaussian ranks of the mean of the halves."""
        return gaussian_ranks(self.halves.astype(np.float64).sum(axis=0))

    @property
    def reliability(self) -> float:
        return split_half_reliability(self.halves)


class PooledLabels(NamedTuple):
    """Labels of several rounds, one after the other.

    Attributes:
      windows: `(N, ...)`.
      values: `(N,)` float32 labels.
      weights: `(N,)` float32 in (0, 1], by the age of their round.
    """

    windows: np.ndarray
    values: np.ndarray
    weights: np.ndarray


class LabelStore:
    """Append-only labels under `run_dir/labels`, one npz file (no pickle) a round."""

    def __init__(self, run_dir: str | Path):
        self.folder = Path(run_dir) / "labels"

    def append(self, round_number: int, labels: RoundLabels) -> None:
        """Stores a round; refuses non-finite scores and rounds that are already there.

        Raises:
          NonFiniteMetagradient: a score is not finite; nothing is written.
          DataError: this round is already stored.
        """
        bad = np.flatnonzero(~np.isfinite(labels.halves).all(axis=0))
        if len(bad):
            raise NonFiniteMetagradient(
                f"{len(bad)} labels of round {round_number} are not finite, the first for window "
                f"{bad[0]}; the round is not stored."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {"windows": labels.windows, "halves": labels.halves}
        if labels.norms is not None:
            arrays["norms"] = labels.norms
        np.savez(buffer, **arrays, target=np.array(labels.target))
        if not write_once(self._path(round_number), buffer.getvalue()):
            raise DataError(
                f"labels of round {round_number} are already stored in {self.folder}; rounds are "
                "never rewritten, start the next one."
            )

    def rounds(self) -> list[int]:
        """Numbers of the stored rounds, ascending."""
        if not self.folder.is_dir():
            return []
        names = (_FILE.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def load(self, round_number: int) -> RoundLabels:
        """Reads one round.

        Raises:
          DataError: the file is missing or damaged.
        """
        path = self._path(round_number)
        try:
            with np.load(path, allow_pickle=False) as data:
                norms = data.get("norms")
                return RoundLabels(data["windows"], data["halves"], str(data["target"]), norms)
        except Exception as error:  # numpy and zipfile raise a dozen types on damaged bytes
            raise DataError(
                f"labels of round {round_number} cannot be read from {path}: {error}; move the "
                "file away, later rounds do without it."
            ) from error

    def pooled(self, recent: int, target: str = "", *, decay: float = 1.0) -> PooledLabels:
        """Windows, labels and weights of the last `recent` rounds of a target, concatenated.

        Labels are rank-normalised within their round first, so rounds at different scales mix. A
        window labelled in several rounds occurs several times; the fit averages its labels. A
        damaged round is left out with a warning, for a fit on fewer labels beats none.

        Args:
          recent: rounds, the newest ones.
          target: as in `RoundLabels`.
          decay: weight of a round's labels against those of the round after it, in (0, 1]; the
            newest have 1. The model that the older ones measured is no longer there.

        Raises:
          DataError: no readable round has this target.
        """
        found: list[RoundLabels] = []
        for number in reversed(self.rounds()):
            if len(found) == recent:
                break
            try:
                labels = self.load(number)
            except DataError as error:
                warnings.warn(f"Left out: {error}", RuntimeWarning, stacklevel=2)
                continue
            if labels.target == target:
                found.append(labels)
        if not found:
            raise DataError(
                f"{self.folder} holds no readable labels of this target; run a calibration round."
            )
        ages = np.arange(len(found))[::-1]
        found.reverse()
        return PooledLabels(
            np.concatenate([labels.windows for labels in found]),
            np.concatenate([labels.values for labels in found]),
            np.repeat(decay**ages, [len(labels.windows) for labels in found]).astype(np.float32),
        )

    def _path(self, round_number: int) -> Path:
        return self.folder / f"round-{round_number:06d}.npz"
