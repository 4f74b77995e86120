"""The pool as its own target: does a filter gain where there is nothing to tell apart?

python -m bench.own_pool            run (about half an hour on two cores), store, print the table
python -m bench.own_pool --table    print the table of the stored record

Two worlds (`bench.worlds`) in which the stream, the target and the report windows come from the
same source, so that the wrong score loses to random:

* `on_target`: PubMed of 1976-79 alone, 1,024 target windows, from a base that was trained on a
  mixture; there still is something to learn about the domain.
* `pool`: PubMed of 2021 alone, and the base has seen nothing else; 32,768 target windows.

Every method chooses a half or a quarter of the stream, block by block as the filter does; the
annealed base trains on what it kept, at the constant rate 3e-4, once per seed, which is the order
of the stream. Gain is random's report loss minus the method's, nats per token, paired by seed.
Labels: T=96, the trajectories of one half measured on one half of the target, those of the other on
the other; so split-half says what is left where the target windows are new ones.

* probe: the labels of the stream itself: hard top-k, Gumbel top-k, and stratified: as many of each
  fifth of the base's loss, so that nothing is gained or lost by taking easier or harder windows.
* distilled: the default scorer, each half of the stream scored by the other half's fit (`pool`: by
  a fit on 40,000 other windows); gated: at the strength that the gate chooses, 0 being random.
* RHO-loss, low perplexity: from the base and a reference tuned on the target windows.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench.readme import README, replaced
from bench.record import environment, say, write_record

RECORD = Path(__file__).parent / "records" / "own_pool.json"

SEEDS, KEEP = 3, (0.5, 0.25)
HORIZON, TRAJECTORIES = 96, 4
FITTED, BLOCK = 40_000, 512
GUMBEL = (0.5,)
GATE_PAIRS = 4


def measure() -> None:
    """Runs both worlds; what is measured is stored as it comes."""
    from bench.worlds import on_target, pool

    record: dict[str, Any] = {
        "worlds": {},
        "config": {
            "seeds": SEEDS,
            "horizon": HORIZON,
            "trajectories": TRAJECTORIES,
            "gumbel_strengths": list(GUMBEL),
            "gate_pairs": GATE_PAIRS,
        },
        "environment": environment(),
    }
    for world, keeps, rivals in ((on_target(), KEEP, True), (pool(), KEEP[:1], False)):

        def store(found: dict[str, Any], name: str = world.name) -> None:
            record["worlds"][name] = found
            write_record(RECORD, record)

        _world(world, keeps, store, rivals=rivals)


def _world(world, keeps: tuple[float, ...], store, *, rivals: bool) -> None:
    from bench.worlds import BATCH, LIVE, arm, base_proxy, labelled, losses, report_loss
    from metagrad_filter.calibration.config import CalibrationConfig
    from metagrad_filter.demo.rivals import tuned_reference
    from metagrad_filter.labels import split_half_reliability
    from metagrad_filter.statistics import rank_correlation

    proxy = base_proxy(world)
    count = len(world.stream)
    other = world.label_pool[:FITTED] if world.name == "pool" else world.stream[:0]
    halves = labelled(
        world,
        proxy,
        np.concatenate([world.stream, other]),
        horizon=HORIZON,
        trajectories=TRAJECTORIES,
        scale=1.0,
    )
    labels = halves.astype(np.float64).sum(axis=0)
    probe = labels[:count]
    reliability = split_half_reliability(halves[:, :count])
    distilled, scorer, fresh = _distilled(world, labels, other)
    say(f"{world.name}: split-half {reliability:.3f}, {rank_correlation(distilled, probe):.3f}")
    base = losses(proxy, world.stream)
    strata = np.searchsorted(np.quantile(base, [0.2, 0.4, 0.6, 0.8]), base)
    # Name: (scores, strength).
    methods: dict[str, tuple[np.ndarray | None, float]] = {
        "random": (None, 0.0),
        "probe": (probe, math.inf),
        **{f"probe, Gumbel {strength:g}": (probe, strength) for strength in GUMBEL},
        "distilled": (distilled, math.inf),
        "distilled, Gumbel 0.5": (distilled, 0.5),
    }
    correlations = {"minus base loss": rank_correlation(probe, -base)}
    if rivals:
        reference = tuned_reference(
            proxy, world.target, world.gate, steps=(24, 48, 96, 192), seed=0
        )
        rho = base - losses(proxy, world.stream, reference[0])
        correlations["RHO-loss"] = rank_correlation(probe, rho)
        methods |= {
            "probe, stratified": (within(probe, strata), math.inf),
            "RHO-loss": (rho, math.inf),
            "low perplexity": (-base, math.inf),
        }
    found: dict[str, Any] = {}
    for keep in keeps:
        steps = int(count * keep) // BATCH
        rates = np.full(steps, LIVE, np.float32)
        # As long a gate run as what it decides on.
        config = CalibrationConfig(
            keep_ratio=keep,
            block_windows=BLOCK,
            gate_steps=steps,
            gate_pairs=GATE_PAIRS,
            gate_strengths=(0.5, math.inf),
        )
        gate = _gate(proxy, scorer, fresh, config, world)
        say(f"{world.name} keep {keep}: gate {gate['chosen']} of {gate['arms']}")
        chosen = dict(methods)
        strength = math.inf if gate["chosen"] == "inf" else float(gate["chosen"])
        results: dict[str, list[float]] = {}
        for name, (scores, how) in chosen.items():
            results[name] = []
            for seed in range(SEEDS):
                order = np.random.default_rng([7, seed]).permutation(count)
                kept = order[filtered(scores, order, keep, how, seed)][: steps * BATCH]
                params = arm(proxy, world.stream[kept], rates)
                results[name].append(report_loss(world, proxy, params))
            gains = np.asarray(results["random"]) - np.asarray(results[name])
            say(f"keep {keep} {name}: {gains.mean():+.5f} ± {gains.std(ddof=1) / SEEDS**0.5:.5f}")
        same = {0.0: "random", 0.5: "distilled, Gumbel 0.5", math.inf: "distilled"}
        results["gated"] = results[same[strength]]
        found[str(keep)] = {"losses": results, "steps": steps, "gate": gate}
        store(
            {
                "keep": found,
                "reliability": reliability,
                "rank_correlation": rank_correlation(distilled, probe),
                "label_correlations": correlations,
                "base_loss": report_loss(world, proxy, proxy.params),
                "stream_windows": count,
                "target_windows": len(world.target),
            }
        )


def _distilled(world, labels: np.ndarray, other: np.ndarray):
    """Scores of the stream, a scorer, and windows of the stream that it was not fitted on."""
    from bench.worlds import VOCAB
    from metagrad_filter.scorer.fit import fit_scorer

    count = len(world.stream)
    if len(other):
        scorer = fit_scorer(other, labels[count:], vocab_size=VOCAB)
        return scorer.score(world.stream), scorer, world.label_pool[len(other) :]
    cut = count // 2
    parts = [slice(0, cut), slice(cut, None)]
    fits = [fit_scorer(world.stream[p], labels[p], vocab_size=VOCAB) for p in parts]
    scores = np.empty(count, np.float32)
    for part, fitted_elsewhere in zip(parts, fits[::-1]):
        scores[part] = fitted_elsewhere.score(world.stream[part])
    return scores, fits[0], world.stream[cut:]


def filtered(
    scores: np.ndarray | None, order: np.ndarray, keep: float, strength: float, seed: int
) -> np.ndarray:
    """Positions of the ordered stream that a filter keeps, block by block."""
    from metagrad_filter.selection import keep_blocks

    return keep_blocks(
        None if scores is None else scores[order],
        len(order),
        block_windows=BLOCK,
        keep_ratio=keep,
        strength=strength,
        seed=seed,
        name="bench",
    )


def within(scores: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Ranks in (0, 1) of `(N,)` scores within their stratum."""
    ranks = np.empty(len(scores))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        ranks[members[np.argsort(scores[members])]] = (np.arange(len(members)) + 0.5) / len(members)
    return ranks


def _gate(proxy, scorer, windows: np.ndarray, config, world) -> dict[str, Any]:
    """What the product's gate chooses, on windows that the scorer has not seen."""
    from bench.worlds import target_of
    from metagrad_filter.calibration.gate import run_gate
    from metagrad_filter.calibration.source import WindowSource

    source = WindowSource(windows)
    result = run_gate(
        proxy,
        scorer,
        target_of(world).gate_metric(proxy.loss),
        source,
        np.arange(len(source)),
        config,
        seed=11,
    )
    return result.to_json()


def table(record: dict[str, Any]) -> str:
    """Gains over random as a Markdown table, with one-sided 95 % lower bounds over seeds."""
    columns = [
        (f"{name}, keep {keep}", part)
        for name, world in record["worlds"].items()
        for keep, part in world["keep"].items()
    ]
    lines = [
        "| selection | " + " | ".join(title for title, _ in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    names = [name for name in columns[0][1]["losses"] if name != "random"]
    for name in names:
        cells = []
        for _, part in columns:
            if name not in part["losses"]:
                cells.append("")
                continue
            mean, bound = gain(part["losses"]["random"], part["losses"][name])
            cells.append(f"{mean:+.4f} (≥ {bound:+.4f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [""] + [
        f"{name}: split-half reliability of the labels over disjoint target windows "
        f"{world['reliability']:.2f}, rank correlation of the scorer "
        f"{world['rank_correlation']:.2f}."
        for name, world in record["worlds"].items()
    ]
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
        measure()
    text = table(json.loads(RECORD.read_text()))
    README.write_text(replaced(README.read_text(), "own-pool-table", text))
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
