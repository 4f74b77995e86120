"""Which scorer version ranks which interval of blocks: a write-once record.

    run_dir/ledger/<name>/%08d.json = {"interval", "version", "manifest_sha256"}

The first process that reaches an interval decides it, by creating a key that did not exist; every
other process, every later epoch and every resumed run reads the same answer. This is what makes a
stream reproducible while scorers are published beside it. Version 0 means that no scorer was
there: a seeded uniform k of M. `filter.json` beside the entries records the filter's configuration
once, so that another configuration cannot silently replay decisions that were not made for it.

Read next: `blocks.py` (who asks), `registry.py` (what a version is).
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import Any

from metagrad_filter.errors import ConfigError, StateMismatch
from metagrad_filter.files import canonical_json
from metagrad_filter.store import Store, open_store

FOLDER = "ledger"

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_ENTRY = re.compile(r"(\d{8}|[1-9]\d{8,17})\.json", re.ASCII)
_MAX_ENTRY_BYTES = 64 * 2**10


@dataclass(frozen=True)
class Entry:
    """One decision.

    Attributes:
      interval: index of the interval of blocks, from 0.
      version: scorer version; 0 for the uniform choice.
      manifest_sha256: hash of the version's manifest; "" for version 0.
    """

    interval: int
    version: int
    manifest_sha256: str


class Ledger:
    """The decisions of one filter.

    Args:
      run_dir: a directory, a URL (see `open_store`), or a store.
      name: one filter of the run, `[a-z0-9][a-z0-9_-]{0,63}`.

    Attributes:
      store: where the decisions are.
      run_dir: its place: a path, or a URL as text.
      directory: the place of `ledger/<name>` in it.
    """

    def __init__(self, run_dir: str | os.PathLike[str] | Store, name: str = "default"):
        if not is_name(name):
            raise ConfigError(
                f"name is {name!r}, expected 1 to 64 characters a-z, 0-9, '_' or '-', "
                "starting with a letter or digit."
            )
        self.name = name
        self.store = open_store(run_dir)
        self.run_dir = self.store.describe()
        self._folder = f"{FOLDER}/{name}"
        self.directory = self.store.describe(self._folder)

    def decide(self, interval: int, version: int, manifest_sha256: str = "") -> int:
        """Records a version for an interval unless one is recorded.

        Args:
          interval: from 0.
          version: the proposed version; 0 for the uniform choice.
          manifest_sha256: hash of the proposed version's manifest.

        Returns:
          The recorded version, which is another process's if that came first. Raises `OSError`
          when the store cannot be written and `StateMismatch` when the record is damaged.
        """
        entry = Entry(interval, version, manifest_sha256)
        _check_entry(entry, interval, "the proposed decision")
        if self.store.write_once(self._key(interval), canonical_json(vars(entry))):
            return version
        winner = self.read(interval)
        if winner is None:
            raise StateMismatch(
                f"{self.store.describe(self._key(interval))} vanished while it was read; decisions "
                "are never deleted. Restore the ledger, or use another name."
            )
        return winner.version

    def read(self, interval: int) -> Entry | None:
        """Returns the decision for an interval, or None; raises `StateMismatch` if damaged."""
        data = self._read(self._key(interval))
        return None if data is None else self._parse(data, interval)

    def entries(self) -> dict[int, Entry]:
        """Returns all decisions by interval, in order."""
        names = self.store.names(self._folder)
        found = sorted(int(match[1]) for name in names if (match := _ENTRY.fullmatch(name)))
        return {n: entry for n in found if (entry := self.read(n)) is not None}

    def fork(self, new_name: str, up_to: int | None = None) -> Ledger:
        """Copies decisions under another name, for a run that should differ from some point on.

        Args:
          new_name: the other name; decisions it already holds must agree.
          up_to: the last interval copied; None copies all.

        Returns:
          The ledger of the new name. Raises `StateMismatch` if it holds another decision.
        """
        other = Ledger(self.store, new_name)
        for interval, entry in self.entries().items():
            if up_to is not None and interval > up_to:
                break
            winner = other.decide(interval, entry.version, entry.manifest_sha256)
            if winner != entry.version:
                raise StateMismatch(
                    f"Ledger {new_name!r} already holds version {winner} for interval {interval}, "
                    f"ledger {self.name!r} has version {entry.version}; fork to an unused name."
                )
        return other

    def bind(self, config: dict[str, Any]) -> None:
        """Records the filter's configuration, or checks it against the recorded one.

        Args:
          config: JSON types only.

        Raises:
          StateMismatch: another configuration is recorded; names the first field that differs.
          OSError: the store cannot be written.
        """
        key = f"{self._folder}/filter.json"
        data = self._read(key)
        if data is None:
            if self.store.write_once(key, canonical_json(config)):
                return
            data = self._read(key)
        try:
            recorded = json.loads(data or b"")
        except (ValueError, RecursionError):
            recorded = None
        if not isinstance(recorded, dict):
            raise self._damaged(key, "not a JSON object")
        for field in sorted(recorded.keys() | config.keys()):
            if recorded.get(field) != config.get(field):
                raise StateMismatch(
                    f"The filter {self.name!r} of {self.run_dir} was started with "
                    f"{field}={recorded.get(field)!r} and now has {config.get(field)!r}, so its "
                    "decisions do not apply. Use the recorded value, or give this filter another "
                    "name= (Ledger.fork copies the decisions)."
                )

    def _key(self, interval: int) -> str:
        return f"{self._folder}/{interval:08d}.json"

    def _read(self, key: str) -> bytes | None:
        try:
            return self.store.read(key, _MAX_ENTRY_BYTES)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise self._damaged(key, error) from None

    def _parse(self, data: bytes, interval: int) -> Entry:
        try:
            value = json.loads(data)
            if canonical_json(value) != data:
                raise ValueError("not in canonical form")
            entry = Entry(**value)
            _check_entry(entry, interval, "the entry")
        except (TypeError, ValueError, RecursionError) as error:
            raise self._damaged(self._key(interval), error) from None
        return entry

    def _damaged(self, key: str, why: object) -> StateMismatch:
        return StateMismatch(
            f"{self.store.describe(key)} is damaged ({why}), so the stream cannot be replayed; "
            "restore it, or use another name for this filter."
        )


def is_name(name: object) -> bool:
    """Returns whether a ledger can have this name."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def _check_entry(entry: Entry, interval: int, what: str) -> None:
    for field, low in (("interval", 0), ("version", 0)):
        value = getattr(entry, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"{field} of {what} is {value!r}, expected an int >= {low}.")
    if entry.interval != interval:
        raise ConfigError(f"interval of {what} is {entry.interval}, expected {interval}.")
    if not isinstance(entry.manifest_sha256, str):
        raise ConfigError(f"manifest_sha256 of {what} is not a string.")
