"""File operations that both lanes trust: write once, replace, and read a bounded regular file.

`write_once` makes a complete file appear under a name that did not exist, or changes nothing:
temporary file, fsync, hard link (which refuses to overwrite, on POSIX and NFS alike), fsync of the
directory. A process killed in between leaves at most one temporary file, which readers ignore.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"


def canonical_json(value: Any) -> bytes:
    """Encodes JSON types in the one spelling that hashes and stored files use."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def write_once(path: Path, data: bytes) -> bool:
    """Creates `path` with `data` unless it exists.

    Args:
      path: target; its directory must exist.
      data: the complete content.

    Returns:
      True when this call created the file, False when it was there already. Raises `OSError`.
    """
    temporary = path.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(handle, view) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
    finally:
        # The file under its final name is what counts; a leftover is removed by a later publish.
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    sync_directory(path.parent)
    return True


def replace_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Puts `data` at `path`, replacing what is there as a whole; makes the directory.

    Args:
      path: target.
      data: the complete content.
      mode: permissions of the file.

    Raises:
      OSError: it cannot be written; what was there before is intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
    try:
        temporary.write_bytes(data)
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_directory(directory: Path) -> None:
    """Makes a directory and its parents, and makes their names survive a power loss."""
    if directory.is_dir():
        return
    make_directory(directory.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory)
        sync_directory(directory.parent)
        return
    if not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))


def sync_directory(directory: Path) -> None:
    """Makes the names in `directory` survive a power loss."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_bounded(path: Path, limit: int) -> bytes:
    """Reads a regular file of at most `limit` bytes.

    Symbolic links, pipes and devices are refused, and a file that grows while it is read is cut
    off at `limit + 1`, so that the caller's memory is bounded whatever the path is.

    Raises:
      FileNotFoundError: no such file.
      OSError: it cannot be read.
      ValueError: not a regular file, or longer than `limit`.
    """
    # O_NONBLOCK: opening a pipe nobody writes to would otherwise wait for ever.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > limit:
            raise ValueError(f"{status.st_size} bytes, more than the {limit} allowed")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"more than the {limit} bytes allowed")
    return data
