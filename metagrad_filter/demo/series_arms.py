"""Selections of the stream of storms, and training on what they keep.

Six rivals, each a score of every window of the stream: `random`, `surprise` (high loss),
`low_loss`, `rho_loss`, `loss_band` (the middle of the losses) and `rare_oracle` (the true classes:
rare first, then usual). All keep the same number of windows, block by block as the filter does, and
train from the same base in the same number of steps. Read next: `series_run.py`.

References:
  Mindermann et al., 2022, https://arxiv.org/abs/2206.07137 (reducible hold-out loss);
  Calian et al., 2025, https://arxiv.org/abs/2505.17895 (the best loss filter is a middle band).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from metagrad_filter.calibration.estimators import estimate
from metagrad_filter.calibration.estimators.task import Task, combined
from metagrad_filter.calibration.estimators.windows import losses_of
from metagrad_filter.calibration.source import WindowSource
from metagrad_filter.demo.live import filtered_batches
from metagrad_filter.demo.series_config import SeriesDemoConfig
from metagrad_filter.demo.series_data import CLASS_NAMES, NORMAL, RARE, Stream, Windows
from metagrad_filter.demo.series_world import Judgement, judge
from metagrad_filter.demo.training import State, continued_state, falling_rates, train
from metagrad_filter.labels import gaussian_ranks
from metagrad_filter.proxy import Proxy
from metagrad_filter.targets import Target
from metagrad_filter.windows import SeriesWindows

EVALUATE_EVERY = 12  # steps between points of a curve


def loss_scores(proxy: Proxy, windows: np.ndarray) -> dict[str, np.ndarray]:
    """Scores that the base model's loss alone gives, `(N,)` each; higher is kept."""
    losses = losses_of(proxy.loss, proxy.params, windows)
    return {
        "surprise": losses,
        "low_loss": -losses,
        "loss_band": -np.abs(gaussian_ranks(losses)),
    }


def rho_scores(
    proxy: Proxy, target: Target, windows: np.ndarray, config: SeriesDemoConfig
) -> np.ndarray:
    """`(N,)` RHO-loss: loss minus that of a model tuned on the target, its parts mixed as ours are.

    Each part has references of its own, tuned on its windows, and ranks are mixed by the target's
    weights: it is given all that the metagradient is given.
    """
    calibration = replace(config.calibration, estimator="rho_loss", normalise_gradient=False)
    task = Task(
        proxy,
        target,
        WindowSource(windows),
        calibration,
        windows,
        np.arange(len(windows)),
        seed=config.seed,
    )
    return combined(estimate(task).halves, target.weights).sum(axis=0)


def oracle_scores(stream: Stream) -> np.ndarray:
    """`(N,)` scores by the true classes: rare above usual above broken."""
    classes = stream.windows.classes
    return np.where(classes == RARE, 2.0, np.where(classes == NORMAL, 1.0, 0.0))


def class_shares(classes: np.ndarray) -> dict[str, float]:
    """Share of each class among `(n,)` class indices."""
    counts = np.bincount(classes, minlength=len(CLASS_NAMES)) / len(classes)
    return {name: float(share) for name, share in zip(CLASS_NAMES, counts)}


def stream_order(config: SeriesDemoConfig, seed: int) -> np.ndarray:
    """Order of the stream in a paired seed, the same for every method."""
    return np.random.default_rng([config.seed, 1, seed]).permutation(config.stream_windows)


@dataclass
class SeriesArm:
    """Continued training from the base, and how the model is judged on the way.

    Attributes:
      proxy: the base.
      rates: learning rate of each step of the stream.
      report: windows that it is judged on.
      state: parameters and optimizer state.
      windows: training windows at which it was judged.
      judged: what was found there.
    """

    proxy: Proxy
    rates: np.ndarray
    report: Windows
    state: State
    windows: list[int] = field(default_factory=list)
    judged: list[Judgement] = field(default_factory=list)
    steps: int = 0

    @classmethod
    def start(cls, proxy: Proxy, report: Windows, config: SeriesDemoConfig) -> SeriesArm:
        """An arm at the base."""
        rates = falling_rates(config.learning_rate, config.steps)
        arm = cls(proxy, rates, report, continued_state(proxy))
        arm._judge(0)
        return arm

    def train(self, batches: np.ndarray) -> None:
        """Takes one step per batch of `(steps, B, T, C)` windows, then judges."""
        self.state = train(self.proxy.loss, self.proxy.optimizer, self.rates, self.state, batches)
        self.steps += len(batches)
        self._judge(self.steps * batches.shape[1])

    def train_all(self, windows: np.ndarray, batch: int) -> None:
        """Trains on `(n, T, C)` windows in order, judging every `EVALUATE_EVERY` steps."""
        steps = len(windows) // batch
        batches = windows[: steps * batch].reshape(steps, batch, *windows.shape[1:])
        for start in range(0, steps, EVALUATE_EVERY):
            self.train(batches[start : start + EVALUATE_EVERY])

    def _judge(self, windows: int) -> None:
        self.windows.append(windows)
        self.judged.append(judge(self.proxy.loss, self.state[0], self.report))  # pyright: ignore[reportArgumentType]


class _Source:
    """Random-access grain source of `{"values", "class"}` elements in a given order."""

    def __init__(self, stream: Stream, order: np.ndarray):
        self._stream, self._order = stream, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        position = self._order[index]
        windows = self._stream.windows
        return {"values": windows.values[position], "class": windows.classes[position]}

    def __repr__(self) -> str:
        return f"_Source({len(self)} windows)"


def live_batches(
    stream: Stream, order: np.ndarray, run_dir: Path, config: SeriesDemoConfig, *, name: str
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the filtered stream, see `filtered_batches`."""
    return filtered_batches(
        _Source(stream, order), SeriesWindows("values"), run_dir, config, name=name
    )
