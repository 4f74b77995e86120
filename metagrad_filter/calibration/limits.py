"""What a calibrating process may use of the machine that trains: priority, threads, device.

Environment variables are read when JAX starts its backends, so limits are applied at the start of a
process. Importing this imports no jax.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from metagrad_filter.errors import ConfigError

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")


@dataclass(frozen=True)
class Limits:
    """Limits of a calibrating process.

    Attributes:
      niceness: added to the process's own, 0 to 19; higher yields more to training.
      threads: of XLA on the CPU and of numpy; None leaves them as they are.
      device: "cpu", "gpu" (all that are visible), the index of one GPU, or None for JAX's choice.
        On a GPU, memory is taken as it is needed and not ahead, for training may use the same one.

    Raises:
      ConfigError: a field is out of its domain.
    """

    niceness: int = 10
    threads: int | None = None
    device: str | int | None = None

    def __post_init__(self):
        if type(self.niceness) is not int or not 0 <= self.niceness <= 19:
            raise ConfigError(f"niceness={self.niceness!r}; expected an integer from 0 to 19.")
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise ConfigError(f"threads={self.threads!r}; expected a positive integer or None.")
        index = type(self.device) is int and self.device >= 0
        if not (self.device in (None, "cpu", "gpu") or index) or self.device is True:
            raise ConfigError(
                f"device={self.device!r}; expected 'cpu', 'gpu', the index of a GPU, or None."
            )

    def apply(self) -> None:
        """Limits this process; before JAX has computed anything.

        Raises:
          ConfigError: JAX has started already, so that threads or device cannot be set any more.
        """
        wanted = self.environment(os.environ.get("XLA_FLAGS", ""))
        if wanted and _jax_has_started():
            raise ConfigError(
                f"threads={self.threads!r} and device={self.device!r} cannot be set, JAX has "
                "started in this process; apply limits first, in a process of its own."
            )
        os.environ.update(wanted)
        platforms = wanted.get("JAX_PLATFORMS")
        if platforms is not None and "jax" in sys.modules:
            # It has read the variable when it was imported.
            sys.modules["jax"].config.update("jax_platforms", platforms)
        os.nice(self.niceness)

    def environment(self, xla_flags: str = "") -> dict[str, str]:
        """The environment variables that these limits are made of.

        Args:
          xla_flags: what XLA_FLAGS holds already.
        """
        found: dict[str, str] = {}
        if self.threads is not None:
            found = dict.fromkeys(_THREADS, str(self.threads))
            if self.threads == 1:
                flag = "--xla_cpu_multi_thread_eigen=false"
                found["XLA_FLAGS"] = f"{xla_flags} {flag}".strip()
        if self.device == "cpu":
            found["JAX_PLATFORMS"] = "cpu"
        elif self.device is not None:
            found["JAX_PLATFORMS"] = "cuda,cpu"
            found["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
            if self.device != "gpu":
                found["CUDA_VISIBLE_DEVICES"] = str(self.device)
        return found


def _jax_has_started() -> bool:
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bool(bridge.backends_are_initialized())
