"""What each estimator's selection is worth: every mode of the switch, distilled alike.

python -m bench.estimators                    all of it (about an hour on two cores)
python -m bench.estimators stable loss mates  these modes from this base, added to the record
python -m bench.estimators --table            print the table of the stored record

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
*Strength 2* is the same scorer drawing by Gumbel top-k, as the gate may choose.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.readme import README, replaced
from bench.record import environment, say, write_record

RECORD = Path(__file__).parent / "records" / "estimators.json"

SEEDS, KEEP = 2, 0.25
LABELS, PROBED = 8192, 1024
HORIZON, TRAJECTORIES = 96, 4
KINDS = ("annealed", "stable")
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
SOFT = "metagradient, strength 2"


def measure(kinds: Sequence[str], modes: Sequence[str]) -> None:
    """Runs modes from bases and adds them to the record as they come."""
    from bench.worlds import mixture

    config = {
        "seeds": SEEDS,
        "keep_ratio": KEEP,
        "labels": LABELS,
        "probed_labels": PROBED,
        "horizon": HORIZON,
        "trajectories": TRAJECTORIES,
    }
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if record.get("config") != config:
        record = {"bases": {}, "config": config, "environment": environment()}
    world = mixture()
    for kind in kinds:
        base = record["bases"].setdefault(kind, {"methods": {}})

        def store(name: str, found: dict[str, Any], base: dict[str, Any] = base) -> None:
            base["methods"][name] = found
            write_record(RECORD, record)
            say(f"{name}: {found}")

        base |= _base(world, kind, modes, store)
        write_record(RECORD, record)


def _base(world, kind: str, modes: Sequence[str], store) -> dict[str, Any]:
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

    limits = {
        "random": final(by(None, 0.0)),
        "on-target only": final(lambda order, seed: order[world.classes[order] == 0]),
    }
    for name, losses in limits.items():
        store(name, {"losses": losses})
    random, ceiling = (np.mean(losses) for losses in limits.values())

    def judged(scores, strength: float) -> dict[str, Any]:
        losses = final(by(scores, strength))
        kept = world.classes[by(scores, strength)(orders[0], 0)]
        return {
            "losses": losses,
            "recovered": float((random - np.mean(losses)) / (random - ceiling)),
            "kept": (np.bincount(kept, minlength=3) / len(kept)).round(4).tolist(),
        }

    source = WindowSource(world.stream)
    chosen = np.random.default_rng(3).permutation(count // 2)
    versions = []
    for mode in modes:
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
        found_here = {
            **judged(scores, math.inf),
            "reliability": split_half_reliability(halves) if found.independent else None,
            "rank_correlation": scorer.metadata["rank_correlation"],
            "within_class": _within(labels, scorer, task.windows, world.classes[index]),
            "learning_rate_scale": found.learning_rate_scale,
            "labels": len(index),
            "gradients": found.gradients,
            "seconds": round(seconds, 1),
        }
        store(mode, found_here)
        if mode == MODES[0]:
            store(SOFT, {**found_here, **judged(scores, 2.0)})
    return {"steps": steps, "learning_rate": live}


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
    both = [record["bases"].get(kind, {}).get("methods", {}) for kind in KINDS]
    for mode in (MODES[0], SOFT, *MODES[1:]):
        cells = []
        for methods in both:
            if mode not in methods:
                cells += ["", "", ""]
                continue
            row = methods[mode]
            kept = " / ".join(f"{share:.2f}" for share in row["kept"])
            reliability = row["reliability"]
            cells += [
                f"{row['recovered']:.2f}",
                kept,
                "" if reliability is None else f"{reliability:.2f}",
            ]
        costs = [f"{methods[mode]['gradients']:,.0f}" for methods in both if mode in methods]
        lines.append(f"| {mode} | " + " | ".join([*cells, *costs[:1]]) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if arguments != ["--table"]:
        kinds, modes = arguments[:1] or KINDS, arguments[1:] or MODES
        if not set(kinds) <= set(KINDS) or not set(modes) <= set(MODES):
            sys.exit(
                f"bench.estimators: unknown arguments {arguments}; expected none, --table, or one "
                f"of {list(KINDS)} and then some of {list(MODES)}."
            )
        if "on_policy" in modes and modes[0] != MODES[0]:
            sys.exit(f"bench.estimators: on_policy follows a version of {MODES[0]}; name it first.")
        measure(kinds, modes)
    text = table(json.loads(RECORD.read_text()))
    README.write_text(replaced(README.read_text(), "estimators-table", text))
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
