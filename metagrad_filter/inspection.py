"""What a run holds: versions, ledgers, rejected candidates, calibration rounds."""

from __future__ import annotations

import json
import os
from typing import Any

from metagrad_filter.errors import ConfigError, ScorerRejected
from metagrad_filter.ledger import FOLDER as LEDGERS
from metagrad_filter.ledger import Ledger, is_name
from metagrad_filter.registry import FOLDER as REGISTRY
from metagrad_filter.registry import Registry
from metagrad_filter.store import Store, is_key, open_store

_ROUNDS = "rounds"
_MAX_RECORD_BYTES = 16 * 2**20


def inspect_run(run_dir: str | os.PathLike[str] | Store) -> dict[str, Any]:
    """Reads a run; JSON types only.

    Args:
      run_dir: a directory, a URL (see `open_store`), or a store.

    Returns:
      `versions` (each verified; `state` is "ok" or why it is refused), `ledgers` by filter name,
      `rejected` candidates with reasons, `rounds` reports.

    Raises:
      ConfigError: nothing there comes from this package.
      OSError: it cannot be read.
    """
    store = open_store(run_dir)
    names = {folder: store.names(folder) for folder in (REGISTRY, LEDGERS, _ROUNDS)}
    if not any(names.values()):
        raise ConfigError(
            f"{store.describe()} is not a run directory: it has neither registry, ledger nor "
            "rounds; pass the directory that score_filter and Calibrator were given."
        )
    registry = Registry(store)
    return {
        "versions": [_version(registry, number) for number in registry.versions()],
        "ledgers": {
            name: ledger
            for name in sorted(filter(is_name, names[LEDGERS]))
            if (ledger := _ledger(store, name)) is not None
        },
        "rejected": _records(store, REGISTRY, "rejected-", names[REGISTRY]),
        "rounds": _records(store, _ROUNDS, "round-", names[_ROUNDS]),
    }


def _records(store: Store, folder: str, prefix: str, names: list[str]) -> list[dict[str, Any]]:
    return [
        _record(store, folder, name)
        for name in sorted(names)
        if name.startswith(prefix) and name.endswith(".json") and is_key(name)
    ]


def _record(store: Store, folder: str, name: str) -> dict[str, Any]:
    try:
        record = json.loads(store.read(f"{folder}/{name}", _MAX_RECORD_BYTES))
    except (ValueError, RecursionError, FileNotFoundError):
        record = None
    return record if isinstance(record, dict) else {"reason": f"{name} is damaged"}


def _ledger(store: Store, name: str) -> list[dict[str, Any]] | None:
    try:
        entries = Ledger(store, name).entries()
    except NotADirectoryError:
        # Something that lies beside the ledgers.
        return None
    return [
        {"interval": interval, "version": entries[interval].version} for interval in sorted(entries)
    ]


def _version(registry: Registry, number: int) -> dict[str, Any]:
    try:
        scorer, manifest = registry.load_with_manifest(number)
    except ScorerRejected as error:
        return {"version": number, "state": f"refused ({error.reason})"}
    fields = {name: scorer.metadata.get(name) for name in ("round", "form", "labels")}
    return {
        "version": number,
        **fields,
        "rank_correlation": scorer.metadata.get("rank_correlation"),
        "strength": manifest["strength"],
        "state": "ok",
    }
