"""What calibration needs to know of a training job, as one value."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import optax

from metagrad_filter.errors import ConfigError
from metagrad_filter.types import Loss, PyTree

OptimizerFactory = Callable[[Any], optax.GradientTransformation]


@dataclass(frozen=True, eq=False)
class Proxy:
    """A model in training: its loss, where it stands, and how it is optimised.

    To calibrate in a process of its own the loss and the optimizer factory must be importable (a
    module-level function, a frozen dataclass such as `DecoderLoss`, a `functools.partial`).

    Attributes:
      loss: `loss(params, windows) -> (B,)` in nats (or any unit) per window. One that crosses zero,
        as the nats of a density do, has an attribute `unit`: the least magnitude that a share of it
        is taken of (`maximum_rise`).
      params: current parameters.
      opt_state: live (warm) optimizer state; its moments are taken over by tree path. None where
        only the weights exist: a round then warms moments at these parameters itself.
      optimizer: learning rate (or optax schedule) -> optax transformation, for instance
        `functools.partial(optax.adamw, b2=0.95, weight_decay=0.01)`.
      learning_rate: the live learning rate, in the optimizer's units.
    """

    loss: Loss
    params: PyTree
    opt_state: PyTree
    optimizer: OptimizerFactory
    learning_rate: float

    def __post_init__(self):
        if not callable(self.loss) or not callable(self.optimizer):
            raise ConfigError(
                "Proxy needs a callable loss(params, windows) and a callable optimizer(rate); got "
                f"{type(self.loss).__name__} and {type(self.optimizer).__name__} (for the "
                "optimizer pass the factory, not the transformation that it returns)."
            )
        if not 0 < self.learning_rate < float("inf"):
            raise ConfigError(f"learning_rate={self.learning_rate!r}; expected a positive number.")

    def at(self, params: PyTree, opt_state: PyTree) -> Proxy:
        """The same job at another point of its training."""
        return replace(self, params=params, opt_state=opt_state)

    def transformation(self, learning_rate: Any) -> optax.GradientTransformation:
        """The optimizer at a learning rate; the same object for the same rate."""
        return _transformation(self.optimizer, learning_rate)


@functools.lru_cache(maxsize=64)
def _transformation(
    optimizer: OptimizerFactory, learning_rate: Any
) -> optax.GradientTransformation:
    return optimizer(learning_rate)
