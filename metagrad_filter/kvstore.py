"""Stores behind URLs: `gs://bucket/path`, `s3://bucket/path` and `memory://name`, by tensorstore.

    KvStore("s3://bucket/run").write_once("registry/00000001.json", data) -> bool

A key is created by one conditional write and read back. The condition is evaluated by the store
itself: generation 0 on Google Cloud Storage, `If-None-Match: *` on S3 (tensorstore 0.1.86 sends it
with the PUT, after a HEAD that spares the upload; `tests/adapters/test_s3.py` looks at the
requests). A server that speaks S3 and ignores that header lets the later of two simultaneous
writers win; reading back notices that unless the writes interleave closely, so on such a server
run one publisher and one filter process per ledger name. Nothing is locked or removed here: a
publisher that dies leaves a payload without manifest, which keeps its number and is never read.

`AWS_ENDPOINT_URL` names another S3 server, as it does for the AWS tools. Cost: a write is three
requests, a read two (the first finds the size, so that memory stays bounded), a listing one per
thousand names. Retries give up after a few seconds, and every call after `timeout`.

tensorstore's threads do not survive a fork, and it ends a forked process that uses it. A process
forked after its parent used a store here gets a `ConfigError` instead.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import tensorstore as ts

from metagrad_filter.errors import ConfigError
from metagrad_filter.store import check_key

# What tensorstore's messages call the size of a value that is shorter than the range asked for:
# the memory and file drivers, HTTP content ranges, and S3's answer for an empty object.
_SIZE = re.compile(r"(?:value of size |total size |<ActualObjectSize>)(\d+)")
_SCHEMES = ("memory", "gs", "s3", "file")
_RETRIES = {"max_retries": 4, "initial_delay": "100ms", "max_delay": "2s"}

_lock = threading.Lock()
_opened: dict[str, ts.KvStore] = {}
_used_by: int | None = None


def _renew_lock() -> None:
    # A fork copies the lock as it is, perhaps held by a thread that the child does not have.
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


class KvStore:
    """The keys under a URL. Small and picklable: what is opened belongs to the process.

    Args:
      url: `memory://name`, `gs://bucket/path`, `s3://bucket/path`, or `file:///path` (for
        comparison; a path is better served by `LocalStore`). A `memory://` store is shared by all
        objects of one process and ends with it.
      timeout: seconds before a call gives up with `TimeoutError`.
    """

    def __init__(self, url: str, *, timeout: float = 30.0):
        scheme, _, rest = url.partition("://")
        parts = urlsplit(url)
        if scheme not in _SCHEMES or parts.query or parts.fragment or not rest.strip("/"):
            raise ConfigError(
                f"url is {url!r}, expected "
                + ", ".join(f"{s}://" for s in _SCHEMES)
                + " followed by a bucket or name, without query and fragment."
            )
        if not isinstance(timeout, int | float) or not 0 < timeout <= threading.TIMEOUT_MAX:
            raise ConfigError(f"timeout is {timeout!r}, expected seconds > 0.")
        self.url = url.rstrip("/") + "/"
        self.timeout = timeout

    def __repr__(self) -> str:
        return f"KvStore({self.url!r})"

    def describe(self, key: str = "") -> str:
        return self.url + key

    def read(self, key: str, limit: int) -> bytes:
        name = check_key(key)
        store = self._store()
        try:
            # One range that is only there when the value is too long tells the size otherwise.
            found = self._result(store.read(name, byte_range=slice(0, limit + 1)), key)
        except _OutOfRange as error:
            size = _SIZE.search(str(error))
            if size is None:
                raise OSError(f"{self.describe(key)} does not tell its size: {error}") from None
            exact = slice(0, int(size[1]))
            try:
                found = self._result(store.read(name, byte_range=exact), key)
            except _OutOfRange as changed:
                raise OSError(
                    f"{self.describe(key)} changed while it was read: {changed}"
                ) from None
        else:
            if found.state == "value":
                raise ValueError(f"more than the {limit} bytes allowed")
        if found.state != "value":
            raise FileNotFoundError(f"{self.describe(key)} does not exist")
        return found.value

    def write_once(self, key: str, data: bytes) -> bool:
        name = check_key(key)
        store = self._store()
        absent = self._result(store.read(name, byte_range=slice(0, 0)), key)
        if absent.state == "value":
            return False
        written = self._result(
            store.write(name, data, if_equal=absent.stamp.generation), key
        ).generation
        # A refused write has the unknown generation.
        if not written:
            return False
        found = self._result(store.read(name, byte_range=slice(0, 0)), key)
        return found.stamp.generation == written

    def names(self, folder: str) -> list[str]:
        prefix = check_key(folder) + "/"
        keys = ts.KvStore.KeyRange(prefix, prefix[:-1] + "0")  # "0" follows "/"
        found = self._result(self._store().list(keys), folder)
        below = {key[len(prefix) :].split(b"/")[0] for key in found}
        return [name.decode("utf-8", "replace") for name in below if name]

    def remove(self, key: str) -> None:
        self._result(self._store().write(check_key(key), None), key)

    def stamp(self, folder: str) -> None:
        return None

    @contextlib.contextmanager
    def exclusive(self, folder: str) -> Iterator[bool]:
        yield False

    def _store(self) -> ts.KvStore:
        global _used_by
        if _used_by not in (None, os.getpid()):
            raise ConfigError(
                f"{self.url} was used before this process was forked, which tensorstore does not "
                "survive; start workers with the start method 'spawn' or 'forkserver'."
            )
        with _lock:
            store = _opened.get(self.url)
            if store is None:
                _used_by = os.getpid()
                try:
                    store = ts.KvStore.open(_spec(self.url)).result(timeout=self.timeout)
                except (ValueError, NotImplementedError) as error:
                    raise ConfigError(
                        f"run_dir is {self.url!r}, which is refused: {error}"
                    ) from None
                _opened[self.url] = store
        return store

    def _result(self, future: Any, key: str) -> Any:
        try:
            return future.result(timeout=self.timeout)
        except TimeoutError:
            raise TimeoutError(
                f"{self.describe(key)} did not answer within {self.timeout:g} s"
            ) from None
        except (ValueError, RuntimeError, KeyError) as error:
            if "OUT_OF_RANGE" in str(error):
                raise _OutOfRange(str(error)) from None
            raise OSError(f"{self.describe(key)}: {error}") from error


class _OutOfRange(OSError):
    """The value is shorter than the range asked for."""


def _spec(url: str) -> dict[str, Any]:
    spec = ts.KvStore.Spec(url).to_json()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if spec["driver"] == "s3":
        spec |= {"endpoint": endpoint} if endpoint else {}
        spec["context"] = {"s3_request_retries": _RETRIES}
    elif spec["driver"] == "gcs":
        spec["context"] = {"gcs_request_retries": _RETRIES}
    return spec
