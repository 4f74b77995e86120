"""Size of a demo run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from metagrad_filter.calibration.config import CalibrationConfig
from metagrad_filter.errors import ConfigError


@dataclass(frozen=True)
class DemoConfig:
    """One run of the demo. The defaults take under ten minutes on two CPU cores.

    Attributes:
      out: folder for results.json, report.html and the run directory.
      seeds: paired seeds; each reorders the stream for every method alike.
      seed: of everything else.
      keep_ratio: share of the stream that is trained on.
      window_tokens: tokens of a window.
      vocab_size: of the byte-level BPE that is fitted on the corpus.
      limit_documents: abstracts and articles to read, None for all.
      blocks: blocks of the live stream.
      block_windows: windows that are ranked together.
      batch_windows: windows of a training step.
      layers: of the model.
      base_steps: training steps of the base model on the unfiltered mixture.
      peak_learning_rate: of the base model, held for six tenths of its steps.
      learning_rate: live learning rate, to which the base's falls by the end of its training; it
        falls on linearly to a tenth while the stream is trained on.
      held_out_windows: windows of the target; half is differentiated, half judges at the gate.
      report_windows: other windows of the target, on which the table's losses are measured.
      curve_windows: how many of those are used for the points of the loss curves.
      reference_steps: numbers of steps that are tried for RHO-loss's reference model.
      check_horizon: steps of the trajectory that finite differences are compared on.
      check_entries: windows that are compared.
      calibration: configuration of each calibration round.
    """

    out: Path = Path("demo")
    seeds: int = 3
    seed: int = 0
    keep_ratio: float = 0.25
    window_tokens: int = 65
    vocab_size: int = 1024
    limit_documents: int | None = None
    blocks: int = 36
    block_windows: int = 512
    batch_windows: int = 64
    layers: int = 2
    base_steps: int = 1200
    peak_learning_rate: float = 4e-3
    learning_rate: float = 1e-3
    held_out_windows: int = 2048
    report_windows: int = 2048
    curve_windows: int = 512
    reference_steps: tuple[int, ...] = (24, 48, 96, 192)
    check_horizon: int = 8
    check_entries: int = 10
    calibration: CalibrationConfig = field(
        default_factory=lambda: CalibrationConfig(
            horizon=72, learning_rate_scale=0.25, labels=12288, gate_steps=24
        )
    )

    def __post_init__(self):
        if self.seeds < 1:
            raise ConfigError(f"seeds={self.seeds}; expected at least 1.")
        kept = self.blocks * self.block_windows * self.keep_ratio
        if self.blocks < 2 or kept % (2 * self.batch_windows):
            raise ConfigError(
                f"{self.blocks} blocks of {self.block_windows} windows at keep ratio "
                f"{self.keep_ratio} give {kept:g} windows; expected an even number of batches of "
                f"{self.batch_windows}, for a version is swapped in at half of the stream."
            )

    @property
    def steps(self) -> int:
        """Training steps on the kept part of the stream."""
        return round(self.blocks * self.block_windows * self.keep_ratio) // self.batch_windows

    def quick(self) -> DemoConfig:
        """The same run at a size that ends within two minutes; its figures prove little."""
        return replace(
            self,
            seeds=1,
            limit_documents=1500,
            blocks=8,
            layers=1,
            base_steps=120,
            reference_steps=(24, 48),
            held_out_windows=256,
            report_windows=256,
            curve_windows=256,
            # The horizon of a calibration, so that one compiled sweep serves both.
            check_horizon=8,
            check_entries=4,
            calibration=replace(
                self.calibration,
                horizon=8,
                trajectories=2,
                labels=1024,
                gate_steps=8,
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """JSON types only; without the output folder, which says nothing about the result."""
        fields = {**self.__dict__, "calibration": self.calibration.to_json()}
        del fields["out"]
        return fields
