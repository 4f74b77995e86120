"""What is installed: versions, devices, the native scorer or why it is absent, memory.

Nothing here computes; the cost is that of importing jax.
"""

from __future__ import annotations

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from metagrad_filter.metagradient.tape import available_host_bytes

_PACKAGES = ("metagrad-filter", "jax", "jaxlib", "optax", "flax", "grain", "numpy")
_NATIVE = "metagrad_filter.kernels.scorer._ngram_bag"


def inspect_installation() -> dict[str, Any]:
    """Looks at this installation; JSON types only.

    Returns:
      `versions` by package (None where it is missing), `devices` that jax sees, `native_scorer`
      with `loaded`, the `reason` where it is not and the `instruction_set` where it is, `memory`
      in bytes, and `problems`: a sentence
      for each thing that keeps the package from working. Scoring without native code is slower and
      gives the same results, so it is no problem.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    problems = []
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
            problems.append(f"{name} is not installed; reinstall metagrad-filter.")
    devices, problem = _devices()
    return {
        "versions": versions,
        "devices": devices,
        "native_scorer": native_scorer(),
        "memory": _memory(),
        "problems": [*problems, *([problem] if problem else [])],
    }


def native_scorer() -> dict[str, Any]:
    """Whether the scorer's native code runs in this process, and the reason where it does not."""
    from metagrad_filter.kernels import scorer  # pyright: ignore[reportMissingImports]

    if os.environ.get(scorer.NO_NATIVE) == "1":
        return {"loaded": False, "reason": f"{scorer.NO_NATIVE}=1 asks for the numpy reference"}
    try:
        importlib.import_module(_NATIVE)
    except ImportError as error:
        return {"loaded": False, "reason": f"{error}; numpy scores the same, several times slower"}
    return {"loaded": True, "reason": None, "instruction_set": scorer.isa()}


def _devices() -> tuple[list[str], str | None]:
    try:
        import jax

        found = jax.devices()
    except (ImportError, RuntimeError) as error:
        return [], f"jax finds no device: {error}; check JAX_PLATFORMS and the installed jaxlib."
    return [f"{device.platform}: {device.device_kind}" for device in found], None


def _memory() -> dict[str, int | None]:
    """Total and available main memory in bytes; None where the system does not tell."""
    name = "SC_PHYS_PAGES"
    known = name in getattr(os, "sysconf_names", {})
    return {
        "total_bytes": os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") if known else None,
        "available_bytes": available_host_bytes(),
    }
