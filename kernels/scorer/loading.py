"""Native code where it loads, numpy elsewhere: what both kinds of scorer have in common.

load("_ngram_bag", "text scorer") -> module or None, with one warning per process
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

NO_NATIVE = "METAGRAD_FILTER_NO_NATIVE"
ISA = "METAGRAD_FILTER_ISA"


def forced_reference() -> bool:
    """Whether the environment asks for numpy."""
    return os.environ.get(NO_NATIVE) == "1"


@functools.cache
def load(module: str, scorer: str) -> ModuleType | None:
    """Returns a native module of this folder, or None where it does not load."""
    try:
        return importlib.import_module(f"metagrad_filter.kernels.scorer.{module}")
    except ImportError as error:
        warn(scorer, f"did not load ({error})")
        return None


@functools.cache
def warn(scorer: str, what: str) -> None:
    """Says once per process and reason that numpy takes over."""
    warnings.warn(
        f"The native {scorer} {what}; scoring continues with numpy, same results, many times "
        f"slower. Reinstall the package, or set {NO_NATIVE}=1 to choose numpy without this "
        "warning.",
        RuntimeWarning,
        stacklevel=5,
    )
