"""Outer metrics: what the filter is asked to improve, as differentiable functions of parameters.

`HeldOutLoss` is the loss itself; `series_targets.py` has recall of rare events, probes of regimes,
calibration and others. `GuardedTarget` mixes several, which one sweep differentiates together.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.types import Loss, PyTree


class HeldOutMetric(ABC):
    """A function of parameters that is measured on held-out windows; lower is better.

    The windows are cut in two: the first part is differentiated (the outer metric), the rest
    decides at the gate. A filter fitted to the first part is therefore judged on windows it has not
    seen. The cut keeps the order, so put windows of one document (one series) next to each other
    and documents in random order: then the parts share at most one. Windows for reporting a result
    belong in neither.

    A metric says in `_function` what is measured on the windows at some rows.

    Args:
      windows: `(N, T)` int32 token ids or `(N, T, C)` float32 series.
      gate_share: share of the windows that goes to the gate, in (0, 1).
      batch_size: windows per evaluation of the model.

    Raises:
      ConfigError: `gate_share` or `batch_size` is out of its domain.
      WindowError: fewer than two windows.
    """

    def __init__(
        self,
        windows: np.ndarray,
        *,
        gate_share: float = 0.5,
        batch_size: int = 128,
    ):
        windows = np.asarray(windows)
        if not 0 < gate_share < 1:
            raise ConfigError(f"gate_share={gate_share!r}; expected a number in (0, 1).")
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size!r}; expected a positive integer.")
        if windows.ndim < 2 or len(windows) < 2:
            raise WindowError(
                f"held-out windows have shape {windows.shape}; expected (N, T) or (N, T, C) with "
                "N >= 2, for they are split into a target and a gate part."
            )
        gate = min(max(1, round(gate_share * len(windows))), len(windows) - 1)
        self.windows = windows
        self._cut = len(windows) - gate
        self.batch_size = batch_size
        self._metrics: dict[tuple[str, Loss], Callable[[PyTree], jax.Array]] = {}

    @abstractmethod
    def _function(self, loss: Loss, rows: slice) -> Callable[[PyTree], jax.Array]:
        """`params -> scalar` over the windows at `rows`."""

    @property
    def identity(self) -> str:
        """Tells what is measured on the windows; labels of different measures are never pooled."""
        return ""

    @property
    def target_windows(self) -> np.ndarray:
        """Windows that are differentiated."""
        return self.windows[: self._cut]

    @property
    def gate_windows(self) -> np.ndarray:
        """Windows that the gate judges by."""
        return self.windows[self._cut :]

    @property
    def parts(self) -> dict[str, HeldOutMetric]:
        """What is measured, by name; here this one as "target"."""
        return {"target": self}

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each part in the labels."""
        return {"target": 1.0}

    @property
    def held_out(self) -> tuple[HeldOutMetric, ...]:
        """All that is evaluated anywhere, the target first."""
        return (self,)

    def outer(self, loss: Loss) -> Callable[[PyTree], jax.Array]:
        """`Phi(params)` on the target part. The same object for the same loss."""
        return self._metric("target", loss, slice(0, self._cut))

    def gate_metric(self, loss: Loss) -> Callable[[PyTree], jax.Array]:
        """The same on the gate part."""
        return self._metric("gate", loss, slice(self._cut, len(self.windows)))

    def guard_metrics(self, loss: Loss) -> dict[str, Callable[[PyTree], jax.Array]]:
        """What may not get worse at the gate, by name; here nothing."""
        del loss
        return {}

    def halves(self, loss: Loss) -> tuple[Callable[[PyTree], jax.Array], ...]:
        """Two independent estimates of `outer`, on the first and the second half of its windows.

        Where the metric is a mean over windows, their mean is exactly `outer`, in uneven halves
        too. A single window makes both the same.
        """
        count = self._cut
        if count < 2:
            return self.outer(loss), self.outer(loss)
        cut = count // 2
        first, second = (2 * cut / count, 2 - 2 * cut / count) if self._is_mean else (1.0, 1.0)
        return (
            self._metric("first half", loss, slice(0, cut), first),
            self._metric("second half", loss, slice(cut, count), second),
        )

    _is_mean = False

    def _metric(self, part: str, loss: Loss, rows: slice, scale: float = 1.0):
        key = (part, loss)
        if key not in self._metrics:
            found = self._function(loss, rows)
            self._metrics[key] = found if scale == 1 else lambda params: scale * found(params)
        return self._metrics[key]

    def __getstate__(self):
        return {**self.__dict__, "_metrics": {}}


class HeldOutLoss(HeldOutMetric):
    """Mean loss over held-out windows, in the loss's own unit; see `HeldOutMetric` for the split.

    Args:
      windows: `(N, T)` int32 token ids or `(N, T, C)` float32 series.
      gate_share: share of the windows that goes to the gate, in (0, 1).
      batch_size: windows per evaluation of the model.

    Raises:
      ConfigError: `gate_share` or `batch_size` is out of its domain.
      WindowError: fewer than two windows.
    """

    _is_mean = True

    def _function(self, loss: Loss, rows: slice) -> Callable[[PyTree], jax.Array]:
        return mean_loss(loss, self.windows[rows], self.batch_size)


class GuardedTarget:
    """A target, and held-out metrics that may not get worse on the way.

    A narrow target buys its gain from everything else. Each round measures the metagradients of all
    parts in one sweep, and a label is the weighted mean of the ranks that the parts give a window.
    At the gate an arm that makes a guard clearly worse than uniform selection does is not eligible.

    Args:
      target: what the filter should improve.
      guards: what may not get worse, by name.
      weights: of the ranks of "target" and of the guards; 1 for those not named. A guard of weight
        0 is looked at by the gate only.

    Raises:
      ConfigError: a guard is called "target" or nothing, a weight is negative or belongs to no
        part, or the target's own is 0.

    Example:
      >>> target = GuardedTarget(HeldOutLoss(rare), {"common": HeldOutLoss(common)},
      ...                        weights={"common": 0.5})                    # doctest: +SKIP
    """

    def __init__(
        self,
        target: HeldOutMetric,
        guards: Mapping[str, HeldOutMetric],
        *,
        weights: Mapping[str, float] | None = None,
    ):
        for name in guards:
            if not isinstance(name, str) or name in ("", "target"):
                raise ConfigError(
                    f"a guard is called {name!r}; expected a name other than 'target'."
                )
        self.target = target
        self.guards = dict(guards)
        found = {"target": 1.0, **dict.fromkeys(guards, 1.0), **(weights or {})}
        for name, weight in found.items():
            if name != "target" and name not in guards:
                raise ConfigError(
                    f"weights has {name!r}; expected 'target' or one of {sorted(guards)}."
                )
            if not 0 <= weight < math.inf:
                raise ConfigError(f"the weight of {name!r} is {weight!r}; expected a number >= 0.")
        if found["target"] == 0:
            raise ConfigError("the weight of 'target' is 0; expected a positive number.")
        self._weights = {name: float(weight) for name, weight in found.items()}

    @property
    def parts(self) -> dict[str, HeldOutMetric]:
        """Target and guards that have a weight in the labels, by name, the target first."""
        every = {"target": self.target, **self.guards}
        return {name: part for name, part in every.items() if self._weights[name]}

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each of `parts` in the labels."""
        return {name: self._weights[name] for name in self.parts}

    @property
    def held_out(self) -> tuple[HeldOutMetric, ...]:
        """Target and guards, whatever their weight."""
        return (self.target, *self.guards.values())

    @property
    def target_windows(self) -> np.ndarray:
        """Windows of the target that are differentiated."""
        return self.target.target_windows

    @property
    def gate_windows(self) -> np.ndarray:
        """Windows of the target that the gate judges by."""
        return self.target.gate_windows

    def outer(self, loss: Loss) -> Callable[[PyTree], jax.Array]:
        """`Phi(params)` of the target alone."""
        return self.target.outer(loss)

    def gate_metric(self, loss: Loss) -> Callable[[PyTree], jax.Array]:
        """The target's metric on its gate part."""
        return self.target.gate_metric(loss)

    def guard_metrics(self, loss: Loss) -> dict[str, Callable[[PyTree], jax.Array]]:
        """Each guard's metric on its gate part, by name."""
        return {name: guard.gate_metric(loss) for name, guard in self.guards.items()}


Target: TypeAlias = HeldOutMetric | GuardedTarget


def mean_loss(loss: Loss, windows: np.ndarray, batch_size: int) -> Callable[[PyTree], jax.Array]:
    """`params -> scalar`: mean loss over `windows`, a batch at a time in every derivative too."""
    size = min(batch_size, len(windows))
    count = -(-len(windows) // size)
    index = np.minimum(np.arange(count * size), len(windows) - 1)
    weight = (np.arange(count * size) < len(windows)).astype(np.float32) / len(windows)
    pieces = windows[index].reshape(count, size, *windows.shape[1:])
    weights = weight.reshape(count, size)

    def metric(params: PyTree) -> jax.Array:
        @jax.checkpoint
        def piece(inputs):
            batch, w = inputs
            return jnp.sum(w * loss(params, batch))

        return jnp.sum(jax.lax.map(piece, (jnp.asarray(pieces), jnp.asarray(weights))))

    return metric
