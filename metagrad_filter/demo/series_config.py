"""Size of a demo run on time series."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from metagrad_filter.calibration.config import CalibrationConfig
from metagrad_filter.errors import ConfigError

SHARES = {"base": 0.28, "stream": 0.25, "target": 0.24, "gate": 0.08, "report": 0.15}


@dataclass(frozen=True)
class SeriesDemoConfig:
    """One run of the demo on storms. The defaults take under ten minutes on two CPU cores.

    Attributes:
      out: folder for results.json, report.html and the run directory.
      seeds: paired seeds; each reorders the stream for every method alike.
      seed: of everything else.
      keep_ratio: share of the stream that is trained on.
      length: T, six-hourly rows of a window.
      patch: rows that the model predicts at once; 4 are 24 hours.
      width, layers, heads: of the patch transformer.
      blocks: blocks of the live stream.
      block_windows: windows that are ranked together.
      batch_windows: windows of a training step.
      rare_share: share of the stream that holds a rare event.
      corrupt_share: share of the stream that is broken.
      base_corrupt_share: share of the base model's mixture that is broken; 0 where faults are new.
      base_steps: training steps of the base model on an unfiltered mixture.
      peak_learning_rate: of the base model, held for six tenths of its steps.
      learning_rate: live learning rate, to which the base's falls by the end of its training; it
        falls on linearly to a tenth while the stream is trained on.
      guard_weight: weight of the loss of usual windows in the labels, the rare target's being 1.
      calibration: configuration of each calibration round.

    Raises:
      ConfigError: the stream does not give an even number of batches.
    """

    out: Path = Path("demo")
    seeds: int = 3
    seed: int = 0
    keep_ratio: float = 0.25
    length: int = 16
    patch: int = 4
    width: int = 32
    layers: int = 2
    heads: int = 2
    blocks: int = 24
    block_windows: int = 512
    batch_windows: int = 32
    rare_share: float = 0.05
    corrupt_share: float = 0.3
    base_corrupt_share: float = 0.3
    base_steps: int = 1200
    peak_learning_rate: float = 4e-3
    learning_rate: float = 1e-3
    guard_weight: float = 0.5
    calibration: CalibrationConfig = field(
        default_factory=lambda: CalibrationConfig(
            horizon=96,
            trajectories=4,
            batch_windows=32,
            learning_rate_scale=0.1,
            labels=8192,
            # The rare event needs force and the guard a light hand: between them lie soft choices.
            gate_strengths=(0.5, 1.0, 2.0, math.inf),
            gate_steps=96,
            # Halves are measured on a dozen storms each, which agree on little but the order.
            minimum_reliability=0.1,
            reference_windows=512,
            gate_guard_tolerance=0.02,
        )
    )

    def __post_init__(self):
        if self.seeds < 1:
            raise ConfigError(f"seeds={self.seeds}; expected at least 1.")
        if self.length % self.patch:
            raise ConfigError(
                f"length={self.length} is not a multiple of patch={self.patch}; change either."
            )
        kept = self.blocks * self.block_windows * self.keep_ratio
        if self.blocks < 2 or self.blocks % 2 or kept % (2 * self.batch_windows):
            raise ConfigError(
                f"{self.blocks} blocks of {self.block_windows} windows at keep ratio "
                f"{self.keep_ratio} give {kept:g} windows; expected an even number of blocks and "
                f"of batches of {self.batch_windows}, for a version is swapped in at half of the "
                "stream."
            )

    @property
    def stream_windows(self) -> int:
        """Windows of the live stream."""
        return self.blocks * self.block_windows

    @property
    def steps(self) -> int:
        """Training steps on the kept part of the stream."""
        return round(self.stream_windows * self.keep_ratio) // self.batch_windows

    def quick(self) -> SeriesDemoConfig:
        """The same run at a size that ends within a few minutes; its figures prove little."""
        return replace(
            self,
            seeds=1,
            layers=1,
            blocks=8,
            guard_weight=0.25,
            calibration=replace(
                self.calibration,
                horizon=48,
                trajectories=2,
                labels=2048,
                gate_steps=32,
                gate_pairs=3,
                # A run this short shows every step; whether a filter helps it does not show.
                minimum_reliability=-0.99,
                gate_margin=0.0,
                gate_guard_tolerance=10.0,
                reference_windows=128,
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """JSON types only; without the output folder, which says nothing about the result."""
        fields = {**self.__dict__, "calibration": self.calibration.to_json()}
        del fields["out"]
        return fields
