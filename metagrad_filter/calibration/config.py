"""Configuration of a calibration round."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from metagrad_filter.errors import ConfigError

ESTIMATORS = (
    "metagradient",
    "one_step",
    "less",
    "datarater",
    "mates",
    "same_batch",
    "on_policy",
    "rho_loss",
    "loss",
)
SHORTEST_HORIZON, LONGEST_HORIZON = 16, 288
LEARNING_RATE_SCALES = (0.25, 0.1, 0.05)

_LINEAR = ("metagradient", "one_step", "datarater", "on_policy")  # in a window's gradient
_MANY_GRADIENTS = ("mates", "same_batch")  # a label costs dozens of gradients and more


@dataclass(frozen=True)
class CalibrationConfig:
    """How one round measures, fits and judges. Defaults are the estimator of record.

    Two things that shape what is kept are the loader's, not a round's: the share drawn uniformly
    (`explore`) and the limits on groups (`caps`) are arguments of `score_filter`.

    Attributes:
      estimator: what a label is. "metagradient" is the estimator of record; the others are there
        to be compared with it, see `calibration/estimators`.
      horizon: T, optimizer steps of a trajectory. None ties it to `acts_for_steps`.
      acts_for_steps: optimizer steps for which a version decides what is trained on before the
        next one takes over (the loader's swap interval, in steps). T is this number, within 16 and
        288: a label is the worth of a window over T steps, and short horizons give labels that are
        reliable and wrong, long ones leave the same budget fewer trajectories, and noise.
      trajectories: R, in two halves for reliability. More of them do not replace the horizon.
      batch_windows: B, windows per inner step.
      learning_rate_scale: inner learning rate as a share of the live one. At the live rate of a
        stable phase labels are noise; .1 to .25 keeps split-half reliability above .9. None tries
        .25, .1 and .05 in turn, with the trajectories of the round itself, and takes the first at
        which split-half is .9 or more, else the most reliable; the first costs nothing extra.
      labels: windows that are scored with the probe and that the scorer is fitted on.
      probed_labels: windows that are labelled instead where one label costs dozens of gradients
        or more ("mates", "same_batch").
      normalise_gradient: divide a score by the norm of its window's gradient where the round
        starts. Neutral on text, decisive on series, where magnitude hides what is rare. For
        estimators that are linear in that gradient only.
      mix_rho: weight of RHO-loss's ranks in the labels, in [0, 1); the metagradient's have the
        rest. The report says what it adds.
      label_decay: weight of a pooled round's labels against those of the round after it, in
        (0, 1]; the newest have 1.
      reference_windows: windows of the fixed pool on which the running version is compared with
        fresh labels, at most; 0 for none.
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
      gate_margin: a strength must beat uniform as clearly as this many standard errors of a normal
        mean would show (2: one trial of nothing in 44 passes); the gate turns that into a quantile
        of Student's t for the number of pairs, and divides it among the strengths. In plain
        standard errors, what counts as clearly worse than a guard's tolerance or than the running
        version.
      gate_preserved: a candidate replaces the running version when it is not clearly worse and has
        at least this share of its gain over uniform, in [0, 1].
      gate_guard_tolerance: how much higher than under uniform a guard's loss may be, in its unit.
      gate_minimum_source_share: of a source with at least 5 % of the windows, share of what a
        uniform choice keeps that must still be kept, in [0, 1]; 0 lets any source be dropped. Acts
        where sources are known (`Calibrator(sources=...)`).
      gate_may_starve: names of sources that may be dropped all the same, such as known junk.
      spooled_windows: how many windows a spool must hold before a round begins; None takes as many
        as a trajectory draws, and at least 100.
      vocab_size: token ids of the windows; None reads it from the proxy's loss configuration. Time
        series have none.
      pad_id: id that pads windows and never counts.
    """

    estimator: str = "metagradient"
    horizon: int | None = None
    acts_for_steps: int = 96
    trajectories: int = 4
    batch_windows: int = 64
    learning_rate_scale: float | None = 0.1
    labels: int = 16384
    probed_labels: int = 1024
    normalise_gradient: bool = False
    mix_rho: float = 0.0
    label_decay: float = 0.7
    reference_windows: int = 2048
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
    gate_pairs: int = 4
    gate_margin: float = 2.0
    gate_preserved: float = 0.5
    gate_guard_tolerance: float = 0.005
    gate_minimum_source_share: float = 0.1
    gate_may_starve: tuple[str, ...] = ()
    spooled_windows: int | None = None
    vocab_size: int | None = None
    pad_id: int | None = None

    def __post_init__(self):
        self._at_least("trajectories", 2, "one for each half of the reliability")
        if self.estimator not in ESTIMATORS:
            raise ConfigError(
                f"estimator={self.estimator!r}; expected one of {', '.join(ESTIMATORS)}."
            )
        for name in ("labels", "probed_labels"):
            self._at_least(name, 50, "enough to fit a scorer and to judge it")
        self._at_least("gate_pairs", 2, "a standard error needs two pairs")
        if self.horizon is not None:
            self._at_least("horizon", 1, "optimizer steps, or None for acts_for_steps")
        self._at_least("acts_for_steps", 1, "optimizer steps between two versions")
        for name in ("batch_windows", "block_windows", "pooled_rounds", "gate_steps"):
            self._at_least(name, 1, "a positive integer")
        if self.reference_windows != 0:
            self._at_least("reference_windows", 3, "windows to correlate, or 0 for none")
        if not isinstance(self.normalise_gradient, bool):
            raise ConfigError(
                f"normalise_gradient={self.normalise_gradient!r}; expected true or false."
            )
        if self.normalise_gradient and self.estimator not in _LINEAR:
            raise ConfigError(
                f"normalise_gradient=True with estimator={self.estimator!r}; it divides scores "
                f"that are linear in a window's gradient, those of {', '.join(_LINEAR)}."
            )
        if not 0 <= self.mix_rho < 1:
            raise ConfigError(f"mix_rho={self.mix_rho!r}; expected a weight in [0, 1).")
        self._within("label_decay", 0, 1, closed=True)
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
        if not 0 <= self.gate_guard_tolerance < math.inf:
            raise ConfigError(
                f"gate_guard_tolerance={self.gate_guard_tolerance!r}; expected a number >= 0, in "
                "the unit of the loss."
            )
        for name in ("gate_preserved", "gate_minimum_source_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)!r}; expected a share in [0, 1].")
        if not isinstance(self.gate_may_starve, tuple) or not all(
            isinstance(name, str) for name in self.gate_may_starve
        ):
            raise ConfigError(
                f"gate_may_starve={self.gate_may_starve!r}; expected a tuple of names of sources."
            )
        if self.learning_rate_scale is not None:
            self._within("learning_rate_scale", 0, 1, closed=True)
        self._within("keep_ratio", 0, 1, closed=False)
        self._within("minimum_reliability", -1, 1, closed=True)
        if not self.gate_strengths or not all(s > 0 for s in self.gate_strengths):
            raise ConfigError(
                f"gate_strengths={self.gate_strengths!r}; expected at least one positive number "
                "(uniform, 0, is always tried)."
            )

    @property
    def inner_steps(self) -> int:
        """T: `horizon`, or what `acts_for_steps` makes of it."""
        if self.horizon is not None:
            return self.horizon
        return min(max(self.acts_for_steps, SHORTEST_HORIZON), LONGEST_HORIZON)

    @property
    def trajectory_windows(self) -> int:
        """Windows that one trajectory draws."""
        return self.inner_steps * self.batch_windows

    @property
    def learning_rate_scales(self) -> tuple[float, ...]:
        """Shares of the live learning rate that are tried, the largest first."""
        scale = self.learning_rate_scale
        return LEARNING_RATE_SCALES if scale is None else (scale,)

    @property
    def dear_labels(self) -> bool:
        """Whether one label costs dozens of gradients or more."""
        return self.estimator in _MANY_GRADIENTS

    @property
    def wanted_labels(self) -> int:
        """Windows that a round labels."""
        return min(self.labels, self.probed_labels) if self.dear_labels else self.labels

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
        found = {**asdict(self), "gate_strengths": strengths}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}
