"""What becomes of a candidate: published, and how strongly it filters, or rejected, and why.

    judge(Facts(reliability, error), gate, config) -> Verdict | None

One pure function from what a round found to what follows, so that a reason means one thing
everywhere: in the round's report, in `rejected-<n>.json`, in `inspect` and on the page.

| reason | published | when |
|---|---|---|
| `published` | yes | better than uniform and not worse than the running version |
| `uniform_beats_running` | strength 0 | no such candidate, and uniform clearly beats what runs |
| `non_finite` | no | a trajectory, or the gate's runs, left the finite numbers |
| `diverged` | no | a trajectory stayed finite and ended far worse than it began |
| `unreliable` | no | the halves of the labels disagree |
| `starves` | no | it would pass if it did not all but drop a source |
| `guard` | no | it would pass if a guard's loss did not rise |
| `not_better_than_uniform` | no | no strength is clearly better than uniform |
| `worse_than_running` | no | better than uniform, but the running version is better still |

A candidate that is as good as the running version replaces it: it was made where training stands
now, the other one ages, and refreshed versions select as well as first ones. What it may not be is
clearly worse (by `gate_margin` standard errors and a twentieth of the running version's gain), or
less than `gate_preserved` of the running
version's gain, both as measured now in the same runs, so that a chain of replacements cannot lead
down by more than noise hides in one of them. And uniform replaces a version only where it is
clearly better: one round without a gain is not a reason to stop filtering.

References:
  Snapinn and Jiang, Preservation of effect and the regulatory approval of new treatments on the
  basis of non-inferiority trials, Statistics in Medicine 2008 (a share that is preserved).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from metagrad_filter.calibration.config import CalibrationConfig
from metagrad_filter.calibration.gate import GateResult, json_strength
from metagrad_filter.errors import NonFiniteMetagradient, TrajectoryDiverged

# Of the running version's gain: a smaller lead is not worth an older version.
_NEGLIGIBLE = 0.05

PUBLISHED = "published"
UNIFORM_BEATS_RUNNING = "uniform_beats_running"
REJECTIONS = (
    "non_finite",
    "diverged",
    "unreliable",
    "starves",
    "guard",
    "not_better_than_uniform",
    "worse_than_running",
)


@dataclass(frozen=True)
class Facts:
    """What is known of a candidate before the gate.

    Attributes:
      reliability: split-half correlation of its labels; None where they have no halves.
      error: what ended the measurement, or None.
    """

    reliability: float | None = None
    error: NonFiniteMetagradient | TrajectoryDiverged | None = None


@dataclass(frozen=True)
class Verdict:
    """What becomes of a candidate.

    Attributes:
      publish: whether a version is published.
      strength: how strongly it filters; 0 is uniform.
      reason: one of `REJECTIONS`, `PUBLISHED` or `UNIFORM_BEATS_RUNNING`.
      sentence: the reason in words, with the figures.
    """

    publish: bool
    strength: float
    reason: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.reason.replace('_', '-')}: {self.sentence}"

    def to_json(self) -> dict[str, Any]:
        return {
            "publish": self.publish,
            "strength": json_strength(self.strength),
            "reason": self.reason,
            "sentence": self.sentence,
        }


def judge(facts: Facts, gate: GateResult | None, config: CalibrationConfig) -> Verdict | None:
    """Decides about a candidate.

    Args:
      facts: what is known before the gate.
      gate: what the gate measured, None before it.
      config: the limits.

    Returns:
      The verdict; None without a gate where nothing speaks against going to it.
    """
    if facts.error is not None:
        diverged = isinstance(facts.error, TrajectoryDiverged)
        return _rejected("diverged" if diverged else "non_finite", str(facts.error))
    # A NaN is not reliable either.
    if facts.reliability is not None and not facts.reliability >= config.minimum_reliability:
        return _rejected(
            "unreliable",
            f"split-half correlation {facts.reliability:.2f} is below "
            f"{config.minimum_reliability}; lower learning_rate_scale or raise trajectories",
        )
    if gate is None:
        return None
    refused = _refusal(gate, config)
    if refused is None:
        assert gate.best is not None
        return Verdict(True, gate.chosen, PUBLISHED, _praise(gate))
    if gate.running is not None and gate.running.harmful:
        gain = gate.running.gain
        return Verdict(
            True,
            0.0,
            UNIFORM_BEATS_RUNNING,
            f"version {gate.running.version} now loses to a uniform choice (gain "
            f"{_figure(gain.mean, gain.standard_error)}), and the candidate is no better: "
            f"{refused.sentence}",
        )
    return refused


def _refusal(gate: GateResult, config: CalibrationConfig) -> Verdict | None:
    """Why the candidate may not filter, or None."""
    if not gate.finite or not any(math.isfinite(arm.gain) for arm in gate.arms):
        who = "the candidate's runs at every strength" if gate.finite else "a run on uniform choice"
        return _rejected(
            "non_finite", f"{who} at the gate left the finite numbers; lower the learning rate"
        )
    if gate.best is not None:
        return _against_running(gate, config)
    barred = [arm for arm in gate.arms if arm.better]
    starving = next((arm.starved for arm in barred if arm.starved is not None), None)
    guarding = next((arm for arm in barred if arm.broken_guard), None)
    if starving is not None:
        return _rejected(
            "starves",
            f"source {starving.source!r} is {starving.before:.1%} of the windows and would be "
            f"{starving.after:.2%} of what is kept; name it in gate_may_starve if that is meant",
        )
    if guarding is not None:
        rise = guarding.guards[guarding.broken_guard]
        return _rejected(
            "guard",
            f"the held-out loss of guard {guarding.broken_guard!r} would rise by "
            f"{_figure(rise.mean, rise.standard_error)} at strength {guarding.strength:g}, more "
            f"than {config.gate_guard_tolerance:g}",
        )
    tried = ", ".join(
        f"{arm.strength:g}: {_figure(arm.gain, arm.standard_error)}" for arm in gate.arms
    )
    return _rejected(
        "not_better_than_uniform",
        "no strength was clearly better than uniform (gains by strength "
        f"{tried}; {gate.bar:.3g} standard errors are needed)",
    )


def _against_running(gate: GateResult, config: CalibrationConfig) -> Verdict | None:
    best, running = gate.best, gate.running
    assert best is not None
    if running is None or running.harmful or running.lead is None:
        return None
    lead, gain = running.lead, running.gain
    worse = lead.mean < -max(
        config.gate_margin * lead.standard_error, _NEGLIGIBLE * max(gain.mean, 0.0)
    )
    # Where the running version gains nothing there is nothing to preserve.
    little = best.gain < config.gate_preserved * max(gain.mean, 0.0)
    if not worse and not little:
        return None
    return _rejected(
        "worse_than_running",
        f"version {running.version} gains {_figure(gain.mean, gain.standard_error)} over uniform "
        f"in the same runs, the candidate {_figure(best.gain, best.standard_error)} at strength "
        f"{best.strength:g}; "
        + (
            f"it is behind by {_figure(-lead.mean, lead.standard_error)}"
            if worse
            else f"that is less than {config.gate_preserved:g} of it"
        ),
    )


def _praise(gate: GateResult) -> str:
    best, running = gate.best, gate.running
    assert best is not None
    text = f"gains {_figure(best.gain, best.standard_error)} over uniform"
    if running is not None and running.lead is not None:
        lead = running.lead
        text += f", {_figure(lead.mean, lead.standard_error)} over version {running.version}"
    return f"{text} at strength {best.strength:g}"


def _rejected(reason: str, sentence: str) -> Verdict:
    assert reason in REJECTIONS
    return Verdict(False, 0.0, reason, sentence)


def _figure(mean: float, error: float) -> str:
    return f"{mean:+.2g} (+- {error:.1g})"
