"""Reads what filters append to `run_dir/metrics/<name>`, each record once, a bounded piece a time.

    tails = MetricTails(run_dir)
    tails.read("train") -> records that are new since the last call        tails.state() -> JSON

Records are appended by any number of processes, each to files of its own, and nobody removes them:
a long run holds more than one look may read. So the place reached in every file is remembered, and
at most a few MiB are read at once, files that were written longest ago first. A line that is not
yet whole is left for the next time.

Read next: `attend.py`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metagrad_filter.blockstats import FOLDER, parse_record
from metagrad_filter.ledger import is_name
from metagrad_filter.store import is_key

MOST_BYTES = 4 * 2**20


class MetricTails:
    """Places reached in the files of a run's filters.

    Args:
      run_dir: the run directory.
      most_bytes: read at one call of `read`, at most; a longer line is passed over.

    Attributes:
      damaged: lines that were no record, so far.
    """

    def __init__(self, run_dir: str | Path, *, most_bytes: int = MOST_BYTES):
        self._folder = Path(run_dir) / FOLDER
        self._most = most_bytes
        self._places: dict[str, dict[str, int]] = {}
        self.damaged = 0

    def names(self) -> list[str]:
        """Filters that have left records."""
        return sorted(name for name in _listing(self._folder) if is_name(name))

    def read(self, name: str) -> tuple[list[dict[str, Any]], bool]:
        """Reads on.

        Args:
          name: the filter's.

        Returns:
          New records, in the order of their files, and whether that is all there is by now.
        """
        before = self._places.get(name, {})
        places: dict[str, int] = {}
        waiting: list[tuple[int, str, int]] = []
        for file in _listing(self._folder / name):
            if not is_key(file) or not file.endswith(".jsonl"):
                continue
            try:
                status = os.stat(self._folder / name / file, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(status.st_mode):
                continue
            place = before.get(file, 0)
            # A file that became shorter is another one; the monitor passes known records over.
            places[file] = place if place <= status.st_size else 0
            if places[file] < status.st_size:
                waiting.append((status.st_mtime_ns, file, status.st_size))
        self._places[name] = places
        records: list[dict[str, Any]] = []
        left = self._most
        for _, file, size in sorted(waiting):
            start = places[file]
            if left <= 0:
                return records, False
            data = _piece(self._folder / name / file, start, min(left, size - start))
            whole = data.rfind(b"\n") + 1
            if not whole and len(data) >= self._most:
                whole = len(data)
                self.damaged += 1
            for line in filter(None, data[:whole].split(b"\n")):
                record = parse_record(line)
                if record is None or record["name"] != name:
                    self.damaged += 1
                else:
                    records.append(record)
            left -= len(data)
            places[file] = start + whole
        return records, left > 0

    def state(self) -> dict[str, Any]:
        """The places, as JSON types."""
        return {name: dict(places) for name, places in self._places.items()}

    def restore(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Goes on from a state; raises `TypeError` or `ValueError` where it is none."""
        self._places = {
            str(name): {str(file): int(place) for file, place in places.items()}
            for name, places in state.items()
        }


def _listing(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _piece(path: Path, start: int, size: int) -> bytes:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return b""
    try:
        return os.pread(handle, size, start)
    finally:
        os.close(handle)
