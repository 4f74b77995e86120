"""The newest verified scorer, known at once: a thread looks, the hot lane only asks what it saw.

    Watcher(registry).newest() -> (version, scorer, manifest) or None
    Watcher(registry).refresh(wait) -> the same, after a look of its own if that ends in time

One daemon thread per process and run looks once per `interval`, and when asked, and keeps what
verified.
A store that hangs, fails or vanishes changes nothing in service: failures are counted, and the
next call to `newest` warns once about each kind. Only the first look of a process is waited for,
up to `timeout`. Cost: `newest` takes about a microsecond; a look at an unchanged directory is one
`stat`, at an unchanged bucket one listing; a new version is loaded in the thread.

Read next: `registry.py` (what is verified), `decisions.py` (who asks).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import warnings
import weakref
from collections import Counter, deque
from typing import Any, NamedTuple

from metagrad_filter.errors import ConfigError
from metagrad_filter.registry import FOLDER, Registry

# A directory's time stamp may be coarse, and old on a network disk; so list now and then anyway.
_LIST_EVERY = 60
# Refusals that may be gone without a new name in the registry.
_PASSING = frozenset({"missing", "unreadable"})
_EXIT_SECONDS = 1.0


class Newest(NamedTuple):
    """A version in service."""

    version: int
    scorer: Any
    manifest: dict[str, Any]


class Watcher:
    """Knows the newest verified version of a registry without waiting for its store.

    Watchers of one run share one thread in a process, which starts at the first `newest` and ends
    with the last of them. A forked process keeps what its parent knew and starts a thread of its
    own.

    Args:
      registry: where versions are published.
      interval: seconds between two looks that nobody asked for; of several watchers the smallest
        counts.
      timeout: seconds that the first look of a process is waited for.
    """

    def __init__(self, registry: Registry, *, interval: float = 1.0, timeout: float = 2.0):
        for field, value in (("interval", interval), ("timeout", timeout)):
            if not isinstance(value, int | float) or not 0 < value <= threading.TIMEOUT_MAX:
                raise ConfigError(f"{field} is {value!r}, expected seconds above 0.")
        self.registry = registry
        self.interval = interval
        self.timeout = timeout
        self._poller: _Poller | None = None
        self._release: weakref.finalize | None = None
        self._closed = False

    def newest(self) -> Newest | None:
        """Returns the newest version that this process has verified, or None so far.

        Waits only while the first look of the process is under way, and warns (`RuntimeWarning`)
        once about each version and each kind of failure that the thread met.
        """
        poller = self._poller
        if poller is None or poller.pid != os.getpid():
            if self._closed:
                return None if poller is None else poller.current
            poller = self._attach(poller)
        return poller.newest()

    def refresh(self, wait: float) -> Newest | None:
        """Asks for a look now, and returns the newest version known after at most `wait` seconds.

        Warns as `newest` does.
        """
        poller = self._poller
        if poller is None or poller.pid != os.getpid():
            if self._closed:
                return self.newest()
            poller = self._attach(poller)
        if poller.looked:
            poller.refresh(wait)
        return poller.newest()

    @property
    def errors(self) -> Counter[str]:
        """Looks that failed as a whole, by reason: unreachable, timeout, slow, or an error's name.

        Refused versions are counted in `rejections`.
        """
        return Counter() if self._poller is None else Counter(self._poller.errors)

    @property
    def rejections(self) -> Counter[str]:
        """Versions that the thread refused, by reason."""
        return Counter() if self._poller is None else Counter(self._poller.registry.rejections)

    def close(self) -> None:
        """Stops looking; `newest` goes on to return what it knew."""
        self._closed = True
        if self._release is not None:
            self._release()
            _reap()

    def _attach(self, inherited: _Poller | None) -> _Poller:
        _reap()
        place = self.registry.directory
        key = place if isinstance(place, str) else os.path.abspath(place)
        with _lock:
            # Another thread may have been here meanwhile.
            poller = self._poller
            if poller is not None and poller.pid == os.getpid():
                return poller
            poller = _pollers.get(key)
            if poller is None:
                known = None if inherited is None else inherited.current
                # A registry of its own, so that no two threads share what it remembers.
                own = Registry(self.registry.store)
                poller = _Poller(key, own, self.interval, self.timeout, known)
                _pollers[key] = poller
            poller.users += 1
            poller.hurry(self.interval)
            if self._release is not None:
                self._release.detach()
            # Runs in whatever thread allocates next, under whatever lock that thread holds, even
            # in one that another thread waits for: so it takes no lock, and `_reap` does the rest.
            self._release = weakref.finalize(self, _left.append, poller)
            self._release.atexit = False
            self._poller = poller
        return poller


class _Poller:
    def __init__(
        self,
        key: str,
        registry: Registry,
        interval: float,
        timeout: float,
        current: Newest | None,
    ):
        self.key = key
        self.pid = os.getpid()
        self.users = 0
        self.registry = registry
        self.interval = interval
        self.current = current
        self.errors: Counter[str] = Counter()
        self._wake = threading.Event()
        self._stopped = False
        self._turn = threading.Condition()
        self._begun = self._ended = 0
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._looked = threading.Event()
        self._warned: set[str] = set()
        self._messages: deque[str] = deque()
        self._looks = 0
        self._stamp: Any = None
        self._settled = False
        self._versions: list[int] | None = None
        self.thread = threading.Thread(target=self._run, name="metagrad-filter-watch", daemon=True)
        self.thread.start()

    def newest(self) -> Newest | None:
        if self.current is None and not self._looked.is_set():
            left = self._deadline - time.monotonic()
            if not self._looked.wait(max(0.0, left)) and "slow" not in self._warned:
                self._failed(
                    "slow",
                    f"{self.registry.directory} has not answered within {self._timeout:g} s; going "
                    "on without a scorer until it does.",
                )
        while self._messages:
            with contextlib.suppress(IndexError):  # another thread was faster
                warnings.warn(self._messages.popleft(), RuntimeWarning, stacklevel=3)
        return self.current

    def hurry(self, interval: float) -> None:
        if interval < self.interval:
            self.interval = interval
            self._wake.set()

    @property
    def looked(self) -> bool:
        return self._looked.is_set()

    def refresh(self, wait: float) -> None:
        with self._turn:
            # A look under way may have read the listing already, so the one after it is meant.
            wanted = self._begun + 1
            self._wake.set()
            self._turn.wait_for(lambda: self._ended >= wanted or self._stopped, wait)

    def stop(self) -> None:
        with self._turn:
            self._stopped = True
            self._turn.notify_all()
        self._wake.set()

    def _run(self) -> None:
        while not self._stopped:
            with self._turn:
                self._wake.clear()
                self._begun += 1
            try:
                self._look()
            except TimeoutError as error:
                self._failed("timeout", self._still(error))
            except OSError as error:
                self._failed("unreachable", self._still(error))
            # Whatever goes wrong here is told in `newest`; the thread stays, so that it can end.
            except Exception as error:
                self._failed(type(error).__name__, self._still(error))
            self._looked.set()
            with self._turn:
                self._ended = self._begun
                self._turn.notify_all()
            _reap()
            self._wake.wait(self.interval)

    def _still(self, error: Exception) -> str:
        acting = "no version" if self.current is None else f"version {self.current.version}"
        return (
            f"{self.registry.directory} cannot be looked at ({type(error).__name__}: {error}); "
            f"{acting} stays in service."
        )

    def _failed(self, reason: str, message: str) -> None:
        self.errors[reason] += 1
        if reason not in self._warned:
            self._warned.add(reason)
            self._messages.append(message)

    def _look(self) -> None:
        registry = self.registry
        self._looks += 1
        stamp = registry.store.stamp(FOLDER)
        same = stamp is not None and stamp == self._stamp
        if same and self._settled and self._looks % _LIST_EVERY:
            return
        versions = registry.versions()
        # Taken before the listing, and trusted from the second listing on: what is published in
        # the same tick of the file system's clock as the first is in the second.
        self._stamp, self._settled = stamp, same
        if versions == self._versions:
            return
        found = registry.look()
        self._messages.extend(registry.unseen(found.refused))
        passing = any(error.reason in _PASSING for _, error in found.refused)
        self._versions = None if passing else versions
        self._settled = self._settled and not passing
        if found.version is not None and found.manifest is not None:
            self.current = Newest(found.version, found.scorer, found.manifest)


_lock = threading.RLock()
_pollers: dict[str, _Poller] = {}
_left: deque[_Poller] = deque()


def _reap() -> None:
    """Ends the threads that nobody uses any more; called where no lock is held."""
    while True:
        try:
            poller = _left.popleft()
        except IndexError:
            return
        if poller.pid != os.getpid():
            continue
        with _lock:
            poller.users -= 1
            if poller.users <= 0:
                poller.stop()
                if _pollers.get(poller.key) is poller:
                    del _pollers[poller.key]


def _forget() -> None:
    # A fork copies neither threads nor what other threads were about to do with the lock.
    global _lock
    _lock = threading.RLock()
    _pollers.clear()


def _stop_all() -> None:
    # A thread that comes back from native code while the interpreter ends may bring it down.
    deadline = time.monotonic() + _EXIT_SECONDS
    pollers = list(_pollers.values())
    for poller in pollers:
        poller.stop()
    for poller in pollers:
        poller.thread.join(max(0.0, deadline - time.monotonic()))


os.register_at_fork(after_in_child=_forget)
atexit.register(_stop_all)
