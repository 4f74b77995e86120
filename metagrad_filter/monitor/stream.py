"""Records of block statistics as series over the stream: ratio, scores, drift, groups, cost.

    stream_view(records, references) -> {"series": ..., "histogram": ..., "groups": ..., ...}

A record says what one process saw over some blocks: counts, score moments, and a histogram between
the 64 quantiles of the version's reference. PSI and binned KS compare that histogram with equal
shares, the Wasserstein distance says how far the scores moved, in units of the score. Their limits
are null quantiles, not rules of thumb: the reference is itself a sample, of `m` windows, so
`1/n + 1/m` stands where a known distribution would have `1/n`.

Input: records of `records.py`. Output: JSON types. Cost: about 0.1 ms a record.

References:
  PSI under no change: Yurdakul, "Statistical Properties of Population Stability Index" (2018):
    `(1/n + 1/m)` times a chi-squared variable of K - 1 degrees of freedom.
  KS: Smirnov's limit for two samples, `sqrt(-log(alpha / 2) / 2 * (1/n + 1/m))`; binning makes it
    smaller, so the limit is conservative.
  Wasserstein: simulated (`drift.wasserstein_limit`) once a version, for other numbers of windows
    scaled by the root of `1/n + 1/m`, as the distance of the null is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
from scipy.stats import chi2

from metagrad_filter.blockstats import bin_edges
from metagrad_filter.errors import MetagradFilterError
from metagrad_filter.monitor.drift import ks, psi, wasserstein, wasserstein_limit
from metagrad_filter.monitor.records import BINS, Record, is_count, items, number
from metagrad_filter.monitor.sketch import ScoreSketch

MAX_POINTS = 2000

_REFERENCE_WINDOWS = 4096
_ALPHA = 0.001
_RARE = 0.002  # the rarest distance that is simulated
_SIMULATED_WINDOWS = 4096
_DRAWN_LABELS = 6
_NEWEST_WINDOWS = 32768
_DRIFT = ("psi", "psi_limit", "ks", "ks_limit", "wasserstein", "wasserstein_limit")


def stream_view(
    records: Sequence[Record],
    references: Mapping[int, Mapping[str, Any]],
    target_ratio: float | None = None,
) -> dict[str, Any]:
    """Makes the series and totals of one filter.

    Args:
      records: in the order of the stream, see `read_records`.
      references: metadata by version: `reference` (257 quantiles) and `labels` (their sample).
      target_ratio: what is to be kept, in (0, 1], or None where that is not known.

    Returns:
      `series`: columns of equal length, None where unknown: `block` (last one), `version`,
      `windows`, `kept_ratio`, `score_mean`, `threshold_mean`, `threshold_min`, `threshold_max`,
      `psi`, `psi_limit`, `ks`, `ks_limit`, `wasserstein`, `wasserstein_limit`, `us_per_window`.
      Besides: `records`, `windows`, `kept`, `kept_ratio`, `seconds` of scoring, `score_bins` (64
      counts of all scored windows by level in their version's reference), `version` that acts at
      the end and its `age_blocks` and `age_seconds`, `swaps`, `histogram` of the newest records,
      `threshold` that the ratio implies, `groups` and `features`.
    """
    parts = _parts(records)
    points = [_point(part, references) for part in parts]
    swaps: list[dict[str, int]] = []
    # A block of which all or none are kept asks no version (-1): that is no change of version.
    asked = [part for part in parts if part[0]["version"] >= 0]
    for part in asked:
        if not swaps or part[0]["version"] != swaps[-1]["version"]:
            swaps.append({"block": part[0]["first_block"], "version": part[0]["version"]})
    windows = sum(r["windows"] for r in records)
    kept = sum(r["kept"] for r in records)
    version, age, seconds = None, None, None
    if swaps:
        version = swaps[-1]["version"]
        age = max(r["last_block"] for r in records) + 1 - swaps[-1]["block"]
        times = [t for r in records if r["version"] == version if (t := number(r.get("time")))]
        seconds = max(times) - min(times) if times else None
    bins = _bins(records, "bins")
    histogram = _histogram(records, version, references)
    return {
        "records": len(records),
        "windows": windows,
        "kept": kept,
        "kept_ratio": kept / windows if windows else None,
        "seconds": _total(records, lambda r: number(r.get("seconds"))),
        "score_bins": None if bins is None else bins.tolist(),
        "version": version,
        "age_blocks": age,
        "age_seconds": seconds,
        "swaps": swaps[-MAX_POINTS:],
        "series": {name: [p[name] for p in points] for name in (points[0] if points else ())},
        "histogram": histogram,
        "threshold": _implied(points, histogram, target_ratio),
        "groups": _groups(records, parts),
        "features": _features(records, parts),
    }


def limits(windows: int, reference_windows: float, bins: int = BINS) -> tuple[float, float]:
    """What PSI and KS exceed once in a thousand times without any change.

    Args:
      windows: in the histogram.
      reference_windows: behind the quantiles; `inf` where they are known exactly.
      bins: of the histogram.
    """
    scale = 1 / max(windows, 1) + 1 / reference_windows
    return scale * float(chi2.isf(_ALPHA, bins - 1)), math.sqrt(-math.log(_ALPHA / 2) / 2 * scale)


def reference_size(metadata: Mapping[str, Any] | None) -> float:
    """Windows behind a version's reference quantiles; 4096 where the version does not say."""
    windows = (metadata or {}).get("reference_windows")
    return windows if type(windows) is int and windows >= 1 else _REFERENCE_WINDOWS


def _distance(
    part: Iterable[Record], version: int, references: Mapping[int, Mapping[str, Any]]
) -> tuple[float | None, float | None]:
    """Wasserstein distance of a part's scores from their reference, and its limit."""
    metadata = references.get(version) or {}
    reference = metadata.get("reference")
    if not isinstance(reference, list) or bin_edges(reference) is None:
        return None, None
    sketch = ScoreSketch()
    for record in part:
        try:
            found = ScoreSketch.from_record(record)
            sketch = sketch if found is None else sketch + found
        except (MetagradFilterError, KeyError, TypeError):
            return None, None  # moments that do not belong to the counts
    if not sketch.count:
        return None, None
    m = reference_size(metadata)
    values = tuple(float(v) for v in reference)
    value = wasserstein(sketch, values)
    limit = _simulated(values, m)
    scale = (1 / sketch.count + 1 / m) / (1 / _SIMULATED_WINDOWS + 1 / m)
    return value, None if limit is None else limit * math.sqrt(scale)


@lru_cache(maxsize=256)
def _simulated(reference: tuple[float, ...], windows: float) -> float | None:
    if windows < 2 * BINS:
        return None
    return wasserstein_limit(_SIMULATED_WINDOWS, reference, reference=int(windows), level=_RARE)


def _implied(
    points: Sequence[Mapping[str, Any]],
    histogram: Mapping[str, Any] | None,
    target: float | None,
) -> dict[str, Any]:
    """Score above which the target's share lies: of the reference, of the newest windows, kept."""
    realised = next(
        (p["threshold_mean"] for p in reversed(points) if p["threshold_mean"] is not None), None
    )
    found: dict[str, Any] = {"realised": realised, "reference": None, "newest": None}
    edges = (histogram or {}).get("edges")
    if histogram is None or edges is None or target is None:
        return found
    level = 1 - target
    found["reference"] = float(np.interp(level, np.linspace(0, 1, len(edges)), edges))
    levels = np.concatenate([[0], np.cumsum(histogram["bins"])]) / histogram["windows"]
    found["newest"] = float(np.interp(level, levels, edges))
    return found


def _parts(records: Sequence[Record]) -> list[list[Record]]:
    """Records that make one point: those of the same blocks, then neighbours of one version."""
    same = [list(g) for _, g in groupby(records, key=lambda r: (r["first_block"], r["version"]))]
    size = -(-len(same) // MAX_POINTS) if same else 1
    parts: list[list[Record]] = []
    filled = size
    for group in same:
        if filled >= size or parts[-1][0]["version"] != group[0]["version"]:
            parts.append([])
            filled = 0
        parts[-1] += group
        filled += 1
    # Only a stream whose version changes at every record has more; the newest are shown.
    return parts[-MAX_POINTS:]


def _point(part: list[Record], references: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    version = part[0]["version"]
    windows = sum(r["windows"] for r in part)
    bins = _bins(part, "bins")
    count = 0 if bins is None else int(bins.sum())
    found: dict[str, Any] = dict.fromkeys(_DRIFT)
    if bins is not None and count:
        found["psi"], found["ks"] = psi(bins), ks(bins)
        found["psi_limit"], found["ks_limit"] = limits(
            count, reference_size(references.get(version))
        )
        found["wasserstein"], found["wasserstein_limit"] = _distance(part, version, references)
    seconds = _total(part, lambda r: number(r.get("seconds")))
    return {
        "block": max(r["last_block"] for r in part),
        "version": version,
        "windows": windows,
        "kept_ratio": sum(r["kept"] for r in part) / windows if windows else None,
        "score_mean": _mean((r.get("scores"), "count") for r in part),
        "threshold_mean": _mean((_threshold(r), "blocks") for r in part),
        "threshold_min": _extreme(min, part, "minimum"),
        "threshold_max": _extreme(max, part, "maximum"),
        **found,
        "us_per_window": 1e6 * seconds / windows if windows and seconds is not None else None,
    }


def _histogram(
    records: Sequence[Record], version: int | None, references: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any] | None:
    newest: list[Record] = []
    count = 0
    for record in reversed(records):
        if record["version"] != version or count >= _NEWEST_WINDOWS:
            break
        newest.append(record)
        count += record["windows"]
    bins, kept = _bins(newest, "bins"), _bins(newest, "kept_bins")
    if bins is None or not bins.sum():
        return None
    reference = (references.get(version) or {}).get("reference") if version else None
    edges = None
    if isinstance(reference, list) and len(reference) == 4 * BINS + 1:
        edges = reference[::4]
    return {
        "version": version,
        "windows": int(bins.sum()),
        "first_block": min(r["first_block"] for r in newest),
        "last_block": max(r["last_block"] for r in newest),
        "bins": bins.tolist(),
        "kept_bins": None if kept is None else kept.tolist(),
        "edges": edges,
    }


def _groups(records: Sequence[Record], parts: list[list[Record]]) -> dict[str, Any]:
    totals = _group_counts(records)
    counts = [_group_counts(part) for part in parts]
    return {
        key: [
            {
                "label": label,
                "seen": seen,
                "kept": kept,
                "share": [_share(part, key, label) for part in counts]
                if place < _DRAWN_LABELS
                else None,
            }
            for place, (label, (seen, kept)) in enumerate(
                sorted(labels.items(), key=lambda item: (-item[1][0], item[0]))
            )
        ]
        for key, labels in sorted(totals.items())
    }


def _group_counts(records: Iterable[Record]) -> dict[str, dict[str, list[int]]]:
    totals: dict[str, dict[str, list[int]]] = {}
    for record in records:
        for key, labels in items(record.get("groups")):
            for label, counts in items(labels):
                if isinstance(counts, list) and len(counts) == 2 and all(map(is_count, counts)):
                    total = totals.setdefault(key, {}).setdefault(label, [0, 0])
                    total[0] += counts[0]
                    total[1] += counts[1]
    return totals


def _share(counts: dict[str, dict[str, list[int]]], key: str, label: str) -> float | None:
    seen, kept = counts.get(key, {}).get(label, (0, 0))
    return kept / seen if seen else None


def _features(records: Sequence[Record], parts: list[list[Record]]) -> dict[str, Any]:
    names = sorted({name for r in records for name, _ in items(r.get("features"))})
    tenth = records[-max(len(records) // 10, 1) :]
    found = {}
    for name in names:
        count, mean, m2 = 0, 0.0, 0.0
        for moments in (_moments(r, name) for r in records):
            if moments:
                # Chan, Golub and LeVeque (1979): moments of a union from those of its parts.
                total = count + moments[0]
                delta = moments[1] - mean
                m2 += moments[2] + delta * delta * count * moments[0] / total
                mean += delta * moments[0] / total
                count = total
        if not count:
            continue
        deviation = math.sqrt(max(m2, 0.0) / count)
        newest = _mean((_feature(r, name), "count") for r in tenth)
        shift = None if newest is None or not deviation else (newest - mean) / deviation
        found[name] = {
            "count": count,
            "mean": mean,
            "deviation": deviation,
            "newest_mean": newest,
            "shift": shift,
            "series": [_mean((_feature(r, name), "count") for r in part) for part in parts],
        }
    return found


def _feature(record: Record, name: str) -> Any:
    return dict(items(record.get("features"))).get(name)


def _moments(record: Record, name: str) -> tuple[int, float, float] | None:
    value = _feature(record, name)
    if not isinstance(value, dict) or not is_count(value.get("count")) or not value["count"]:
        return None
    mean, m2 = number(value.get("mean")), number(value.get("m2"))
    return None if mean is None or m2 is None else (value["count"], mean, m2)


def _threshold(record: Record) -> Any:
    threshold = record.get("threshold")
    return threshold | {"blocks": record["blocks"]} if isinstance(threshold, dict) else None


def _bins(records: Iterable[Record], name: str) -> np.ndarray | None:
    found = [
        scores[name]
        for r in records
        if isinstance(scores := r.get("scores"), dict) and scores.get(name) is not None
    ]
    return np.sum(np.asarray(found, np.int64), axis=0) if found else None


def _mean(parts: Iterable[tuple[Any, str]]) -> float | None:
    """Mean of `mean` over dictionaries, weighted by the field that is named beside each."""
    weight, total = 0, 0.0
    for value, field in parts:
        if isinstance(value, dict) and (mean := number(value.get("mean"))) is not None:
            count = value.get(field)
            if isinstance(count, int) and is_count(count):
                weight += count
                total += count * mean
    return total / weight if weight else None


def _extreme(which: Callable[..., float], part: list[Record], field: str) -> float | None:
    values = [
        value
        for r in part
        if isinstance(threshold := r.get("threshold"), dict)
        if (value := number(threshold.get(field))) is not None
    ]
    return which(values) if values else None


def _total(part: Sequence[Record], get: Callable[[Record], float | None]) -> float | None:
    values = [value for r in part if (value := get(r)) is not None]
    return sum(values) if values else None
