"""One calibration round as one function: sample -> estimate -> labels -> fit -> gate -> publish.

What a label is lies in `estimators/`; everything after it is one path whatever the estimator: ranks
of scores, pooled over recent rounds with weights by their age, a scorer fitted to them, paired runs
that choose its strength. The report counts what each part cost in window gradients (forward and
backward of one window = 1), which is what training costs a window too.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from metagrad_filter.calibration.config import CalibrationConfig
from metagrad_filter.calibration.estimators import Task, estimate
from metagrad_filter.calibration.estimators.mixing import RhoShare, mixed_halves, what_rho_adds
from metagrad_filter.calibration.estimators.on_policy import VERSIONS
from metagrad_filter.calibration.estimators.rho_loss import rho_loss
from metagrad_filter.calibration.estimators.task import FORWARD_COST, Stages, combined
from metagrad_filter.calibration.gate import (
    GateResult,
    draw,
    json_strength,
    run_gate,
    running_version,
)
from metagrad_filter.calibration.reference import Agreement, ReferencePool, agreement
from metagrad_filter.calibration.source import SeriesCheck, WindowCheck, WindowSource
from metagrad_filter.calibration.verdict import PUBLISHED, Facts, judge
from metagrad_filter.calibration.warm import warm_moments, warmup_steps
from metagrad_filter.errors import (
    ConfigError,
    NonFiniteMetagradient,
    ScorerRejected,
    TrajectoryDiverged,
    WindowError,
)
from metagrad_filter.labels import LabelStore, RoundLabels
from metagrad_filter.proxy.proxy import Proxy
from metagrad_filter.registry import Registry
from metagrad_filter.scorer.artifact import StoredScorer
from metagrad_filter.scorer.fit import fit_scorer
from metagrad_filter.scorer.scorer import Scorer
from metagrad_filter.targets import Target
from metagrad_filter.types import Progress, silent

_REFERENCE_WINDOWS = 4096  # that the distribution of scores is kept of


@dataclass(frozen=True)
class RoundReport:
    """What a round did.

    Attributes:
      round: its number, from 1.
      version: the version it published, or None.
      reason: "published", or why not.
      reliability: split-half rank correlation of the labels; None where the estimator has no
        randomness, or the round ended before it.
      rank_correlation: of the scorer with labels that its fit has not seen.
      form: "linear", "linear+bag" (text) or "linear+mlp" (series).
      labels: windows that the scorer was fitted and judged on, over the pooled rounds.
      gate: what the paired runs measured, or None where the round ended before them.
      live_step: step of the live training state that the round started from, or None.
      started_from: where that state came from, in words.
      warmup_steps: batches that warmed the moments; 0 where the live ones were at hand.
      estimator: what a label was.
      horizon: optimizer steps of a trajectory, None for estimators without.
      learning_rate_scale: inner learning rate that was used, as a share of the live one, or None.
      scales_tried: split-half correlation at each share that was tried, where several were; None
        for one that diverged.
      agreement: of the version that was running with fresh labels of the reference pool, or None.
      rho: what mixing RHO-loss's ranks into the labels added, or None.
      gradients: cost in window gradients of labels (warm-up included), fit and gate.
      masked_coordinates: coordinates without second moment, whose cotangent was set to zero.
      windows: positions in the source of the windows at which a round ended that diverged or left
        the finite numbers.
      tape: what the sweeps kept, in words.
      seconds: wall time by stage.
    """

    round: int
    version: int | None
    reason: str
    reliability: float | None = None
    rank_correlation: float | None = None
    form: str | None = None
    labels: int = 0
    gate: GateResult | None = None
    live_step: int | None = None
    started_from: str = "the proxy as given"
    warmup_steps: int = 0
    estimator: str = "metagradient"
    horizon: int | None = None
    learning_rate_scale: float | None = None
    scales_tried: dict[str, float | None] = field(default_factory=dict)
    agreement: Agreement | None = None
    rho: RhoShare | None = None
    gradients: dict[str, float] = field(default_factory=dict)
    masked_coordinates: int = 0
    windows: list[int] = field(default_factory=list)
    tape: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def strength(self) -> float | None:
        """How strongly the published version filters, or None."""
        return self.gate.chosen if self.gate and self.version is not None else None

    def to_json(self) -> dict[str, Any]:
        strength = None if self.strength is None else json_strength(self.strength)
        gate = self.gate.to_json() if self.gate else None
        return {
            **self.__dict__,
            "gate": gate,
            "strength": strength,
            "agreement": self.agreement.to_json() if self.agreement else None,
            "rho": self.rho.to_json() if self.rho else None,
        }


def run_round(
    proxy: Proxy,
    target: Target,
    source: WindowSource,
    config: CalibrationConfig,
    *,
    number: int,
    registry: Registry,
    store: LabelStore,
    live_step: int | None = None,
    started_from: str = "the proxy as given",
    run_dir: str | Path | None = None,
    progress: Progress = silent,
) -> RoundReport:
    """Runs one round and publishes its version, or records why not.

    Args:
      proxy: the model at the point of training that the round measures.
      target: outer metric and gate split.
      source: raw windows.
      config: the round's configuration.
      number: of the round; folded into every random choice.
      registry: where the version goes.
      store: where the labels go.
      live_step: training step of `proxy`, for the report.
      started_from: where `proxy` stands, for the report.
      run_dir: where the reference pool lies; None does without one.
      progress: called with stage name, done and total; may raise to end the round early.
    """
    clock = Stages()
    rng = np.random.default_rng([config.seed, number])
    to_label, for_gate = split_source(len(source), config, source.lots)
    target_hash = _target_hash(target, source, config)
    begun = RoundReport(
        number,
        None,
        "",
        live_step=live_step,
        started_from=started_from,
        estimator=config.estimator,
    )
    cost = 0.0
    try:
        if proxy.opt_state is None:
            with clock("warmup"):
                proxy, steps = warmed(proxy, source, config, rng, progress)
                begun = replace(begun, warmup_steps=steps)
                cost += steps * config.batch_windows
        sample = _sample(source, to_label, config, rng, registry, run_dir)
        task = Task(
            proxy,
            target,
            source,
            config,
            sample.windows,
            sample.positions,
            seed=(config.seed, number),
            versions=_versions(registry, config),
            progress=progress,
            clock=clock,
        )
        found_scores = estimate(task)
        cost += found_scores.gradients
        halves = combined(found_scores.halves[..., : sample.labelled], target.weights)
        fresh = combined(found_scores.halves[..., sample.labelled :], target.weights)
        rho = None
        if config.mix_rho:
            with clock("rho"):
                rho = rho_loss(
                    replace(
                        task,
                        clock=Stages(),
                        progress=lambda stage, done, total: progress("rho", done, total),
                    )
                )
            cost += rho.gradients
    except (NonFiniteMetagradient, TrajectoryDiverged) as error:
        verdict = judge(Facts(error=error), None, config)
        assert verdict is not None
        windows = list(error.windows)
        detail = {"round": number, "detail": verdict.sentence, "windows": windows}
        registry.reject(None, verdict.reason, detail)
        return replace(begun, reason=str(verdict), windows=windows)
    own, windows = halves, sample.windows[: sample.labelled]
    if rho is not None:
        reducible = combined(rho.halves[..., : sample.labelled], target.weights)
        halves = mixed_halves(own, reducible, config.mix_rho)
    norms = None if found_scores.norms is None else found_scores.norms[: sample.labelled]
    labels = RoundLabels(windows, halves, target_hash, norms)
    reliability = labels.reliability if found_scores.independent else None
    found = replace(
        begun,
        reliability=reliability,
        horizon=found_scores.horizon,
        learning_rate_scale=found_scores.learning_rate_scale,
        scales_tried={str(scale): halves for scale, halves in found_scores.tried.items()},
        agreement=_agreement(fresh, sample, registry, config),
        gradients={"labels": cost, "fit": 0.0, "gate": 0.0},
        masked_coordinates=found_scores.masked_coordinates,
        tape=found_scores.tape,
        seconds=clock.seconds,
    )
    facts = Facts(reliability)
    if (verdict := judge(facts, None, config)) is not None:
        detail = {"round": number, "detail": verdict.sentence, "reliability": reliability}
        registry.reject(None, verdict.reason, detail)
        return replace(found, reason=str(verdict))
    store.append(number, labels)
    with clock("fit"):
        progress("fit", 0, 1)
        pooled = store.pooled(config.pooled_rounds, target_hash, decay=config.label_decay)
        scorer = fit_scorer(
            pooled.windows,
            pooled.values,
            **fit_options(proxy, target, config),
            weights=pooled.weights,
            # Raw windows of this round's stream that no round labels.
            reference=source.take(for_gate[:_REFERENCE_WINDOWS]),
        )
        progress("fit", 1, 1)
    if rho is not None:
        with clock("rho"):
            added = what_rho_adds(
                windows,
                own,
                reducible,
                config.mix_rho,
                fit_options(proxy, target, config),
            )
        found = replace(
            found, rho=replace(added, gradients=rho.gradients, seconds=clock.seconds["rho"])
        )
    with clock("gate"):
        gate = run_gate(
            proxy,
            scorer,
            target.gate_metric(proxy.loss),
            source,
            for_gate,
            config,
            seed=int(rng.integers(2**31)),
            running=running_version(registry, source),
            guards=target.guard_metrics(proxy.loss),
            progress=lambda done, total: progress("gate", done, total),
        )
    found = replace(
        found,
        rank_correlation=scorer.metadata["rank_correlation"],
        form=scorer.metadata["form"],
        labels=len(pooled.windows),
        gate=gate,
        gradients={**found.gradients, "gate": _gate_cost(gate, target, config)},
    )
    return _publish(found, facts, scorer, config, registry)


def _publish(
    found: RoundReport,
    facts: Facts,
    scorer: StoredScorer,
    config: CalibrationConfig,
    registry: Registry,
) -> RoundReport:
    assert found.gate is not None
    verdict = judge(facts, found.gate, config)
    assert verdict is not None
    metadata = {
        "round": found.round,
        "reliability": found.reliability,
        "estimator": found.estimator,
        "horizon": found.horizon,
        "learning_rate_scale": found.learning_rate_scale,
        "gate": found.gate.to_json(),
        "verdict": verdict.to_json(),
        "detail": verdict.sentence,
        "live_step": found.live_step,
        "warmup_steps": found.warmup_steps,
        "config": config.to_json(),
    }
    if not verdict.publish:
        registry.reject(scorer, verdict.reason, metadata)
        return replace(found, reason=str(verdict))
    chosen = replace(scorer, strength=verdict.strength)  # pyright: ignore[reportArgumentType]
    version = registry.publish(chosen, metadata)
    reason = PUBLISHED if verdict.reason == PUBLISHED else str(verdict)
    return replace(found, version=version, reason=reason)


def warmed(
    proxy: Proxy,
    source: WindowSource,
    config: CalibrationConfig,
    rng: np.random.Generator,
    progress: Progress,
) -> tuple[Proxy, int]:
    """The proxy with moments of its own, and the number of batches that warmed them."""
    optimizer = proxy.transformation(proxy.learning_rate)
    steps = config.warmup_steps or warmup_steps(proxy.params, optimizer)
    progress("warmup", 0, steps)
    windows = source.take(draw(rng, np.arange(len(source)), steps * config.batch_windows))
    state = warm_moments(
        proxy.loss,
        proxy.params,
        windows.reshape(steps, config.batch_windows, *windows.shape[1:]),
        optimizer=optimizer,
        microbatch=config.microbatch,
    )
    progress("warmup", steps, steps)
    return proxy.at(proxy.params, state), steps


@dataclass(frozen=True)
class _Sample:
    """Windows that a round measures: those to label, then those of the reference pool."""

    windows: np.ndarray
    positions: np.ndarray  # in the source, -1 for the pool's
    labelled: int


def _sample(
    source: WindowSource,
    to_label: np.ndarray,
    config: CalibrationConfig,
    rng: np.random.Generator,
    registry: Registry,
    run_dir: str | Path | None,
) -> _Sample:
    chosen = rng.permutation(to_label)
    # Where a label costs dozens of gradients, a pool of thousands is no check any more.
    if run_dir is None or not config.reference_windows or config.dear_labels:
        chosen = chosen[: config.wanted_labels]
        return _Sample(source.take(chosen), chosen, len(chosen))
    pool = ReferencePool.open_or_create(
        run_dir, source, to_label, config.reference_windows, seed=config.seed
    )
    chosen = chosen[: config.wanted_labels + len(pool.windows)]
    windows = source.take(chosen)
    free = np.flatnonzero(~pool.contains(windows))[: config.wanted_labels]
    windows, chosen = windows[free], chosen[free]
    if registry.latest() is None:
        return _Sample(windows, chosen, len(chosen))
    return _Sample(
        np.concatenate([windows, pool.windows]),
        np.concatenate([chosen, np.full(len(pool.windows), -1)]),
        len(chosen),
    )


def _versions(registry: Registry, config: CalibrationConfig) -> list[Scorer]:
    """The newest versions, oldest first, where the estimator looks at them."""
    if config.estimator != "on_policy":
        return []
    found = []
    for version in registry.versions()[-VERSIONS:]:
        try:
            found.append(registry.load(version))
        except ScorerRejected as error:
            warnings.warn(f"Left out of the policy: {error}", RuntimeWarning, stacklevel=3)
    return found


def _agreement(
    fresh: np.ndarray, sample: _Sample, registry: Registry, config: CalibrationConfig
) -> Agreement | None:
    """How well the running version ranks the reference pool, or None without either."""
    running = registry.latest_verified() if fresh.shape[1] else None
    if running is None:
        return None
    version, scorer = running
    scores = scorer.score(sample.windows[sample.labelled :])
    return agreement(fresh, scores, version=version, seed=config.seed)


def _gate_cost(gate: GateResult, target: Target, config: CalibrationConfig) -> float:
    """Window gradients of the paired runs, uniform's included, and their evaluations."""
    judged = sum(len(part.gate_windows) for part in target.held_out)
    return gate.runs * (config.gate_steps * config.batch_windows + FORWARD_COST * judged)


def split_source(
    count: int, config: CalibrationConfig, lots: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Positions that rounds may label, and positions kept for the gate; the same in every round.

    The gate's are as many as its runs draw, at most a third: were a candidate tried on windows it
    was fitted on, it would look better than it is. Where windows come and go, `lots`, `(count,)` in
    [0, 1) and the same for a window in every round, say on which side it falls.
    """
    wanted = math.ceil(config.gate_steps * config.batch_windows / config.keep_ratio)
    order = np.random.default_rng([config.seed, 0]).permutation(count)
    if lots is not None:
        held_out = lots[order] < 1 / 3
        return order[~held_out], order[held_out][:wanted]
    reserved = min(wanted, count // 3)
    return order[reserved:], order[:reserved]


def _target_hash(target: Target, source: WindowSource, config: CalibrationConfig) -> str:
    """Identifies what labels mean; only rounds that agree in it are pooled.

    The horizon and the inner learning rate are left out: they may follow training.
    """
    shape = source.take(np.arange(1)).shape[1:]
    digest = hashlib.sha256(np.ascontiguousarray(target.target_windows).tobytes())
    digest.update(str(shape).encode())
    digest.update(target.parts["target"].identity.encode())
    for name, part in target.parts.items():
        if name != "target":
            digest.update(f"{name} {target.weights[name] / target.weights['target']}".encode())
            digest.update(np.ascontiguousarray(part.target_windows).tobytes())
            digest.update(part.identity.encode())
    kind = (config.estimator, config.normalise_gradient, config.mix_rho)
    if kind != ("metagradient", False, 0.0):
        digest.update(str(kind).encode())
    return digest.hexdigest()


def reads_series(target: Target) -> bool:
    """Whether windows are time series: those of the target are floats."""
    return np.issubdtype(target.target_windows.dtype, np.floating)


def window_check(
    proxy: Proxy, target: Target, config: CalibrationConfig
) -> WindowCheck | SeriesCheck:
    """What every window of the source has to pass, by the kind of the target's windows.

    Raises:
      ConfigError: windows are text, and nothing names the vocabulary size.
      WindowError: the target's windows are floats that are no series.
    """
    if not reads_series(target):
        return WindowCheck(vocabulary(proxy, config), config.pad_id)
    check = SeriesCheck(target.target_windows.shape[-1])
    check(target.target_windows)
    return check


def fit_options(proxy: Proxy, target: Target, config: CalibrationConfig) -> dict[str, Any]:
    """How `fit_scorer` is called for windows of the target's kind."""
    if reads_series(target):
        return {"kind": "series", "seed": config.seed}
    return {
        "vocab_size": vocabulary(proxy, config),
        "seed": config.seed,
        "pad_id": config.pad_id,
    }


def vocabulary(proxy: Proxy, config: CalibrationConfig) -> int:
    """The vocabulary size: the configuration's, or that of the proxy's loss.

    Raises:
      ConfigError: neither names it.
    """
    known = config.vocab_size or getattr(getattr(proxy.loss, "config", None), "vocab_size", None)
    if not isinstance(known, int) or known < 1:
        raise ConfigError(
            "the vocabulary size is unknown; set CalibrationConfig(vocab_size=...) to the "
            "tokenizer's, the loader checks token ids by it."
        )
    return known


def check_source(source: WindowSource, config: CalibrationConfig) -> None:
    """Looks at the size of the source before a round spends minutes on it.

    Raises:
      WindowError: it is too small to fit and judge a scorer.
    """
    if len(source) < 100:
        raise WindowError(
            f"the source holds {len(source)} windows; a round labels up to {config.labels} and "
            "needs at least 100."
        )
    trajectory = config.trajectory_windows
    if len(source) < trajectory:
        warnings.warn(
            f"the source holds {len(source)} windows, but a trajectory draws {trajectory}: "
            "repeated windows measure memorisation; name a larger source or lower the horizon.",
            RuntimeWarning,
            stacklevel=3,
        )
