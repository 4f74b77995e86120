"""Streaming data filter for pretraining loaders, learned from metagradients.

`import metagrad_filter as mgf` is cheap: every public name is imported from its module when it is
first used, so a loader worker that filters never imports jax through this package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    # Filtering: the hot lane.
    "score_filter": "metagrad_filter.transform",
    "TextWindows": "metagrad_filter.windows",
    "SeriesWindows": "metagrad_filter.windows",
    "Cap": "metagrad_filter.selection",
    "counters": "metagrad_filter.counting",
    "Scorer": "metagrad_filter.scorer.scorer",
    "SeriesScorer": "metagrad_filter.scorer.series",
    "Registry": "metagrad_filter.registry",
    "Ledger": "metagrad_filter.ledger",
    "SpooledWindows": "metagrad_filter.spool",
    # Metagradients and calibration: the cold lane.
    "metagradients": "metagrad_filter.metagradient",
    "probe_scores": "metagrad_filter.metagradient",
    "check_metagradients": "metagrad_filter.metagradient",
    "linear_datamodeling_score": "metagrad_filter.metagradient",
    "split_half_reliability": "metagrad_filter.metagradient",
    "tilt_check": "metagrad_filter.metagradient",
    "fit_scorer": "metagrad_filter.scorer.fit",
    "CalibrationConfig": "metagrad_filter.calibration.config",
    "Calibrator": "metagrad_filter.calibration.calibrator",
    "Checkpoints": "metagrad_filter.calibration.checkpoint",
    "warm_moments": "metagrad_filter.calibration.warm",
    "Proxy": "metagrad_filter.proxy",
    "HeldOutLoss": "metagrad_filter.targets",
    "GuardedTarget": "metagrad_filter.targets",
    # Errors.
    "MetagradFilterError": "metagrad_filter.errors",
    "ConfigError": "metagrad_filter.errors",
    "WindowError": "metagrad_filter.errors",
    "DataError": "metagrad_filter.errors",
    "ScorerRejected": "metagrad_filter.errors",
    "PublishFailed": "metagrad_filter.errors",
    "StateMismatch": "metagrad_filter.errors",
    "NonFiniteMetagradient": "metagrad_filter.errors",
    "TrajectoryDiverged": "metagrad_filter.errors",
    "CalibrationFailed": "metagrad_filter.errors",
}
_MODULES = ("adapters", "errors", "kernels")

if TYPE_CHECKING:
    from metagrad_filter.counting import counters as counters
    from metagrad_filter.errors import CalibrationFailed as CalibrationFailed
    from metagrad_filter.errors import ConfigError as ConfigError
    from metagrad_filter.errors import DataError as DataError
    from metagrad_filter.errors import MetagradFilterError as MetagradFilterError
    from metagrad_filter.errors import NonFiniteMetagradient as NonFiniteMetagradient
    from metagrad_filter.errors import PublishFailed as PublishFailed
    from metagrad_filter.errors import ScorerRejected as ScorerRejected
    from metagrad_filter.errors import StateMismatch as StateMismatch
    from metagrad_filter.errors import TrajectoryDiverged as TrajectoryDiverged
    from metagrad_filter.errors import WindowError as WindowError
    from metagrad_filter.ledger import Ledger as Ledger
    from metagrad_filter.registry import Registry as Registry
    from metagrad_filter.scorer.scorer import Scorer as Scorer
    from metagrad_filter.scorer.series import SeriesScorer as SeriesScorer
    from metagrad_filter.selection import Cap as Cap
    from metagrad_filter.spool import SpooledWindows as SpooledWindows
    from metagrad_filter.transform import score_filter as score_filter
    from metagrad_filter.windows import SeriesWindows as SeriesWindows
    from metagrad_filter.windows import TextWindows as TextWindows


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_MODULES})
