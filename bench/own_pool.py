"""The pool as its own target: does a filter gain where there is nothing to tell apart?

python -m bench.own_pool            run (about half an hour on two cores), store, print the table
python -m bench.own_pool --table    print the table of the stored record

Stream, target and report windows are PubMed abstracts of 2021 (`bench.worlds.pool`). In such a
world filters lose to random, and so does a metagradient with a wrong horizon. Every method chooses
a half or a quarter of the stream, block by block as the filter does, and the annealed base trains
on what it kept, at the constant rate 3e-4, once per seed; a seed is the order of the stream. Gain
is random's report loss minus the method's, nats per token, paired by seed.

* probe: metagradient labels of the stream itself, T=96, 6 trajectories on other windows; hard
  top-k, Gumbel top-k of strength 2, divided by the frozen gradient norm, and reversed (a sanity
  check).
* distilled: the default scorer fitted on 80,000 other labelled windows.
* gated: the distilled scorer at the strength that the gate chooses, by paired runs on windows and a
  target split of its own; strength 0 is random itself.
* stratified: what is kept holds a fifth of each fifth of the base's loss, so that nothing can be
  gained or lost by taking easier or harder windows.
* low / high perplexity, RHO-loss: from the base and a reference tuned on the target windows.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

RECORD = Path(__file__).parent / "records" / "own_pool.json"

SEEDS, KEEP = 3, (0.5, 0.25)
HORIZON, TRAJECTORIES = 96, 6
FITTED, BLOCK = 80_000, 512
GUMBEL = 2.0
GATE_PAIRS = 4


def measure() -> dict[str, Any]:
    """Runs every method; JSON types only."""
    from bench.worlds import (
        BATCH,
        LIVE,
        VOCAB,
        arm,
        base_proxy,
        environment,
        labelled,
        losses,
        pool,
        report_loss,
        say,
        target_of,
    )
    from metagrad_filter.calibration.config import CalibrationConfig
    from metagrad_filter.calibration.estimators.windows import gradient_norms
    from metagrad_filter.demo.rivals import tuned_reference
    from metagrad_filter.labels import split_half_reliability
    from metagrad_filter.scorer.fit import fit_scorer
    from metagrad_filter.statistics import rank_correlation

    world = pool()
    proxy = base_proxy(world)
    count = len(world.stream)
    everything = np.concatenate([world.stream, world.label_pool, world.base])
    halves = labelled(
        world, proxy, everything, horizon=HORIZON, trajectories=TRAJECTORIES, scale=1.0
    )
    labels = halves.astype(np.float64).sum(axis=0)
    probe = labels[:count]
    scorer = fit_scorer(world.label_pool[:FITTED], labels[count : count + FITTED], vocab_size=VOCAB)
    distilled = scorer.score(world.stream)
    say(f"distilled: rank correlation {rank_correlation(distilled, probe):.3f}")
    base = losses(proxy, world.stream)
    reference = tuned_reference(proxy, world.target, world.gate, steps=(24, 48, 96, 192), seed=0)
    rho = base - losses(proxy, world.stream, reference[0])
    norms = gradient_norms(proxy.loss, proxy.params, world.stream)
    strata = np.searchsorted(np.quantile(base, [0.2, 0.4, 0.6, 0.8]), base)
    # Name: (scores, strength).
    methods: dict[str, tuple[np.ndarray | None, float]] = {
        "random": (None, 0.0),
        "probe": (probe, math.inf),
        "probe, Gumbel": (probe, GUMBEL),
        "probe / gradient norm": (probe / norms, math.inf),
        "probe reversed": (-probe, math.inf),
        "distilled": (distilled, math.inf),
        "distilled, Gumbel": (distilled, GUMBEL),
        "RHO-loss": (rho, math.inf),
        "low perplexity": (-base, math.inf),
        "high perplexity": (base, math.inf),
        "probe, stratified": (within(probe, strata), math.inf),
        "distilled, stratified": (within(distilled, strata), math.inf),
    }
    found: dict[str, Any] = {}
    for keep in KEEP:
        steps = int(count * keep) // BATCH
        rates = np.full(steps, LIVE, np.float32)
        # As long a gate run as what it decides on.
        config = CalibrationConfig(
            keep_ratio=keep,
            block_windows=BLOCK,
            gate_steps=steps,
            gate_pairs=GATE_PAIRS,
            gate_strengths=(GUMBEL, math.inf),
        )
        gate = _gate(proxy, scorer, world, config, target_of(world), LIVE)
        say(f"keep {keep}: gate {gate}")
        chosen = dict(methods)
        strength = math.inf if gate["chosen"] == "inf" else float(gate["chosen"])
        if strength:
            chosen["gated"] = (distilled, strength)
        results: dict[str, list[float]] = {}
        for name, (scores, strength) in chosen.items():
            results[name] = []
            for seed in range(SEEDS):
                order = np.random.default_rng([7, seed]).permutation(count)
                kept = order[filtered(scores, order, keep, strength, seed)][: steps * BATCH]
                params = arm(proxy, world.stream[kept], rates)
                results[name].append(report_loss(world, proxy, params))
            gains = np.asarray(results["random"]) - np.asarray(results[name])
            say(f"keep {keep} {name}: {gains.mean():+.5f} ± {gains.std(ddof=1) / SEEDS**0.5:.5f}")
        if "gated" not in results:
            results["gated"] = results["random"]
        found[str(keep)] = {"losses": results, "steps": steps, "gate": gate}
    return {
        "keep": found,
        "reliability": split_half_reliability(halves[:, :count]),
        "rank_correlation": rank_correlation(distilled, probe),
        "label_correlations": {
            "minus base loss": rank_correlation(probe, -base),
            "RHO-loss": rank_correlation(probe, rho),
        },
        "base_loss": report_loss(world, proxy, proxy.params),
        "config": {
            "seeds": SEEDS,
            "horizon": HORIZON,
            "trajectories": TRAJECTORIES,
            "fitted_labels": FITTED,
            "stream_windows": count,
            "report_windows": len(world.report),
            "gumbel_strength": GUMBEL,
            "gate_pairs": GATE_PAIRS,
        },
        "environment": environment(),
    }


def filtered(
    scores: np.ndarray | None, order: np.ndarray, keep: float, strength: float, seed: int
) -> np.ndarray:
    """Positions of the ordered stream that a filter keeps, block by block."""
    from metagrad_filter.selection import as_ratio, kept_before, select

    ratio, kept = as_ratio(keep), []
    for block, first in enumerate(range(0, len(order), BLOCK)):
        last = min(first + BLOCK, len(order))
        quota = kept_before(last, ratio) - kept_before(first, ratio)
        here = None if scores is None else scores[order[first:last]]
        chosen = select(
            here, last - first, quota, strength=strength, seed=seed, name="bench", block=block
        )
        kept.append(first + chosen)
    return np.concatenate(kept)


def within(scores: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Ranks in (0, 1) of `(N,)` scores within their stratum."""
    ranks = np.empty(len(scores))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        ranks[members[np.argsort(scores[members])]] = (np.arange(len(members)) + 0.5) / len(members)
    return ranks


def _gate(proxy, scorer, world, config, target, rate) -> dict[str, Any]:
    """What the product's gate chooses, on label windows that the scorer has not seen."""
    from metagrad_filter.calibration.gate import run_gate
    from metagrad_filter.calibration.source import WindowSource

    source = WindowSource(world.label_pool[FITTED:])
    result = run_gate(
        proxy,
        scorer,
        target.gate_metric(proxy.loss),
        source,
        np.arange(len(source)),
        config,
        seed=11,
    )
    return result.to_json()


def table(record: dict[str, Any]) -> str:
    """Gains over random as a Markdown table, with one-sided 95 % lower bounds over seeds."""
    lines = [
        "| selection | " + " | ".join(f"keep {keep}" for keep in record["keep"]) + " |",
        "|---|" + "---:|" * len(record["keep"]),
    ]
    names = list(next(iter(record["keep"].values()))["losses"])
    for name in names:
        if name == "random":
            continue
        cells = []
        for part in record["keep"].values():
            if name not in part["losses"]:
                cells.append("random")
                continue
            mean, bound = gain(part["losses"]["random"], part["losses"][name])
            cells.append(f"{mean:+.4f} (≥ {bound:+.4f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gain(random: list[float], method: list[float]) -> tuple[float, float]:
    """Mean paired gain over seeds, and its one-sided 95 % lower confidence bound."""
    from scipy.stats import t

    gains = np.asarray(random) - np.asarray(method)
    error = gains.std(ddof=1) / math.sqrt(len(gains))
    return float(gains.mean()), float(gains.mean() - t.ppf(0.95, len(gains) - 1) * error)


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--table"]):
        sys.exit(f"bench.own_pool: unknown arguments {arguments}; expected none or --table")
    if not arguments:
        from bench.worlds import write_record

        write_record(RECORD, measure())
    print(table(json.loads(RECORD.read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
