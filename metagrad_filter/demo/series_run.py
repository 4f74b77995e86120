"""The whole job on time series: storms in which rapid intensification is what matters.

A small patch transformer should foresee rapid intensification better, and stay calibrated on usual
weather; its stream is mostly usual windows, a twentieth holds the event, and three tenths are
broken in seven ways. The run trains a base on such a mixture, calibrates a scorer from
metagradients of the error at rare events under guards, trains on while the filter works inside
a real grain pipeline, lets a second version be calibrated in a process of its own, swaps it in at
half of the stream, and compares with six other ways to choose as many windows from the same base.

The one path of the text demo: `Calibrator`, registry, ledger and `score_filter` are the same.

Output: `results.json` (every figure), `report.html` (drawn from it), `run/` (the run directory).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from metagrad_filter.calibration.calibrator import Calibrator
from metagrad_filter.demo import run as text_run
from metagrad_filter.demo.live import LiveArm
from metagrad_filter.demo.series_arms import (
    EVALUATE_EVERY,
    SeriesArm,
    class_shares,
    live_batches,
    loss_scores,
    oracle_scores,
    rho_scores,
    stream_order,
)
from metagrad_filter.demo.series_config import SeriesDemoConfig
from metagrad_filter.demo.series_data import CLASS_NAMES, CORRUPT, RARE, StormWorld, Stream
from metagrad_filter.demo.series_report import write_series_report
from metagrad_filter.demo.series_world import SeriesWorld, judge, series_base, series_world
from metagrad_filter.demo.stream import kept_by
from metagrad_filter.errors import CalibrationFailed
from metagrad_filter.files import replace_file
from metagrad_filter.labels import gaussian_ranks
from metagrad_filter.ledger import Ledger
from metagrad_filter.metagradient import check_metagradients
from metagrad_filter.metagradient.optimizer import warm_state
from metagrad_filter.proxy import Proxy
from metagrad_filter.scorer.fit import held_out, merge_windows
from metagrad_filter.targets import Target
from metagrad_filter.types import Progress, silent

METHODS = (
    "random",
    "surprise",
    "low_loss",
    "rho_loss",
    "loss_band",
    "metagrad",
    "rare_oracle",
)
_CHECKED_STEPS, _CHECKED = 8, 10
_SCATTER_POINTS, _HISTOGRAM_BINS = 1500, 60


def run_series_demo(
    config: SeriesDemoConfig, *, storms: StormWorld | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Runs the demo and writes its results; returns what `results.json` holds.

    Args:
      config: sizes and seeds.
      storms: with the parts of `series_config.SHARES`; None downloads and builds them.
      progress: called with stage name, done and total.

    Raises:
      DataError: the storms cannot be downloaded or are damaged.
      CalibrationFailed: no version came out of a calibration round; says why.
    """
    started = time.monotonic()
    clock = text_run._Clock()
    run_dir = config.out / "run"
    text_run._clear(run_dir)
    with clock("data"):
        progress("storms", 0, 1)
        world = series_world(config, storms=storms)
        progress("storms", 1, 1)
    with clock("base"):
        proxy = series_base(world, config, progress=progress)
    target = world.target(config.guard_weight)
    values = world.stream.windows.values
    calibrator = Calibrator(
        run_dir,
        proxy=proxy,
        target=target,
        windows=values,
        config=config.calibration,
        progress=progress,
    )
    with clock("calibration"):
        first = calibrator.round()
    if first.version is None:
        raise CalibrationFailed(f"the first calibration round published nothing: {first.reason}")
    with clock("finite_differences"):
        progress("finite differences", 0, 1)
        finite_difference = _check(proxy, target, values, config)
        progress("finite differences", 1, 1)

    bench = SeriesBench(proxy, world, config)
    live = bench.live(run_dir, seed=0)
    progress("live stream, first half", 0, 1)
    with clock("live_stream"):
        live.train_half()
    progress("live stream, first half", 1, 1)
    calibrator.follow(live.arm.steps, *live.arm.state)
    with clock("rivals_beside_calibration"), calibrator.background(rounds=1) as worker:
        bench.run_rivals(target, progress)
        progress("second calibration round", 0, 1)
        reports = worker.wait(1)
        progress("second calibration round", 1, 1)
    with clock("live_stream"):
        for seed in range(config.seeds):
            if seed:
                # The other seeds replay the first one's decisions: the same version at each block.
                Ledger(run_dir, "seed-0").fork(f"seed-{seed}")
                live = bench.live(run_dir, seed=seed)
                live.train_half()
            live.train_half()
            bench.record("metagrad", live.arm, live.classes)
            if seed == 0:
                stream = _stream_record(live.classes, live.versions, config)
            progress("live stream, second half", seed + 1, config.seeds)

    scored = _scorer_record(calibrator, world, config, bench.scores)
    results = {
        "kind": "series",
        "keep_ratio": config.keep_ratio,
        "seeds": list(range(config.seeds)),
        "base": judge(proxy.loss, proxy.params, world.report).__dict__,  # pyright: ignore[reportArgumentType]
        "methods": bench.methods(
            prepare=clock.seconds["calibration"] + sum(reports[0]["seconds"].values()),
            score=scored["scorer"]["score_seconds"],
        ),
        **scored,
        "finite_difference": finite_difference,
        "versions": text_run._versions(calibrator.reports(), stream["swaps"]),
        "second_round": reports[0]["reason"],
        "stream": stream,
        "world": {
            "stream_windows": len(values),
            "window_rows": config.length,
            "channels": values.shape[2],
            **{name: int(np.sum(world.stream.windows.classes == i)) for i, name in _classes()},
            "report_windows": len(world.report),
        },
        "config": {**config.to_json(), "parameters": text_run._parameter_count(proxy)},
        "environment": text_run._environment(),
        "stages": clock.seconds,
        "seconds": round(time.monotonic() - started, 1),
    }
    content = json.dumps(results, indent=1) + "\n"
    replace_file(config.out / "results.json", content.encode(), mode=0o644)
    write_series_report(results, config.out / "report.html")
    return results


class SeriesBench:
    """Runs every method on the same seeds and keeps their records.

    Attributes:
      scores: of the stream's windows, by method; None is a uniform choice.
    """

    def __init__(self, proxy: Proxy, world: SeriesWorld, config: SeriesDemoConfig):
        self.proxy, self.world, self.config = proxy, world, config
        self.arms: dict[str, list[SeriesArm]] = {name: [] for name in METHODS}
        self.kept: dict[str, list[np.ndarray]] = {name: [] for name in METHODS}
        self.scores: dict[str, np.ndarray | None] = {}
        self.seconds: dict[str, dict[str, float | None]] = {
            name: {"prepare_seconds": None, "score_seconds": None} for name in METHODS
        }

    def live(self, run_dir: Path, *, seed: int) -> LiveArm:
        """An arm on the live stream in the order of a seed."""
        config, world = self.config, self.world
        order = stream_order(config, seed)
        return LiveArm(
            SeriesArm.start(self.proxy, world.report, config),
            live_batches(world.stream, order, run_dir, config, name=f"seed-{seed}"),
            config.steps // 2,
            key="values",
            evaluate_every=EVALUATE_EVERY,
        )

    def record(self, method: str, arm: SeriesArm, classes: np.ndarray) -> None:
        """Adds a finished arm of a method."""
        self.arms.setdefault(method, []).append(arm)
        self.kept.setdefault(method, []).append(classes)

    def run_rivals(self, target: Target, progress: Progress = silent) -> None:
        """Scores the stream as each rival does and trains on what it keeps."""
        values = self.world.stream.windows.values
        found, loss_seconds = text_run._timed(loss_scores, self.proxy, values)
        rho, rho_seconds = text_run._timed(rho_scores, self.proxy, target, values, self.config)
        self.scores = {
            "random": None,
            **found,
            "rho_loss": rho,
            "rare_oracle": oracle_scores(self.world.stream),
        }
        for name in found:
            self.seconds[name]["score_seconds"] = loss_seconds
        # Tuning the references and scoring are one call.
        self.seconds["rho_loss"]["score_seconds"] = rho_seconds
        for i, (name, scores) in enumerate(self.scores.items()):
            self.run(name, scores)
            progress("rivals", i + 1, len(self.scores))

    def run(self, name: str, scores: np.ndarray | None) -> None:
        """Trains on what a score keeps, once a seed."""
        for seed in range(self.config.seeds):
            order = stream_order(self.config, seed)
            self.train_on(name, kept_by(scores, order, self.config, seed=seed))

    def train_on(self, name: str, positions: np.ndarray) -> None:
        """Trains on windows of the stream, in their order."""
        windows = self.world.stream.windows
        arm = SeriesArm.start(self.proxy, self.world.report, self.config)
        arm.train_all(windows.values[positions], self.config.batch_windows)
        self.record(name, arm, windows.classes[positions])

    def methods(self, *, prepare: float = 0.0, score: float = 0.0) -> dict[str, Any]:
        """The `methods` part of the results, given the seconds that metagrad's scores took."""
        if "metagrad" in self.seconds:
            self.seconds["metagrad"] = {
                "prepare_seconds": round(prepare, 3),
                "score_seconds": score,
            }
        final = {name: [arm.judged[-1] for arm in arms] for name, arms in self.arms.items()}
        plain = np.mean([judged.rare_error for judged in final["random"]])
        return {
            name: {
                "rare_error": [judged.rare_error for judged in final[name]],
                "normal_nll": [judged.normal_nll for judged in final[name]],
                "coverage": [judged.coverage for judged in final[name]],
                "rare_change": float(
                    np.mean([judged.rare_error for judged in final[name]]) / plain - 1
                ),
                "kept_share": class_shares(np.concatenate(self.kept[name])),
                "rare_retained": _retained(self.kept[name], self.world.stream),
                **self.seconds.get(name, {}),
                "curve": {
                    "windows": arms[0].windows,
                    "rare_error": [
                        [arm.judged[i].rare_error for arm in arms]
                        for i in range(len(arms[0].windows))
                    ],
                    "normal_nll": [
                        [arm.judged[i].normal_nll for arm in arms]
                        for i in range(len(arms[0].windows))
                    ],
                },
            }
            for name, arms in self.arms.items()
            if arms
        }


def _retained(kept: list[np.ndarray], stream: Stream) -> float:
    """Share of the stream's rare windows that is kept, mean over seeds."""
    there = int(np.sum(stream.windows.classes == RARE))
    return float(np.mean([np.sum(classes == RARE) / there for classes in kept]))


def ranked_above(first: np.ndarray, second: np.ndarray) -> float | None:
    """AUROC: how often a score of `first` is above one of `second`, ties half; None without any."""
    if not len(first) or not len(second):
        return None
    order = np.sort(second)
    below = np.searchsorted(order, first, "left") + np.searchsorted(order, first, "right")
    return float(below.mean() / 2 / len(second))


def rare_against_corrupt(scores: np.ndarray, stream: Stream) -> dict[str, Any]:
    """AUROC of rare above broken windows: of all, and by corruption and severity."""
    classes = stream.windows.classes
    rare = scores[classes == RARE]
    severities = sorted({float(s) for s in stream.severities[classes == CORRUPT]})
    return {
        "all": ranked_above(rare, scores[classes == CORRUPT]),
        **{
            name: {
                f"{severity:g}": ranked_above(
                    rare, scores[(stream.kinds == i) & (stream.severities == severity)]
                )
                for severity in severities
            }
            for i, name in enumerate(stream.kind_names)
        },
    }


def _check(
    proxy: Proxy, target: Target, values: np.ndarray, config: SeriesDemoConfig
) -> dict[str, Any]:
    """Finite differences on the demo's own model, from the moments calibration starts from."""
    rate = config.learning_rate * config.calibration.learning_rate_scales[0]
    optimizer = proxy.transformation(rate)
    shape = (_CHECKED_STEPS, config.batch_windows)
    found = check_metagradients(
        proxy.loss,
        target.outer(proxy.loss),
        proxy.params,
        warm_state(optimizer, proxy.params, proxy.opt_state),
        values[: shape[0] * shape[1]].reshape(*shape, *values.shape[1:]),
        optimizer=optimizer,
        entries=_CHECKED,
        epsilon=1.0,
        seed=config.seed,
    )
    return {
        "rank_correlation": found.rank_correlation,
        "relative_error": found.relative_error,
        "sign_agreement": found.sign_agreement,
        "metasmoothness": found.metasmoothness,
        "entries": len(found.entries),
    }


def _scorer_record(
    calibrator: Calibrator,
    world: SeriesWorld,
    config: SeriesDemoConfig,
    rivals: dict[str, np.ndarray | None],
) -> dict[str, Any]:
    """The newest scorer: by class, against unseen labels, and rare against broken windows."""
    stream = world.stream
    newest = calibrator.registry.latest()
    assert newest is not None
    scorer = calibrator.registry.load(newest)
    scores, score_seconds = text_run._timed(scorer.score, stream.windows.values)
    low, high = np.quantile(scores, [0.001, 0.999])
    edges = np.linspace(low, high, _HISTOGRAM_BINS + 1)
    histogram = {
        name: np.histogram(scores[stream.windows.classes == i], edges)[0].tolist()
        for i, name in _classes()
    }
    newest_round = calibrator.labels.load(calibrator.labels.rounds()[-1])
    windows, labels, weights = calibrator.labels.pooled(
        config.calibration.pooled_rounds,
        newest_round.target,
        decay=config.calibration.label_decay,
    )
    windows, labels, _ = merge_windows(windows, gaussian_ranks(labels, weights), weights)
    unseen = held_out(len(windows), config.calibration.seed)[:_SCATTER_POINTS]
    lookup = {window.tobytes(): i for i, window in enumerate(stream.windows.values)}
    places = [lookup[windows[i].tobytes()] for i in unseen]
    last = calibrator.reports()[-1]
    judged = {"metagrad": scores, **{n: s for n, s in rivals.items() if s is not None}}
    return {
        "scorer": {
            "rank_correlation": last["rank_correlation"],
            "label_reliability": last["reliability"],
            "form": last["form"],
            "score_seconds": score_seconds,
        },
        "auroc": {
            name: rare_against_corrupt(found, stream)
            for name, found in judged.items()
            if name != "rare_oracle"
        },
        "histogram": {"edges": edges.tolist(), **histogram},
        "scatter": {
            "label": labels[unseen].tolist(),
            "score": scorer.score(windows[unseen]).tolist(),
            "class": [CLASS_NAMES[stream.windows.classes[place]] for place in places],
        },
    }


def _stream_record(
    classes: np.ndarray, versions: np.ndarray, config: SeriesDemoConfig
) -> dict[str, Any]:
    by_block = classes.reshape(config.blocks, -1)
    used = versions.reshape(config.blocks, -1)[:, 0]
    changes = np.flatnonzero(np.diff(used, prepend=-1))
    return {
        "block_windows": config.block_windows,
        "kept_share": {name: (by_block == i).mean(axis=1).tolist() for i, name in _classes()},
        "swaps": [{"block": int(block), "version": int(used[block])} for block in changes],
    }


def _classes() -> list[tuple[int, str]]:
    return list(enumerate(CLASS_NAMES))
