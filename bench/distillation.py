"""Distillation: what more labels and other scorers are worth.

python -m bench.distillation            run (about half an hour), store, print the tables
python -m bench.distillation --table    print the tables of the stored record

Labels are metagradient labels (T=96, 4 trajectories, inner rate a quarter of the live one) of a
base early in its stable phase, in the largest of the worlds (`bench.worlds.dirty`: 40 % PubMed of
2021, the target, 20 % BBC news, 40 % shuffled PubMed). Scorers are fitted on the first N labels
and judged on 13,824 windows that none has seen: rank correlation with the label, the same within a
class (mean of the three), and *recovered*, the share of what training on the target's windows only
gains over random that the scorer gains: report loss after 54 steps at a rate falling to a tenth, on
the quarter that it keeps, paired seeds. *Within target* is random's loss minus the scorer's (nats)
where both keep half of the target's windows and nothing else.

Scorers, each on the most labels:

* linear, trigram: the presets of those names.
* language models: as DSIR, hashed n-gram models of the target and of the pool; their log ratio and
  log probability, mean, deviation and extremes over the window, in a ridge regression beside the
  linear scorer. DSIR itself (the mean log ratio, no labels) is a row of its own.
* mixer: one token-and-channel mixing block over 16-wide embeddings; convolution: windows of three
  embeddings, mean and maximum pooled, fitted on what the linear scorer leaves over. Both cost about
  1 % of the proxy's forward pass in multiply-adds.

Microseconds a window on one core are medians of seven turns, ours native, the others compiled by
XLA. Labels cost .95 gradients each, and the sweep before them as much for any number.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.readme import README, replaced
from bench.record import environment, say, write_record

RECORD = Path(__file__).parent / "records" / "distillation.json"

COUNTS = (2000, 8000, 32_000, 120_000)
JUDGED, KEEP, INSIDE = 13_824, 0.25, 0.5
SEEDS = 3
HORIZON, TRAJECTORIES, SCALE = 96, 4, 0.25
WIDTH, HIDDEN = 16, 32
EPOCHS, TRAINING_BATCH = 8, 256

Predict = Callable[[np.ndarray], np.ndarray]


def measure() -> dict[str, Any]:
    """Labels 133,824 windows, then fits and judges; JSON types only."""
    from bench.refresh import BASE_STEPS
    from bench.worlds import VOCAB, base_proxy, dirty, labelled, losses
    from metagrad_filter.labels import gaussian_ranks, split_half_reliability
    from metagrad_filter.scorer.fit import fit_scorer

    world = dirty()
    proxy = base_proxy(world, "stable", steps=BASE_STEPS)
    windows = world.stream[: JUDGED + COUNTS[-1]]
    halves = labelled(
        world, proxy, windows, horizon=HORIZON, trajectories=TRAJECTORIES, scale=SCALE
    )
    labels = gaussian_ranks(halves.astype(np.float64).sum(axis=0))
    judged, fitted = windows[:JUDGED], windows[JUDGED:]
    truth, labels = labels[:JUDGED], labels[JUDGED:]
    judge = _Judge(world, proxy, judged, truth, world.classes[:JUDGED])
    say(f"random {judge.random}, on-target only {judge.ceiling}")
    curve, scorer = [], None
    for count in COUNTS:
        begun = time.monotonic()
        scorer = fit_scorer(fitted[:count], labels[:count], vocab_size=VOCAB)
        seconds = time.monotonic() - begun
        curve.append({"labels": count, "fit_seconds": round(seconds, 1), **judge(scorer.score)})
        say(f"linear: {curve[-1]}")
    assert scorer is not None
    scorers = {"linear": {**curve[-1], "microseconds": _microseconds(scorer.score, judged)}}
    for name, fit in _rivals(world).items():
        begun = time.monotonic()
        predict = fit(fitted, labels)
        seconds = time.monotonic() - begun
        scorers[name] = {
            "labels": len(labels),
            "fit_seconds": round(seconds, 1),
            **judge(predict),
            "microseconds": _microseconds(predict, judged),
        }
        say(f"{name}: {scorers[name]}")
    return {
        "reliability": split_half_reliability(halves),
        "curve": curve,
        "scorers": scorers,
        "labels_themselves": judge(None),
        "random": judge.random,
        "on_target_only": judge.ceiling,
        "proxy_forward": {
            "multiply_adds": _proxy_work(proxy),
            "mixer": _mixer_work() / _proxy_work(proxy),
            "convolution": _convolution_work() / _proxy_work(proxy),
            "microseconds": _microseconds(partial(losses, proxy), judged),
        },
        "config": {
            "horizon": HORIZON,
            "trajectories": TRAJECTORIES,
            "learning_rate_scale": SCALE,
            "seeds": SEEDS,
            "judged_windows": JUDGED,
            "keep_ratio": KEEP,
            "mixer": {"width": WIDTH, "hidden": HIDDEN},
        },
        "environment": environment(),
    }


class _Judge:
    """What a scorer is worth on windows that it has not seen."""

    def __init__(self, world, proxy, windows, truth, classes):
        self.world, self.proxy, self.windows = world, proxy, windows
        self.truth, self.classes = truth, classes
        every, good = np.arange(len(windows)), np.flatnonzero(classes == 0)
        self.random = self._losses(None, every, KEEP)
        self.inside = self._losses(None, good, INSIDE)
        self.good = good
        steps = int(len(windows) * KEEP) // 64
        self.ceiling = [
            self._train(np.random.default_rng([7, seed]).permutation(good)[: steps * 64])
            for seed in range(SEEDS)
        ]

    def __call__(self, predict: Predict | None) -> dict[str, Any]:
        from metagrad_filter.statistics import rank_correlation

        scores = self.truth if predict is None else predict(self.windows)
        within = [
            rank_correlation(scores[self.classes == c], self.truth[self.classes == c])
            for c in range(3)
        ]
        found = self._losses(scores, np.arange(len(self.windows)), KEEP)
        gains = np.asarray(self.random) - np.asarray(found)
        best = np.mean(self.random) - np.mean(self.ceiling)
        inside = np.asarray(self.inside) - np.asarray(self._losses(scores, self.good, INSIDE))
        return {
            "rank_correlation": rank_correlation(scores, self.truth),
            "within_class": float(np.mean(within)),
            "by_class": within,
            "losses": found,
            "recovered": float(gains.mean() / best),
            "standard_error": float(gains.std(ddof=1) / math.sqrt(SEEDS) / best),
            "within_target": float(inside.mean()),
            "within_target_error": float(inside.std(ddof=1) / math.sqrt(SEEDS)),
        }

    def _losses(self, scores: np.ndarray | None, among: np.ndarray, keep: float) -> list[float]:
        from bench.own_pool import filtered

        found = []
        for seed in range(SEEDS):
            order = np.random.default_rng([7, seed]).permutation(among)
            kept = order[filtered(scores, order, keep, math.inf, seed)]
            found.append(self._train(kept[: len(kept) // 64 * 64]))
        return found

    def _train(self, kept: np.ndarray) -> float:
        from bench.worlds import PEAK, arm, report_loss

        rates = np.linspace(PEAK, PEAK / 10, len(kept) // 64, dtype=np.float32)
        return report_loss(self.world, self.proxy, arm(self.proxy, self.windows[kept], rates))


def _rivals(world) -> dict[str, Callable[[np.ndarray, np.ndarray], Predict]]:
    from bench.worlds import VOCAB
    from metagrad_filter.scorer.fit import fit_scorer

    def preset(name: str):
        return lambda windows, labels: (
            fit_scorer(windows, labels, vocab_size=VOCAB, preset=name).score
        )

    return {
        "trigram": preset("trigram"),
        "DSIR": lambda windows, labels: _LanguageModels(world.target, windows).ratio,
        "language models": partial(_fit_statistics, world.target),
        "mixer": partial(_fit_network, _mixer, False),
        "convolution": partial(_fit_network, _convolution, True),
    }


class _LanguageModels:
    """Hashed n-gram models of the target and of the pool: log probability of each n-gram."""

    BITS = 17

    def __init__(self, target: np.ndarray, pool: np.ndarray):
        self.log_pool = self._log_frequencies(pool)
        self.log_ratio = self._log_frequencies(target) - self.log_pool

    def ratio(self, windows: np.ndarray) -> np.ndarray:
        """`(N,)` mean log ratio: DSIR's importance weight, per n-gram."""
        return self.log_ratio[self._rows(windows)].mean(axis=1)

    def statistics(self, windows: np.ndarray) -> np.ndarray:
        """`(N, 10)` mean, deviation, least, greatest and median of both over a window."""
        rows = self._rows(windows)
        found = []
        for table in (self.log_ratio, self.log_pool):
            values = table[rows]
            found += [
                values.mean(axis=1),
                values.std(axis=1),
                values.min(axis=1),
                values.max(axis=1),
                np.median(values, axis=1),
            ]
        return np.stack(found, axis=1)

    def _rows(self, windows: np.ndarray) -> np.ndarray:
        from metagrad_filter.scorer.features import ngram_rows

        return ngram_rows(windows, bits=self.BITS, hash_seed=1)

    def _log_frequencies(self, windows: np.ndarray) -> np.ndarray:
        counts = np.bincount(self._rows(windows).ravel(), minlength=1 << self.BITS)
        return np.log((counts + 0.5) / (counts.sum() + 0.5 * len(counts))).astype(np.float32)


def _fit_statistics(target, windows, labels) -> Predict:
    """The linear scorer's score and the models' statistics, squares included, in a ridge."""
    from bench.worlds import VOCAB
    from metagrad_filter.scorer.fit import fit_scorer

    half = len(windows) // 2
    # Fitted on one half each, for a scorer's scores of its own windows are too good.
    models = _LanguageModels(target, windows)
    linear = fit_scorer(windows, labels, vocab_size=VOCAB)
    first = fit_scorer(windows[:half], labels[:half], vocab_size=VOCAB)

    def design(x: np.ndarray, scores: np.ndarray) -> np.ndarray:
        raw = np.concatenate([scores[:, None], models.statistics(x)], axis=1)
        return np.concatenate([raw, np.square(raw), np.ones((len(raw), 1))], axis=1)

    known = design(windows[half:], first.score(windows[half:]))
    scale = known.std(axis=0) + 1e-6
    known = known / scale
    solution = np.linalg.solve(
        known.T @ known + 10.0 * np.eye(known.shape[1]), known.T @ labels[half:]
    )
    return lambda x: (design(x, linear.score(x)) / scale) @ solution


def _fit_network(build, beside_linear: bool, windows, labels) -> Predict:
    """Trains a network on labels, or on what the linear scorer leaves; keeps its best epoch."""
    import jax
    import jax.numpy as jnp
    import optax

    from bench.worlds import VOCAB
    from metagrad_filter.scorer.fit import fit_scorer
    from metagrad_filter.statistics import rank_correlation

    rng = np.random.default_rng(0)
    order = rng.permutation(len(windows))
    choose, fit = order[: len(order) // 10], order[len(order) // 10 :]
    init, apply = build()
    linear = None
    if beside_linear:
        # Two folds, so that the network sees what a linear scorer leaves over on new windows.
        offset = np.empty(len(windows), np.float32)
        folds = np.array_split(order, 2)
        for here, there in (folds, folds[::-1]):
            offset[here] = fit_scorer(windows[there], labels[there], vocab_size=VOCAB).score(
                windows[here]
            )
        linear = fit_scorer(windows, labels, vocab_size=VOCAB)
    else:
        offset = np.zeros(len(windows), np.float32)
    steps = len(fit) // TRAINING_BATCH
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, EPOCHS * steps), weight_decay=0.05)

    def loss(params, x, y):
        return jnp.mean(jnp.square(apply(params, x) - y))

    @jax.jit
    def epoch(params, state, xs, ys):
        def step(carry, batch):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, *batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), (xs, ys))[0]

    forward = jax.jit(lambda params, xs: jax.lax.map(lambda x: apply(params, x), xs))

    def predict(params, x):
        count = -(-len(x) // 128)
        index = np.minimum(np.arange(count * 128), len(x) - 1)
        out = np.asarray(forward(params, x[index].reshape(count, 128, -1)))
        out = out.ravel()[: len(x)]
        return out if linear is None else out + linear.score(x)

    params = init(jax.random.key(0))
    state = optimizer.init(params)
    best = (-2.0, params)
    residual = (labels - offset).astype(np.float32)
    for _ in range(EPOCHS):
        rows = rng.permutation(fit)[: steps * TRAINING_BATCH].reshape(steps, -1)
        params, state = epoch(params, state, windows[rows], residual[rows])
        out = np.asarray(
            forward(
                params,
                windows[choose[: len(choose) // 128 * 128]].reshape(-1, 128, windows.shape[1]),
            )
        ).ravel()
        known = choose[: len(out)]
        found = rank_correlation(out + offset[known], labels[known])
        best = max(best, (found, params), key=lambda b: b[0])
    return partial(predict, best[1])


def _mixer():
    """One mixing block: over tokens, then over channels, and a mean."""
    import jax
    import jax.numpy as jnp

    from bench.worlds import LENGTH, VOCAB

    def init(key):
        a, b, c, d, e, f = jax.random.split(key, 6)
        normal = jax.random.normal
        return {
            "embedding": normal(a, (VOCAB, WIDTH)),
            "tokens_up": normal(b, (LENGTH, HIDDEN)) * LENGTH**-0.5,
            "tokens_down": normal(c, (HIDDEN, LENGTH)) * HIDDEN**-0.5,
            "up": normal(d, (WIDTH, HIDDEN)) * WIDTH**-0.5,
            "down": normal(e, (HIDDEN, WIDTH)) * HIDDEN**-0.5,
            "out": normal(f, (WIDTH,)) * 0.0,
            "bias": jnp.zeros(()),
        }

    def apply(p, x):
        h = p["embedding"][x]
        mixed = jax.nn.gelu(jnp.einsum("btd,th->bhd", h, p["tokens_up"]))
        h = h + jnp.einsum("bhd,ht->btd", mixed, p["tokens_down"])
        h = h + jax.nn.gelu(h @ p["up"]) @ p["down"]
        return h.mean(axis=1) @ p["out"] + p["bias"]

    return init, apply


def _convolution():
    """Windows of three embeddings, mean and maximum over positions, and a hidden layer."""
    import jax
    import jax.numpy as jnp

    from bench.worlds import VOCAB

    def init(key):
        a, b, c, d = jax.random.split(key, 4)
        normal = jax.random.normal
        return {
            "embedding": normal(a, (VOCAB, WIDTH)),
            "kernel": normal(b, (3, WIDTH, HIDDEN)) * (3 * WIDTH) ** -0.5,
            "bias": jnp.zeros(HIDDEN),
            "hidden": normal(c, (2 * HIDDEN, HIDDEN)) * (2 * HIDDEN) ** -0.5,
            "out": normal(d, (HIDDEN,)) * 0.0,
            "shift": jnp.zeros(()),
        }

    def apply(p, x):
        h = p["embedding"][x]
        wide = sum(h[:, i : h.shape[1] - 2 + i] @ p["kernel"][i] for i in range(3))
        wide = jax.nn.gelu(wide + p["bias"])
        pooled = jnp.concatenate([wide.mean(axis=1), wide.max(axis=1)], axis=-1)
        return jax.nn.gelu(pooled @ p["hidden"]) @ p["out"] + p["shift"]

    return init, apply


def _mixer_work() -> int:
    return 2 * 65 * HIDDEN * WIDTH + 2 * 65 * WIDTH * HIDDEN


def _convolution_work() -> int:
    return 63 * 3 * WIDTH * HIDDEN + 2 * HIDDEN * HIDDEN


def _proxy_work(proxy) -> int:
    """Multiply-adds of a window's forward pass: kernels, attention products, logits."""
    config = proxy.loss.config
    d, t = config.n_embd, 64
    return t * (config.n_layer * (12 * d * d + 2 * t * d) + d * config.vocab_size)


def _microseconds(predict: Predict, windows: np.ndarray) -> float:
    """Median over seven turns, per window; on however many threads the scorer itself takes."""
    windows = windows[:4096]
    predict(windows)
    turns = []
    for _ in range(7):
        begun = time.perf_counter()
        predict(windows)
        turns.append(time.perf_counter() - begun)
    return float(np.median(turns) / len(windows) * 1e6)


def table(record: dict[str, Any]) -> str:
    """The curve and the scorers as Markdown."""
    head = "rank correlation | within class | recovered | within target (nats)"
    lines = [f"| linear, labels | {head} |", "|---:|---:|---:|---:|---:|"]
    lines += [f"| {row['labels']:,} | {_cells(row)} |" for row in record["curve"]]
    lines += ["", f"| scorer | {head} | us/window |", "|---|---:|---:|---:|---:|---:|"]
    rows = {**record["scorers"], "the labels themselves": record["labels_themselves"]}
    lines += [
        f"| {name} | {_cells(row)} | "
        f"{'' if 'microseconds' not in row else format(row['microseconds'], '.2f')} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> str:
    return (
        f"{row['rank_correlation']:.3f} | {row['within_class']:.3f} | "
        f"{row['recovered']:.3f} ± {row['standard_error']:.3f} | "
        f"{row['within_target']:+.4f} ± {row['within_target_error']:.4f}"
    )


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--table"]):
        sys.exit(f"bench.distillation: unknown arguments {arguments}; expected none or --table")
    if not arguments:
        write_record(RECORD, measure())
    text = table(json.loads(RECORD.read_text()))
    README.write_text(replaced(README.read_text(), "distillation-table", text))
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
