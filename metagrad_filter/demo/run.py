"""The main job, end to end, on real text.

PubMed abstracts are what a small model should get better at; its stream also holds BBC news and
shuffled abstracts. The run trains a base on the raw mixture, calibrates a scorer from
metagradients, trains on while the filter works inside a real grain pipeline, lets a second version
be calibrated in a process of its own and swaps it in at half of the stream, and compares with five
other ways to choose the same number of training tokens from the same base.

While the second round runs, this process trains the rivals: a real job would train on instead, and
would take the swap whenever it came. Waiting at the swap makes the run repeatable.

Output: `results.json` (every figure), `report.html` (drawn from it), `run/` (the run directory).
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from metagrad_filter.calibration.calibrator import Calibrator
from metagrad_filter.demo.config import DemoConfig
from metagrad_filter.demo.data import CLASS_NAMES, World, build_world
from metagrad_filter.demo.domain_match import domain_match_scores
from metagrad_filter.demo.live import LiveArm
from metagrad_filter.demo.report import write_report
from metagrad_filter.demo.rivals import low_perplexity_scores, rho_loss_scores, tuned_reference
from metagrad_filter.demo.stream import (
    EVALUATE_EVERY,
    Arm,
    class_shares,
    kept_by,
    kept_on_target,
    live_batches,
)
from metagrad_filter.demo.training import (
    falling_rates,
    fresh_state,
    mean_window_loss,
    train,
    window_losses,
)
from metagrad_filter.errors import CalibrationFailed, DataError
from metagrad_filter.files import replace_file
from metagrad_filter.labels import gaussian_ranks
from metagrad_filter.ledger import Ledger
from metagrad_filter.metagradient import check_metagradients
from metagrad_filter.metagradient.optimizer import warm_state
from metagrad_filter.proxy import DecoderConfig, DecoderLoss, Proxy, init_decoder
from metagrad_filter.scorer.fit import held_out, merge_windows
from metagrad_filter.targets import HeldOutLoss
from metagrad_filter.types import Progress, silent

METHODS = ("random", "low_perplexity", "domain_match", "rho_loss", "metagrad", "on_target_only")
_SCATTER_POINTS = 1500
_HISTOGRAM_BINS = 60


def run_demo(config: DemoConfig, *, progress: Progress = silent) -> dict[str, Any]:
    """Runs the demo and writes its results; returns what `results.json` holds.

    Args:
      config: sizes and seeds.
      progress: called with stage name, done and total.

    Raises:
      DataError: the corpora cannot be downloaded or are damaged.
      CalibrationFailed: no version came out of a calibration round; says why.
    """
    started = time.monotonic()
    clock = _Clock()
    run_dir = config.out / "run"
    _clear(run_dir)
    with clock("data"):
        progress("corpus", 0, 1)
        world = build_world(
            length=config.window_tokens,
            vocab_size=config.vocab_size,
            seed=config.seed,
            limit_documents=config.limit_documents,
        )
        progress("corpus", 1, 1)
    parts = _Parts(world, config)
    target = HeldOutLoss(parts.target)

    with clock("base"):
        proxy = _train_base(parts.base, world.vocab_size, config, progress)
    base_loss = mean_window_loss(proxy.loss, proxy.params, parts.report)

    calibrator = Calibrator(
        run_dir,
        proxy=proxy,
        target=target,
        windows=parts.stream,
        config=config.calibration,
        progress=progress,
    )
    with clock("calibration"):
        first = calibrator.round()
    if first.version is None:
        raise CalibrationFailed(f"the first calibration round published nothing: {first.reason}")
    with clock("finite_differences"):
        progress("finite differences", 0, 1)
        finite_difference = _check(proxy, target, parts.stream, config)
        progress("finite differences", 1, 1)

    bench = _Bench(proxy, parts, config)
    live = bench.live_arm(run_dir, seed=0)
    progress("live stream, first half", 0, 1)
    with clock("live_stream"):
        live.train_half()
    progress("live stream, first half", 1, 1)
    params, opt_state = live.arm.state
    calibrator.follow(live.arm.steps, params, opt_state)
    with clock("rivals_beside_calibration"), calibrator.background(rounds=1) as worker:
        bench.run_rivals(target, progress)
        progress("second calibration round", 0, 1)
        reports = worker.wait(1)
        progress("second calibration round", 1, 1)
    if reports[0]["version"] is None:
        raise CalibrationFailed(f"the second round published nothing: {reports[0]['reason']}")
    with clock("live_stream"):
        for seed in range(config.seeds):
            if seed:
                # The other seeds replay the first one's decisions: the same version at each block.
                Ledger(run_dir, "seed-0").fork(f"seed-{seed}")
                live = bench.live_arm(run_dir, seed=seed)
                live.train_half()
            live.train_half()
            bench.record("metagrad", live.arm, live.classes)
            if seed == 0:
                stream = _stream_record(live.classes, live.versions, config)
            progress("live stream, second half", seed + 1, config.seeds)

    scorer = _scorer_record(calibrator, parts, config)
    results = {
        "keep_ratio": config.keep_ratio,
        "seeds": list(range(config.seeds)),
        "base_loss": base_loss,
        "methods": bench.methods(
            prepare=clock.seconds["calibration"] + sum(reports[0]["seconds"].values()),
            score=scorer["scorer"]["score_seconds"],
        ),
        **scorer,
        "finite_difference": finite_difference,
        "versions": _versions(calibrator.reports(), stream["swaps"]),
        "stream": stream,
        "world": {
            "windows": len(world.windows),
            "stream_windows": len(parts.stream),
            "window_tokens": config.window_tokens,
            "vocab_size": world.vocab_size,
        },
        "config": {**config.to_json(), "parameters": _parameter_count(proxy)},
        "environment": _environment(),
        "stages": clock.seconds,
        "seconds": round(time.monotonic() - started, 1),
    }
    content = json.dumps(results, indent=1) + "\n"
    replace_file(config.out / "results.json", content.encode(), mode=0o644)
    write_report(results, config.out / "report.html")
    return results


class _Parts:
    """Disjoint parts of the world: base | stream, and target | report of the held-out windows."""

    def __init__(self, world: World, config: DemoConfig):
        stream = config.blocks * config.block_windows
        wanted = config.held_out_windows + config.report_windows
        if len(world.windows) < 2 * stream or len(world.held_out) < wanted:
            raise DataError(
                f"the corpus gives {len(world.windows)} windows and {len(world.held_out)} held-out "
                f"ones; this run needs {2 * stream} and {wanted}: raise limit_documents."
            )
        self.base = world.windows[:-stream]
        self.stream = world.windows[-stream:]
        self.classes = world.classes[-stream:].astype(np.int64)
        # Contiguous, for neighbouring held-out windows share a document.
        self.target = world.held_out[: config.held_out_windows]
        self.report = world.held_out[config.held_out_windows : wanted]


class _Bench:
    """Runs every method on the same seeds and keeps their records."""

    def __init__(self, proxy: Proxy, parts: _Parts, config: DemoConfig):
        self.proxy, self.parts, self.config = proxy, parts, config
        self.rates = falling_rates(config.learning_rate, config.steps)
        self.orders = [
            np.random.default_rng([config.seed, 1, seed]).permutation(len(parts.stream))
            for seed in range(config.seeds)
        ]
        self.arms: dict[str, list[Arm]] = {name: [] for name in METHODS}
        self.kept: dict[str, list[np.ndarray]] = {name: [] for name in METHODS}
        self.seconds: dict[str, dict[str, float | None]] = {
            name: {"prepare_seconds": None, "score_seconds": None} for name in METHODS
        }

    def arm(self) -> Arm:
        return Arm.start(self.proxy, self.rates, self.parts.report[: self.config.curve_windows])

    def live_arm(self, run_dir: Path, *, seed: int) -> LiveArm:
        batches = live_batches(
            self.parts.stream,
            self.parts.classes,
            self.orders[seed],
            run_dir,
            self.config,
            name=f"seed-{seed}",
        )
        half = self.config.steps // 2
        return LiveArm(self.arm(), batches, half, key="tokens", evaluate_every=EVALUATE_EVERY)

    def record(self, method: str, arm: Arm, classes: np.ndarray) -> None:
        self.arms[method].append(arm)
        self.kept[method].append(classes)

    def run_rivals(self, target: HeldOutLoss, progress: Progress) -> None:
        """Scores the stream as each rival does and trains on what it keeps."""
        proxy, stream = self.proxy, self.parts.stream
        losses, base_seconds = _timed(window_losses, proxy.loss, proxy.params, stream)
        reference, tuning = _timed(
            tuned_reference,
            proxy,
            target.target_windows,
            target.gate_windows,
            steps=self.config.reference_steps,
            seed=self.config.seed,
        )
        tuned, tuned_seconds = _timed(window_losses, proxy.loss, reference[0], stream)
        domain, domain_seconds = _timed(
            domain_match_scores, self.parts.target, stream, seed=self.config.seed
        )
        scores = {
            "random": None,
            "low_perplexity": low_perplexity_scores(losses),
            "domain_match": domain,
            "rho_loss": rho_loss_scores(losses, tuned),
        }
        self.seconds["low_perplexity"]["score_seconds"] = base_seconds
        self.seconds["rho_loss"] = {
            "prepare_seconds": tuning,
            "score_seconds": base_seconds + tuned_seconds,
        }
        # Fitting and scoring are one call: each half of the stream is scored by the other's fit.
        self.seconds["domain_match"]["score_seconds"] = domain_seconds
        names = [*scores, "on_target_only"]
        done = 0
        for seed, order in enumerate(self.orders):
            for name in names:
                if name == "on_target_only":
                    kept = kept_on_target(self.parts.classes, order, self.config)
                else:
                    kept = kept_by(scores[name], order, self.config, seed=seed)
                arm = self.arm()
                arm.train_all(stream[kept], self.config.batch_windows, lambda: None)
                self.record(name, arm, self.parts.classes[kept])
                done += 1
                progress("rivals", done, len(names) * len(self.orders))

    def methods(self, *, prepare: float, score: float) -> dict[str, Any]:
        """The `methods` part of the results, given the seconds that metagrad's scores took."""
        self.seconds["metagrad"] = {"prepare_seconds": round(prepare, 3), "score_seconds": score}
        final = {
            name: [arm.loss(self.parts.report) for arm in arms] for name, arms in self.arms.items()
        }
        random, ceiling = np.mean(final["random"]), np.mean(final["on_target_only"])
        return {
            name: {
                "loss": final[name],
                "kept_share": class_shares(np.concatenate(self.kept[name])),
                "recovered": float((random - np.mean(final[name])) / (random - ceiling)),
                **self.seconds[name],
                "curve": {
                    "tokens": arms[0].tokens,
                    "loss": [[arm.losses[i] for arm in arms] for i in range(len(arms[0].tokens))],
                },
            }
            for name, arms in self.arms.items()
        }


def _train_base(
    windows: np.ndarray, vocab_size: int, config: DemoConfig, progress: Progress
) -> Proxy:
    model = DecoderConfig(
        vocab_size=vocab_size,
        n_positions=config.window_tokens - 1,
        n_embd=48,
        n_layer=config.layers,
        n_head=2,
        # Second derivatives of GELU's tanh dominate the sweep on CPU; squared ReLU has none.
        activation_function="relu2",
        initializer_range=0.06,
    )
    loss = DecoderLoss(model)
    factory = functools.partial(optax.adamw, b2=0.95, weight_decay=0.01)
    params = init_decoder(model, seed=config.seed)
    rng = np.random.default_rng([config.seed, 0])
    wanted = config.base_steps * config.batch_windows
    epochs = -(-wanted // len(windows))
    order = np.concatenate([rng.permutation(len(windows)) for _ in range(epochs)])[:wanted]
    params, opt_state = train(
        loss,
        factory,
        _base_rates(config),
        fresh_state(factory, params),
        windows[order].reshape(config.base_steps, config.batch_windows, -1),
        progress=lambda done: progress("base model", done, config.base_steps),
    )
    return Proxy(loss, params, opt_state, factory, config.learning_rate)


def _base_rates(config: DemoConfig) -> np.ndarray:
    """Warm-up, a stable phase, and a decay that ends at the live rate."""
    steps = config.base_steps
    turns = [0, min(50, steps // 4), steps * 6 // 10, steps]
    values = [0.0, config.peak_learning_rate, config.peak_learning_rate, config.learning_rate]
    return np.interp(np.arange(steps), turns, values).astype(np.float32)


def _check(
    proxy: Proxy, target: HeldOutLoss, stream: np.ndarray, config: DemoConfig
) -> dict[str, Any]:
    """Finite differences on the demo's own model, from the moments calibration starts from."""
    rate = config.learning_rate * config.calibration.learning_rate_scales[0]
    optimizer = proxy.transformation(rate)
    shape = (config.check_horizon, config.batch_windows, config.window_tokens)
    found = check_metagradients(
        proxy.loss,
        target.outer(proxy.loss),
        proxy.params,
        warm_state(optimizer, proxy.params, proxy.opt_state),
        stream[: shape[0] * shape[1]].reshape(shape),
        optimizer=optimizer,
        entries=config.check_entries,
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


def _scorer_record(calibrator: Calibrator, parts: _Parts, config: DemoConfig) -> dict[str, Any]:
    """Histograms of the newest scorer by class, and its scores against unseen labels."""
    registry = calibrator.registry
    newest = registry.latest()
    assert newest is not None
    scorer = registry.load(newest)
    scores, score_seconds = _timed(scorer.score, parts.stream)
    low, high = np.quantile(scores, [0.001, 0.999])
    edges = np.linspace(low, high, _HISTOGRAM_BINS + 1)
    histogram = {
        name: np.histogram(scores[parts.classes == i], edges)[0].tolist()
        for i, name in enumerate(CLASS_NAMES)
    }
    newest_round = calibrator.labels.load(calibrator.labels.rounds()[-1])
    windows, labels, weights = calibrator.labels.pooled(
        config.calibration.pooled_rounds,
        newest_round.target,
        decay=config.calibration.label_decay,
    )
    windows, labels, _ = merge_windows(windows, gaussian_ranks(labels, weights), weights)
    unseen = held_out(len(windows), config.calibration.seed)[:_SCATTER_POINTS]
    lookup = {window.tobytes(): i for i, window in enumerate(parts.stream)}
    classes = [int(parts.classes[lookup[windows[i].tobytes()]]) for i in unseen]
    last = calibrator.reports()[-1]
    return {
        "scorer": {
            "rank_correlation": last["rank_correlation"],
            "label_reliability": last["reliability"],
            "form": last["form"],
            "score_seconds": score_seconds,
        },
        "histogram": {"edges": edges.tolist(), **histogram},
        "scatter": {
            "label": labels[unseen].tolist(),
            "score": scorer.score(windows[unseen]).tolist(),
            "class": classes,
        },
    }


def _versions(reports: list[dict[str, Any]], swaps: list[dict[str, int]]) -> list[dict[str, Any]]:
    first_block = {swap["version"]: swap["block"] for swap in swaps}
    return [
        {**report, "first_block": first_block.get(report["version"])}
        for report in reports
        if report["version"] is not None
    ]


def _stream_record(classes: np.ndarray, versions: np.ndarray, config: DemoConfig) -> dict[str, Any]:
    by_block = classes.reshape(config.blocks, -1)
    used = versions.reshape(config.blocks, -1)[:, 0]
    changes = np.flatnonzero(np.diff(used, prepend=-1))
    return {
        "block_windows": config.block_windows,
        "kept_share": {
            name: (by_block == i).mean(axis=1).tolist() for i, name in enumerate(CLASS_NAMES)
        },
        "swaps": [{"block": int(block), "version": int(used[block])} for block in changes],
    }


def _parameter_count(proxy: Proxy) -> int:
    return sum(int(np.size(x)) for x in jax.tree.leaves(proxy.params))


def _environment() -> dict[str, Any]:
    packages = ("metagrad-filter", "jax", "flax", "optax", "grain", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "device": jax.devices()[0].platform,
    }


def _timed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    start = time.monotonic()
    value = function(*args, **kwargs)
    return value, round(time.monotonic() - start, 4)


def _clear(run_dir: Path) -> None:
    """Removes the run directory of an earlier demo, and nothing else."""
    marker = run_dir / "demo-run"
    if run_dir.exists() and not marker.exists():
        raise DataError(
            f"{run_dir} exists and was not made by the demo; choose another --out folder."
        )
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    marker.touch()


class _Clock:
    """Adds up wall time by stage, in seconds."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        spent = time.monotonic() - start
        self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 3)
