"""Published scorers: immutable, numbered versions under `registry/` of a run's store.

    publish(scorer) -> version        load(version) -> Scorer        latest_verified() -> both

A version is a payload and a manifest, `%08d.safetensors` and `%08d.json`; it exists once the second
is in place. Both are created whole and never modified, numbers only grow, and a reader verifies
everything it reads, so it sees a complete version or none, whoever dies while publishing and on
whatever store (`tests/test_registry.py`). A `Registry` object also remembers what it has verified
and refuses to be led back: to an older version, or to another one under the same number.

Publishers of one machine take turns, by a lock; publishers on several machines, or on a store
without locks, each take the next free number, so a slower one may complete a smaller number after a
larger one, which readers that have the larger one ignore. Cost: one listing per look, one pass
over the payload per load.

Read next: `store.py` (what is written where), `ledger.py` (which version scores which blocks),
`watch.py` (a look that never waits).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from metagrad_filter.errors import ConfigError, PublishFailed, ScorerRejected
from metagrad_filter.files import TEMPORARY, canonical_json
from metagrad_filter.scorer import artifact
from metagrad_filter.store import Store, is_key, open_store

FOLDER = "registry"

_NAME = re.compile(r"(\d{8})\.(safetensors|json)", re.ASCII)
_REJECTED = re.compile(r"rejected-([1-9]\d{0,8})\.json", re.ASCII)
_ATTEMPTS = 100


@dataclass(frozen=True, eq=False)
class Look:
    """What one look at a registry found.

    Attributes:
      version: the newest version that passes verification, or None.
      scorer: its scorer, of the class of its kind, or None.
      manifest: its manifest, or None.
      refused: the versions that were passed over, newest first, and why.
    """

    version: int | None
    scorer: Any
    manifest: dict[str, Any] | None
    refused: tuple[tuple[int, ScorerRejected], ...]


class Registry:
    """The versions of one run.

    Args:
      run_dir: a directory, a URL (see `open_store`), or a store.
      metadata: JSON types that every version published through this object carries, such as what
        scaled the windows.

    Attributes:
      store: where the versions are.
      directory: the place of `registry/` in it: a path, or a URL as text.
      rejections: how often this object skipped or refused a version, by reason.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str] | Store,
        metadata: Mapping[str, Any] | None = None,
    ):
        self.store = open_store(run_dir)
        self._metadata = dict(metadata or {})
        self.directory = self.store.describe(FOLDER)
        self.rejections: Counter[str] = Counter()
        self._warned: set[tuple[int, str]] = set()
        self._verified: dict[int, str] = {}
        self._published = 0

    def publish(
        self, scorer: artifact.StoredScorer, metadata: Mapping[str, Any] | None = None
    ) -> int:
        """Publishes a scorer as the next version.

        Args:
          scorer: what to publish.
          metadata: JSON types, merged over the scorer's own metadata.

        Returns:
          The new version, larger than every one that was complete before. Raises `PublishFailed`
          when it cannot be written (earlier versions are intact) and `ConfigError` when it cannot
          be encoded.
        """
        merged = scorer.metadata | self._metadata | dict(metadata or {})
        payload, manifest = artifact.dump(dataclasses.replace(cast(Any, scorer), metadata=merged))
        try:
            with self.store.exclusive(FOLDER) as locked:
                if locked:
                    self._remove_leftovers()
                self._published = self._write(payload, manifest)
                return self._published
        except OSError as error:
            raise PublishFailed(
                f"Could not write a new version to {self.directory}: {error}; earlier versions "
                "are intact. Free space or fix the permissions, then publish again."
            ) from error

    def _write(self, payload: bytes, manifest: dict[str, Any]) -> int:
        # A number is taken as long as this object remembers it, also when the listing forgot it.
        version = max([0, self._published, *self._verified, *self._numbers()])
        for _ in range(_ATTEMPTS):
            version += 1
            # A taken number belongs to a publisher on another machine; take the next one.
            if not self.store.write_once(_key(version, "safetensors"), payload):
                continue
            sealed = artifact.seal(manifest | {"version": version})
            if self.store.write_once(_key(version, "json"), canonical_json(sealed)):
                return version
        raise PublishFailed(f"Found no free version after {_ATTEMPTS} attempts up to {version}.")

    def versions(self) -> list[int]:
        """Returns the complete versions, oldest first; raises `OSError`."""
        return sorted(int(name[:8]) for name in self._listing() if _is(name, "json"))

    def latest(self) -> int | None:
        """Returns the newest complete version without verifying it, or None."""
        return max(self.versions(), default=None)

    def manifest(self, version: int) -> dict[str, Any]:
        """Returns the verified manifest of a version; raises `ScorerRejected`."""
        data = self._read(version, "json", artifact.MAX_MANIFEST_BYTES)
        manifest = artifact.parse_manifest(data)
        if manifest.get("version") != version:
            raise ScorerRejected(
                f"The manifest of version {version} says version {manifest.get('version')!r}; "
                "files were mixed up or replayed. Restore the original file.",
                reason="version",
            )
        known = self._verified.get(version)
        if known is not None and known != manifest["manifest_sha256"]:
            raise ScorerRejected(
                f"The manifest of version {version} in {self.directory} is another one than was "
                "verified earlier; a published version never changes. Restore the original files.",
                reason="changed",
            )
        return manifest

    def load(self, version: int) -> Any:
        """Verifies and returns a version; raises `ScorerRejected` and nothing else.

        Raises:
          ScorerRejected: with the reasons of `artifact.load`, or missing, unreadable, not_regular,
            version, changed.
        """
        return self.load_with_manifest(version)[0]

    def load_with_manifest(self, version: int) -> tuple[Any, dict[str, Any]]:
        """Like `load`, and returns the manifest as well."""
        manifest = self.manifest(version)
        payload = self._read(version, "safetensors", artifact.MAX_PAYLOAD_BYTES)
        scorer = artifact.load(payload, manifest)
        self._verified[version] = manifest["manifest_sha256"]
        return scorer, manifest

    def latest_verified(self, below: int | None = None) -> tuple[int, Any] | None:
        """Returns the newest version that passes verification.

        A version that fails is skipped with one warning per object, and counted in `rejections`.
        An object that has verified a version takes an older one only while the newer one is there
        and damaged. Where the newer one cannot be read, nothing is returned; where it is gone, that
        is a rollback: counted, warned about, refused.

        Args:
          below: only versions smaller than this.

        Returns:
          `(version, scorer)`, or None when no version verifies or the older ones are refused;
          whoever holds a scorer then keeps it. Raises `OSError`.
        """
        found = self.look(below)
        for message in self.unseen(found.refused):
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None if found.version is None else (found.version, found.scorer)

    def look(self, below: int | None = None) -> Look:
        """Like `latest_verified`, without warnings and with everything that was found."""
        refused: list[tuple[int, ScorerRejected]] = []
        listed = [v for v in self.versions() if below is None or v < below]
        known = tuple(self._verified)
        newest = max((v for v in known if below is None or v < below), default=0)
        lost = newest > 0 and newest not in listed
        found = None
        for version in reversed(listed):
            if lost and version < newest:
                break
            try:
                found = version, *self.load_with_manifest(version)
                break
            except ScorerRejected as error:
                refused.append((version, error))
                if version == newest and error.reason == "unreadable":
                    # Out of reach for now, which is no reason to go back.
                    break
        if lost and found is None:
            error = ScorerRejected(
                f"{self.directory} no longer has version {newest}, which was verified earlier; its "
                f"newest is {max(listed, default=None)}, and older versions are refused. Restore "
                "the files, or publish again.",
                reason="rollback",
            )
            refused.append((newest, error))
        self.rejections.update(error.reason for _, error in refused)
        return Look(*(found or (None, None, None)), tuple(refused))

    def unseen(self, refused: tuple[tuple[int, ScorerRejected], ...]) -> list[str]:
        """Returns what to warn about: refusals that this object was not asked about before."""
        messages = []
        for version, error in refused:
            if (version, error.reason) not in self._warned:
                self._warned.add((version, error.reason))
                messages.append(f"Skipping scorer version {version} ({error.reason}): {error}")
        return messages

    def reject(
        self,
        scorer: artifact.StoredScorer | None,
        reason: str,
        metadata: Mapping[str, Any] | None = None,
    ) -> Path | str:
        """Stores why a candidate was not published, as `rejected-<n>.json`.

        Args:
          scorer: the candidate, or None when there was none; its metadata is stored, not its
            weights.
          reason: one word or sentence.
          metadata: JSON types, merged over the candidate's metadata.

        Returns:
          The place of the record. Raises `PublishFailed` and `ConfigError`.
        """
        merged = (scorer.metadata if scorer else {}) | dict(metadata or {})
        try:
            data = canonical_json({"reason": reason, "metadata": merged})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"metadata of a rejected candidate is not JSON: {error}") from None
        try:
            taken = [int(m[1]) for n in self._listing() if (m := _REJECTED.fullmatch(n))]
            number = max(taken, default=0) + 1
            while not self.store.write_once(f"{FOLDER}/rejected-{number}.json", data):
                number += 1
        except OSError as error:
            raise PublishFailed(
                f"Could not record a rejected candidate in {self.directory}: {error}"
            ) from error
        return self.store.describe(f"{FOLDER}/rejected-{number}.json")

    def _listing(self) -> list[str]:
        return self.store.names(FOLDER)

    def _numbers(self) -> list[int]:
        return [int(match[1]) for name in self._listing() if (match := _NAME.fullmatch(name))]

    def _read(self, version: int, suffix: str, limit: int) -> bytes:
        if isinstance(version, bool) or not isinstance(version, int) or not 0 < version < 10**8:
            raise ScorerRejected(
                f"Version is {version!r}, expected an int in [1, 99999999].", reason="version"
            )
        key = _key(version, suffix)
        try:
            return self.store.read(key, limit)
        except FileNotFoundError:
            seen, reason = "does not exist", "missing"
        except OSError as error:
            seen, reason = f"cannot be read: {error}", "unreadable"
        except ValueError as error:
            seen, reason = f"is refused: {error}", "not_regular"
        raise ScorerRejected(f"{self.store.describe(key)} {seen}.", reason=reason)

    def _remove_leftovers(self) -> None:
        """Removes what a killed publisher left; only while no other can be at work."""
        names = self._listing()
        complete = {name[:8] for name in names if _is(name, "json")}
        newest = max(complete, default="")
        leftovers = [name for name in names if name.startswith(TEMPORARY)]
        # An orphan above the newest version keeps its number taken until a newer version exists.
        leftovers += [
            n for n in names if _is(n, "safetensors") and n[:8] not in complete and n[:8] < newest
        ]
        for name in filter(is_key, leftovers):
            # What cannot be removed takes space, which is no reason not to publish.
            with contextlib.suppress(OSError):
                self.store.remove(f"{FOLDER}/{name}")


def _key(version: int, suffix: str) -> str:
    return f"{FOLDER}/{version:08d}.{suffix}"


def _is(name: str, suffix: str) -> bool:
    match = _NAME.fullmatch(name)
    return match is not None and match[2] == suffix
