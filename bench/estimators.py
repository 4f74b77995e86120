"""What each estimator's selection is worth: every mode of the switch, distilled alike.

python -m bench.estimators            run (about half an hour on two cores), store, print the table
python -m bench.estimators --table    print the table of the stored record

World (`bench.worlds.mixture`): 40 % PubMed of 1976-79 (the target), 40 % BBC news, 20 % shuffled
PubMed. From the base, an arm trains 144 steps of 64 windows on a quarter of the stream; *recovered*
is (random - method) / (random - on-target only) of the loss on the report windows, mean over paired
seeds. Two bases: `annealed`, whose arms go on at its last rate 3e-4, and `stable`, at the constant
4e-3 of its plateau, whose arms fall from there to a tenth.

Every estimator labels windows of the stream's first half, the default scorer is fitted to their
ranks and filters the whole stream, block by block, the best quarter of each. Probes, losses and
RHO-loss label 8,192 windows; those that take dozens of gradients a label (`mates`, `same_batch`)
1,024. Trajectories take 96 steps, 4 of them, at the share of the live rate that the split-half rule
chooses (annealed: the live rate itself, which is the plateau's cooled to a thirteenth). The
on-policy mode follows the version that the estimator of record gave. Costs are in window gradients.
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

RECORD = Path(__file__).parent / "records" / "estimators.json"

SEEDS, KEEP = 2, 0.25
LABELS, PROBED = 8192, 1024
HORIZON, TRAJECTORIES = 96, 4
MODES = (
    "metagradient",
    "metagradient / gradient norm",
    "on_policy",
    "datarater",
    "one_step",
    "less",
    "mates",
    "same_batch",
    "rho_loss",
    "loss",
)


def measure() -> dict[str, Any]:
    """Runs every mode from both bases; JSON types only."""
    from bench.worlds import mixture

    world = mixture()
    return {
        "bases": {kind: _base(world, kind) for kind in ("annealed", "stable")},
        "config": {
            "seeds": SEEDS,
            "keep_ratio": KEEP,
            "labels": LABELS,
            "probed_labels": PROBED,
            "horizon": HORIZON,
            "trajectories": TRAJECTORIES,
        },
        "environment": environment(),
    }


def _base(world, kind: str) -> dict[str, Any]:
    import time

    from bench.own_pool import filtered
    from bench.worlds import BATCH, VOCAB, arm, base_proxy, report_loss, target_of
    from metagrad_filter.calibration.config import CalibrationConfig
    from metagrad_filter.calibration.estimators import Task, estimate
    from metagrad_filter.calibration.source import WindowSource
    from metagrad_filter.labels import split_half_reliability
    from metagrad_filter.scorer.fit import fit_scorer

    proxy = base_proxy(world, kind)
    count = len(world.stream)
    steps = int(count * KEEP) // BATCH
    live = proxy.learning_rate
    rates = np.linspace(live, live if kind == "annealed" else live / 10, steps, dtype=np.float32)
    orders = [np.random.default_rng([7, seed]).permutation(count) for seed in range(SEEDS)]

    def final(choose) -> list[float]:
        losses = []
        for seed, order in enumerate(orders):
            kept = choose(order, seed)[: steps * BATCH]
            params = arm(proxy, world.stream[kept], rates)
            losses.append(report_loss(world, proxy, params))
        return losses

    def by(scores, strength: float):
        return lambda order, seed: order[filtered(scores, order, KEEP, strength, seed)]

    results: dict[str, Any] = {
        "random": {"losses": final(by(None, 0.0))},
        "on-target only": {"losses": final(lambda order, seed: order[world.classes[order] == 0])},
    }
    random, ceiling = (np.mean(part["losses"]) for part in results.values())
    say(f"{kind}: random {random:.4f}, on-target only {ceiling:.4f}")
    source = WindowSource(world.stream)
    chosen = np.random.default_rng(3).permutation(count // 2)
    versions = []
    for mode in MODES:
        name, _, normalised = mode.partition(" / ")
        many = name in ("mates", "same_batch")
        config = CalibrationConfig(
            estimator=name,
            horizon=HORIZON,
            trajectories=TRAJECTORIES,
            learning_rate_scale=1.0 if kind == "annealed" else None,
            normalise_gradient=bool(normalised),
            keep_ratio=KEEP,
        )
        index = chosen[: PROBED if many else LABELS]
        task = Task(
            proxy,
            target_of(world),
            source,
            config,
            source.take(index),
            index,
            seed=5,
            versions=versions[:1],
        )
        begun = time.monotonic()
        found = estimate(task)
        seconds = time.monotonic() - begun
        halves = found.halves[0]
        labels = halves.astype(np.float64).sum(axis=0)
        scorer = fit_scorer(task.windows, labels, vocab_size=VOCAB)
        versions.append(scorer)
        scores = scorer.score(world.stream)
        losses = final(by(scores, math.inf))
        order = orders[0]
        kept = world.classes[by(scores, math.inf)(order, 0)]
        results[mode] = {
            "losses": losses,
            "recovered": float((random - np.mean(losses)) / (random - ceiling)),
            "kept": (np.bincount(kept, minlength=3) / len(kept)).round(4).tolist(),
            "reliability": split_half_reliability(halves) if found.independent else None,
            "rank_correlation": scorer.metadata["rank_correlation"],
            "within_class": _within(labels, scorer, task.windows, world.classes[index]),
            "learning_rate_scale": found.learning_rate_scale,
            "labels": len(index),
            "gradients": found.gradients,
            "seconds": round(seconds, 1),
        }
        say(f"{kind} {mode}: {results[mode]}")
    return {"methods": results, "steps": steps, "learning_rate": live}


def _within(labels, scorer, windows, classes) -> float:
    """Mean over classes of the scorer's rank correlation, on windows that it was not fitted on."""
    from metagrad_filter.scorer.fit import held_out
    from metagrad_filter.statistics import rank_correlation

    unseen = held_out(len(windows), 0)
    scores, labels, classes = scorer.score(windows[unseen]), labels[unseen], classes[unseen]
    return float(
        np.mean([rank_correlation(scores[classes == c], labels[classes == c]) for c in range(3)])
    )


def table(record: dict[str, Any]) -> str:
    """Recovered gain and cost as Markdown."""
    lines = [
        "| estimator | annealed: recovered | kept on / off / corrupt | split-half | "
        "stable: recovered | kept | split-half | gradients |",
        "|---|---:|---|---:|---:|---|---:|---:|",
    ]
    both = [record["bases"][kind]["methods"] for kind in ("annealed", "stable")]
    for mode in MODES:
        cells = []
        for methods in both:
            row = methods[mode]
            kept = " / ".join(f"{share:.2f}" for share in row["kept"])
            reliability = row["reliability"]
            cells += [
                f"{row['recovered']:.2f}",
                kept,
                "" if reliability is None else f"{reliability:.2f}",
            ]
        lines.append(f"| {mode} | " + " | ".join(cells) + f" | {both[0][mode]['gradients']:,.0f} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--table"]):
        sys.exit(f"bench.estimators: unknown arguments {arguments}; expected none or --table")
    if not arguments:
        write_record(RECORD, measure())
    text = table(json.loads(RECORD.read_text()))
    README.write_text(replaced(README.read_text(), "estimators-table", text))
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
