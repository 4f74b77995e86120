"""The live stream of the demo, and continued training on what a method keeps of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from metagrad_filter.demo.config import DemoConfig
from metagrad_filter.demo.data import CLASS_NAMES, ON_TARGET
from metagrad_filter.demo.live import filtered_batches
from metagrad_filter.demo.training import State, continued_state, mean_window_loss, train
from metagrad_filter.errors import WindowError
from metagrad_filter.proxy.proxy import Proxy
from metagrad_filter.selection import keep_blocks
from metagrad_filter.windows import TextWindows

EVALUATE_EVERY = 12  # steps between points of the loss curve


class Blocks(Protocol):
    """How a demo cuts its stream."""

    @property
    def block_windows(self) -> int: ...
    @property
    def keep_ratio(self) -> float: ...


class _Source:
    """Random-access grain source of `{"tokens", "class"}` elements in a given order."""

    def __init__(self, windows: np.ndarray, classes: np.ndarray, order: np.ndarray):
        self._windows, self._classes, self._order = windows, classes, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        position = self._order[index]
        return {"tokens": self._windows[position], "class": self._classes[position]}

    def __repr__(self) -> str:
        return f"_Source({len(self)} windows)"


def live_batches(
    windows: np.ndarray,
    classes: np.ndarray,
    order: np.ndarray,
    run_dir: Path,
    config: DemoConfig,
    *,
    name: str,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the filtered stream, see `filtered_batches`."""
    return filtered_batches(
        _Source(windows, classes, order), TextWindows("tokens"), run_dir, config, name=name
    )


def kept_by(
    scores: np.ndarray | None,
    order: np.ndarray,
    config: Blocks,
    *,
    seed: int,
    strength: float = math.inf,
) -> np.ndarray:
    """Positions that a method keeps of the ordered stream, block by block; None keeps a uniform
    choice. Equal scores are cut by the order of the stream."""
    kept = keep_blocks(
        None if scores is None else scores[order],
        len(order),
        block_windows=config.block_windows,
        keep_ratio=config.keep_ratio,
        strength=strength,
        seed=seed,
        name="rival",
    )
    return order[kept]


def kept_on_target(classes: np.ndarray, order: np.ndarray, config: DemoConfig) -> np.ndarray:
    """The ceiling: the first on-target windows of each block, by their known class."""
    quota = round(config.block_windows * config.keep_ratio)
    kept = []
    for first in range(0, len(order), config.block_windows):
        here = order[first : first + config.block_windows]
        known = here[classes[here] == ON_TARGET][:quota]
        if len(known) < quota:
            raise WindowError(
                f"block {first // config.block_windows} holds {len(known)} on-target windows, "
                f"fewer than the {quota} to keep; use larger blocks or a lower keep ratio."
            )
        kept.append(known)
    return np.concatenate(kept)


def class_shares(classes: np.ndarray) -> dict[str, float]:
    """Share of each class among `(n,)` class indices."""
    counts = np.bincount(classes, minlength=len(CLASS_NAMES)) / len(classes)
    return {name: float(share) for name, share in zip(CLASS_NAMES, counts)}


@dataclass
class Arm:
    """Continued training from the base: the state so far and its loss curve.

    Attributes:
      proxy: the base.
      rates: learning rate of each step of the stream.
      curve: windows on which the points of the loss curve are measured.
      state: parameters and optimizer state.
      tokens: training tokens at which the loss was measured.
      losses: nats per token there.
    """

    proxy: Proxy
    rates: np.ndarray
    curve: np.ndarray
    state: State
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    steps: int = 0

    @classmethod
    def start(
        cls,
        proxy: Proxy,
        rates: np.ndarray,
        curve: np.ndarray,
    ) -> Arm:
        arm = cls(proxy, rates, curve, continued_state(proxy))
        arm._measure(0)
        return arm

    def train(self, batches: np.ndarray) -> None:
        """Takes one step per batch of `(steps, B, T)` windows, then measures the loss."""
        self.state = train(self.proxy.loss, self.proxy.optimizer, self.rates, self.state, batches)
        self.steps += len(batches)
        self._measure(self.steps * batches.shape[1] * (batches.shape[2] - 1))

    def loss(self, windows: np.ndarray) -> float:
        """Mean loss of `(n, T)` windows at the current parameters, nats per token."""
        return mean_window_loss(self.proxy.loss, self.state[0], windows)

    def _measure(self, tokens: int) -> None:
        self.tokens.append(tokens)
        self.losses.append(self.loss(self.curve))

    def train_all(self, windows: np.ndarray, batch: int, done: Callable[[], None]) -> None:
        """Trains on `(n, T)` windows in order, measuring every `EVALUATE_EVERY` steps."""
        batches = windows.reshape(-1, batch, windows.shape[1])
        for start in range(0, len(batches), EVALUATE_EVERY):
            self.train(batches[start : start + EVALUATE_EVERY])
        done()
