"""Settings of a calibrator that runs beside training: one TOML file, read and validated.

    Settings.load("calibrate.toml").calibrator()

Tables and keys are those of the dataclasses below and of `CalibrationConfig`; a key that none of
them has is refused by name, with the nearest one there is. `example()` is a file with every
default. Importing this imports no jax, so that limits can be applied first.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metagrad_filter.calibration.config import CalibrationConfig
from metagrad_filter.calibration.limits import Limits
from metagrad_filter.calibration.monitoring import Monitoring
from metagrad_filter.errors import ConfigError

if TYPE_CHECKING:
    from metagrad_filter.calibration.calibrator import Calibrator


@dataclass(frozen=True)
class Schedule:
    """When rounds are run. A request (`request_round`) is always one, and so is the first.

    Attributes:
      rounds: how many to run, None for no end.
      pause_seconds: least time between two rounds, of the monotonic clock.
      every_steps: a round is due when training is that many steps further than at the last one.
      on_drift: a standing alarm of the drift monitor asks for a round. With neither this nor
        `every_steps`, a round is due whenever the pause is over.
      most_failures: how many rounds in a row may raise before the loop ends with what the last one
        raised, None for no end.

    Raises:
      ConfigError: a field is out of its domain.
    """

    rounds: int | None = None
    pause_seconds: float = 0.0
    every_steps: int | None = None
    on_drift: bool = False
    most_failures: int | None = None

    def __post_init__(self):
        for name in ("rounds", "every_steps", "most_failures"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}={value!r}; expected a positive integer or None.")
        pause = self.pause_seconds
        if type(pause) not in (int, float) or not 0 <= pause < math.inf:
            raise ConfigError(f"pause_seconds={pause!r}; expected a number of seconds >= 0.")
        if type(self.on_drift) is not bool:
            raise ConfigError(f"on_drift={self.on_drift!r}; expected true or false.")


_TABLES: tuple[tuple[str, type, str], ...] = (
    ("calibration", CalibrationConfig, "replaces fields of the Calibrator's configuration"),
    ("worker", Limits, "what this process may use"),
    ("schedule", Schedule, "when rounds are run"),
    ("monitor", Monitoring, "how drift is watched, and where numbers go besides the run directory"),
)


@dataclass(frozen=True)
class Settings:
    """What `metagrad-filter calibrate` is told.

    Attributes:
      run_dir: the run directory, that of the `Calibrator` as well.
      setup: `package.module:function`, a function without arguments that returns the `Calibrator`.
      calibration: fields of `CalibrationConfig` that replace those of the `Calibrator`.
      worker: limits of the process.
      schedule: when rounds are run.
      monitor: how drift is watched, and where its numbers go.

    Raises:
      ConfigError: a field is out of its domain.
    """

    run_dir: str
    setup: str
    calibration: dict[str, Any] = field(default_factory=dict)
    worker: Limits = field(default_factory=Limits)
    schedule: Schedule = field(default_factory=Schedule)
    monitor: Monitoring = field(default_factory=Monitoring)

    def __post_init__(self):
        for name in ("run_dir", "setup"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{name}={value!r}; expected a text that is not empty.")
        fields = _table(self.calibration, CalibrationConfig, "calibration")
        CalibrationConfig(**fields)
        object.__setattr__(self, "calibration", fields)

    @classmethod
    def load(cls, path: str | Path) -> Settings:
        """Reads a TOML file; relative paths in it are taken from the current directory.

        Raises:
          ConfigError: the file cannot be read, is not TOML, or holds what is not expected.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"settings cannot be read from {path}: {error}; expected a TOML file."
            ) from error
        try:
            return cls.parse(text)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def parse(cls, text: str) -> Settings:
        """Reads the text of a TOML file; raises `ConfigError`."""
        try:
            found = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"this is not TOML: {error}; see `example()`.") from error
        known = [f.name for f in dataclasses.fields(cls)]
        _check_names(found, known, "")
        for name in ("run_dir", "setup"):
            if name not in found:
                raise ConfigError(f"{name} is missing; expected {name} = '...' before any table.")
        tables = {name: _table(found.get(name, {}), kind, name) for name, kind, _ in _TABLES}
        return cls(
            found["run_dir"],
            found["setup"],
            tables["calibration"],
            Limits(**tables["worker"]),
            Schedule(**tables["schedule"]),
            Monitoring(**tables["monitor"]),
        )

    def calibrator(self) -> Calibrator:
        """Builds the `Calibrator` that `setup` names; imports jax.

        Raises:
          ConfigError: `setup` cannot be called, or its `Calibrator` has another run directory.
        """
        from metagrad_filter.calibration.setup import load_setup

        found = load_setup(self.setup)
        if found.run_dir != Path(self.run_dir).absolute():
            raise ConfigError(
                f"run_dir={self.run_dir!r}, but the Calibrator of {self.setup} has "
                f"{str(found.run_dir)!r}; expected the same run directory in both."
            )
        found.configure(**self.calibration)
        return found


def example() -> str:
    """A settings file with every default, and what has none as a comment."""
    lines = [
        'run_dir = "run"',
        'setup = "training.calibration:calibrator"  # a function that returns the Calibrator',
    ]
    for name, kind, about in _TABLES:
        lines += ["", f"[{name}]  # {about}"]
        for entry in dataclasses.fields(kind):
            if entry.default is None:
                lines.append(f"# {entry.name} =")
            else:
                lines.append(f"{entry.name} = {_toml(entry.default)}")
    return "\n".join(lines) + "\n"


def _table(found: Any, kind: type, table: str) -> dict[str, Any]:
    """Values of a table as the fields of `kind` want them."""
    if not isinstance(found, dict):
        raise ConfigError(f"{table}={found!r}; expected a table, [{table}].")
    hints = typing.get_type_hints(kind)
    _check_names(found, [f.name for f in dataclasses.fields(kind)], f"[{table}] ")
    return {name: _value(value, hints[name], f"[{table}] {name}") for name, value in found.items()}


def _check_names(found: dict[str, Any], known: list[str], where: str) -> None:
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            advice = f"did you mean {near[0]}?" if near else f"expected one of {sorted(known)}."
            raise ConfigError(f"{where}{name} is no setting; {advice}")


def _value(value: Any, hint: Any, where: str) -> Any:
    """Checks a value's type; integers stand for floats, arrays for tuples."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
            return tuple(_value(v, typing.get_args(kind)[0], f"{where} item") for v in value)
        if type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
    names = [_kind_name(kind) for kind in kinds if kind is not type(None)]
    raise ConfigError(
        f"{where} is {value!r}, {_kind_name(type(value))}; expected {' or '.join(names)}."
    )


def _kind_name(kind: Any) -> str:
    if typing.get_origin(kind) is tuple or kind is list:
        return "an array"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    return names.get(kind, "a table" if kind is dict else "a date or time")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else repr(value)
