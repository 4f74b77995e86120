"""What a run directory holds: versions, ledgers, rejected candidates, calibration rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metagrad_filter.errors import ConfigError, ScorerRejected
from metagrad_filter.ledger import Ledger
from metagrad_filter.registry import Registry


def inspect_run(run_dir: str | Path) -> dict[str, Any]:
    """Reads a run directory; JSON types only.

    Returns:
      `versions` (each verified; `state` is "ok" or why it is refused), `ledgers` by filter name,
      `rejected` candidates with reasons, `rounds` reports.

    Raises:
      ConfigError: there is no such directory, or nothing in it comes from this package.
    """
    run_dir = Path(run_dir)
    parts = [run_dir / name for name in ("registry", "ledger", "rounds")]
    if not any(part.is_dir() for part in parts):
        raise ConfigError(
            f"{run_dir} is not a run directory: it has neither registry, ledger nor rounds; pass "
            "the directory that score_filter and Calibrator were given."
        )
    registry, ledger, rounds = parts
    reader = Registry(run_dir)
    folders = ledger.iterdir() if ledger.is_dir() else ()
    names = sorted(path.name for path in folders if path.is_dir())
    return {
        "versions": [_version(reader, number) for number in reader.versions()],
        "ledgers": {name: _ledger(run_dir, name) for name in names},
        "rejected": [_record(path) for path in sorted(registry.glob("rejected-*.json"))],
        "rounds": [_record(path) for path in sorted(rounds.glob("round-*.json"))],
    }


def _record(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return {"reason": f"{path.name} is damaged"}


def _ledger(run_dir: Path, name: str) -> list[dict[str, Any]]:
    entries = Ledger(run_dir, name).entries()
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
