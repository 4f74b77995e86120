"""What every benchmark writes: its record, the machine that it ran on, and lines of progress."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "grain")

_BEGAN = time.monotonic()


def environment(*packages: str) -> dict[str, Any]:
    """Machine, Python and package versions of a record.

    Args:
      *packages: names of distributions, `PACKAGES` by default; one that is absent becomes None.
    """
    return {
        "cpus": os.cpu_count(),
        "processor": processor(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **versions(packages or PACKAGES),
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes a record as indented JSON and makes its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def say(line: str) -> None:
    """Prints a line with the seconds since the benchmark began."""
    print(f"[{time.monotonic() - _BEGAN:6.0f} s] {line}", flush=True)


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Installed version of each distribution, None for one that is absent."""
    return {name: _version(name) for name in packages}


def processor() -> str:
    """The processor's model, in the operating system's words."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
