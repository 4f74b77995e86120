"""The gate: paired short runs decide how strongly a candidate may filter, zero included.

A likelihood-type score cut hard can lose to random selection, whoever computes it. So before a
candidate is published, the proxy is trained for some steps on what each strength would keep and on
a uniform choice from the same windows, and the held-out loss on the gate's own split is compared
pair by pair. Uniform wins unless a strength beats it by a margin of standard errors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagrad_filter.calibration.config import CalibrationConfig
from metagrad_filter.calibration.source import WindowSource
from metagrad_filter.metagradient.optimizer import warm_state
from metagrad_filter.metagradient.trajectory import run
from metagrad_filter.proxy.proxy import Proxy
from metagrad_filter.scorer.scorer import Scorer
from metagrad_filter.selection import as_ratio, kept_before, select
from metagrad_filter.types import PyTree


@dataclass(frozen=True)
class GateArm:
    """One strength against uniform.

    Attributes:
      strength: logits per standard deviation of rank score; inf is plain top-k.
      gain: mean over pairs of (uniform's held-out loss - this arm's), in the loss's unit.
      standard_error: of the gain.
    """

    strength: float
    gain: float
    standard_error: float


@dataclass(frozen=True)
class GateResult:
    """What the gate measured and chose; `chosen` is 0 where no arm was clearly better."""

    arms: tuple[GateArm, ...]
    chosen: float

    def to_json(self) -> dict[str, Any]:
        arms = [
            {
                "strength": json_strength(arm.strength),
                "gain": _json_number(arm.gain),
                "standard_error": _json_number(arm.standard_error),
            }
            for arm in self.arms
        ]
        return {"arms": arms, "chosen": json_strength(self.chosen)}


def json_strength(strength: float) -> float | str:
    return "inf" if math.isinf(strength) else strength


def _json_number(value: float) -> float | None:
    # An arm that diverged has no gain, and JSON no NaN.
    return value if math.isfinite(value) else None


def run_gate(
    proxy: Proxy,
    candidate: Scorer,
    metric: Callable[[PyTree], jax.Array],
    source: WindowSource,
    pool: np.ndarray,
    config: CalibrationConfig,
    *,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GateResult:
    """Runs the paired comparison.

    Args:
      proxy: where training stands.
      candidate: the scorer on trial.
      metric: held-out loss on the gate split.
      source: raw windows.
      pool: positions in `source` to draw from, none of which the candidate was fitted on.
      config: strengths, steps, pairs and margin.
      seed: of the draws.
      progress: called with runs done and in total.
    """
    ratio = as_ratio(config.keep_ratio)
    wanted = config.gate_steps * config.batch_windows
    # The smallest number of windows of which floor(n r) are kept.
    drawn = -(-wanted * ratio.denominator // ratio.numerator)
    optimizer = proxy.transformation(_annealed(proxy.learning_rate, config.gate_steps))
    start = warm_state(optimizer, proxy.params, proxy.opt_state)
    strengths = (0.0, *config.gate_strengths)
    losses = np.empty((config.gate_pairs, len(strengths)))
    for pair in range(config.gate_pairs):
        rng = np.random.default_rng([seed, pair])
        windows = source.take(draw(rng, pool, drawn))
        scores = candidate.score(windows)
        for i, strength in enumerate(strengths):
            kept = _filtered(scores, ratio, config.block_windows, strength, seed, pair)[:wanted]
            batches = windows[kept].reshape(
                config.gate_steps, config.batch_windows, *windows.shape[1:]
            )
            losses[pair, i] = _train_and_measure(
                proxy.params,
                start,
                batches,
                loss=proxy.loss,
                optimizer=optimizer,
                metric=metric,
                microbatch=config.microbatch,
            )
            progress(pair * len(strengths) + i + 1, losses.size)
    return decide(losses, strengths, config.gate_margin)


def decide(losses: np.ndarray, strengths: tuple[float, ...], margin: float) -> GateResult:
    """Chooses among `(pairs, strengths)` losses; column 0 is uniform.

    An arm is eligible when its mean gain exceeds `margin` standard errors and zero; the eligible
    arm with the largest mean gain is chosen. Non-finite losses make an arm ineligible.
    """
    with np.errstate(invalid="ignore"):
        gains = losses[:, :1] - losses[:, 1:]
        means = gains.mean(axis=0)
        errors = gains.std(axis=0, ddof=1) / math.sqrt(len(losses))
    arms = tuple(
        GateArm(strength, float(mean), float(error))
        for strength, mean, error in zip(strengths[1:], means, errors)
    )
    eligible = [
        arm
        for arm in arms
        if math.isfinite(arm.gain) and arm.gain > max(margin * arm.standard_error, 0)
    ]
    best = max(eligible, key=lambda arm: arm.gain, default=None)
    return GateResult(arms, best.strength if best else 0.0)


def draw(rng: np.random.Generator, pool: np.ndarray, count: int) -> np.ndarray:
    """`count` positions of `pool` in random order, each as often as any other (+- 1)."""
    rounds = -(-count // len(pool))
    return np.concatenate([rng.permutation(pool) for _ in range(rounds)])[:count]


def _filtered(scores, ratio, block_windows, strength, seed, pair) -> np.ndarray:
    """Positions that a filter of this strength keeps of consecutive blocks."""
    kept = []
    for block, first in enumerate(range(0, len(scores), block_windows)):
        last = min(first + block_windows, len(scores))
        quota = kept_before(last, ratio) - kept_before(first, ratio)
        chosen = select(
            scores[first:last] if strength else None,
            last - first,
            quota,
            strength=strength,
            seed=seed,
            name=f"gate-{pair}",
            block=block,
        )
        kept.append(first + chosen)
    return np.concatenate(kept)


@functools.lru_cache(maxsize=16)
def _annealed(learning_rate: float, steps: int) -> optax.Schedule:
    # A rate that ends low makes short runs comparable: at a constant rate most of the held-out
    # loss is noise that any selection would lose by annealing.
    return optax.linear_schedule(learning_rate, learning_rate / 10, steps)


@functools.partial(jax.jit, static_argnames=("loss", "optimizer", "metric", "microbatch"))
def _train_and_measure(params, opt_state, batches, *, loss, optimizer, metric, microbatch):
    weights = jnp.ones(batches.shape[:2], jnp.float32)
    end, _, _ = run(loss, optimizer, params, opt_state, batches, weights, microbatch=microbatch)
    return metric(end)
