"""The record of stability: how long an inner loop may be before its metagradients stop being right.

python -m bench.stability            run, store after every point, print the table
python -m bench.stability --table    print the table of the stored record

The demo's own model, text and base training (`metagrad_filter.demo`, fewer steps), in float32. Two
bases: annealed to the demo's live rate, and in the stable phase, at a constant 4e-3. For each inner
learning rate and horizon T, Spearman's rho between the adjoint's scores and central differences of
retraining (`check_metagradients`), over windows spread evenly over the ranks of the scores. Points
are measured in the order of `HORIZONS`, T=96 first, until `BUDGET_SECONDS` are spent.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.record import environment, write_record

RECORD = Path(__file__).parent / "records" / "stability.json"

BASE_STEPS = 600
STABLE_RATE = 4e-3
HORIZONS = (96, 48, 16, 144, 256)
ENTRIES, EPSILON = 12, 1.0
TARGET = 0.99
BUDGET_SECONDS = 3600.0


def measure() -> dict[str, Any]:
    """Measures point by point; JSON types only. The record on disk grows with every point."""
    import jax

    from metagrad_filter.demo.config import DemoConfig
    from metagrad_filter.demo.data import build_world
    from metagrad_filter.demo.run import _Parts, _train_base
    from metagrad_filter.targets import HeldOutLoss

    started = time.monotonic()
    config = replace(DemoConfig(), base_steps=BASE_STEPS)
    world = build_world(
        length=config.window_tokens,
        vocab_size=config.vocab_size,
        seed=config.seed,
        limit_documents=config.limit_documents,
    )
    parts = _Parts(world, config)
    target = HeldOutLoss(parts.target)
    live = config.learning_rate
    arms = {
        "annealed": (config, [live, live * config.calibration.learning_rate_scales[0]]),
        "stable": (replace(config, learning_rate=STABLE_RATE), [4e-3, 1e-3, 4e-4]),
    }
    record: dict[str, Any] = {
        "points": [],
        "bases": {},
        "config": {
            "base_steps": BASE_STEPS,
            "batch_windows": config.batch_windows,
            "window_tokens": config.window_tokens,
            "entries": ENTRIES,
            "epsilon": EPSILON,
            "horizons": list(HORIZONS),
            "seed": config.seed,
            "dtype": "float32",
            "target_windows": len(target.target_windows),
            "peak_learning_rate": config.peak_learning_rate,
        },
        "environment": environment(),
    }
    proxies = {}
    for name, (settings, _) in arms.items():
        _say(f"base: {name}")
        proxies[name] = proxy = _train_base(
            parts.base, world.vocab_size, settings, lambda *stage: None
        )
        outer = target.outer(proxy.loss)
        record["bases"][name] = {
            "learning_rate": settings.learning_rate,
            "loss": float(jax.jit(outer)(proxy.params)),
            "parameters": sum(int(x.size) for x in jax.tree.leaves(proxy.params)),
        }
    for horizon in HORIZONS:
        for name, (settings, rates) in arms.items():
            for rate in rates:
                if time.monotonic() - started > BUDGET_SECONDS:
                    return record
                point = _point(proxies[name], target, parts.stream, settings, horizon, rate)
                record["points"].append({"base": name, "inner_rate": rate, **point})
                record["seconds"] = round(time.monotonic() - started, 1)
                _store(record)
                _say(f"{name} {rate:g} T={horizon}: {point['rank_correlation']}")
    return record


def _point(proxy, target, stream, config, horizon: int, rate: float) -> dict[str, Any]:
    from metagrad_filter.errors import NonFiniteMetagradient
    from metagrad_filter.metagradient import check_metagradients
    from metagrad_filter.metagradient.optimizer import warm_state

    started = time.monotonic()
    optimizer = proxy.transformation(rate)
    shape = (horizon, config.batch_windows, config.window_tokens)
    point: dict[str, Any] = {"horizon": horizon, "detail": ""}
    try:
        found = check_metagradients(
            proxy.loss,
            target.outer(proxy.loss),
            proxy.params,
            warm_state(optimizer, proxy.params, proxy.opt_state),
            stream[: shape[0] * shape[1]].reshape(shape),
            optimizer=optimizer,
            entries=ENTRIES,
            epsilon=EPSILON,
            seed=config.seed,
        )
    except NonFiniteMetagradient as error:
        # An overflow is a finding of this bench, not a fault of it.
        return {**point, "rank_correlation": None, "detail": str(error)}
    return {
        **point,
        "rank_correlation": found.rank_correlation,
        "relative_error": found.relative_error,
        "sign_agreement": found.sign_agreement,
        "metasmoothness": found.metasmoothness,
        "adjoint": found.adjoint.tolist(),
        "differences": found.differences.tolist(),
        "seconds": round(time.monotonic() - started, 1),
    }


def table(record: dict[str, Any]) -> str:
    """Rank correlations by base, rate and horizon, each figure from the record."""
    points = {(p["base"], p["inner_rate"], p["horizon"]): p for p in record["points"]}
    arms = list(dict.fromkeys((base, rate) for base, rate, _ in points))
    horizons = sorted({horizon for *_, horizon in points})
    lines = [
        f"{'base':10}{'inner rate':>11}"
        + "".join(f"{f'T={horizon}':>9}" for horizon in horizons)
        + f"   largest T >= {TARGET}"
    ]
    for base, rate in arms:
        cells, largest = [], None
        for horizon in horizons:
            point = points.get((base, rate, horizon))
            value = None if point is None else point["rank_correlation"]
            missing = "-" if point is None else "overflow"
            cells.append(f"{missing if value is None else f'{value:.4f}':>9}")
            largest = horizon if value is not None and value >= TARGET else largest
        lines.append(f"{base:10}{rate:>11g}{''.join(cells)}   {largest or 'none'}")
    return "\n".join(lines)


def _store(record: dict[str, Any]) -> None:
    write_record(RECORD, record)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--table"]):
        sys.exit(f"bench.stability: unknown arguments {arguments}; expected none or --table")
    if not arguments:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        _store(measure())
    print(table(json.loads(RECORD.read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
