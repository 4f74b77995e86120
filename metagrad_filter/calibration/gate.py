"""The gate: paired short runs decide how strongly a candidate may filter, zero included.

A likelihood-type score cut hard can lose to random selection, whoever computes it. So before a
candidate is published, the proxy is trained for some steps on what each strength would keep, on
what the running version keeps, and on a uniform choice from the same windows, and the held-out loss
on the gate's own split is compared pair by pair: the windows, their order in blocks and the draws
are the same for every run of a pair.

What has to be shown before a candidate may filter is shown at a stated level. With few pairs a
standard error is itself a guess: with three, a gain of two of them turns up once in eleven trials
of nothing, and with two strengths to choose from once in six. So the bar is the quantile of
Student's t at the level that `gate_margin` means for a normal distribution (2: .023), divided among
the strengths. Each arm has its own standard error: one pooled over arms would allow lower bars, and
be wrong where arms differ in noise or share it. Where acting wrongly is cheap, because the running
version or uniform stays, the bar is `gate_margin` plain standard errors.

Cost: (strengths + 1, or 2 with a running version) x pairs x steps optimizer steps.

Read next: `verdict.py` (what follows from the result).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import ndtr, stdtrit

from metagrad_filter.calibration.config import CalibrationConfig
from metagrad_filter.calibration.source import WindowSource
from metagrad_filter.errors import WindowError
from metagrad_filter.metagradient.optimizer import warm_state
from metagrad_filter.metagradient.trajectory import run
from metagrad_filter.proxy.proxy import Proxy
from metagrad_filter.registry import Registry
from metagrad_filter.scorer.artifact import StoredScorer
from metagrad_filter.selection import as_ratio, keep_blocks
from metagrad_filter.types import PyTree

Metric = Callable[[PyTree], jax.Array]

_LARGE_SOURCE = 0.05  # of the windows; what a smaller source loses cannot cost much
_FEWEST_EXPECTED = 20  # kept windows of a source under uniform; below, a share is a matter of luck


@dataclass(frozen=True)
class Difference:
    """A mean over pairs of a paired difference.

    Attributes:
      mean: in the loss's unit; NaN where a run left the finite numbers.
      standard_error: of the mean, from the differences themselves.
    """

    mean: float
    standard_error: float

    @classmethod
    def of(cls, differences: np.ndarray) -> Difference:
        """From `(pairs,)` differences, at least two."""
        with np.errstate(invalid="ignore"):
            error = differences.std(ddof=1) / math.sqrt(len(differences))
            return cls(float(differences.mean()), float(error))

    def exceeds(self, multiplier: float, floor: float = 0.0) -> bool:
        """Whether the mean is above `floor` by more than that many standard errors."""
        # inf * 0 is NaN: a bar that nothing passes.
        bar = floor + multiplier * self.standard_error
        return math.isfinite(self.mean) and self.mean > floor and self.mean > bar

    def to_json(self) -> dict[str, Any]:
        return {
            "mean": _json_number(self.mean),
            "standard_error": _json_number(self.standard_error),
        }


@dataclass(frozen=True)
class Starved:
    """A source that an arm would all but drop.

    Attributes:
      source: its name.
      before: its share of the windows.
      after: its share of what the arm keeps.
    """

    source: str
    before: float
    after: float


@dataclass(frozen=True)
class GateArm:
    """One strength against uniform.

    Attributes:
      strength: logits per standard deviation of rank score; inf is plain top-k.
      gain: mean over pairs of (uniform's held-out loss - this arm's), in the loss's unit.
      standard_error: of the gain.
      better: whether the gain is clearly above zero.
      guards: by name, how much higher the guard's loss is than under uniform.
      broken_guard: a guard whose loss is too much higher, or "".
      starved: a source it would all but drop, or None.
    """

    strength: float
    gain: float
    standard_error: float
    better: bool = False
    guards: Mapping[str, Difference] = field(default_factory=dict)
    broken_guard: str = ""
    starved: Starved | None = None

    @property
    def eligible(self) -> bool:
        """Whether it may be chosen."""
        return self.better and not self.broken_guard and self.starved is None

    def to_json(self) -> dict[str, Any]:
        return {
            "strength": json_strength(self.strength),
            "gain": _json_number(self.gain),
            "standard_error": _json_number(self.standard_error),
            "better": self.better,
            "guards": {name: rise.to_json() for name, rise in self.guards.items()},
            "broken_guard": self.broken_guard,
            "starved": None if self.starved is None else dict(self.starved.__dict__),
        }


@dataclass(frozen=True)
class RunningArm:
    """The running version, at its own strength, in the same runs.

    Attributes:
      version: its number.
      strength: its strength.
      gain: mean over pairs of (uniform's loss - its), with its standard error.
      lead: of the candidate's chosen arm over it, or None where no arm was chosen.
      harmful: whether uniform is clearly better, or its runs left the finite numbers.
    """

    version: int
    strength: float
    gain: Difference
    lead: Difference | None = None
    harmful: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "running": True,
            "version": self.version,
            "strength": json_strength(self.strength),
            "gain": _json_number(self.gain.mean),
            "standard_error": _json_number(self.gain.standard_error),
            "lead": None if self.lead is None else self.lead.to_json(),
            "harmful": self.harmful,
        }


@dataclass(frozen=True)
class GateResult:
    """What the gate measured and chose.

    Attributes:
      arms: the candidate's, one per strength.
      chosen: strength of the eligible arm with the largest gain; 0 where there is none.
      running: the running version, or None where none filters.
      pairs: how many pairs there were.
      bar: standard errors by which an arm has to beat uniform.
      finite: whether every run on a uniform choice stayed within the finite numbers.
    """

    arms: tuple[GateArm, ...]
    chosen: float
    running: RunningArm | None = None
    pairs: int = 0
    bar: float = math.nan
    finite: bool = True

    @property
    def best(self) -> GateArm | None:
        """The chosen arm, or None."""
        return next((arm for arm in self.arms if arm.strength == self.chosen), None)

    @property
    def runs(self) -> int:
        """How many short runs were made."""
        return self.pairs * (1 + len(self.arms) + (self.running is not None))

    def to_json(self) -> dict[str, Any]:
        arms = [arm.to_json() for arm in self.arms]
        if self.running is not None:
            arms.append(self.running.to_json())
        return {
            "arms": arms,
            "chosen": json_strength(self.chosen),
            "pairs": self.pairs,
            "bar": _json_number(self.bar),
        }


def json_strength(strength: float) -> float | str:
    return "inf" if math.isinf(strength) else strength


def _json_number(value: float) -> float | None:
    # An arm that diverged has no gain, and JSON no NaN.
    return value if math.isfinite(value) else None


def running_version(registry: Registry, source: WindowSource) -> tuple[int, StoredScorer] | None:
    """The version that filters now and its scorer; None where selection is uniform.

    A version that cannot score windows of this source is warned about and not compared.
    """
    found = registry.look()
    if found.version is None or found.scorer.strength == 0:
        return None
    try:
        found.scorer.score(source.take(np.arange(1)))
    except WindowError as error:
        warnings.warn(
            f"Version {found.version} cannot score the windows of this calibration ({error}); the "
            "candidate is compared with a uniform choice only.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return found.version, found.scorer


def run_gate(
    proxy: Proxy,
    candidate: StoredScorer,
    metric: Metric,
    source: WindowSource,
    pool: np.ndarray,
    config: CalibrationConfig,
    *,
    seed: int,
    running: tuple[int, StoredScorer] | None = None,
    guards: Mapping[str, Metric] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GateResult:
    """Runs the paired comparison.

    Args:
      proxy: where training stands.
      candidate: the scorer on trial.
      metric: held-out loss on the gate split.
      source: raw windows.
      pool: positions in `source` to draw from, none of which the candidate was fitted on.
      config: strengths, steps, pairs, margin and tolerances.
      seed: of the draws.
      running: the version that filters now, see `running_version`.
      guards: by name, losses that filtering must not raise by much.
      progress: called with runs done and in total.
    """
    ratio = as_ratio(config.keep_ratio)
    wanted = config.gate_steps * config.batch_windows
    # The smallest number of windows of which floor(n r) are kept.
    drawn = -(-wanted * ratio.denominator // ratio.numerator)
    optimizer = proxy.transformation(_annealed(proxy.learning_rate, config.gate_steps))
    start = warm_state(optimizer, proxy.params, proxy.opt_state)
    guards = dict(guards or {})
    strengths = (0.0, *config.gate_strengths)
    arms = [(candidate, strength) for strength in strengths]
    if running is not None:
        arms.append((running[1], running[1].strength))
    losses = np.empty((1 + len(guards), config.gate_pairs, len(arms)))
    seen: Counter[str] = Counter()
    held: list[Counter[str]] = [Counter() for _ in strengths]
    for pair in range(config.gate_pairs):
        rng = np.random.default_rng([seed, pair])
        index = draw(rng, pool, drawn)
        windows, sources = source.take(index), source.sources(index)
        scores = {id(scorer): scorer.score(windows) for scorer, _ in arms}
        if sources is not None:
            seen.update(sources.tolist())
        for i, (scorer, strength) in enumerate(arms):
            own = scores[id(scorer)]
            kept = keep_blocks(
                own if strength else None,
                len(windows),
                block_windows=config.block_windows,
                keep_ratio=ratio,
                strength=strength,
                seed=seed,
                name=f"gate-{pair}",
            )[:wanted]
            if sources is not None and i < len(held):
                held[i].update(sources[kept].tolist())
            batches = windows[kept].reshape(
                config.gate_steps, config.batch_windows, *windows.shape[1:]
            )
            losses[:, pair, i] = _train_and_measure(
                proxy.params,
                start,
                batches,
                loss=proxy.loss,
                optimizer=optimizer,
                metrics=(metric, *guards.values()),
                microbatch=config.microbatch,
            )
            progress(pair * len(arms) + i + 1, losses[0].size)
    count = len(strengths)
    return decide(
        losses[0][:, :count],
        strengths,
        config.gate_margin,
        guards={name: found[:, :count] for name, found in zip(guards, losses[1:])},
        guard_tolerance=config.gate_guard_tolerance,
        starved=[starved_source(seen, mine, config) for mine in held[1:]],
        running=None if running is None else (running[0], running[1].strength, losses[0][:, -1]),
    )


def decide(
    losses: np.ndarray,
    strengths: tuple[float, ...],
    margin: float,
    *,
    guards: Mapping[str, np.ndarray] | None = None,
    guard_tolerance: float = 0.0,
    starved: list[Starved | None] | None = None,
    running: tuple[int, float, np.ndarray] | None = None,
) -> GateResult:
    """Chooses among `(pairs, strengths)` losses; column 0 is uniform. Pure.

    An arm is eligible when its gain is clearly above zero (`bar`), no guard's loss is above
    uniform's by more than `guard_tolerance` and `margin` standard errors, and it starves no source.
    The eligible arm with the largest mean gain is chosen. Losses that are not finite make an arm
    ineligible. Where no strength helps, one is chosen with a probability of at most
    `Phi(-margin)`, whatever the noise of arms and their correlation, if differences are normal.

    Args:
      losses: held-out losses.
      strengths: of the columns, 0 first.
      margin: as `gate_margin`.
      guards: by name, `(pairs, strengths)` losses.
      guard_tolerance: in the loss's unit.
      starved: per strength above 0, the source that it starves.
      running: version, strength and `(pairs,)` losses of the running version.
    """
    bar = required(margin, len(losses), len(strengths) - 1)
    dropped = starved or [None] * (len(strengths) - 1)
    arms = []
    for i, strength in enumerate(strengths[1:], 1):
        with np.errstate(invalid="ignore"):
            gain = Difference.of(losses[:, 0] - losses[:, i])
            rises = {n: Difference.of(g[:, i] - g[:, 0]) for n, g in (guards or {}).items()}
        # One that is not finite is a broken guard too.
        broken = [
            name
            for name, rise in rises.items()
            if not math.isfinite(rise.mean) or rise.exceeds(margin, guard_tolerance)
        ]
        arms.append(
            GateArm(
                strength,
                gain.mean,
                gain.standard_error,
                gain.exceeds(bar),
                rises,
                broken[0] if broken else "",
                dropped[i - 1],
            )
        )
    eligible = [i for i, arm in enumerate(arms) if arm.eligible]
    best = max(eligible, key=lambda i: arms[i].gain, default=None)
    against = None
    if running is not None:
        version, strength, own = running
        with np.errstate(invalid="ignore"):
            gain = Difference.of(losses[:, 0] - own)
            loss = Difference.of(own - losses[:, 0])
            lead = None if best is None else Difference.of(own - losses[:, best + 1])
        lost = bool(np.isfinite(losses[:, 0]).all() and not np.isfinite(own).all())
        harmful = lost or loss.exceeds(required(margin, len(losses), 1))
        against = RunningArm(version, strength, gain, lead, harmful)
    return GateResult(
        tuple(arms),
        0.0 if best is None else arms[best].strength,
        against,
        len(losses),
        bar,
        bool(np.isfinite(losses[:, 0]).all()),
    )


def required(margin: float, pairs: int, comparisons: int) -> float:
    """Standard errors that a mean of `pairs` differences needs, so that all `comparisons` together
    err as rarely as one normal mean does that needs `margin`.

    References:
      Student, The probable error of a mean, Biometrika 1908; Bonferroni's inequality.

    Example:
      >>> round(required(2.0, 3, 1), 2), round(required(2.0, 4, 2), 2), round(required(2.0, 99, 1))
      (4.53, 4.18, 2)
    """
    level = ndtr(-margin) / comparisons
    return float(-stdtrit(pairs - 1, level)) if level > 0 else math.inf


def starved_source(
    seen: Mapping[str, int], kept: Mapping[str, int], config: CalibrationConfig
) -> Starved | None:
    """The source that is starved most, or None.

    Of a source with at least 5 % of the windows, an arm must keep `gate_minimum_source_share` of
    what a uniform choice would keep, unless the source is named in `gate_may_starve`. Sources of
    which uniform would keep less than 20 windows are passed over.

    Args:
      seen: windows by source.
      kept: of those, windows that are kept.
      config: the limits.
    """
    total, held = sum(seen.values()), sum(kept.values())
    found = []
    for name, count in seen.items():
        before = count / total
        if name in config.gate_may_starve or before < _LARGE_SOURCE:
            continue
        if before * held < _FEWEST_EXPECTED:
            continue
        after = kept.get(name, 0) / held
        if after < config.gate_minimum_source_share * before:
            found.append(Starved(name, before, after))
    return min(found, key=lambda one: one.after / one.before, default=None)


def draw(rng: np.random.Generator, pool: np.ndarray, count: int) -> np.ndarray:
    """`count` positions of `pool` in random order, each as often as any other (+- 1)."""
    rounds = -(-count // len(pool))
    return np.concatenate([rng.permutation(pool) for _ in range(rounds)])[:count]


@functools.lru_cache(maxsize=16)
def _annealed(learning_rate: float, steps: int) -> optax.Schedule:
    # A rate that ends low makes short runs comparable: at a constant rate most of the held-out
    # loss is noise that any selection would lose by annealing.
    return optax.linear_schedule(learning_rate, learning_rate / 10, steps)


@functools.partial(jax.jit, static_argnames=("loss", "optimizer", "metrics", "microbatch"))
def _train_and_measure(params, opt_state, batches, *, loss, optimizer, metrics, microbatch):
    weights = jnp.ones(batches.shape[:2], jnp.float32)
    end, _, _ = run(loss, optimizer, params, opt_state, batches, weights, microbatch=microbatch)
    return jnp.stack([metric(end) for metric in metrics])
