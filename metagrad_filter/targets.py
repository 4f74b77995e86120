"""Outer metrics: what the filter is asked to improve, as differentiable functions of parameters."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.types import Loss, PyTree


class HeldOutLoss:
    """Mean loss over held-out windows, in the loss's own unit; lower is better.

    The windows are cut in two: the first part is differentiated (the outer metric), the rest
    decides at the gate. A filter fitted to the first part is therefore judged on windows it has not
    seen. The cut keeps the order, so put windows of one document next to each other and documents
    in random order: then the parts share at most one document. Windows for reporting a result
    belong in neither.

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
        self.target_windows = windows[:-gate]
        self.gate_windows = windows[-gate:]
        self.batch_size = batch_size
        self._metrics: dict[tuple[str, Loss], Callable[[PyTree], jax.Array]] = {}

    def outer(self, loss: Loss) -> Callable[[PyTree], jax.Array]:
        """`Phi(params)`: mean loss over the target part. The same object for the same loss."""
        return self._metric("target", loss, self.target_windows)

    def gate_metric(self, loss: Loss) -> Callable[[PyTree], jax.Array]:
        """Mean loss over the gate part."""
        return self._metric("gate", loss, self.gate_windows)

    def _metric(self, part: str, loss: Loss, windows: np.ndarray):
        key = (part, loss)
        if key not in self._metrics:
            self._metrics[key] = mean_loss(loss, windows, self.batch_size)
        return self._metrics[key]

    def __getstate__(self):
        return {**self.__dict__, "_metrics": {}}


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
