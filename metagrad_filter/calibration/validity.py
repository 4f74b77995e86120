"""Are the labels right? Retraining answers, and is printed beside how repeatable they are.

Split-half reliability says that two measurements agree, not that they mean anything: labels of a
short horizon are the most reliable and the least valid. Two checks ask what training itself says:

* `tilt`: train on mixtures tilted towards and away from each class or cluster, and compare the
  change of the outer metric with the class's mean score. The cheapest check of any estimator.
* `lds`: train on random halves of a pool, and compare the outer metric with the sums of scores.
  The general one; it needs many more runs.

Input is what a round has, output a `ValidityCheck`. Both retrain at the live learning rate, falling
to a tenth of it, for as many steps as the labels' horizon.

Cost: `2 x clusters x seeds` (tilt) or `subsets x seeds` (lds) runs of `steps` gradients of a batch,
and the labels of the pool.

References:
  Park et al., 2023, https://arxiv.org/abs/2303.14186, section 2 (linear datamodeling score).
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import optax
from numpy.typing import ArrayLike

from metagrad_filter.calibration.clusters import clusters_of
from metagrad_filter.calibration.config import CalibrationConfig
from metagrad_filter.calibration.estimators import Task, estimate
from metagrad_filter.calibration.estimators.task import FORWARD_COST, combined
from metagrad_filter.calibration.round import split_source, warmed
from metagrad_filter.calibration.source import WindowSource
from metagrad_filter.errors import ConfigError
from metagrad_filter.labels import gaussian_ranks, split_half_reliability
from metagrad_filter.metagradient.diagnostics.lds import linear_datamodeling_score
from metagrad_filter.metagradient.diagnostics.tilt import tilt_check
from metagrad_filter.metagradient.optimizer import warm_state
from metagrad_filter.proxy.proxy import Proxy
from metagrad_filter.targets import Target
from metagrad_filter.types import Progress, silent

Kind = Literal["tilt", "lds"]


@dataclass(frozen=True)
class ValidityCheck:
    """What retraining says of the labels.

    Attributes:
      kind: "tilt" or "lds".
      estimator, horizon: of the labels; the horizon is None for estimators without one.
      reliability: split-half rank correlation of the labels, None where they have no randomness.
      validity: Spearman's rho with the outer metric after retraining, over classes or subsets.
      low, high: its 95 % bootstrap interval (lds), or None.
      ceiling: correlation that exact labels would reach, given the noise of retraining (lds), or
        None.
      sign_agreement: share of classes whose tilt does what the sign of their score says (tilt).
      classes: for each class its `name`, `share`, `predicted` (mean label above the others'),
        `effect` (fall of the outer metric for each unit of share) and `standard_error`.
      windows: in the pool.
      steps: of a retraining.
      runs: retrainings.
      live_step: step of training that the check started from, or None.
      gradients: cost in window gradients.
      seconds: wall time.
    """

    kind: str
    estimator: str
    horizon: int | None
    reliability: float | None
    validity: float
    low: float | None = None
    high: float | None = None
    ceiling: float | None = None
    sign_agreement: float | None = None
    classes: list[dict[str, Any]] = field(default_factory=list)
    windows: int = 0
    steps: int = 0
    runs: int = 0
    live_step: int | None = None
    gradients: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        """One sentence for people."""
        reliable = "none" if self.reliability is None else f"{self.reliability:.2f}"
        bounds = "" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]"
        name = "class tilts" if self.kind == "tilt" else "linear datamodeling score"
        ceiling = "" if self.ceiling is None else f" (ceiling {self.ceiling:.2f})"
        signs = (
            "" if self.sign_agreement is None else f", signs agree for {self.sign_agreement:.0%}"
        )
        return (
            f"{self.estimator}: {name} {self.validity:.2f}{bounds}{ceiling}{signs}; split-half "
            f"reliability {reliable}"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_validity(
    proxy: Proxy,
    target: Target,
    source: WindowSource,
    config: CalibrationConfig,
    *,
    kind: Kind = "tilt",
    classes: ArrayLike | None = None,
    clusters: int = 6,
    pool_windows: int | None = None,
    steps: int | None = None,
    seeds: int = 2,
    subsets: int = 32,
    seed: int = 0,
    live_step: int | None = None,
    progress: Progress = silent,
) -> ValidityCheck:
    """Labels a pool with the configured estimator and retrains on parts of it.

    Args:
      proxy: the model where training stands.
      target: the outer metric; of several the first, by which retraining is judged. Labels are
        those of the first as well.
      source: raw windows.
      config: estimator, horizon, batch and learning rate.
      kind: "tilt" or "lds".
      classes: `(len(source),)` class of each window. None makes clusters for a tilt, and plain
        halves for lds, which otherwise hold half of each class.
      clusters: how many to make.
      pool_windows: N; None takes as many as one retraining draws, if there are.
      steps: of a retraining; None takes the labels' horizon.
      seeds: orders of each mixture or subset.
      subsets: random halves (lds).
      seed: of the pool, the labels and the retrainings.
      live_step: for the record.
      progress: called with stage name, done and total.

    Raises:
      ConfigError: an argument is out of its domain.
      NonFiniteMetagradient, TrajectoryDiverged: labels or retrainings left the finite numbers.
    """
    if kind not in ("tilt", "lds"):
        raise ConfigError(f"kind={kind!r}; expected 'tilt' or 'lds'.")
    given = None if classes is None else np.asarray(classes)
    if given is not None and given.shape != (len(source),):
        raise ConfigError(
            f"classes have shape {given.shape}; expected {(len(source),)}, one for each window of "
            "the source."
        )
    started = time.monotonic()
    rng = np.random.default_rng([config.seed, seed, 5])
    steps = config.inner_steps if steps is None else steps
    to_label, _ = split_source(len(source), config, source.lots)
    wanted = pool_windows or min(steps * config.batch_windows, config.wanted_labels)
    chosen = rng.permutation(to_label)[:wanted]
    windows = source.take(chosen)
    if given is not None:
        given = given[chosen]
    elif kind == "tilt":
        given = clusters_of(windows, clusters, seed=seed)
    cost = 0.0
    if proxy.opt_state is None:
        proxy, taken = warmed(proxy, source, config, rng, progress)
        cost += taken * config.batch_windows
    first = target.parts["target"]
    task = Task(
        proxy,
        first,
        source,
        config,
        windows,
        chosen,
        seed=(config.seed, seed, 6),
        progress=progress,
    )
    found = estimate(task)
    halves = combined(found.halves, first.weights)
    labels = gaussian_ranks(halves.astype(np.float64).sum(axis=0))
    rate = proxy.learning_rate
    optimizer = proxy.transformation(optax.linear_schedule(rate, rate / 10, steps))
    begin = (
        proxy.loss,
        first.outer(proxy.loss),
        proxy.params,
        warm_state(optimizer, proxy.params, proxy.opt_state),
        windows,
    )

    def retraining(done: int, total: int) -> None:
        progress("retraining", done, total)

    shared: dict[str, Any] = {
        "optimizer": optimizer,
        "steps": steps,
        "batch_windows": config.batch_windows,
        "seeds": seeds,
        "seed": seed,
        "microbatch": config.microbatch,
        "progress": retraining,
    }
    if kind == "tilt":
        tilt = tilt_check(*begin, given, labels, **shared)  # pyright: ignore[reportArgumentType]
        runs = 2 * len(tilt.classes) * seeds
        facts: dict[str, Any] = {
            "validity": tilt.rank_correlation,
            "sign_agreement": tilt.sign_agreement,
            "classes": [
                {
                    "name": str(tilt.classes[i]),
                    "share": float(tilt.shares[i]),
                    "predicted": float(tilt.predicted[i]),
                    "effect": float(tilt.effect[i]),
                    "standard_error": _finite(tilt.standard_error[i]),
                }
                for i in range(len(tilt.classes))
            ],
        }
    else:
        lds = linear_datamodeling_score(*begin, labels, strata=given, subsets=subsets, **shared)
        runs = subsets * seeds
        facts = {
            "validity": lds.rho,
            "low": lds.low,
            "high": lds.high,
            "ceiling": _finite(lds.ceiling),
        }
    run_cost = steps * config.batch_windows + FORWARD_COST * len(first.target_windows)
    return ValidityCheck(
        kind=kind,
        estimator=config.estimator,
        horizon=found.horizon,
        reliability=split_half_reliability(halves) if found.independent else None,
        **facts,
        windows=len(windows),
        steps=steps,
        runs=runs,
        live_step=live_step,
        gradients=cost + found.gradients + runs * run_cost,
        seconds=round(time.monotonic() - started, 3),
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
