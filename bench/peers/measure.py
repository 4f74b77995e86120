"""One engine in a process of its own: what it returns, and what that costs.

Engines that are compared must not share an allocator, a thread pool or a warm cache, and must not
run at the same time. Each lives in a spawned process, pinned to one core, and runs when asked.
Seconds of CPU time count every thread of the process; on a busy machine they say more than seconds
of wall time. Memory is the peak of the resident set during a run over what the process held before
its first one, with its packages and data loaded. Linux only.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol


class Engine(Protocol):
    """What a process holds."""

    def run(self) -> Any:
        """Computes everything anew; the result must be picklable."""
        ...


class EngineProcess:
    """A spawned process that holds one engine.

    Args:
      make: importable function, called in the process as `make(*arguments)`.
      name: what error messages call it.

    Attributes:
      baseline_bytes: resident set once the engine was made.
    """

    def __init__(self, make: Callable[..., Engine], *arguments: Any, name: str):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments))
        self._process.start()
        theirs.close()
        self.baseline_bytes: int = self._receive()

    def run(self) -> tuple[Any, dict[str, float]]:
        """Runs the engine once.

        Returns:
          Its result, and the cost: `wall_s`, `cpu_s` and `peak_bytes` over the baseline.
        """
        self._pipe.send(True)
        result, cost = self._receive()
        cost["peak_bytes"] -= self.baseline_bytes
        return result, cost

    def stop(self) -> None:
        """Ends the process and waits for it."""
        self._pipe.send(False)
        self._process.join()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            sys.exit(
                f"the process of {self.name!r} ended early, with exit code "
                f"{self._process.exitcode}; its own error stands above."
            )


def _serve(pipe: Connection, make: Callable[..., Engine], arguments: tuple[Any, ...]) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before thread pools are sized
    engine = make(*arguments)
    pipe.send(_resident("VmRSS"))
    while pipe.recv():
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
        wall, cpu = time.perf_counter(), time.process_time()
        result = engine.run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        pipe.send((result, {"wall_s": wall, "cpu_s": cpu, "peak_bytes": _resident("VmHWM")}))


def _resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (peak since it was reset) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
