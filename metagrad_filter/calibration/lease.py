"""One calibrator per run directory: a file lock where locks exist, and a heartbeat.

    with Lease(run_dir).holding(timeout=0): ...

The lock `run_dir/lease/.lock` belongs to the process: the kernel frees it when its holder dies,
however it dies. The heartbeat `run_dir/lease/holder.json` covers what locks do not: several
machines on a shared disk, and file systems without locks. The holder changes it four times a
period; whoever waits takes over once it has not seen it change for a period and a quarter.

Age is what the waiting process measures on its own monotonic clock since it last saw a change. No
time is written down, so clocks that differ or jump change nothing. Cost: a file of a hundred bytes
four times a period.

Where locks are missing, two processes may claim a stale lease at once; each waits and looks again
whose claim stands. A holder that was away for longer than that (a machine asleep) finds another's
name at its next beat and is no longer `held`; versions are never overwritten either way, for the
registry sees to that itself.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from metagrad_filter.errors import ConfigError
from metagrad_filter.files import canonical_json, read_bounded, replace_file

try:
    import fcntl
except ImportError:  # Windows has no fcntl; the heartbeat decides alone there.
    fcntl = None

FOLDER = "lease"

_BEATS = 4  # a period
_STALE = 1.25  # periods without a change; with the settling below, under 2
_SETTLE = 0.1  # periods until a claim without lock is looked at again
_LIMIT = 4096


class Lease:
    """The right to calibrate a run directory, for one process at a time.

    Args:
      run_dir: the run directory, local or on a shared disk.
      period: seconds; a dead holder is replaced within two of them, at once on its own machine.

    Raises:
      ConfigError: `period` is not a positive number of seconds.
    """

    def __init__(self, run_dir: str | Path, period: float = 30.0):
        if isinstance(period, bool) or not (0 < period < math.inf):
            raise ConfigError(f"period={period!r}; expected a positive number of seconds.")
        self._folder = Path(run_dir) / FOLDER
        self._holder_path = self._folder / "holder.json"
        self._period = period
        self._token = secrets.token_hex(8)
        self._lock: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._held = False
        # What this process has seen of the present holder's heartbeat, and since when.
        self._seen: tuple[Any, float] | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lease, as of its last heartbeat."""
        return self._held

    def acquire(
        self, timeout: float | None = None, *, stopped: Callable[[], bool] = lambda: False
    ) -> bool:
        """Takes the lease, waiting for it if need be.

        Args:
          timeout: seconds to wait at most; 0 looks once, None waits for as long as it takes.
          stopped: asked several times a period; True ends the wait.

        Returns:
          Whether the lease is held now. Raises `OSError` when `run_dir` cannot be written.
        """
        if self._held:
            return True
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not stopped():
            if self._try():
                return True
            left = end - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, self._period / 20, 1.0))
        return False

    def release(self) -> None:
        """Gives the lease back; the next holder need not wait. Without it, nothing happens."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._held:
            self._held = False
            with contextlib.suppress(OSError):  # the next one then finds it stale
                if self._claimed_by_me():
                    self._holder_path.unlink(missing_ok=True)
        self._unlock()

    @contextlib.contextmanager
    def holding(self, timeout: float | None = 0) -> Iterator[Lease]:
        """Holds the lease for a block.

        Raises:
          ConfigError: another process holds it still when the time is over.
        """
        if not self.acquire(timeout):
            raise ConfigError(self.refusal())
        try:
            yield self
        finally:
            self.release()

    def refusal(self) -> str:
        """Says who holds the lease and what to do."""
        holder = self._read() or {}
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        return (
            f"{self._folder.parent} is being calibrated by {who}; expected one calibrator per run "
            "directory. Wait for it or end it, or use `metagrad-filter calibrate --watch`, which "
            "waits."
        )

    def _try(self) -> bool:
        self._folder.mkdir(parents=True, exist_ok=True)
        locked = self._take_lock()
        if locked is False:
            self._seen = None  # it lives; what a heartbeat said before it took over is old
            return False
        try:
            taken = self._claim(locked)
        except BaseException:
            self._unlock()
            raise
        if not taken:
            self._unlock()
            return False
        self._held, self._seen = True, None
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._keep, args=(self._stop,), name="metagrad-lease", daemon=True
        )
        self._thread.start()
        return True

    def _claim(self, locked: bool | None) -> bool:
        holder = self._read()
        # A lock that was free proves that nobody on this machine holds the lease.
        free = holder is None or (locked is True and holder.get("machine") == _machine())
        if not free and not self._stale(holder):
            return False
        self._beat(0)
        if locked is True and free:
            return True
        # Without a lock, or across machines, another may have claimed it just now too.
        time.sleep(_SETTLE * self._period)
        return self._claimed_by_me()

    def _keep(self, stop: threading.Event) -> None:
        count = 0
        while not stop.wait(self._period / _BEATS):
            count += 1
            try:
                holder = self._read()
                if holder is not None and holder.get("token") != self._token:
                    self._held = False
                    return
                self._beat(count)
            except OSError:
                # A full disk for a moment is no reason to stop; if it lasts, where there is no
                # lock another takes over, and this process learns of it at its next beat.
                continue

    def _stale(self, holder: dict[str, Any] | None) -> bool:
        now = time.monotonic()
        if self._seen is None or self._seen[0] != holder:
            self._seen = holder, now
        return now - self._seen[1] >= _STALE * self._period

    def _beat(self, count: int) -> None:
        record = {
            "token": self._token,
            "host": platform.node(),
            "machine": _machine(),
            "pid": os.getpid(),
            "beat": count,
        }
        replace_file(self._holder_path, canonical_json(record), mode=0o644)

    def _read(self) -> dict[str, Any] | None:
        """The heartbeat; {} where it is damaged, which ages like any other, None without one."""
        try:
            found = json.loads(read_bounded(self._holder_path, _LIMIT))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _claimed_by_me(self) -> bool:
        return (self._read() or {}).get("token") == self._token

    def _take_lock(self) -> bool | None:
        """True: locked, False: another process has it, None: there are no locks here."""
        if fcntl is None:
            return None
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        handle = os.open(self._folder / ".lock", flags, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        except OSError:
            os.close(handle)
            return None
        self._lock = handle
        return True

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _machine() -> str:
    """Identifies this boot of this machine; locks reach as far, host names may repeat."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()
