"""Falls back to uniform selection when the live validation loss breaks its trend.

    record_validation(run_dir, step, loss)      in the training job, after each evaluation
    broken_trend(steps, losses) -> Break        where the newest losses rise above their own trend
    fall_back(registry, reason) -> version      the running scorer again, with strength 0

The gate judges a version by short runs at the moment it is made; the live curve is the only witness
of what it does afterwards. A loss curve falls, and ever more slowly, so it is held against its own
trend: a quadratic in the logarithm of the step, fitted robustly to the points before, whose
residuals say what is noise. Evidence adds up over points and none counts for more than four
standard errors: a single spike, however high, is not a break, and a lasting rise is one after a
handful of points. Noise that is correlated from point to point raises the bar as it should.

Imports no jax, so that a training job and a loader may use it. Cost: one line per evaluation; a
check reads the file and fits three numbers to 128 points, about 0.2 ms, for every fourth of the
newest 512.

References:
  Page, Continuous inspection schemes, Biometrika 1954 (CUSUM).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from metagrad_filter.errors import ConfigError, DataError, ScorerRejected
from metagrad_filter.files import canonical_json, make_directory
from metagrad_filter.registry import Registry

FILE = "validation.jsonl"

_MAX_BYTES = 64 * 2**20
_DEGREE = 2
_HALF_SHIFT = 1.5  # half of the smallest rise, in standard errors, that is to be found at once
_MOST = 4.0  # standard errors that one point can count for
_LIMIT = 6.5  # more than any two points can bring together: 2 (4 - 1.5) = 5
_HUBER = 1.345
_REFIT = 4  # points for which a trend serves, unless one of them is above it
_FINEST = 1e-4  # of the loss: noise below it is not told from none


@dataclass(frozen=True)
class Break:
    """A validation loss that left its trend.

    Attributes:
      step: training step of the point at which it was found.
      loss: the loss there, in its own unit; may be NaN or infinite.
      expected: what the trend predicted for that step; NaN where the loss is not finite.
      standard_error: of one point about the prediction, in the loss's unit; NaN likewise.
    """

    step: int
    loss: float
    expected: float = math.nan
    standard_error: float = math.nan

    def __str__(self) -> str:
        if not math.isfinite(self.loss):
            return f"the validation loss at step {self.step} is {self.loss}"
        return (
            f"the validation loss at step {self.step} is {self.loss:.4f} where its trend leads to "
            f"{self.expected:.4f} (+- {self.standard_error:.4f}), and those before it lie above too"
        )


def record_validation(run_dir: str | Path, step: int, loss: float, *, reset: bool = False) -> None:
    """Appends one evaluation of the model in training to `run_dir/validation.jsonl`.

    One process writes, any number read. A line is written at once; one that a crash tore is
    ignored, and the next starts on a line of its own.

    Args:
      run_dir: the run's directory; made if missing.
      step: training step, >= 0. A step that is not beyond the last one says that training went
        back to a checkpoint: readers forget the points from there on.
      loss: mean held-out loss, always on the same windows; NaN and infinities are data too.
      reset: the curve starts anew here, for instance because the learning rate warms up again or
        other windows are held out: readers forget the points before.

    Raises:
      ConfigError: `step` or `loss` is not a number of that kind.
      OSError: it cannot be written.
    """
    if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < 0:
        raise ConfigError(f"step={step!r}; expected an integer >= 0, the training step.")
    try:
        value = float(loss)
    except (TypeError, ValueError):
        raise ConfigError(f"loss={loss!r}; expected a number, the mean held-out loss.") from None
    entry: dict[str, Any] = {
        "step": int(step),
        "loss": value if math.isfinite(value) else str(value),
    }
    if reset:
        entry["reset"] = True
    make_directory(Path(run_dir).absolute())
    handle = os.open(Path(run_dir) / FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(handle).st_size
        torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        os.write(handle, (b"\n" if torn else b"") + canonical_json(entry) + b"\n")
    finally:
        os.close(handle)


def read_validation(run_dir: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads the points that count, oldest first.

    Returns:
      `(n,)` int64 steps, strictly ascending, and `(n,)` float64 losses, from the last reset on. No
      file reads as no points, a damaged line as none.

    Raises:
      DataError: the file is longer than 64 MiB.
      OSError: it cannot be read.
    """
    path = Path(run_dir) / FILE
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        data = b""
    if len(data) > _MAX_BYTES:
        raise DataError(
            f"{path} is longer than {_MAX_BYTES} bytes; record fewer evaluations, or move it away."
        )
    steps: list[int] = []
    losses: list[float] = []
    for line in data.split(b"\n"):
        entry = _entry(line)
        if entry is None:
            continue
        step, loss, reset = entry
        if reset:
            steps, losses = [], []
        while steps and steps[-1] >= step:
            steps.pop()
            losses.pop()
        steps.append(step)
        losses.append(loss)
    return np.array(steps, np.int64), np.array(losses, np.float64)


def _entry(line: bytes) -> tuple[int, float, bool] | None:
    try:
        entry = json.loads(line)
        step = entry["step"]
        if type(step) is not int or not 0 <= step < 2**53:
            return None
        return step, float(entry["loss"]), entry.get("reset") is True
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def broken_trend(
    steps: Sequence[int] | np.ndarray,
    losses: Sequence[float] | np.ndarray,
    *,
    after: int = -1,
    window: int = 128,
    least: int = 32,
    newest: int = 512,
) -> Break | None:
    """Looks for the first break of a falling loss curve; pure.

    The excess of each point over the trend of the (at most `window`) points before is counted in
    robust standard errors of a prediction, at most 4, less 1.5, and summed; the sum starts again
    from 0 where it falls below. While it is above 0 the points in question do not enter the trend.
    A sum above 6.5, times `(1 + r) / (1 - r)` for residuals of lag-one correlation r, is a break.
    Simulated on power-law curves: a lasting rise by 3 standard deviations of the noise is found
    after 4 to 9 points (quartiles), a large one at the third; without one, 10,000 points of
    independent noise show no break, of noise with lag-one correlation .5 one, of .8 some twenty. A
    loss that is not finite is a break at once.

    Args:
      steps: `(n,)` ascending.
      losses: `(n,)`.
      after: points up to this step are ignored, for instance because a break was answered there.
      window: points that a trend is fitted to.
      least: points before anything but a non-finite loss can be a break.
      newest: points that are held against the trend; whoever looks from time to time has seen the
        earlier ones. One that is not finite is found wherever it is.

    Raises:
      ConfigError: the lengths differ, steps do not ascend, or `least` or `window` is too small.
    """
    x, y = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
    if x.ndim != 1 or x.shape != y.shape or (len(x) and (x[0] < 0 or not (np.diff(x) > 0).all())):
        raise ConfigError(
            f"steps {x.shape} and losses {y.shape} do not belong together; expected as many of "
            "each, with steps that ascend from 0 or more."
        )
    if not 2 * (_DEGREE + 1) <= least <= window:
        raise ConfigError(
            f"least={least!r}, window={window!r}; expected {2 * (_DEGREE + 1)} <= least <= window."
        )
    x, y = x[x > after], y[np.asarray(steps) > after]
    infinite = np.flatnonzero(~np.isfinite(y))
    last = int(infinite[0]) if len(infinite) else len(y)
    trend, fitted, evidence = None, 0, 0.0
    logs = np.log1p(x)
    for i in range(max(least, last - newest), last):
        if trend is None or (evidence == 0.0 and i >= fitted + _REFIT):
            first = max(0, i - window)
            trend, fitted = _Trend.fit(logs[first:i], y[first:i]), i
        expected, error = trend.predict(logs[i])
        evidence = max(0.0, evidence + min((y[i] - expected) / error, _MOST) - _HALF_SHIFT)
        if evidence > _LIMIT * trend.inflation:
            return Break(int(x[i]), float(y[i]), float(expected), float(error))
    return Break(int(x[last]), float(y[last])) if last < len(y) else None


@dataclass(frozen=True)
class _Trend:
    """A robust quadratic, the scale of its residuals, and how much correlation widens them."""

    centre: float
    half: float
    coefficients: np.ndarray
    inverse: np.ndarray
    scale: float
    inflation: float

    @classmethod
    def fit(cls, x: np.ndarray, y: np.ndarray) -> _Trend:
        centre, half = (x[0] + x[-1]) / 2, (x[-1] - x[0]) / 2
        basis = ((x - centre) / half)[:, None] ** np.arange(_DEGREE + 1)
        weights, scale, residuals = np.ones(len(x)), 0.0, y
        coefficients = np.zeros(_DEGREE + 1)
        for _ in range(4):
            weighted = basis * weights[:, None]
            coefficients = np.linalg.solve(weighted.T @ basis, weighted.T @ y)
            residuals = y - basis @ coefficients
            scale = 1.4826 * float(np.median(np.abs(residuals)))
            if scale == 0:
                break
            weights = np.minimum(1, _HUBER * scale / np.maximum(np.abs(residuals), 1e-300))
        scale *= math.sqrt(len(x) / (len(x) - _DEGREE - 1))
        scale = max(scale, _FINEST * float(np.median(np.abs(y))), 1e-300)
        clipped = np.clip(residuals, -_MOST * scale, _MOST * scale)
        power = float(clipped @ clipped)
        lag = float(clipped[1:] @ clipped[:-1]) / power if power > 0 else 0.0
        # A fit of few points makes residuals look less correlated than the noise is.
        lag = min(max(lag + (_DEGREE + 1) / len(x), 0.0), 0.8) if lag > 0 else 0.0
        return cls(
            centre, half, coefficients, np.linalg.inv(basis.T @ basis), scale, (1 + lag) / (1 - lag)
        )

    def predict(self, x: float) -> tuple[float, float]:
        row = ((x - self.centre) / self.half) ** np.arange(_DEGREE + 1)
        variance = 1 + self.inflation * (row @ self.inverse @ row)
        return float(row @ self.coefficients), self.scale * math.sqrt(variance)


def last_fallback(registry: Registry) -> int:
    """The step of the newest break that a version answers; -1 where there was none.

    Pass it to `broken_trend` as `after`: the trend begins anew behind a break that was answered.

    Raises:
      OSError: the registry cannot be listed.
    """
    for version in reversed(registry.versions()):
        try:
            step = registry.manifest(version)["metadata"].get("fallback_step")
        except ScorerRejected:
            continue  # a damaged version says nothing; readers refuse it and say so
        if type(step) is int:
            return step
    return -1


def fall_back(registry: Registry, reason: Break | str) -> int | None:
    """Publishes the running scorer with strength 0: uniform selection from the next interval on.

    The quota stays exact, only the choice becomes uniform. The next version that a gate accepts
    lifts it. Metadata say `fallback` and, for a `Break`, `fallback_step`.

    Returns:
      The new version; None where there is nothing to fall back from: no version, or uniform
      already. Raises `OSError` and `PublishFailed`.
    """
    running = registry.look()
    if running.version is None or running.scorer.strength == 0:
        return None
    metadata: dict[str, Any] = {"fallback": str(reason), "fallback_from": running.version}
    if isinstance(reason, Break):
        metadata["fallback_step"] = reason.step
    return registry.publish(replace(cast(Any, running.scorer), strength=0.0), metadata)
