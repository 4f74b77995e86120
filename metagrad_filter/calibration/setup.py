"""Finds the user's own `Calibrator` by name: `package.module:function`, which builds it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from metagrad_filter.calibration.calibrator import Calibrator
from metagrad_filter.errors import ConfigError


def load_setup(spec: str) -> Calibrator:
    """Calls the function that a specification names.

    The current directory is searched too, as `python -m` does.

    Args:
      spec: `package.module:function`; the function takes no arguments and returns a `Calibrator`.

    Raises:
      ConfigError: the specification cannot be read, imported or called, or what it returns is no
        `Calibrator`. An exception that the function raises itself is the cause of the error.
    """
    module_name, colon, name = spec.partition(":")
    named = bool(module_name) and all(part.isidentifier() for part in module_name.split("."))
    if not colon or not named or not name.isidentifier():
        raise ConfigError(
            f"setup={spec!r}; expected package.module:function, a function without arguments that "
            "returns a Calibrator."
        )
    build = _function(spec, module_name, name)
    try:
        found = build()
    except Exception as error:
        raise ConfigError(f"{spec} raised {type(error).__name__}: {error}") from error
    if not isinstance(found, Calibrator):
        raise ConfigError(
            f"{spec} returned a {type(found).__name__}; expected a Calibrator, the one that "
            "training calls round() of."
        )
    return found


def _function(spec: str, module_name: str, name: str) -> Callable[[], object]:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ConfigError(
            f"setup={spec!r}: importing {module_name} raised {type(error).__name__}: {error}; run "
            "the command where python can import it."
        ) from error
    build = getattr(module, name, None)
    if not callable(build):
        functions = sorted(n for n, v in vars(module).items() if callable(v) and n[0] != "_")
        raise ConfigError(
            f"setup={spec!r}: {module_name} has no function {name}; it has {functions or 'none'}."
        )
    return build
