"""Time series: do rare windows survive a filter that drops broken ones, and what does it cost?

python -m bench.series            run (about ten minutes on two cores), store, print the table
python -m bench.series --quick    the same at a size that shows that it runs; stores nothing
python -m bench.series --table    print the tables of the stored record

The world is that of `metagrad-filter demo --kind series`: Atlantic storms, rapid intensification as
the rare event (5 % of the stream), 30 % of the stream broken in seven ways at three severities;
base, stream, target and report share no storm. One sweep measures three outer metrics together: the
loss of rare windows, the loss of usual ones, and the calibration guard. From it come

* `rare only`: labels of the first alone, the target without guards;
* `guarded`: the first and the second, with the demo's weight and with others; `calibration guard`:
  the first and the third; `both guards`: all three;
* `... distilled`: the series scorer of the product, each half of the stream scored by the fit on
  the other half's labels.

Rivals: random, surprise, low loss, loss band, RHO-loss (references tuned on the very target
windows, ranks mixed by the same weights) and the oracle that knows the classes. Measured: the area
under the curve of rare above broken windows, by kind and severity; and, after as many steps on the
kept quarter, the error at rare events, loss and 90 % coverage of usual windows, and the share of
the stream's rare windows that was kept. Every selection also trains a latent predictor (JEPA) from
one start; effective rank and log-determinant of its states on usual report windows say what the
selection does to its geometry. Seeds reorder the stream, for all methods alike.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.record import environment, say, write_record

RECORD = Path(__file__).parent / "records" / "series.json"

SEEDS = 3
GUARD_WEIGHTS = (0.5, 1.0, 2.0)
JEPA_BASE_STEPS, JEPA_RATE = 400, 2e-3
SHAPED = (
    "random",
    "surprise",
    "low loss",
    "loss band",
    "RHO-loss",
    "rare oracle",
    "rare only, distilled",
    "guarded, distilled",
)
SHOWN = (
    "guarded, distilled",
    "rare only, distilled",
    "surprise",
    "RHO-loss",
    "RHO-loss, rare only",
)


def measure(*, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Runs the benchmark; returns its record."""
    from metagrad_filter.demo.series_config import SeriesDemoConfig
    from metagrad_filter.demo.series_run import SeriesBench, rare_against_corrupt
    from metagrad_filter.demo.series_world import judge, series_base, series_world

    config = replace(SeriesDemoConfig(), seeds=SEEDS, seed=seed)
    if quick:
        config = config.quick()
    world = series_world(config)
    proxy = series_base(world, config)
    base = judge(proxy.loss, proxy.params, world.report)  # pyright: ignore[reportArgumentType]
    say(f"base: {base}")
    found, reliability, seconds = labelled(world, proxy, config)
    say(f"labels: split-half {reliability}")
    scores: dict[str, np.ndarray | None] = {"random": None, **rivals(world, proxy, config)}
    correlations = {}
    for name, labels in found.items():
        distilled, correlation = distil(world.stream.windows.values, labels)
        if name in ("rare only", "guarded"):
            scores[name] = labels
        scores[f"{name}, distilled"] = distilled
        correlations[name] = correlation
    say(f"distilled: {correlations}")
    bench = SeriesBench(proxy, world, config)
    bench.arms.clear()
    bench.kept.clear()
    for name, values in scores.items():
        bench.run(name, values)
    methods = bench.methods()
    for name, method in methods.items():
        del method["curve"]
        say(f"{name}: {np.mean(method['rare_error']):.4f} {np.mean(method['normal_nll']):.4f}")
    chosen = {name: values for name, values in scores.items() if name in SHAPED}
    geometry = latent_geometry(world, chosen, config)
    stream = world.stream
    return {
        "methods": methods,
        "auroc": {
            name: rare_against_corrupt(values, stream)
            for name, values in scores.items()
            if values is not None and name != "rare oracle"
        },
        "rare_above_usual": {
            name: _above_usual(values, stream)
            for name, values in scores.items()
            if values is not None and name != "rare oracle"
        },
        "reliability": reliability,
        "rank_correlation": correlations,
        "base": base.__dict__,
        "geometry": geometry,
        "label_seconds": seconds,
        "config": config.to_json(),
        "environment": environment(),
    }


def labelled(world, proxy, config) -> tuple[dict[str, np.ndarray], dict[str, float], float]:
    """Scores of the stream by each mixture of the outer metrics, and how reliable they are."""
    import time

    from metagrad_filter.calibration.estimators import estimate
    from metagrad_filter.calibration.estimators.task import Task, combined
    from metagrad_filter.calibration.source import WindowSource
    from metagrad_filter.labels import split_half_reliability
    from metagrad_filter.targets import GuardedTarget

    values = world.stream.windows.values
    target = GuardedTarget(
        world.rare_target(), {"usual": world.usual_loss(), "calibration": world.guard()}
    )
    began = time.monotonic()
    halves = estimate(
        Task(
            proxy,
            target,
            WindowSource(values),
            config.calibration,
            values,
            np.arange(len(values)),
            seed=config.seed,
        )
    ).halves
    labels, reliability = {}, {}
    for name, weights in mixtures(config.guard_weight).items():
        index = [list(target.parts).index(part) for part in weights]
        mixed = combined(halves[index], weights)
        reliability[name] = split_half_reliability(mixed)
        if name != "usual only":
            labels[name] = mixed.sum(axis=0)
    return labels, reliability, round(time.monotonic() - began, 1)


def mixtures(guard_weight: float) -> dict[str, dict[str, float]]:
    """Weights of the outer metrics in each kind of label; the trade of rare against usual."""
    return {
        "rare only": {"target": 1.0},
        "guarded": {"target": 1.0, "usual": guard_weight},
        **{
            f"guarded, weight {weight:g}": {"target": 1.0, "usual": weight}
            for weight in GUARD_WEIGHTS
            if weight != guard_weight
        },
        "calibration guard": {"target": 1.0, "calibration": 1.0},
        "both guards": {"target": 1.0, "usual": 0.5, "calibration": 0.5},
        "usual only": {"usual": 1.0},
    }


def rivals(world, proxy, config) -> dict[str, np.ndarray]:
    """Scores of the stream by everything but metagradients."""
    from metagrad_filter.demo.series_arms import loss_scores, oracle_scores, rho_scores

    values = world.stream.windows.values
    found = loss_scores(proxy, values)
    return {
        "surprise": found["surprise"],
        "low loss": found["low_loss"],
        "loss band": found["loss_band"],
        "RHO-loss": rho_scores(proxy, world.target(config.guard_weight), values, config),
        "RHO-loss, rare only": rho_scores(proxy, world.rare_target(), values, config),
        "rare oracle": oracle_scores(world.stream),
    }


def distil(values: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """Scores of each half of the windows by the fit on the other, and its rank correlation.

    Copies of a window fall on one side: the stream goes through its storms several times.
    """
    from metagrad_filter.scorer.fit import fit_scorer

    keys = np.array([zlib.crc32(window.tobytes()) & 1 for window in values], bool)
    scores, correlations = np.empty(len(values), np.float32), []
    for side in (keys, ~keys):
        scorer = fit_scorer(values[side], labels[side], kind="series")
        scores[~side] = scorer.score(values[~side])
        correlations.append(scorer.metadata["rank_correlation"])
    return scores, float(np.mean(correlations))


def latent_geometry(world, scores, config) -> dict[str, dict[str, float]]:
    """Geometry of a latent predictor after training on what each selection keeps, first seed."""
    import optax

    from metagrad_filter.calibration.estimators.windows import losses_of
    from metagrad_filter.demo.series_arms import kept_by, stream_order
    from metagrad_filter.demo.series_data import NORMAL, RARE
    from metagrad_filter.demo.series_world import model_config
    from metagrad_filter.demo.training import falling_rates, fresh_state, train
    from metagrad_filter.proxy import EmaOptimizer, JepaConfig, JepaLoss, init_jepa
    from metagrad_filter.series_targets import LatentGeometry

    values, base = world.stream.windows.values, world.base.windows.values
    shape, batch = values.shape[1:], config.batch_windows
    loss = JepaLoss(JepaConfig(model_config(config, shape[1])), base[:64])
    factory = EmaOptimizer(functools.partial(optax.adamw, b2=0.95, weight_decay=0.01))
    steps = min(JEPA_BASE_STEPS, len(base) // batch)
    rates = np.concatenate(
        [
            np.full(steps, JEPA_RATE, np.float32),
            falling_rates(JEPA_RATE, config.steps),
        ]
    )
    start = train(
        loss,
        factory,
        rates,
        fresh_state(factory, init_jepa(loss.config, seed=config.seed)),
        base[: steps * batch].reshape(steps, batch, *shape),
    )
    usual = world.report.of_class(NORMAL).values
    rare = world.report.of_class(RARE).values
    measures = {
        name: LatentGeometry(usual, measure=name, gate_share=0.5).outer(loss)
        for name in ("effective_rank", "log_det")
    }

    def look(params) -> dict[str, float]:
        return {
            "effective_rank": math.exp(-float(measures["effective_rank"](params))),
            "log_det": -float(measures["log_det"](params)),
            "usual_error": float(losses_of(loss.prediction_errors, params, usual).mean()),
            "rare_error": float(losses_of(loss.prediction_errors, params, rare).mean()),
        }

    found = {"base": look(start[0])}
    order = stream_order(config, 0)
    for name, score in scores.items():
        kept = values[kept_by(score, order, config, seed=0)]
        batches = kept[: config.steps * batch].reshape(config.steps, batch, *shape)
        found[name] = look(train(loss, factory, rates, start, batches)[0])
        say(f"JEPA {name}: {found[name]}")
    return found


def _above_usual(scores: np.ndarray, stream) -> float | None:
    from metagrad_filter.demo.series_data import NORMAL, RARE
    from metagrad_filter.demo.series_run import ranked_above

    classes = stream.windows.classes
    return ranked_above(scores[classes == RARE], scores[classes == NORMAL])


def table(record: dict[str, Any]) -> str:
    """What each selection does, and how it ranks rare above broken windows, as Markdown."""
    lines = [
        "| selection | rare error | against random | usual NLL | 90 % coverage | rare kept | "
        "kept usual / rare / broken | JEPA rank |",
        "|---|" + "---:|" * 7,
    ]
    for name, method in record["methods"].items():
        shares = " / ".join(f"{share:.2f}" for share in method["kept_share"].values())
        rank = record["geometry"].get(name, {}).get("effective_rank", math.nan)
        lines.append(
            f"| {name} | {np.mean(method['rare_error']):.3f} | {method['rare_change']:+.0%} | "
            f"{np.mean(method['normal_nll']):.3f} | {np.mean(method['coverage']):.3f} | "
            f"{method['rare_retained']:.2f} | {shares} | {rank:.1f} |"
        )
    shown = [name for name in SHOWN if name in record["auroc"]]
    lines += ["", "| rare above | " + " | ".join(shown) + " |", "|---|" + "---:|" * len(shown)]
    for kind, first in record["auroc"][shown[0]].items():
        cells = []
        for name in shown:
            value = record["auroc"][name][kind]
            many = value.values() if isinstance(first, dict) else [value]
            cells.append(" / ".join(f"{v:.2f}" for v in many))
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    usual = " | ".join(f"{record['rare_above_usual'][name]:.2f}" for name in shown)
    lines.append(f"| usual windows | {usual} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--quick"], ["--table"]):
        sys.exit(f"bench.series: unknown arguments {arguments}; expected none, --quick or --table")
    if arguments != ["--table"]:
        record = measure(quick=arguments == ["--quick"])
        if not arguments:
            write_record(RECORD, record)
    else:
        record = json.loads(RECORD.read_text())
    print(table(record))


if __name__ == "__main__":
    main(sys.argv[1:])
