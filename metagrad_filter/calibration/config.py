"""Configuration of a calibration round."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from metagrad_filter.errors import ConfigError


@dataclass(frozen=True)
class CalibrationConfig:
    """How one round measures, fits and judges. Defaults are the estimator of record.

    Attributes:
      horizon: T, optimizer steps of a trajectory. Tie it to the number of steps over which the
        selection will act: short horizons give labels that are reliable and wrong.
      trajectories: R, in two halves for reliability. More of them do not replace the horizon.
      batch_windows: B, windows per inner step.
      learning_rate_scale: inner learning rate as a share of the live one. At the live rate of a
        stable phase labels are noise; .1 to .25 keeps split-half reliability above .9.
      labels: windows that are scored with the probe and that the scorer is fitted on.
      seed: of every random choice, folded with the round's number.
      keep_ratio: at which the gate tries the candidate, in (0, 1); the loader's.
      block_windows: windows that the gate ranks together; the loader's.
      microbatch: windows per gradient evaluation, None for all.
      maximum_rise: a trajectory at whose end the outer metric has risen by more than this share
        has diverged, and ends the round.
      warmup_steps: batches whose gradients warm the moments of a proxy that comes without optimizer
        state; None takes `2 / (1 - b)` of its slowest moment, at most 64.
      pooled_rounds: recent rounds whose labels a version is fitted on.
      minimum_reliability: split-half correlation below which nothing is published.
      gate_strengths: strengths that are tried against 0 (uniform): Gumbel top-k logits per
        standard deviation of rank score; inf is plain top-k.
      gate_steps: optimizer steps of a gate run, at a learning rate that falls linearly from the
        live one to a tenth.
      gate_pairs: paired seeds of the gate.
      gate_margin: a strength must beat uniform by this many standard errors.
      spooled_windows: how many windows a spool must hold before a round begins; None takes as many
        as a trajectory draws, and at least 100.
      vocab_size: token ids of the windows; None reads it from the proxy's loss configuration.
      pad_id: id that pads windows and never counts.
    """

    horizon: int = 96
    trajectories: int = 4
    batch_windows: int = 64
    learning_rate_scale: float = 0.1
    labels: int = 16384
    seed: int = 0
    keep_ratio: float = 0.25
    block_windows: int = 512
    microbatch: int | None = None
    maximum_rise: float = 0.25
    warmup_steps: int | None = None
    pooled_rounds: int = 3
    minimum_reliability: float = 0.3
    gate_strengths: tuple[float, ...] = (2.0, math.inf)
    gate_steps: int = 48
    gate_pairs: int = 3
    gate_margin: float = 2.0
    spooled_windows: int | None = None
    vocab_size: int | None = None
    pad_id: int | None = None

    def __post_init__(self):
        self._at_least("trajectories", 2, "one for each half of the reliability")
        self._at_least("labels", 50, "enough to fit a scorer and to judge it")
        self._at_least("gate_pairs", 2, "a standard error needs two pairs")
        for name in ("horizon", "batch_windows", "block_windows", "pooled_rounds", "gate_steps"):
            self._at_least(name, 1, "a positive integer")
        self._at_least("seed", 0, "numpy seeds are not negative")
        if self.microbatch is not None:
            self._at_least("microbatch", 1, "windows per gradient evaluation, or None")
        if self.warmup_steps is not None:
            self._at_least("warmup_steps", 1, "batches that warm the moments, or None")
        if self.spooled_windows is not None:
            self._at_least("spooled_windows", 100, "a round needs as many, or None")
        if not self.maximum_rise > 0:
            raise ConfigError(f"maximum_rise={self.maximum_rise!r}; expected a positive share.")
        if not self.gate_margin >= 0:
            raise ConfigError(f"gate_margin={self.gate_margin!r}; expected a number >= 0.")
        self._within("learning_rate_scale", 0, 1, closed=True)
        self._within("keep_ratio", 0, 1, closed=False)
        self._within("minimum_reliability", -1, 1, closed=True)
        if not self.gate_strengths or not all(s > 0 for s in self.gate_strengths):
            raise ConfigError(
                f"gate_strengths={self.gate_strengths!r}; expected at least one positive number "
                "(uniform, 0, is always tried)."
            )

    def _at_least(self, name: str, least: int, why: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r}; expected an integer >= {least}: {why}.")

    def _within(self, name: str, low: float, high: float, *, closed: bool) -> None:
        value = getattr(self, name)
        if not (low < value < high or (closed and value == high)):
            bracket = "]" if closed else ")"
            raise ConfigError(f"{name}={value!r}; expected a number in ({low}, {high}{bracket}.")

    def to_json(self) -> dict[str, Any]:
        """JSON types only; infinite strengths as "inf"."""
        strengths = ["inf" if math.isinf(s) else s for s in self.gate_strengths]
        return {**asdict(self), "gate_strengths": strengths}
