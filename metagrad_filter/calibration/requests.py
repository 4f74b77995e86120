"""Requests for a calibration round: one small file each, in `run_dir/requests`, until it is served.

    request_round(run_dir, "the pool was replaced")

Anybody may ask, from any process; the calibrator that holds the lease reads, and removes a request
once a round that began after it has reported. So a request outlives both processes.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from metagrad_filter.files import canonical_json, make_directory, read_bounded, write_once

FOLDER = "requests"

_LIMIT = 65536


def request_round(
    run_dir: str | Path, reason: str, *, key: str | None = None, **details: Any
) -> Path:
    """Asks the calibrator of a run directory for a round; returns the request's file.

    Args:
      run_dir: the run directory.
      reason: one sentence.
      key: the request's file name without suffix: while it waits, asking again changes nothing;
        None for a request of its own.
      details: JSON types.

    Raises:
      OSError: it cannot be written.
    """
    folder = Path(run_dir) / FOLDER
    make_directory(folder)
    path = folder / f"{key or secrets.token_hex(8)}.json"
    write_once(path, canonical_json({**details, "reason": reason}))
    return path


def waiting_requests(run_dir: str | Path) -> list[Path]:
    """Requests that no round has served yet."""
    return sorted((Path(run_dir) / FOLDER).glob("*.json"))


def reason_of(path: Path) -> str:
    """The reason of a request; one that cannot be read is a request all the same."""
    try:
        return str(json.loads(read_bounded(path, _LIMIT))["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return path.name
