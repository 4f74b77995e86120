"""The record of the small world: which scores predict training, and what reliable ones cost.

python -m bench.lds            run (about ten minutes of processor time), store, print the table
python -m bench.lds --table    print the table of the stored record

World (`metagrad_filter/doctor/small_world.py`): a decoder of 14 thousand parameters in mid-training
on windows of 17 tokens, good / off / corrupt in shares .4 / .4 / .2, four topics each, every window
with its own share of replaced tokens. Phi is the mean loss of 256 held-out windows of the target.

Truth: a pool of 512 windows is halved 96 times, each kind by itself, so that the mixture of kinds
never differs and only which windows of a kind are in does. From the warm base each half trains 32
steps of 16 windows in 4 orders, at the live learning rate falling to a tenth. LDS is Spearman's rho
over halves between -Phi and the sum of scores.

World and truth were fixed by looking at the base's loss and at the reliability of the retrainings,
before any score was computed. A first run in world 0 gave the rival its best of three rates, as
judged by the truth itself, and ours one fixed rate: the difference was .09, its interval [-.06,
.26]. After that run the comparison became what it is now: both at the same rate, at three rates,
each at its best, and the first run's one beside them; and world 1, which no choice had looked at,
was added.

Scores:

* fresh, T: metagradients from warm moments, a fresh batch of the raw stream (outside the pool) each
  step, at a quarter of the live rate; 256 steps in all for every T (T=32: 8 trajectories), the
  probe averaged over them and every window of the pool scored by it.
* fresh in batch, T=32: the pool's own windows in the trajectories, 8 passes, scores normalised
  within each step.
* same batch, cold: the same 16 windows of the pool at all 16 steps from cold Adam moments (epsilon
  inside the root, 1e-8), scores summed over steps and normalised within a round, 4.2 rounds for
  every window, at the same rate.
* same batch, warm: as before with warm moments, to tell the two differences apart.
* one step: the gradient of Phi against each window's gradient, plain and divided by the root of
  Adam's second moment.
* RHO-loss: loss under the base minus loss under the base tuned 64 steps on Phi's windows.

Cost counts window gradients (forward and backward of one window = 1): a step of a sweep 3.66 a
window, a probe score .95, a gradient of Phi 256; and wall and processor seconds after compilation.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.record import environment, write_record

RECORD = Path(__file__).parent / "records" / "lds.json"

WORLDS = (0, 1)
POOL, SUBSETS, ORDERS, STEPS = 512, 96, 4, 32
INNER_SCALE = 0.25  # of the live learning rate
INNER_STEPS = 256
SCALES = (0.1, 0.25, 1.0)  # at which both are compared
RIVAL_STEPS, RIVAL_ROUNDS = 16, 4.2
RIVAL_PASSES = 8  # of the reliability curve, in two halves
SWEEP_COST, PROBE_COST = 3.66, 0.95
REFERENCE_STEPS = 64

COSTS = ("window_gradients", "wall_seconds", "cpu_seconds")

MAIN, RIVAL = "fresh, T=32", "same batch, cold"


def measure() -> dict[str, Any]:
    """Runs the comparison in every world; JSON types only."""
    started = time.monotonic()
    worlds, reliability = {}, None
    for seed in WORLDS:
        found, estimators, rival_scale = _world(seed)
        worlds[str(seed)] = found
        if reliability is None:
            reliability = _reliability(estimators, rival_scale)
    return {
        "worlds": worlds,
        "reliability": reliability,
        "config": {
            "pool": POOL,
            "subsets": SUBSETS,
            "orders": ORDERS,
            "retraining_steps": STEPS,
            "inner_scale": INNER_SCALE,
            "inner_steps": INNER_STEPS,
            "scales": list(SCALES),
            "rival_steps": RIVAL_STEPS,
            "rival_rounds": RIVAL_ROUNDS,
            "rival_passes": RIVAL_PASSES,
            "reference_steps": REFERENCE_STEPS,
        },
        "environment": environment("metagrad-filter", "jax", "flax", "optax", "numpy"),
        "seconds": round(time.monotonic() - started, 1),
    }


def _world(seed: int) -> tuple[dict[str, Any], _Estimators, float]:
    """Every score against the retrainings of one world; and the rival's best rate there."""
    import jax
    import numpy as np

    from metagrad_filter.doctor.small_world import BATCH, LENGTH, small_world
    from metagrad_filter.metagradient.checks import retrain_on_subsets
    from metagrad_filter.metagradient.optimizer import warm_state

    world = small_world(seed=seed)
    proxy, pool = world.proxy, world.windows[:POOL]
    outer = world.target.outer(proxy.loss)
    live = proxy.transformation(_falling(proxy.learning_rate))
    _say(f"world {seed}: retraining on half-subsets")
    truth = retrain_on_subsets(
        proxy.loss,
        outer,
        proxy.params,
        warm_state(live, proxy.params, proxy.opt_state),
        pool,
        optimizer=live,
        steps=STEPS,
        batch_windows=BATCH,
        subsets=SUBSETS,
        seeds=ORDERS,
        strata=world.kinds[:POOL],
        seed=seed,
    )
    _say(f"world {seed}: scores")
    estimators = _Estimators(world, seed)
    scores = {
        f"fresh, T={horizon}": estimators.fresh(horizon, INNER_SCALE)[0].mean(axis=0)
        for horizon in (16, 32, 64)
    }
    scores["fresh in batch, T=32"] = estimators.in_batch(STEPS)
    rounds = round(RIVAL_ROUNDS * POOL / BATCH)
    ours = {scale: estimators.fresh(STEPS, scale)[0].mean(axis=0) for scale in SCALES}
    rival = {
        scale: np.nanmean(estimators.same_batch(scale, cold=True, rounds=rounds)[0], axis=0)
        for scale in SCALES
    }
    scores[RIVAL] = rival[INNER_SCALE]
    labels, _ = estimators.same_batch(INNER_SCALE, cold=False, rounds=rounds)
    scores["same batch, warm"] = np.nanmean(labels, axis=0)
    scores["one step"] = estimators.one_step(preconditioned=False)
    scores["one step, Adam"] = estimators.one_step(preconditioned=True)
    scores["RHO-loss"] = estimators.rho_loss()
    scores["fresh, T=32 + RHO-loss"] = _ranks(scores[MAIN]) + _ranks(scores["RHO-loss"])

    def lds(values):
        found = truth.agreement(values, seed=seed)
        return {"lds": found.rho, "low": found.low, "high": found.high}

    def best(of):
        return max(of, key=lambda scale: lds(of[scale])["lds"])

    def difference(first, second):
        return vars(truth.difference(first, second, seed=seed))

    found = {
        "methods": {name: lds(values) for name, values in scores.items()},
        "by_scale": {
            str(scale): {
                MAIN: lds(ours[scale]),
                RIVAL: lds(rival[scale]),
                "difference": difference(ours[scale], rival[scale]),
            }
            for scale in SCALES
        },
        "best_scales": {
            MAIN: best(ours),
            RIVAL: best(rival),
            "difference": difference(ours[best(ours)], rival[best(rival)]),
            "difference_from_ours_as_configured": difference(scores[MAIN], rival[best(rival)]),
        },
        "retraining": {
            "reliability": truth.reliability,
            "ceiling": truth.agreement(scores[MAIN]).ceiling,
            "phi_mean": float(truth.phi.mean()),
            "phi_deviation_of_subsets": float(truth.phi.mean(axis=1).std(ddof=1)),
            "phi_deviation_of_orders": float(truth.phi.std(axis=1, ddof=1).mean()),
        },
        "world": {
            "seed": seed,
            "parameters": sum(int(x.size) for x in jax.tree.leaves(proxy.params)),
            "window_tokens": LENGTH,
            "batch_windows": BATCH,
            "learning_rate": proxy.learning_rate,
            "target_windows": len(world.target.target_windows),
            "base_loss": float(outer(proxy.params)),
        },
    }
    return found, estimators, best(rival)


class _Estimators:
    """Every way to score the pool, from one start."""

    def __init__(self, world, seed: int):
        self.world, self.seed, self.proxy, self.batch = world, seed, world.proxy, 16
        self.pool, self.stream = world.windows[:POOL], world.windows[POOL:]
        self.outer = world.target.outer(world.proxy.loss)
        self.phi_windows = len(world.target.target_windows)

    def sweep(self, optimizer, state, batches):
        from metagrad_filter.metagradient import metagradients

        proxy = self.proxy
        return metagradients(
            proxy.loss, self.outer, proxy.params, state, batches, optimizer=optimizer
        )

    def warm(self, scale: float):
        from metagrad_filter.metagradient.optimizer import warm_state

        optimizer = self.proxy.transformation(self.proxy.learning_rate * scale)
        return optimizer, warm_state(optimizer, self.proxy.params, self.proxy.opt_state)

    def fresh(self, horizon: int, scale: float):
        """`(2, N)` probe scores of two halves of the trajectories, and what they cost."""
        import jax
        import numpy as np

        from metagrad_filter.metagradient import probe_scores

        optimizer, state = self.warm(scale)
        trajectories = INNER_STEPS // horizon

        def everything(count: int):
            rng = np.random.default_rng([self.seed, 2])
            halves: list[list[Any]] = [[], []]
            for i in range(count):
                rows = rng.permutation(len(self.stream))[: horizon * self.batch]
                batches = self.stream[rows].reshape(horizon, self.batch, -1)
                halves[i % 2].append(self.sweep(optimizer, state, batches).probe)
            means = [jax.tree.map(lambda *x: sum(x) / len(x), *half) for half in halves]
            return np.stack(
                [
                    probe_scores(self.proxy.loss, self.proxy.params, mean, self.pool)
                    for mean in means
                ]
            )

        everything(2)  # compiles
        found, seconds = _timed(lambda: everything(trajectories))
        sweeps = horizon * self.batch * SWEEP_COST + self.phi_windows
        # Both halves are scored here; a round scores both in one pass over the windows.
        cost = trajectories * sweeps + 2 * PROBE_COST * len(self.pool)
        return found, {"trajectories": trajectories, "window_gradients": cost, **seconds}

    def in_batch(self, horizon: int):
        """`(N,)` in-batch scores, normalised within steps, over passes of the pool."""
        import numpy as np

        optimizer, state = self.warm(INNER_SCALE)
        total = np.zeros(len(self.pool))
        for i in range(INNER_STEPS // horizon):
            rows = np.random.default_rng([self.seed, 3, i]).permutation(len(self.pool))
            rows = rows[: horizon * self.batch].reshape(horizon, self.batch)
            scores = np.asarray(self.sweep(optimizer, state, self.pool[rows]).scores, np.float64)
            np.add.at(total, rows, _normalised(scores))
        return total

    def same_batch(self, scale: float, *, cold: bool, rounds: int):
        """`(passes, N)` labels, NaN where the last pass is not complete, and what they cost."""
        import jax.numpy as jnp
        import numpy as np
        import optax

        if cold:
            rate = self.proxy.learning_rate * scale
            optimizer = optax.adamw(rate, b2=0.95, eps=0.0, eps_root=1e-8, weight_decay=0.01)
            state = optimizer.init(self.proxy.params)
        else:
            optimizer, state = self.warm(scale)
        each = len(self.pool) // self.batch

        def everything(rounds: int):
            labels = np.full((-(-rounds // each), len(self.pool)), np.nan)
            order = np.empty(0)
            for i in range(rounds):
                if i % each == 0:
                    rng = np.random.default_rng([self.seed, 4, i // each])
                    order = rng.permutation(len(self.pool)).reshape(each, self.batch)
                rows = order[i % each]
                batches = jnp.broadcast_to(
                    self.pool[rows], (RIVAL_STEPS, self.batch, self.pool.shape[1])
                )
                scores = np.asarray(self.sweep(optimizer, state, batches).scores, np.float64)
                labels[i // each, rows] = _normalised(scores.sum(axis=0))
            return labels

        everything(1)  # compiles
        found, seconds = _timed(lambda: everything(rounds))
        sweep = RIVAL_STEPS * self.batch * SWEEP_COST + self.phi_windows
        return found, {"rounds": rounds, "window_gradients": rounds * sweep, **seconds}

    def one_step(self, *, preconditioned: bool):
        import jax
        import jax.numpy as jnp
        import optax

        from metagrad_filter.metagradient import probe_scores

        proxy = self.proxy
        # One step moves parameters along minus the gradient, so the cotangent is minus grad Phi.
        probe = jax.tree.map(jnp.negative, jax.grad(self.outer)(proxy.params))
        if preconditioned:
            nu = optax.tree_utils.tree_get(proxy.opt_state, "nu")
            probe = jax.tree.map(lambda p, v: p / (jnp.sqrt(v) + 1e-8), probe, nu)
        return probe_scores(proxy.loss, proxy.params, probe, self.pool)

    def rho_loss(self):
        import jax
        import numpy as np

        from metagrad_filter.metagradient.trajectory import run

        proxy, target = self.proxy, self.world.target.target_windows
        optimizer, state = self.warm(INNER_SCALE)
        rng = np.random.default_rng([self.seed, 5])
        wanted = REFERENCE_STEPS * self.batch
        passes = -(-wanted // len(target))
        rows = np.concatenate([rng.permutation(len(target)) for _ in range(passes)])[:wanted]
        batches = target[rows].reshape(REFERENCE_STEPS, self.batch, -1)
        tuned, *_ = jax.jit(lambda p, s, b: run(proxy.loss, optimizer, p, s, b, _ones(b)))(
            proxy.params, state, batches
        )
        losses = jax.jit(proxy.loss)
        return np.asarray(losses(proxy.params, self.pool)) - np.asarray(losses(tuned, self.pool))


def _reliability(estimators: _Estimators, scale: float) -> dict[str, Any]:
    """Split-half reliability of the probe and of the rival, and what each costs."""
    from metagrad_filter.metagradient.checks import split_half_reliability

    _say("reliability")
    halves, cost = estimators.fresh(STEPS, INNER_SCALE)
    probe = {**vars(split_half_reliability(*halves)), **cost}
    each = POOL // estimators.batch
    labels, cost = estimators.same_batch(scale, cold=True, rounds=RIVAL_PASSES * each)
    costs = {name: cost[name] for name in COSTS}
    curve = []
    for passes in range(2, RIVAL_PASSES + 1, 2):
        first, second = labels[0:passes:2].mean(axis=0), labels[1:passes:2].mean(axis=0)
        share = passes / RIVAL_PASSES
        curve.append(
            {
                "rounds_per_window": passes,
                "half": split_half_reliability(first, second).half,
                **{name: value * share for name, value in costs.items()},
            }
        )
    reached = next((point for point in curve if point["half"] >= 0.8), None)
    usual = {name: value * RIVAL_ROUNDS / RIVAL_PASSES for name, value in costs.items()}
    points = {"usual": usual, "reaches_80": reached}
    return {
        "probe": probe,
        "same_batch_cold": {"scale": scale, "curve": curve, **points},
        "cost_of_probe_as_share": {
            at: None if point is None else {name: probe[name] / point[name] for name in COSTS}
            for at, point in points.items()
        },
    }


def table(record: dict[str, Any]) -> str:
    """The comparison as text, each figure from the record."""
    worlds = list(record["worlds"].values())
    seeds = "".join(f"{'world ' + seed:>29}" for seed in record["worlds"])
    lines = [f"{'LDS, 95 % interval':26}{seeds}"]
    for name in worlds[0]["methods"]:
        cells = (_cell(world["methods"][name], "lds") for world in worlds)
        lines.append(f"{name:26}{''.join(cells)}")
    lines += ["", f"{MAIN} minus {RIVAL}"]
    for scale in worlds[0]["by_scale"]:
        cells = (_cell(world["by_scale"][scale]["difference"], "value") for world in worlds)
        lines.append(f"{f'both at {scale} of live':26}{''.join(cells)}")
    for label, key in (
        ("each at its best", "difference"),
        ("rival at its best", "difference_from_ours_as_configured"),
    ):
        cells = (_cell(world["best_scales"][key], "value") for world in worlds)
        lines.append(f"{label:26}{''.join(cells)}")
    ceilings = (f"{world['retraining']['ceiling']:>9.3f}{'':20}" for world in worlds)
    lines += [f"{'ceiling':26}{''.join(ceilings)}", ""]
    found = record["reliability"]
    probe, rival = found["probe"], found["same_batch_cold"]
    lines.append(f"{'split-half':36}{'rho':>7}{'gradients':>12}{'wall s':>9}{'cpu s':>8}")
    rows = [(f"probe, {probe['trajectories']} trajectories", probe)]
    rows += [(f"{RIVAL}, {p['rounds_per_window']} rounds", p) for p in rival["curve"]]
    for label, row in rows:
        lines.append(
            f"{label:36}{row['half']:7.3f}{row['window_gradients']:12,.0f}"
            f"{row['wall_seconds']:9.1f}{row['cpu_seconds']:8.1f}"
        )
    for at, shares in found["cost_of_probe_as_share"].items():
        where = f"at {RIVAL_ROUNDS} rounds" if at == "usual" else "where it reaches .8"
        if shares is None:
            lines.append(f"{RIVAL} does not reach .8 within {RIVAL_PASSES} rounds")
        else:
            listed = ", ".join(f"{name} {value:.3f}" for name, value in shares.items())
            lines.append(f"cost as a share of {RIVAL} {where}: {listed}")
    return "\n".join(line.rstrip() for line in lines)


def _cell(row: dict[str, float], name: str) -> str:
    return f"{row[name]:>9.3f}   " + f"[{row['low']:.3f}, {row['high']:.3f}]".ljust(17)


def _falling(rate: float):
    import optax

    return optax.linear_schedule(rate, rate / 10, STEPS)


def _normalised(scores):
    """Mean 0 and deviation 1 along the last axis."""
    centred = scores - scores.mean(axis=-1, keepdims=True)
    return centred / centred.std(axis=-1, keepdims=True)


def _ranks(scores):
    from scipy.stats import rankdata

    return rankdata(scores)


def _ones(batches):
    import jax.numpy as jnp

    return jnp.ones(batches.shape[:2], jnp.float32)


def _timed(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    wall, cpu = time.monotonic(), time.process_time()
    value = function()
    return value, {
        "wall_seconds": time.monotonic() - wall,
        "cpu_seconds": time.process_time() - cpu,
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--table"]):
        sys.exit(f"bench.lds: unknown arguments {arguments}; expected none or --table")
    if not arguments:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        write_record(RECORD, measure())
    print(table(json.loads(RECORD.read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
