"""Where a run keeps its files: a directory, or a bucket behind a URL, through one small interface.

    open_store(run_dir) -> Store        store.write_once("registry/00000001.json", data) -> bool

A key is created whole or not at all and is never modified; that is all that registry and ledger
ask of a store. Plain paths and `file://` are a `LocalStore`; `memory://`, `gs://` and `s3://` are
a `kvstore.KvStore`, whose module (and tensorstore with it) is imported only for such a URL.

Read next: `registry.py` and `ledger.py` (who asks), `kvstore.py` (what other stores guarantee).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit

from metagrad_filter.errors import ConfigError
from metagrad_filter.files import make_directory, read_bounded, sync_directory, write_once

try:
    import fcntl
except ImportError:  # Windows has no fcntl; publishers then rely on exclusive links alone.
    fcntl = None

REMOTE_SCHEMES = ("memory", "gs", "s3")

_SEGMENT = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,128}\Z")
_ONE_SLASH = re.compile(r"(file|memory|gs|s3):/(?!/)")


@runtime_checkable
class Store(Protocol):
    """Write-once keys in folders, such as `ledger/train/00000003.json`.

    Every method raises `ConfigError` for a key that could leave the store, and `OSError` (its
    subclass `TimeoutError` where the store has a time limit) when the store cannot be reached.
    """

    def describe(self, key: str = "") -> Path | str:
        """Returns the place of a key, for messages: a path, or a URL."""
        ...

    def read(self, key: str, limit: int) -> bytes:
        """Returns a key's bytes.

        Raises:
          FileNotFoundError: no such key.
          OSError: it cannot be read.
          ValueError: not a plain file, or longer than `limit`; at most `limit + 1` bytes are read.
        """
        ...

    def write_once(self, key: str, data: bytes) -> bool:
        """Creates a key with `data` unless it exists; True when this call created it."""
        ...

    def names(self, folder: str) -> list[str]:
        """Returns the names directly inside a folder, in any order; [] when there is none."""
        ...

    def remove(self, key: str) -> None:
        """Removes a leftover; a key that is not there is no error."""
        ...

    def stamp(self, folder: str) -> Hashable | None:
        """Returns a value that changes when names come or go, or None where that is not cheap."""
        ...

    def exclusive(self, folder: str) -> AbstractContextManager[bool]:
        """Keeps other writers of this machine out; yields False where the store has no locks."""
        ...


def open_store(run_dir: str | os.PathLike[str] | Store) -> Store:
    """Returns the store of a run directory.

    Args:
      run_dir: a path, a URL (`file:///path`, `gs://bucket/path`, `s3://bucket/path`,
        `memory://name` for one process), or a store.

    Returns:
      The store; nothing is opened or created yet. Raises `ConfigError`.
    """
    if isinstance(run_dir, Store):
        return run_dir
    try:
        text = os.fspath(run_dir)
    except TypeError:
        text = None
    if not isinstance(text, str) or "\0" in text:
        raise ConfigError(f"run_dir is {run_dir!r}, expected a directory or a URL.")
    if _ONE_SLASH.match(text):
        raise ConfigError(
            f"run_dir is {text!r}, a URL that has lost a slash, as pathlib does to URLs; pass it "
            "as a string."
        )
    scheme, separator, _ = text.partition("://")
    if not separator:
        return LocalStore(text)
    if scheme == "file":
        return LocalStore(_path_of(text))
    if scheme in REMOTE_SCHEMES:
        return importlib.import_module("metagrad_filter.kvstore").KvStore(text)
    raise ConfigError(
        f"run_dir is {text!r}, expected a directory or a URL with file://, "
        + ", ".join(f"{s}://" for s in REMOTE_SCHEMES[:-1])
        + f" or {REMOTE_SCHEMES[-1]}://."
    )


def check_key(key: str) -> str:
    """Returns `key` when each of its parts is a plain ASCII file name; else `ConfigError`."""
    if not isinstance(key, str) or not all(map(_SEGMENT.match, key.split("/"))):
        raise ConfigError(
            f"key is {key!r}, expected names of 1 to 128 characters a-z, A-Z, 0-9, '.', '_' or "
            "'-', joined by '/'."
        )
    return key


def is_key(key: str) -> bool:
    """Returns whether `check_key` accepts it; folders may hold other names, put there by hand."""
    return all(map(_SEGMENT.match, key.split("/")))


class LocalStore:
    """A directory, local or mounted.

    Files are private (0600), appear whole or not at all, and survive a power loss once
    `write_once` has returned. Symbolic links, pipes and devices are refused, not followed.

    Args:
      directory: need not exist; folders are made when something is written.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)

    def __repr__(self) -> str:
        return f"LocalStore({str(self.directory)!r})"

    def describe(self, key: str = "") -> Path:
        return self.directory / key

    def read(self, key: str, limit: int) -> bytes:
        return read_bounded(self._path(key), limit)

    def write_once(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        make_directory(path.parent)
        return write_once(path, data)

    def names(self, folder: str) -> list[str]:
        try:
            return os.listdir(self._path(folder))
        except FileNotFoundError:
            return []

    def remove(self, key: str) -> None:
        path = self._path(key)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
            sync_directory(path.parent)

    def stamp(self, folder: str) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self._path(folder))
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino, status.st_mtime_ns

    @contextlib.contextmanager
    def exclusive(self, folder: str) -> Iterator[bool]:
        path = self._path(folder)
        make_directory(path)
        handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            locked = False
            if fcntl is not None:
                # Some network file systems refuse locks; exclusive links still keep writers
                # apart there.
                with contextlib.suppress(OSError):
                    fcntl.flock(handle, fcntl.LOCK_EX)
                    locked = True
            yield locked
        finally:
            os.close(handle)

    def _path(self, key: str) -> Path:
        return self.directory / check_key(key)


def _path_of(url: str) -> str:
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or "\0" in path:
        raise ConfigError(
            f"run_dir is {url!r}, expected file:///path without host, query and fragment."
        )
    return path
