"""A run directory as a training run leaves it: versions, rounds, labels, a ledger and records.

Everything but the records is written by the package itself; the records are drawn from multinomial
distributions that drift from `drift_block` on, in the format that filters write.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from hotlane import make_scorer

import metagrad_filter as mgf
from metagrad_filter.blocks import FilterConfig
from metagrad_filter.calibration.gate import Difference, GateArm, GateResult, RunningArm, Starved
from metagrad_filter.calibration.reference import Agreement
from metagrad_filter.calibration.round import RoundReport
from metagrad_filter.calibration.validation import record_validation
from metagrad_filter.calibration.validity import ValidityCheck
from metagrad_filter.files import canonical_json
from metagrad_filter.labels import LabelStore, RoundLabels

BLOCK_WINDOWS, SWAP_EVERY, EVERY = 512, 16, 8
REFERENCE = np.linspace(-2.5, 2.5, 257).astype(np.float32).astype(float).tolist()


def make_record(
    index: int, version: int, *, shift: float = 0.0, seed: int = 0, **fields: Any
) -> dict[str, Any]:
    """Returns the record of blocks `8 index` to `8 index + 7`; `shift` tilts the score bins."""
    rng = np.random.default_rng([seed, index])
    windows, kept = EVERY * BLOCK_WINDOWS, EVERY * BLOCK_WINDOWS // 4
    share = np.exp(shift * np.linspace(-1, 1, 64))
    bins = rng.multinomial(windows, share / share.sum())
    above = np.cumsum(bins[::-1])[::-1]
    kept_bins = np.clip(kept - (above - bins), 0, bins)
    web = int(rng.integers(2400, 2600))
    score = {
        "count": windows,
        "mean": shift + float(rng.normal(0, 0.01)),
        "m2": float(windows),
        "minimum": -3.0,
        "maximum": 3.0,
        "bins": bins.tolist(),
        "kept_bins": kept_bins.tolist(),
    }
    threshold = 0.67 + shift + float(rng.normal(0, 0.02))
    limits = {"mean": threshold, "minimum": threshold - 0.15, "maximum": threshold + 0.12}
    return {
        "format": 1,
        "name": "train",
        "session": "host-1-1",
        "sequence": index,
        "first_block": EVERY * index,
        "last_block": EVERY * index + EVERY - 1,
        "blocks": EVERY,
        "version": version,
        "windows": windows,
        "kept": kept,
        "uniform_blocks": 0 if version else EVERY,
        "seconds": windows * 2.1e-6 * float(rng.uniform(0.9, 1.2)),
        "time": 1.8e9 + 40.0 * index,
        "scores": score if version else None,
        "threshold": limits if version else None,
        "groups": {
            "source": {
                "web": [web, kept * 2 // 5],
                "books": [3200 - web, kept // 2],
                "code": [windows - 3200, kept - kept * 2 // 5 - kept // 2],
            }
        },
        "features": {"length": {"count": windows, "mean": 250.0 + index / 9, "m2": 9e5}},
        **fields,
    }


def gate(chosen: float) -> GateResult:
    arms = (GateArm(1.5, 0.0123, 0.0031, better=True), GateArm(math.inf, 0.0214, 0.0052))
    if chosen < math.inf:
        starved = Starved("books", 0.2, 0.001)
        return GateResult((arms[0], replace(arms[1], starved=starved)), chosen, pairs=3, bar=4.3)
    running = RunningArm(1, 1.5, Difference(0.011, 0.004), Difference(0.0104, 0.003))
    return GateResult(arms, chosen, running, pairs=3, bar=4.3)


def write_records(run_dir: Path, records: list[dict[str, Any]], name: str = "train") -> Path:
    path = run_dir / "metrics" / name / "host-1-1.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(canonical_json(record) + b"\n" for record in records))
    return path


def make_run(run_dir: Path, *, records: int = 48, drift_from: int = 40) -> Path:
    """Writes a run with two versions, a failed round and a drift of scores near its end."""
    # psi is raised and stands; ks was raised and cleared.
    ends = EVERY * records - 1
    registry, rng = mgf.Registry(run_dir), np.random.default_rng(0)
    config = FilterConfig(
        run_dir=str(run_dir),
        keep_ratio=0.25,  # pyright: ignore[reportArgumentType]
        windows=mgf.TextWindows("tokens"),
        block_windows=BLOCK_WINDOWS,
        swap_every_blocks=SWAP_EVERY,
        name="train",
    )
    config.bind()
    (run_dir / "rounds").mkdir()
    for number, chosen in ((1, 1.5), (2, math.inf)):
        judged = gate(chosen)
        metadata = {
            "round": number,
            "form": "linear",
            "labels": 4096,
            "reliability": 0.9 + number / 100,
            "rank_correlation": 0.61 + number / 20,
            "reference": REFERENCE,
            "gate": judged.to_json(),
            "live_step": 500 * number,
        }
        registry.publish(make_scorer(number, strength=chosen), metadata)
        halves = rng.normal(size=(2, 32)).astype(np.float32)
        LabelStore(run_dir).append(number, RoundLabels(np.zeros((32, 8), np.int32), halves))
        _report(run_dir, number, judged, 0.9 + number / 100, version=number, reason="published")
    reason = "unreliable: split-half correlation 0.31 is below 0.5; raise trajectories"
    registry.reject(None, "unreliable", {"round": 3, "reliability": 0.31})
    _report(run_dir, 3, None, 0.31, version=None, reason=reason)
    ledger, total = mgf.Ledger(run_dir, "train"), []
    for index in range(records):
        version = 0 if index < records // 8 else 1 if index < records // 2 else 2
        interval = EVERY * index // SWAP_EVERY
        version = ledger.decide(
            interval, version, registry.manifest(version)["sha256"] if version else ""
        )
        shift = 0.6 if index >= drift_from else 0.0
        total.append(make_record(index, version, shift=shift))
    write_records(run_dir, total)
    write_alarms(
        run_dir,
        [
            make_alarm("ks", EVERY * 10, "raised", version=1),
            make_alarm("ks", EVERY * 12, "cleared", version=1),
            make_alarm("psi", ends, "raised"),
        ],
    )
    for step in range(0, 1600, 100):
        record_validation(run_dir, step, 4.0 - 0.1 * math.log(1 + step))
    cluster = {"name": "cluster 0", "share": 0.4, "predicted": 0.3, "effect": 0.0102}
    check = ValidityCheck(
        "lds", "metagradient", 96, 0.92, 0.71, low=0.6, high=0.8, ceiling=0.9,
        sign_agreement=0.75, classes=[cluster | {"standard_error": 0.002}], live_step=500,
    )  # fmt: skip
    (run_dir / "rounds" / "check-000001.json").write_text(json.dumps(check.to_json()))
    return run_dir


def make_alarm(kind: str, block: int, state: str, version: int = 2, **fields: Any):
    """Returns an alarm as the calibrating process writes it."""
    found = {"format": 1, "filter": "train", "kind": kind, "block": block, "state": state}
    return found | {"value": 0.05, "limit": 0.011, "version": version, "time": 1.8e9} | fields


def write_alarms(run_dir: Path, alarms: list[dict[str, Any]]) -> Path:
    path = run_dir / "monitor" / "alarms.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(canonical_json(alarm) + b"\n" for alarm in alarms))
    return path


def _report(run_dir: Path, number: int, judged: GateResult | None, reliability: float, **fields):
    report = RoundReport(
        number,
        **fields,
        reliability=reliability,
        rank_correlation=0.66 if judged else None,
        form="linear" if judged else None,
        labels=4096 if judged else 0,
        gate=judged,
        live_step=500 * number,
        agreement=Agreement(0.5 + number / 20, 0.45 + number / 20, 0.55 + number / 20, number, 256),
        horizon=96,
        learning_rate_scale=0.1,
        gradients={"labels": 1000.0, "fit": 0.0, "gate": 500.0},
        seconds={"trajectories": 61.2, "labels": 20.4, "fit": 3.1, "gate": 12.0},
    )
    path = run_dir / "rounds" / f"round-{number:06d}.json"
    path.write_text(json.dumps(report.to_json()))
