"""Every exception that this package raises on purpose.

    MetagradFilterError
    ├── ConfigError           (ValueError)   an argument or configuration field is out of its domain
    ├── WindowError           (ValueError)   a window, batch or dataset cannot be read as windows
    ├── DataError             (RuntimeError) a download or cached file is not what it should be
    ├── ScorerRejected        (RuntimeError) a published scorer failed verification; see `reason`
    ├── PublishFailed         (RuntimeError) a version could not be written; earlier ones are intact
    ├── StateMismatch         (ValueError)   a checkpoint belongs to another filter; names the field
    ├── NonFiniteMetagradient (ArithmeticError) a trajectory or its adjoint left the finite numbers
    ├── TrajectoryDiverged    (ArithmeticError) the outer metric rose far above where it started
    └── CalibrationFailed     (RuntimeError) a calibration round or its worker ended early

Each message says what was seen, what was expected and what to do.
"""

from __future__ import annotations


class MetagradFilterError(Exception):
    """Base of every error of this package."""


class ConfigError(MetagradFilterError, ValueError):
    """An argument or a configuration field is out of its domain."""


class WindowError(MetagradFilterError, ValueError):
    """A window, a batch or a dataset cannot be read as windows."""


class DataError(MetagradFilterError, RuntimeError):
    """A download or a cached file is not what it should be."""


class ScorerRejected(MetagradFilterError, RuntimeError):
    """A published scorer failed verification.

    Attributes:
      reason: one word that a counter can carry as a label, for instance `sha256` or `truncated`.
    """

    def __init__(self, message: str, *, reason: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):
        return _rejected, (self.args[0], self.reason)


def _rejected(message: str, reason: str) -> ScorerRejected:
    return ScorerRejected(message, reason=reason)


class PublishFailed(MetagradFilterError, RuntimeError):
    """A version could not be written; every earlier version is intact."""


class StateMismatch(MetagradFilterError, ValueError):
    """A checkpoint belongs to a filter with another configuration; the message names the field."""


class NonFiniteMetagradient(MetagradFilterError, ArithmeticError):
    """A trajectory or its adjoint left the finite numbers.

    Attributes:
      step: inner step at which it was first seen, or None.
      windows: positions in that step's batch of the windows that it was seen in; may be empty.
    """

    def __init__(self, message: str, *, step: int | None = None, windows: tuple[int, ...] = ()):
        super().__init__(message)
        self.step = step
        self.windows = windows

    def __reduce__(self):
        return _non_finite, (self.args[0], self.step, self.windows)


def _non_finite(message: str, step: int | None, windows: tuple[int, ...]) -> NonFiniteMetagradient:
    return NonFiniteMetagradient(message, step=step, windows=windows)


class TrajectoryDiverged(MetagradFilterError, ArithmeticError):
    """A trajectory stayed finite but ended far worse than it started; its scores mean nothing.

    Attributes:
      step: inner step after which the loss jumped.
      windows: positions in that step's batch of its windows, those with the highest loss first.
    """

    def __init__(self, message: str, *, step: int, windows: tuple[int, ...]):
        super().__init__(message)
        self.step = step
        self.windows = windows

    def __reduce__(self):
        return _diverged, (self.args[0], self.step, self.windows)


def _diverged(message: str, step: int, windows: tuple[int, ...]) -> TrajectoryDiverged:
    return TrajectoryDiverged(message, step=step, windows=windows)


class CalibrationFailed(MetagradFilterError, RuntimeError):
    """A calibration round, or the process that runs it, ended before it could report."""
