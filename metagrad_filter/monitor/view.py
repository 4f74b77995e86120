"""Everything the monitor's page shows of a run, as JSON types.

    run_view(run_dir) -> {"versions", "rejected", "rounds", "filters": {name: ...}, "problems"}

Only reads, and only what a run stores anyway: registry, ledgers, round reports and the records of
block statistics under `metrics/<name>/`. Parts that are missing are empty, parts that are damaged
are named in `problems`, and everything else is shown all the same. A series over the stream has at
most 2,000 points: neighbouring records are added up, so counts and histograms stay exact.

Cost: one read of the stored JSON (at most 64 MiB of records a filter, the newest), and with
`verify` one load per version. Read next: `page.py`, `server.py`, `stream.py`, `records.py`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from metagrad_filter.errors import ConfigError, MetagradFilterError, ScorerRejected
from metagrad_filter.ledger import FOLDER as LEDGERS
from metagrad_filter.ledger import Ledger, is_name
from metagrad_filter.monitor.records import read_records
from metagrad_filter.monitor.stream import stream_view
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
_FROM_ROUND = (*_FROM_METADATA, "version", "reason", "strength", "started_from", "seconds")


def run_view(run_dir: str | os.PathLike[str] | Store, *, verify: bool = True) -> dict[str, Any]:
    """Reads what a run has stored and returns what the page shows of it.

    Args:
      run_dir: a directory, a URL (see `open_store`), or a store.
      verify: load every version to see whether it is intact, not only its manifest.

    Returns:
      JSON types, every number finite: `run` (its place), `versions`, `rejected` candidates and
      `rounds`, oldest first; `filters` by name, each with `config`, ledger `intervals` and what
      `stream_view` makes of its records; `problems`, a sentence for each part that cannot be read.

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
    view = {
        "format": FORMAT,
        "run": str(store.describe()),
        "versions": versions,
        "rejected": [
            _rejected(d) for d in _documents(store, REGISTRY, r"rejected-(\d+)\.json", problems)
        ],
        "rounds": [
            {name: d.get(name) for name in _FROM_ROUND} | {"gate": _gate(d.get("gate"))}
            for d in _documents(store, ROUNDS, r"round-(\d+)\.json", problems)
        ],
        "filters": {
            name: _filter(store, name, references, problems) for name in _filters(store, problems)
        },
        "problems": problems,
    }
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
    for number in _reading(problems, registry.versions, []):
        try:
            manifest = registry.manifest(number)
            if verify:
                registry.load(number)
        except ScorerRejected as error:
            versions.append({"version": number, "state": f"refused ({error.reason})"})
            problems.append(f"Version {number}: {error}")
            continue
        metadata = manifest.get("metadata")
        metadata = metadata if isinstance(metadata, dict) else {}
        references[number] = metadata
        versions.append(
            {"version": number, "state": "ok", "strength": manifest.get("strength")}
            | {name: metadata.get(name) for name in _FROM_METADATA}
            | {"gate": _gate(metadata.get("gate")), "has_reference": "reference" in metadata}
        )
    return versions, references


def _rejected(document: dict[str, Any]) -> dict[str, Any]:
    metadata = document.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    return {
        "reason": document.get("reason"),
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
            {name: arm.get(name) for name in ("strength", "gain", "standard_error")}
            for arm in (arms if isinstance(arms, list) else [])
            if isinstance(arm, dict)
        ],
    }


def _filters(store: Store, problems: list[str]) -> list[str]:
    found: set[str] = set()
    for folder in (LEDGERS, METRICS):
        found.update(_reading(problems, lambda f=folder: store.names(f), []))
    return sorted(filter(is_name, found))


def _filter(
    store: Store, name: str, references: dict[int, dict[str, Any]], problems: list[str]
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
        **stream_view(records, references),
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
    names = _reading(problems, lambda: store.names(folder), [])
    numbered = [(int(m[1]), n) for n in names if is_key(n) and (m := re.fullmatch(pattern, n))]
    for _, name in sorted(numbered):
        document = _document(store, f"{folder}/{name}", problems)
        if document is not None:
            yield document


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
