"""Published scorers: immutable, numbered versions in `run_dir/registry`.

    publish(scorer) -> version        load(version) -> Scorer        latest_verified() -> both

A version is two files, `%08d.safetensors` and `%08d.json`; it exists once the second is in place.
Files are created whole and never modified, numbers only grow, and a reader verifies everything it
reads, so it sees a complete version or none (`tests/test_registry.py` kills a publisher at every
system call). Cost: one directory listing per look, one pass over the payload per load.

Read next: `ledger.py` (which version scores which blocks).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metagrad_filter.errors import ConfigError, PublishFailed, ScorerRejected
from metagrad_filter.files import (
    TEMPORARY,
    canonical_json,
    read_bounded,
    sync_directory,
    write_once,
)
from metagrad_filter.scorer import artifact
from metagrad_filter.scorer.scorer import Scorer

try:
    import fcntl
except ImportError:  # Windows has no fcntl; publishers then rely on exclusive links alone.
    fcntl = None

_NAME = re.compile(r"(\d{8})\.(safetensors|json)")
_REJECTED = re.compile(r"rejected-(\d+)\.json")
_ATTEMPTS = 100


class Registry:
    """The versions of one run.

    Attributes:
      directory: `run_dir/registry`.
      rejections: how often this object skipped or refused a version, by reason.
    """

    def __init__(self, run_dir: str | os.PathLike[str]):
        self.directory = Path(run_dir) / "registry"
        self.rejections: Counter[str] = Counter()
        self._warned: set[int] = set()

    def publish(self, scorer: Scorer, metadata: Mapping[str, Any] | None = None) -> int:
        """Publishes a scorer as the next version.

        Args:
          scorer: what to publish.
          metadata: JSON types, merged over the scorer's own metadata.

        Returns:
          The new version, larger than every earlier one. Raises `PublishFailed` when it cannot be
          written (earlier versions are intact) and `ConfigError` when it cannot be encoded.
        """
        merged = scorer.metadata | dict(metadata or {})
        payload, manifest = artifact.dump(dataclasses.replace(scorer, metadata=merged))
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with self._exclusive():
                return self._write(payload, manifest)
        except OSError as error:
            raise PublishFailed(
                f"Could not write a new version to {self.directory}: {error}; earlier versions "
                "are intact. Free space or fix the permissions, then publish again."
            ) from error

    def _write(self, payload: bytes, manifest: dict[str, Any]) -> int:
        version = max(self._numbers(), default=0)
        for _ in range(_ATTEMPTS):
            version += 1
            # A taken number belongs to a publisher on another machine; take the next one.
            if not write_once(self._path(version, "safetensors"), payload):
                continue
            sealed = artifact.seal(manifest | {"version": version})
            if write_once(self._path(version, "json"), canonical_json(sealed)):
                return version
        raise PublishFailed(f"Found no free version after {_ATTEMPTS} attempts up to {version}.")

    def versions(self) -> list[int]:
        """Returns the complete versions, oldest first."""
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
        return manifest

    def load(self, version: int) -> Scorer:
        """Verifies and returns a version; raises `ScorerRejected` and nothing else.

        Raises:
          ScorerRejected: with the reasons of `artifact.load`, or missing, unreadable, not_regular,
            version.
        """
        return self.load_with_manifest(version)[0]

    def load_with_manifest(self, version: int) -> tuple[Scorer, dict[str, Any]]:
        """Like `load`, and returns the manifest as well."""
        manifest = self.manifest(version)
        payload = self._read(version, "safetensors", artifact.MAX_PAYLOAD_BYTES)
        return artifact.load(payload, manifest), manifest

    def latest_verified(self, below: int | None = None) -> tuple[int, Scorer] | None:
        """Returns the newest version that passes verification.

        A version that fails is skipped with one warning per object, and counted in `rejections`.

        Args:
          below: only versions smaller than this.

        Returns:
          `(version, scorer)`, or None when no version verifies.
        """
        for version in reversed(self.versions()):
            if below is not None and version >= below:
                continue
            try:
                return version, self.load(version)
            except ScorerRejected as error:
                self.rejections[error.reason] += 1
                if version not in self._warned:
                    self._warned.add(version)
                    warnings.warn(
                        f"Skipping scorer version {version} ({error.reason}): {error}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
        return None

    def reject(
        self,
        scorer: Scorer | None,
        reason: str,
        metadata: Mapping[str, Any] | None = None,
    ) -> Path:
        """Stores why a candidate was not published, as `rejected-<n>.json`.

        Args:
          scorer: the candidate, or None when there was none; its metadata is stored, not its
            weights.
          reason: one word or sentence.
          metadata: JSON types, merged over the candidate's metadata.

        Returns:
          The path of the record. Raises `PublishFailed`.
        """
        merged = (scorer.metadata if scorer else {}) | dict(metadata or {})
        try:
            data = canonical_json({"reason": reason, "metadata": merged})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"metadata of a rejected candidate is not JSON: {error}") from None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            taken = [int(m[1]) for n in self._listing() if (m := _REJECTED.fullmatch(n))]
            number = max(taken, default=0) + 1
            while not write_once(self.directory / f"rejected-{number}.json", data):
                number += 1
        except OSError as error:
            raise PublishFailed(
                f"Could not record a rejected candidate in {self.directory}: {error}"
            ) from error
        return self.directory / f"rejected-{number}.json"

    def _path(self, version: int, suffix: str) -> Path:
        return self.directory / f"{version:08d}.{suffix}"

    def _listing(self) -> list[str]:
        try:
            return os.listdir(self.directory)
        except FileNotFoundError:
            return []

    def _numbers(self) -> list[int]:
        return [int(match[1]) for name in self._listing() if (match := _NAME.fullmatch(name))]

    def _read(self, version: int, suffix: str, limit: int) -> bytes:
        if isinstance(version, bool) or not isinstance(version, int) or not 0 < version < 10**8:
            raise ScorerRejected(
                f"Version is {version!r}, expected an int in [1, 99999999].", reason="version"
            )
        path = self._path(version, suffix)
        try:
            return read_bounded(path, limit)
        except FileNotFoundError:
            seen, reason = "does not exist", "missing"
        except OSError as error:
            seen, reason = f"cannot be read: {error}", "unreadable"
        except ValueError as error:
            seen, reason = f"is refused: {error}", "not_regular"
        raise ScorerRejected(f"{path} {seen}.", reason=reason)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Lets one publisher of this machine write, after removing what a killed one left."""
        handle = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            locked = False
            if fcntl is not None:
                # Some network file systems refuse locks; exclusive links still keep versions
                # apart there, only the clean-up has to wait.
                with contextlib.suppress(OSError):
                    fcntl.flock(handle, fcntl.LOCK_EX)
                    locked = True
            if locked:
                self._remove_leftovers()
            yield
        finally:
            os.close(handle)

    def _remove_leftovers(self) -> None:
        names = self._listing()
        complete = {name[:8] for name in names if _is(name, "json")}
        newest = max(complete, default="")
        leftovers = [name for name in names if name.startswith(TEMPORARY)]
        # An orphan above the newest version keeps its number taken until a newer version exists.
        leftovers += [
            n for n in names if _is(n, "safetensors") and n[:8] not in complete and n[:8] < newest
        ]
        for name in leftovers:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.directory / name)
        if leftovers:
            sync_directory(self.directory)


def _is(name: str, suffix: str) -> bool:
    match = _NAME.fullmatch(name)
    return match is not None and match[2] == suffix
