"""One calibration round as one function: sample -> trajectories -> probe -> labels -> fit -> gate.

Trajectories start at the proxy's live parameters from warm moments, take fresh batches of the raw
(unfiltered) stream at a cooled learning rate, and run about as long as the selection will act; the
cotangent is averaged over all insertion steps. Each of these is load-bearing: the step-0 cotangent,
the filtered stream, a short horizon or the live rate give labels that look reliable and select
badly.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metagrad_filter.calibration.config import CalibrationConfig
from metagrad_filter.calibration.gate import GateResult, draw, json_strength, run_gate
from metagrad_filter.calibration.source import WindowSource
from metagrad_filter.calibration.warm import warm_moments, warmup_steps
from metagrad_filter.errors import (
    ConfigError,
    NonFiniteMetagradient,
    TrajectoryDiverged,
    WindowError,
)
from metagrad_filter.labels import LabelStore, RoundLabels
from metagrad_filter.metagradient.adjoint import metagradients
from metagrad_filter.metagradient.divergence import check_rise
from metagrad_filter.metagradient.optimizer import warm_state
from metagrad_filter.metagradient.probe import score_with_probes
from metagrad_filter.proxy.proxy import Proxy
from metagrad_filter.registry import Registry
from metagrad_filter.scorer.fit import fit_scorer
from metagrad_filter.scorer.scorer import Scorer
from metagrad_filter.targets import HeldOutLoss
from metagrad_filter.types import Progress, PyTree, silent


@dataclass(frozen=True)
class RoundReport:
    """What a round did.

    Attributes:
      round: its number, from 1.
      version: the version it published, or None.
      reason: "published", or why not.
      reliability: split-half rank correlation of the labels.
      rank_correlation: of the scorer with labels that its fit has not seen.
      form: "linear" or "linear+bag".
      labels: windows that the scorer was fitted and judged on, over the pooled rounds.
      gate: what the paired runs measured, or None where the round ended before them.
      live_step: step of the live training state that the round started from, or None.
      started_from: where that state came from, in words.
      warmup_steps: batches that warmed the moments; 0 where the live ones were at hand.
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
        return {**self.__dict__, "gate": gate, "strength": strength}


def run_round(
    proxy: Proxy,
    target: HeldOutLoss,
    source: WindowSource,
    config: CalibrationConfig,
    *,
    number: int,
    registry: Registry,
    store: LabelStore,
    live_step: int | None = None,
    started_from: str = "the proxy as given",
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
      progress: called with stage name, done and total; may raise to end the round early.
    """
    clock = _Stages()
    rng = np.random.default_rng([config.seed, number])
    to_label, for_gate = split_source(len(source), config, source.lots)
    target_hash = _target_hash(target, source)
    begun = RoundReport(number, None, "", live_step=live_step, started_from=started_from)
    try:
        if proxy.opt_state is None:
            with clock("warmup"):
                proxy, steps = _warmed(proxy, source, config, rng, progress)
                begun = replace(begun, warmup_steps=steps)
        with clock("trajectories"):
            probes, masked, tape = _averaged_probes(proxy, target, source, config, rng, progress)
        with clock("labels"):
            chosen = rng.permutation(to_label)[: config.labels]
            windows = source.take(chosen)
            with _naming(chosen, "scoring"):
                halves = score_with_probes(
                    proxy.loss,
                    proxy.params,
                    probes,
                    windows,
                    progress=lambda done: progress("labels", done, len(windows)),
                )
    except (NonFiniteMetagradient, TrajectoryDiverged) as error:
        why = "diverged" if isinstance(error, TrajectoryDiverged) else "non_finite"
        windows = list(error.windows)
        registry.reject(None, why, {"round": number, "detail": str(error), "windows": windows})
        return replace(begun, reason=f"{why.replace('_', '-')}: {error}", windows=windows)
    labels = RoundLabels(windows, halves, target_hash)
    reliability = labels.reliability
    found = replace(
        begun,
        reliability=reliability,
        masked_coordinates=masked,
        tape=tape,
        seconds=clock.seconds,
    )
    if not reliability >= config.minimum_reliability:
        registry.reject(None, "unreliable", {"round": number, "reliability": reliability})
        return replace(
            found,
            reason=f"unreliable: split-half correlation {reliability:.2f} is below "
            f"{config.minimum_reliability}; lower learning_rate_scale or raise trajectories",
        )
    store.append(number, labels)
    with clock("fit"):
        progress("fit", 0, 1)
        pooled_windows, pooled_labels = store.pooled(config.pooled_rounds, target_hash)
        scorer = fit_scorer(
            pooled_windows,
            pooled_labels,
            vocab_size=vocabulary(proxy, config),
            seed=config.seed,
            pad_id=config.pad_id,
        )
        progress("fit", 1, 1)
    with clock("gate"):
        gate = run_gate(
            proxy,
            scorer,
            target.gate_metric(proxy.loss),
            source,
            for_gate,
            config,
            seed=int(rng.integers(2**31)),
            progress=lambda done, total: progress("gate", done, total),
        )
    found = replace(
        found,
        rank_correlation=scorer.metadata["rank_correlation"],
        form=scorer.metadata["form"],
        labels=len(pooled_windows),
        gate=gate,
    )
    return _publish(found, scorer, config, registry)


def _publish(
    found: RoundReport, scorer: Scorer, config: CalibrationConfig, registry: Registry
) -> RoundReport:
    assert found.gate is not None
    metadata = {
        "round": found.round,
        "reliability": found.reliability,
        "gate": found.gate.to_json(),
        "live_step": found.live_step,
        "warmup_steps": found.warmup_steps,
        "config": config.to_json(),
    }
    if found.gate.chosen == 0 and registry.latest() is None:
        registry.reject(scorer, "gate", metadata)
        return replace(found, reason="gate: no strength was clearly better than uniform")
    # With a version already filtering, "uniform is best now" has to be said by a version too.
    version = registry.publish(replace(scorer, strength=found.gate.chosen), metadata)
    return replace(found, version=version, reason="published")


def _warmed(
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


def _averaged_probes(
    proxy: Proxy,
    target: HeldOutLoss,
    source: WindowSource,
    config: CalibrationConfig,
    rng: np.random.Generator,
    progress: Progress,
) -> tuple[list[PyTree], int, str]:
    """Mean probe of each half of the trajectories, masked coordinates, and what was kept."""
    optimizer = proxy.transformation(proxy.learning_rate * config.learning_rate_scale)
    start = warm_state(optimizer, proxy.params, proxy.opt_state)
    outer = target.outer(proxy.loss)
    before = float(jax.jit(outer)(proxy.params))
    every = np.arange(len(source))
    halves: list[list[PyTree]] = [[], []]
    masked, tape = 0, ""
    for i in range(config.trajectories):
        progress("trajectories", i, config.trajectories)
        index = draw(rng, every, config.horizon * config.batch_windows)
        windows = source.take(index)
        batches = windows.reshape(config.horizon, config.batch_windows, *windows.shape[1:])
        with _naming(index.reshape(config.horizon, -1), f"trajectory {i}"):
            result = metagradients(
                proxy.loss,
                outer,
                proxy.params,
                start,
                batches,
                optimizer=optimizer,
                microbatch=config.microbatch,
            )
            check_rise(
                proxy.loss,
                optimizer,
                (proxy.params, start),
                batches,
                jnp.ones(batches.shape[:2]),
                before=before,
                after=float(result.phi),
                most=config.maximum_rise,
                microbatch=config.microbatch,
            )
        tape = str(result.tape)
        halves[i % 2].append(result.probe)
        masked = max(masked, result.masked_coordinates)
    progress("trajectories", config.trajectories, config.trajectories)
    means = [jax.tree.map(lambda *x: sum(x) / len(x), *probes) for probes in halves]
    return means, masked, tape


@contextmanager
def _naming(positions: np.ndarray, what: str) -> Iterator[None]:
    """Turns positions in a batch, in errors of a measurement, into positions in the source."""
    try:
        yield
    except (NonFiniteMetagradient, TrajectoryDiverged) as error:
        places = positions if error.step is None else positions[error.step]
        named = tuple(int(i) for i in places[list(error.windows)]) if error.windows else ()
        shown = f" (windows {', '.join(map(str, named[:8]))} of the source)" if named else ""
        message = f"{what}: {error}{shown}"
        raise type(error)(message, step=error.step, windows=named) from error  # pyright: ignore[reportArgumentType]


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


def _target_hash(target: HeldOutLoss, source: WindowSource) -> str:
    """Identifies what labels mean; only rounds that agree in it are pooled."""
    shape = source.take(np.arange(1)).shape[1:]
    digest = hashlib.sha256(np.ascontiguousarray(target.target_windows).tobytes())
    digest.update(str(shape).encode())
    return digest.hexdigest()


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


class _Stages:
    """Wall time by stage: `with clock("fit"): ...`."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._running: tuple[str, float] = ("", 0.0)

    def __call__(self, name: str) -> _Stages:
        self._running = (name, time.monotonic())
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        name, start = self._running
        self.seconds[name] = round(time.monotonic() - start, 3)


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
    trajectory = config.horizon * config.batch_windows
    if len(source) < trajectory:
        warnings.warn(
            f"the source holds {len(source)} windows, but a trajectory draws {trajectory}: "
            "repeated windows measure memorisation; name a larger source or lower the horizon.",
            RuntimeWarning,
            stacklevel=3,
        )
