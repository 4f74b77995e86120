"""Everything the monitor's page shows of a run, as JSON types.

    run_view(run_dir) -> {"versions", "rejected", "rounds", "checks", "cost", "filters": {...},
                          "examples", "problems"}

Only reads, and only what a run stores anyway: registry, ledgers, round reports, checks, alarms and
the records of block statistics under `metrics/<name>/`. Parts that are missing are empty, parts
that are damaged are named in `problems`, and everything else is shown all the same. A series over
the stream has at most 2,000 points: neighbouring records are added up, so counts and histograms
stay exact. Windows are shown only where `examples` is asked for.

Cost: one read of the stored JSON (at most 64 MiB of records a filter, the newest), and with
`verify` one load per version. Read next: `page.py`, `server.py`, `stream.py`, `records.py`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from metagrad_filter.calibration.validation import read_validation
from metagrad_filter.errors import ConfigError, MetagradFilterError, ScorerRejected
from metagrad_filter.ledger import FOLDER as LEDGERS
from metagrad_filter.ledger import Ledger, is_name
from metagrad_filter.monitor.records import ALARMS, items, number, read_alarms, read_records
from metagrad_filter.monitor.stream import MAX_POINTS, stream_view
from metagrad_filter.monitor.words import alarm_text, verdict
from metagrad_filter.registry import FOLDER as REGISTRY
from metagrad_filter.registry import Registry
from metagrad_filter.store import LocalStore, Store, is_key, open_store

METRICS = "metrics"
ROUNDS = "rounds"
FORMAT = 1

_MAX_DOCUMENT_BYTES = 16 * 2**20
_MAX_TEXT = 2000
_MAX_DEPTH = 12
_FROM_METADATA = ("round", "form", "labels", "reliability", "rank_correlation", "live_step")
_FROM_ROUND = (
    *_FROM_METADATA,
    *("version", "reason", "strength", "started_from", "seconds", "estimator", "horizon"),
    *("learning_rate_scale", "gradients"),
)
_AGREEMENT = ("rho", "low", "high", "version", "windows", "reliability")
_ARM = (
    *("strength", "gain", "standard_error", "better", "broken_guard", "starved"),
    *("running", "version", "lead", "harmful"),
)
_GATE = ("pairs", "bar")
_SHOWN_ALARMS = 200
_SHOWN_CHECKS = 50
_READ_FAILURES = 100


def run_view(
    run_dir: str | os.PathLike[str] | Store,
    *,
    verify: bool = True,
    examples: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None,
) -> dict[str, Any]:
    """Reads what a run has stored and returns what the page shows of it.

    Args:
      run_dir: a directory, a URL (see `open_store`), or a store.
      verify: load every version to see whether it is intact, not only its manifest.
      examples: makes windows to show of the view, see `examples.Examples`; None shows none.

    Returns:
      JSON types, every number finite: `run` (its place), whether it is `watched` by a drift
      monitor, `versions`, `rejected` candidates,
      `rounds` and `checks`, oldest first; live `validation` losses; `cost` of calibration in window
      gradients, and its share of training's; `filters` by name, each with `config`, ledger
      `intervals`, `alarms` and what `stream_view` makes of its records; `examples`, None unless
      asked for; `problems`, a sentence for each part that cannot be read.

    Raises:
      ConfigError: there is no such directory, or the URL is not one of a store.
    """
    store = open_store(run_dir)
    if isinstance(store, LocalStore) and not store.directory.is_dir():
        raise ConfigError(
            f"run_dir is {str(store.directory)!r}, which is not a directory; pass the one that "
            "score_filter and Calibrator were given."
        )
    problems: list[str] = []
    versions, references = _versions(store, verify, problems)
    alarms, damaged = _reading(problems, lambda: read_alarms(store), ([], 0))
    if damaged:
        lines = "line is" if damaged == 1 else "lines are"
        problems.append(f"{ALARMS}: {damaged} {lines} no complete alarm and left out.")
    view = {
        "format": FORMAT,
        "run": str(store.describe()),
        "versions": versions,
        "rejected": [
            _rejected(d) for d in _documents(store, REGISTRY, r"rejected-(\d+)\.json", problems)
        ],
        "rounds": [_round(d) for d in _documents(store, ROUNDS, r"round-(\d+)\.json", problems)],
        "watched": bool(_reading(problems, lambda: store.names(ALARMS.partition("/")[0]), [])),
        **_failures(store),
        "checks": _checks(store, problems),
        "validation": _validation(store, problems),
        "filters": {
            name: _filter(
                store, name, references, [a for a in alarms if a["filter"] == name], problems
            )
            for name in _filters(store, problems)
        },
        "examples": None,
        "problems": problems,
    }
    view["cost"] = _cost(view["rounds"], view["filters"].values())
    if examples is not None:
        view["examples"] = _reading(problems, lambda: examples(view), None)
    return plain(view)


def plain(value: Any, depth: int = 0) -> Any:
    """Returns JSON types only: no NaN or infinity, no long text, no deep nesting."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        # A lone surrogate survives JSON but not UTF-8.
        text = value.encode(errors="replace").decode()
        return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "\u2026"
    if depth < _MAX_DEPTH and isinstance(value, dict):
        return {str(plain(str(key))): plain(v, depth + 1) for key, v in value.items()}
    if depth < _MAX_DEPTH and isinstance(value, list | tuple):
        return [plain(v, depth + 1) for v in value]
    return plain(str(value))


def _versions(
    store: Store, verify: bool, problems: list[str]
) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """The versions, and what their scores are compared with: reference quantiles and labels."""
    registry = Registry(store)
    versions, references = [], {}
    for version in _reading(problems, registry.versions, []):
        try:
            manifest = registry.manifest(version)
            if verify:
                registry.load(version)
        except ScorerRejected as error:
            versions.append({"version": version, "state": f"refused ({error.reason})"})
            problems.append(f"Version {version}: {error}")
            continue
        metadata = manifest.get("metadata")
        metadata = metadata if isinstance(metadata, dict) else {}
        references[version] = metadata
        versions.append(
            {"version": version, "state": "ok", "strength": manifest.get("strength")}
            | {name: metadata.get(name) for name in _FROM_METADATA}
            | {"gate": _gate(metadata.get("gate")), "has_reference": "reference" in metadata}
            | {name: metadata.get(name) for name in ("fallback", "fallback_step")}
        )
    return versions, references


def _rejected(document: dict[str, Any]) -> dict[str, Any]:
    metadata = document.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    return {
        "reason": document.get("reason"),
        "verdict": verdict(document.get("reason")),
        "detail": metadata.get("detail"),
        **{name: metadata.get(name) for name in _FROM_METADATA},
        "gate": _gate(metadata.get("gate")),
    }


def _gate(gate: Any) -> dict[str, Any] | None:
    if not isinstance(gate, dict):
        return None
    arms = gate.get("arms")
    return {
        "chosen": gate.get("chosen"),
        "arms": [
            {name: arm[name] for name in _ARM if name in arm}
            for arm in (arms if isinstance(arms, list) else [])
            if isinstance(arm, dict)
        ],
        **{name: gate[name] for name in _GATE if name in gate},
    }


def _round(document: dict[str, Any]) -> dict[str, Any]:
    found = {name: document.get(name) for name in _FROM_ROUND}
    agreement = document.get("agreement")
    agreement = agreement if isinstance(agreement, dict) else None
    return found | {
        "agreement": agreement and {name: agreement.get(name) for name in _AGREEMENT},
        "gate": _gate(document.get("gate")),
        "verdict": verdict(found["reason"]),
    }


def _failures(store: Store) -> dict[str, int]:
    """Rounds that ended in an error, and those of them whose version could not be published."""
    names = _names(store, ROUNDS, r"failed-(\d+)\.json", [])
    newest = [_document(store, f"{ROUNDS}/{name}", []) for name in names[-_READ_FAILURES:]]
    unpublished = sum(d is not None and d.get("error") == "PublishFailed" for d in newest)
    return {"failed_rounds": len(names), "publish_failures": unpublished}


def _checks(store: Store, problems: list[str]) -> list[dict[str, Any]]:
    found = []
    for name in _names(store, ROUNDS, r"check-([A-Za-z0-9_-]{1,80})\.json", problems):
        document = _document(store, f"{ROUNDS}/{name}", problems)
        if document is not None:
            found.append({"name": name[6:-5]} | document)
    return found[-_SHOWN_CHECKS:]


def _validation(store: Store, problems: list[str]) -> dict[str, Any]:
    """Live validation losses that training recorded, the newest 2,000, and where they fell back."""
    steps, losses = [], []
    if isinstance(store, LocalStore):
        steps, losses = _reading(
            problems, lambda: read_validation(store.directory), (np.empty(0), np.empty(0))
        )
        steps, losses = steps[-MAX_POINTS:].tolist(), losses[-MAX_POINTS:].tolist()
    return {"steps": steps, "losses": losses}


def _cost(rounds: list[dict[str, Any]], filters: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Window gradients of calibration by stage, and their share of training's where known."""
    stages: dict[str, float] = {}
    counted = 0
    for entry in rounds:
        parts = [(name, number(value)) for name, value in items(entry["gradients"])]
        counted += any(value is not None for _, value in parts)
        for name, value in parts:
            stages[name] = stages.get(name, 0.0) + (value or 0.0)
    # Training takes one gradient for each window that any filter of the run keeps.
    trained = sum(entry["kept"] for entry in filters)
    total = sum(stages.values()) if counted else None
    return {
        "gradients": total,
        "stages": stages,
        "rounds": counted,
        "trained_windows": trained,
        "share": total / trained if total is not None and trained else None,
    }


def _alarms(found: list[dict[str, Any]]) -> dict[str, Any]:
    standing: dict[str, Any] = {}
    for alarm in found:
        standing.pop(alarm["kind"], None)
        if alarm["state"] == "raised":
            standing[alarm["kind"]] = alarm
    return {
        "count": len(found),
        "events": [_alarm(alarm) for alarm in found[-_SHOWN_ALARMS:]],
        "standing": [_alarm(alarm) for alarm in standing.values()],
    }


def _alarm(alarm: dict[str, Any]) -> dict[str, Any]:
    names = ("kind", "block", "value", "limit", "state", "version", "time")
    return {name: alarm.get(name) for name in names} | {"text": alarm_text(alarm)}


def _filters(store: Store, problems: list[str]) -> list[str]:
    found: set[str] = set()
    for folder in (LEDGERS, METRICS):
        found.update(_reading(problems, lambda f=folder: store.names(f), []))
    return sorted(filter(is_name, found))


def _filter(
    store: Store,
    name: str,
    references: dict[int, dict[str, Any]],
    alarms: list[dict[str, Any]],
    problems: list[str],
) -> dict[str, Any]:
    config = _document(store, f"{LEDGERS}/{name}/filter.json", [])
    entries = _reading(problems, Ledger(store, name).entries, {})
    intervals: list[dict[str, int]] = []
    for interval, entry in entries.items():
        last = intervals[-1] if intervals else None
        if last and last["version"] == entry.version and last["last"] == interval - 1:
            last["last"] = interval
        else:
            intervals.append({"first": interval, "last": interval, "version": entry.version})
    records, damaged = _reading(problems, lambda: read_records(store, f"{METRICS}/{name}"), ([], 0))
    if damaged:
        lines = "line is" if damaged == 1 else "lines are"
        problems.append(f"Filter {name}: {damaged} {lines} no complete record and left out.")
    target = _ratio(config.get("keep_ratio")) if config else None
    return {
        "config": config,
        "target_ratio": target,
        "intervals": intervals,
        "alarms": _alarms(alarms),
        **stream_view(records, references, target),
    }


def _ratio(value: Any) -> float | None:
    try:
        ratio = float(Fraction(value))
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return ratio if 0 < ratio <= 1 else None


def _documents(
    store: Store, folder: str, pattern: str, problems: list[str]
) -> Iterator[dict[str, Any]]:
    for name in _names(store, folder, pattern, problems):
        document = _document(store, f"{folder}/{name}", problems)
        if document is not None:
            yield document


def _names(store: Store, folder: str, pattern: str, problems: list[str]) -> list[str]:
    """Names of a folder that match, in the order of the number that the pattern's group is."""
    names = _reading(problems, lambda: store.names(folder), [])
    found = [(m[1], n) for n in names if is_key(n) and (m := re.fullmatch(pattern, n))]
    return [n for _, n in sorted(found, key=lambda f: (int(f[0]) if f[0].isdecimal() else 0, *f))]


def _document(store: Store, key: str, problems: list[str]) -> dict[str, Any] | None:
    try:
        document = json.loads(store.read(key, _MAX_DOCUMENT_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{key} cannot be read: {error}")
        return None
    if not isinstance(document, dict):
        problems.append(f"{key} is not a JSON object.")
        return None
    return document


def _reading(problems: list[str], read: Any, otherwise: Any) -> Any:
    """What `read` returns, or a problem in words and `otherwise`."""
    try:
        return read()
    except NotADirectoryError:
        # A file that lies beside the folders of the filters.
        return otherwise
    except (OSError, MetagradFilterError) as error:
        problems.append(str(error))
        return otherwise
