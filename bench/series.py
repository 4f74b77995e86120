"""Time series: do rare windows survive a filter that drops broken ones, and is its ranking right?

python -m bench.series            run (about half an hour on two cores), store, rewrite the tables
python -m bench.series --quick    the same at a size that shows that it runs; stores nothing
python -m bench.series --table    rewrite the README's tables from the stored record

The world is that of `metagrad-filter demo --kind series`: Atlantic storms, rapid intensification as
the rare event (5 % of the stream), 30 % of the stream broken in seven ways at three severities;
base, stream, target and report share no storm. It is dealt out anew for each of three `SPLITS`,
none of which any setting was chosen on, and twice: the base model knows the faults from its own
training mixture (`known faults`), or was trained on whole windows (`new faults`).

One sweep measures three outer metrics together: the error at rare events (`target`), the loss of
windows that hold one, and the loss of usual windows. From it come

* `rare only`: labels of the first alone, the target without guards; `rare loss only` the second's;
* `guarded`: the first and the third, with the demo's weight;
* `... distilled`: the series scorer of the product, each half of the storms scored by the fit on
  the other half's labels, cut hard (strength inf) unless a strength is named;
* `metagradient`: the product: a scorer fitted on guarded labels of two thirds of the storms, at the
  strength that its gate chooses under the guards on the windows of the others; like the product, it
  then filters the whole stream.

Storms are never cut: windows overlap in all rows but one, so two halves of windows would share
nearly everything. The scorer's own held-out correlation splits windows and is not used here.

Rivals: random (three draws), surprise, low loss, loss band, RHO-loss (references tuned on the very
target windows, ranks mixed by the same weights), the oracle that knows the classes, and `whole`,
which knows what is broken and nothing else; and RHO-loss with all that the product has, distilled
and with its own gate. Measured after as many steps on the kept quarter: the error at rare events,
loss and 90 % coverage of usual windows, and the share of the stream's rare windows that was kept;
and the area under the curve of rare above broken windows, by kind and severity. Spreads are
standard deviations over splits.

`groups` asks whether the ranking is right, by retraining: a quarter of the training windows is
taken from one group, as many distinct ones from each, the rest are usual windows; the effect on the
error at rare events stands beside the mean label of what was taken. The groups are the classes,
each kind of fault, and the ends of the score of `rare only, distilled`: rare windows below the
median broken one, the rare windows and the broken ones (shifted rare events apart) that score
highest. In the first split every selection also trains a latent predictor (JEPA) from one start;
effective rank and log-determinant of its states on usual report windows say what the selection
does to its geometry.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from bench.readme import README, RECORDS, replaced
from bench.record import environment, say, write_record

RECORD = RECORDS / "series.json"

SPLITS = (1, 2, 3)
CONDITIONS = {"known faults": 0.3, "new faults": 0.0}
"""Share of the base model's mixture that is broken."""
SOFT = (1.0, 2.0)
RANDOM_DRAWS = 3
GROUP_SHARE, GROUP_DRAWS, LEAST_GROUP = 0.25, 2, 24
JEPA_BASE_STEPS, JEPA_RATE = 400, 2e-3
SHAPED = (
    "random",
    "surprise",
    "low loss",
    "loss band",
    "RHO-loss",
    "rare oracle",
    "rare only, distilled",
)
LISTED = (
    "random",
    "surprise",
    "low loss",
    "loss band",
    "RHO-loss",
    "RHO-loss, rare only",
    "RHO-loss, gated",
    "RHO-loss, rare only, gated",
    "rare oracle",
    "whole",
    "rare loss only, distilled",
    "rare only, distilled",
    "guarded, distilled",
    "guarded, distilled, strength 1",
    "metagradient",
)
SHOWN = (
    "rare only, distilled",
    "guarded, distilled",
    "surprise",
    "RHO-loss",
    "RHO-loss, rare only",
)


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Runs the benchmark; returns its record."""
    from metagrad_filter.demo.series_config import SeriesDemoConfig

    config = replace(SeriesDemoConfig(), seeds=1)
    if quick:
        config = replace(config.quick(), base_steps=300)
    splits = SPLITS[:1] if quick else SPLITS
    found = {}
    for condition, share in CONDITIONS.items():
        runs = []
        for split in splits:
            say(f"{condition}, split {split}")
            one = replace(config, seed=split, base_corrupt_share=share)
            runs.append(measure_split(one, shaped=split == splits[0]))
        found[condition] = merged(runs)
    return {
        "splits": list(splits),
        "conditions": found,
        "config": config.to_json(),
        "environment": environment(),
    }


def measure_split(config, *, shaped: bool) -> dict[str, Any]:
    """One dealing of the storms under one condition."""
    from metagrad_filter.demo import series_arms
    from metagrad_filter.demo.series_data import NORMAL, RARE
    from metagrad_filter.demo.series_run import SeriesBench, ranked_above, rare_against_corrupt
    from metagrad_filter.demo.series_world import judge, series_base, series_world
    from metagrad_filter.demo.stream import kept_by

    world = series_world(config)
    proxy = series_base(world, config)
    base = judge(proxy.loss, proxy.params, world.report)  # pyright: ignore[reportArgumentType]
    stream = world.stream
    values, classes = stream.windows.values, stream.windows.classes
    labels, reliability, seconds = labelled(world, proxy, config)
    say(f"labels in {seconds} s: split-half {reliability}")
    scores: dict[str, np.ndarray | None] = {"random": None, **rivals(world, proxy, config)}
    correlations = {}
    storms = stream.windows.series
    for name, own in labels.items():
        scores[f"{name}, distilled"], correlations[name] = distil(values, own, storms)
    bench = SeriesBench(proxy, world, config)
    bench.arms.clear()
    bench.kept.clear()
    for name, score in scores.items():
        bench.run(name, score)
    for draw in range(1, RANDOM_DRAWS):
        uniform = kept_by(None, series_arms.stream_order(config, draw), config, seed=draw)
        bench.train_on("random", uniform)
    order = series_arms.stream_order(config, 0)
    keep = functools.partial(kept_by, order=order, config=config, seed=0)
    for strength in SOFT:
        soft = keep(scores["guarded, distilled"], strength=strength)
        bench.train_on(f"guarded, distilled, strength {strength:g}", soft)
    gates, kept = {}, {}
    on_trial = {
        "metagradient": labels["guarded"],
        "RHO-loss, gated": scores["RHO-loss"],
        "RHO-loss, rare only, gated": scores["RHO-loss, rare only"],
    }
    for name, own in on_trial.items():
        scorer, strength, gates[name] = gated(world, proxy, own, config)
        scores[name] = scorer.score(values)
        kept[name] = keep(scores[name] if strength else None, strength=strength)
        bench.train_on(name, kept[name])
    methods = bench.methods()
    for name, method in methods.items():
        del method["curve"]
        say(f"{name}: {method['rare_error'][0]:.4f} {method['normal_nll'][0]:.4f}")
    ranked = {
        n: s for n, s in scores.items() if s is not None and n not in ("rare oracle", "whole")
    }
    geometry = {}
    if shaped:
        shown = {name: keep(scores[name]) for name in SHAPED}
        shown["metagradient"] = kept["metagradient"]
        geometry = latent_geometry(world, shown, config)
    return {
        "methods": methods,
        "auroc": {name: rare_against_corrupt(s, stream) for name, s in ranked.items()},
        "rare_above_usual": {
            name: ranked_above(s[classes == RARE], s[classes == NORMAL])
            for name, s in ranked.items()
        },
        "groups": groups(world, proxy, labels["rare only"], scores["rare only, distilled"], config),
        "gates": gates,
        "reliability": reliability,
        "rank_correlation": correlations,
        "base": base.__dict__,
        "geometry": geometry,
        "label_seconds": seconds,
    }


def labelled(world, proxy, config) -> tuple[dict[str, np.ndarray], dict[str, float], float]:
    """Labels of the stream by each mixture of the outer metrics, and how reliable they are."""
    from metagrad_filter.calibration.estimators import estimate
    from metagrad_filter.calibration.estimators.task import Task, combined
    from metagrad_filter.calibration.source import WindowSource
    from metagrad_filter.labels import gaussian_ranks, split_half_reliability
    from metagrad_filter.targets import GuardedTarget

    values = world.stream.windows.values
    others = {"rare loss": world.rare_loss(), "usual": world.usual_loss()}
    target = GuardedTarget(world.rare_target(), others)
    began = time.monotonic()
    every = np.arange(len(values))
    source = WindowSource(values)
    task = Task(proxy, target, source, config.calibration, values, every, seed=config.seed)
    halves = estimate(task).halves
    labels, reliability = {}, {}
    for name, weights in mixtures(config.guard_weight).items():
        index = [list(target.parts).index(part) for part in weights]
        mixed = combined(halves[index], weights)
        reliability[name] = split_half_reliability(mixed)
        if name != "usual only":
            labels[name] = gaussian_ranks(mixed.sum(axis=0))
    return labels, reliability, round(time.monotonic() - began, 1)


def mixtures(guard_weight: float) -> dict[str, dict[str, float]]:
    """Weights of the outer metrics in each kind of label."""
    return {
        "rare only": {"target": 1.0},
        "rare loss only": {"rare loss": 1.0},
        "guarded": {"target": 1.0, "usual": guard_weight},
        "usual only": {"usual": 1.0},
    }


def rivals(world, proxy, config) -> dict[str, np.ndarray]:
    """Scores of the stream by everything but metagradients."""
    from metagrad_filter.demo.series_arms import loss_scores, oracle_scores, rho_scores
    from metagrad_filter.demo.series_data import CORRUPT

    values, classes = world.stream.windows.values, world.stream.windows.classes
    found = loss_scores(proxy, values)
    drawn = np.random.default_rng(config.seed).random(len(values))
    return {
        "surprise": found["surprise"],
        "low loss": found["low_loss"],
        "loss band": found["loss_band"],
        "RHO-loss": rho_scores(proxy, world.target(config.guard_weight), values, config),
        "RHO-loss, rare only": rho_scores(proxy, world.rare_target(), values, config),
        "rare oracle": oracle_scores(world.stream),
        "whole": np.where(classes == CORRUPT, -1.0, drawn),
    }


def fold(storms: np.ndarray, folds: int) -> np.ndarray:
    """Which of so many folds each window is in, by its storm."""
    return np.array([zlib.crc32(str(name).encode()) % folds for name in storms])


def distil(values: np.ndarray, labels: np.ndarray, storms: np.ndarray) -> tuple[np.ndarray, float]:
    """Scores of each half of the storms by the fit on the other, and their rank correlation with
    the labels there."""
    from metagrad_filter.scorer.fit import fit_scorer
    from metagrad_filter.statistics import rank_correlation

    first = fold(storms, 2) == 0
    scores, correlations = np.empty(len(values), np.float32), []
    for side in (first, ~first):
        scorer = fit_scorer(values[side], labels[side], kind="series")
        scores[~side] = scorer.score(values[~side])
        correlations.append(rank_correlation(scores[~side], labels[~side]))
    return scores, float(np.mean(correlations))


def gated(world, proxy, labels, config) -> tuple[Any, float, dict[str, Any]]:
    """The product's scorer, and the strength and the verdict of its gate.

    The gate draws from storms that the scorer was not fitted on.
    """
    from metagrad_filter.calibration.gate import run_gate
    from metagrad_filter.calibration.source import WindowSource
    from metagrad_filter.scorer.fit import fit_scorer

    windows = world.stream.windows
    fitted = fold(windows.series, 3) > 0
    scorer = fit_scorer(windows.values[fitted], labels[fitted], kind="series")
    target = world.target(config.guard_weight)
    result = run_gate(
        proxy,
        scorer,
        target.gate_metric(proxy.loss),
        WindowSource(windows.values),
        np.flatnonzero(~fitted),
        config.calibration,
        seed=config.seed,
        guards=target.guard_metrics(proxy.loss),
    )
    say(f"gate: {result.to_json()}")
    return scorer, result.chosen, result.to_json()


def groups(world, proxy, labels: np.ndarray, scores: np.ndarray | None, config) -> dict[str, Any]:
    """Error at rare events after training on usual windows and one group, beside its mean label."""
    from metagrad_filter.demo.series_arms import SeriesArm
    from metagrad_filter.demo.series_data import CORRUPT, NORMAL, RARE
    from metagrad_filter.statistics import rank_correlation

    assert scores is not None
    stream = world.stream
    classes, kinds = stream.windows.classes, stream.kinds
    rare, broken = (np.flatnonzero(classes == c) for c in (RARE, CORRUPT))
    unshifted = broken[kinds[broken] != stream.kind_names.index("shift")]
    low = rare[scores[rare] < np.median(scores[broken])]
    chosen = {
        "usual": np.flatnonzero(classes == NORMAL),
        "rare": rare,
        **{kind: np.flatnonzero(kinds == i) for i, kind in enumerate(stream.kind_names)},
    }
    distinct = LEAST_GROUP
    if len(low) >= LEAST_GROUP:
        distinct = len(low)
        for name, members in (("rare", rare), ("broken", unshifted)):
            ranked = members[np.argsort(-scores[members], kind="stable")]
            chosen[f"{name}, score high"] = ranked[:distinct]
        chosen["rare, score low"] = low
    wanted = config.steps * config.batch_windows
    found = {}
    for name, members in chosen.items():
        judged, means = [], []
        for draw in range(GROUP_DRAWS):
            rng = np.random.default_rng([config.seed, draw])
            usual = rng.permutation(chosen["usual"])[: round(wanted * (1 - GROUP_SHARE))]
            taken = rng.permutation(members)[:distinct]
            repeated = np.resize(taken, wanted - len(usual))
            order = rng.permutation(np.concatenate([usual, repeated]))
            arm = SeriesArm.start(proxy, world.report, config)
            arm.train_all(stream.windows.values[order], config.batch_windows)
            judged.append(arm.judged[-1].__dict__)
            means.append(labels[taken].mean())
        found[name] = {
            **{key: float(np.mean([one[key] for one in judged])) for key in judged[0]},
            "label": float(np.mean(means)),
            "windows": min(distinct, len(members)),
            "kinds": {
                kind: int(np.sum(kinds[members] == i)) for i, kind in enumerate(stream.kind_names)
            },
        }
        say(f"usual and {name}: {found[name]}")
    agreement = rank_correlation(
        np.array([group["label"] for group in found.values()]),
        np.array([-group["rare_error"] for group in found.values()]),
    )
    return {"effects": found, "rank_correlation": agreement}


def latent_geometry(world, kept: Mapping[str, np.ndarray], config) -> dict[str, dict[str, float]]:
    """Geometry of a latent predictor after training on what each selection keeps."""
    import optax

    from metagrad_filter.calibration.estimators.windows import losses_of
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
    for name, positions in kept.items():
        windows = values[positions]
        batches = windows[: config.steps * batch].reshape(config.steps, batch, *shape)
        found[name] = look(train(loss, factory, rates, start, batches)[0])
        say(f"JEPA {name}: {found[name]}")
    return found


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Records of the splits of a condition in one: lists over splits where they are figures."""
    first = runs[0]

    def lists(take) -> Any:
        """Nested dicts as the first run's, with a list over runs at each leaf."""
        found = [take(run) for run in runs]
        if isinstance(found[0], dict):
            return {key: lists(lambda run, key=key: take(run)[key]) for key in found[0]}
        if isinstance(found[0], list):
            return [x for one in found for x in one]
        return found

    shared = {key: lists(lambda run, key=key: run[key]) for key in first if key in _MERGED}
    return {
        **shared,
        "groups": [run["groups"] for run in runs],
        "gates": [run["gates"] for run in runs],
        "geometry": first["geometry"],
    }


_MERGED = (
    "methods",
    "auroc",
    "rare_above_usual",
    "reliability",
    "rank_correlation",
    "base",
    "label_seconds",
)


def change(methods: dict[str, Any], name: str, what: str) -> np.ndarray:
    """Difference to random's mean in each split; of the error at rare events, as a share of it."""
    splits = len(methods["rare oracle"][what])
    own, plain = (np.reshape(methods[x][what], (splits, -1)).mean(1) for x in (name, "random"))
    return own / plain - 1 if what == "rare_error" else own - plain


def table(record: dict[str, Any]) -> str:
    """What each selection does, how it ranks rare above broken, and what groups do, as Markdown."""
    parts = (selections, remarks, ranking, interventions)
    return "\n\n".join(part(record) for part in parts)


def selections(record: dict[str, Any]) -> str:
    """Methods by condition: rare error and loss against random, coverage, rare windows kept."""
    conditions = record["conditions"]
    columns = ("rare error", "usual NLL", "coverage", "rare kept")
    heads = [f"{condition}: {columns[0]} | {' | '.join(columns[1:])}" for condition in conditions]
    lines = [f"| selection | {' | '.join(heads)} |", "|---|" + "---:|" * (4 * len(heads))]
    for name in LISTED:
        cells = []
        for found in conditions.values():
            methods = found["methods"]
            error, nll = (change(methods, name, what) for what in ("rare_error", "normal_nll"))
            cells += [
                f"{error.mean():+.1%} ± {_spread(error):.1%}",
                f"{nll.mean():+.3f}",
                f"{np.mean(methods[name]['coverage']):.3f}",
                f"{np.mean(methods[name]['rare_retained']):.2f}",
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def remarks(record: dict[str, Any]) -> str:
    """Choices of gates, reliability of labels and the latent predictor's geometry, in words."""
    lines = []
    for condition, found in record["conditions"].items():
        chosen = "; ".join(
            f"{name} {', '.join(str(gates[name]['chosen']) for gates in found['gates'])}"
            for name in found["gates"][0]
        )
        ranks = ", ".join(
            f"{name} {shape['effective_rank']:.1f}" for name, shape in found["geometry"].items()
        )
        lines.append(
            f"{condition}: strengths that gates chose: {chosen}; split-half reliability of guarded "
            f"labels {np.mean(found['reliability']['guarded']):.2f}; effective rank of the latent "
            f"predictor's states: {ranks}."
        )
    return "\n\n".join(lines)


def ranking(record: dict[str, Any]) -> str:
    """Mean AUROC of rare above broken windows by kind, severities from low to high."""
    lines = []
    for condition, found in record["conditions"].items():
        shown = [name for name in SHOWN if name in found["auroc"]]
        lines += [f"| {condition}: rare above | {' | '.join(shown)} |"]
        lines += ["|---|" + "---:|" * len(shown)]
        for kind in found["auroc"][shown[0]]:
            cells = []
            for name in shown:
                value = found["auroc"][name][kind]
                many = value.values() if isinstance(value, dict) else [value]
                cells.append(" / ".join(f"{np.mean(v):.2f}" for v in many))
            lines.append(f"| {kind} | {' | '.join(cells)} |")
        usual = (f"{np.mean(found['rare_above_usual'][name]):.2f}" for name in shown)
        lines += [f"| usual windows | {' | '.join(usual)} |", ""]
    return "\n".join(lines).strip()


def interventions(record: dict[str, Any]) -> str:
    """What training on a quarter of each group does to the error at rare events."""
    conditions = record["conditions"]
    heads = [f"{condition}: label | rare error" for condition in conditions]
    lines = [
        f"| usual windows and | {' | '.join(heads)} |",
        "|---|" + "---:|" * (2 * len(heads)),
    ]
    names = next(iter(conditions.values()))["groups"][0]["effects"]
    for name in names:
        cells = []
        for found in conditions.values():
            runs = [run["effects"] for run in found["groups"] if name in run["effects"]]
            errors = [run[name]["rare_error"] / run["usual"]["rare_error"] - 1 for run in runs]
            cells.append(f"{np.mean([run[name]['label'] for run in runs]):+.2f}")
            cells.append(f"{np.mean(errors):+.1%}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    agreed = []
    for condition, found in conditions.items():
        each = " / ".join(f"{run['rank_correlation']:.2f}" for run in found["groups"])
        agreed.append(f"{each} ({condition})")
    lines += [
        "",
        f"Rank correlation of label and effect over groups, by split: {', '.join(agreed)}.",
    ]
    return "\n".join(lines)


def _spread(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--quick"], ["--table"]):
        sys.exit(f"bench.series: unknown arguments {arguments}; expected none, --quick or --table")
    if arguments != ["--table"]:
        record = measure(quick=arguments == ["--quick"])
        if not arguments:
            write_record(RECORD, record)
    else:
        record = json.loads(RECORD.read_text())
    text = table(record)
    if arguments != ["--quick"]:
        README.write_text(replaced(README.read_text(), "series-table", text))
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
