"""What every estimator is given and gives back, and the arithmetic that they share.

An estimator is a function `(Task) -> Estimate`: from the model where training stands, a target, a
source of raw windows and the windows to label, to two halves of scores. It publishes nothing and
keeps nothing; equal tasks have equal estimates.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from metagrad_filter.calibration.config import CalibrationConfig
from metagrad_filter.calibration.source import WindowSource
from metagrad_filter.errors import NonFiniteMetagradient, TrajectoryDiverged
from metagrad_filter.labels import gaussian_ranks
from metagrad_filter.proxy.proxy import Proxy
from metagrad_filter.scorer.scorer import Scorer
from metagrad_filter.targets import Target
from metagrad_filter.types import Progress, silent

# Window gradients: forward and backward of one window = 1.
FORWARD_COST = 1 / 3
SWEEP_COST = 3.66  # of a window in a step of a trajectory and its adjoint
PROBE_COST = 0.95  # of a window scored with a probe


class Stages:
    """Wall time by stage, summed over its uses: `with clock("fit"): ...`."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            spent = self.seconds.get(name, 0.0) + time.monotonic() - start
            self.seconds[name] = round(spent, 3)


@dataclass(frozen=True)
class Task:
    """Windows to label, and what their worth is measured with.

    Attributes:
      proxy: the model where training stands, with warm moments.
      target: outer metrics.
      source: raw windows.
      config: of the round.
      windows: `(N, T)` int32 or `(N, T, C)` float32, the windows to label.
      positions: `(N,)` of `windows` in the source, -1 where unknown; only errors name them.
      seed: of every random choice, for `numpy.random.default_rng`.
      versions: scorers published so far, oldest first; what a policy is made of.
      norms: `(N,)` that scores which are linear in a window's gradient are divided by, or None.
      progress: called with stage name, done and total; may raise.
      clock: notes what stages take.
    """

    proxy: Proxy
    target: Target
    source: WindowSource
    config: CalibrationConfig
    windows: np.ndarray
    positions: np.ndarray
    seed: Sequence[int] | int = 0
    versions: Sequence[Scorer] = ()
    norms: np.ndarray | None = None
    progress: Progress = silent
    clock: Stages = field(default_factory=Stages)

    @property
    def target_count(self) -> int:
        """Held-out windows that an evaluation of all outer metrics passes over."""
        return sum(len(part.target_windows) for part in self.target.parts.values())


@dataclass(frozen=True)
class Estimate:
    """Scores of a task's windows.

    Attributes:
      halves: `(K, 2, N)` float32, K parts of the target in their order; higher is better.
      independent: whether the halves are two independent measurements. Where a score has no
        randomness both are the same, and their correlation says nothing.
      gradients: what it cost, in window gradients.
      learning_rate_scale: inner learning rate as a share of the live one; None where no inner loop
        was run.
      tried: split-half correlation of each share that was tried.
      horizon: optimizer steps of a trajectory, None where none was run.
      masked_coordinates: coordinates without second moment, whose cotangent was set to zero.
      tape: what the sweeps kept, in words.
      norms: `(N,)` float32 that the scores were divided by, or None.
    """

    halves: np.ndarray
    independent: bool
    gradients: float
    learning_rate_scale: float | None = None
    tried: dict[float, float | None] = field(default_factory=dict)
    horizon: int | None = None
    masked_coordinates: int = 0
    tape: str = ""
    norms: np.ndarray | None = None


def combined(halves: np.ndarray, weights: Mapping[str, float]) -> np.ndarray:
    """`(2, N)` float32 of `(K, 2, N)`: raw scores of one part, else weighted means of ranks.

    Scores of different outer metrics have different units and monstrous tails, so what is averaged
    over parts are Gaussian ranks.
    """
    if len(halves) == 1:
        return halves[0]
    shares = np.array(list(weights.values()), np.float64)
    ranks = np.stack([[gaussian_ranks(half) for half in part] for part in halves])
    return np.einsum("k,khn->hn", shares / shares.sum(), ranks).astype(np.float32)


@contextmanager
def naming(positions: np.ndarray, what: str) -> Iterator[None]:
    """Turns positions in a batch, in errors of a measurement, into positions in the source."""
    try:
        yield
    except (NonFiniteMetagradient, TrajectoryDiverged) as error:
        places = positions if error.step is None else positions[error.step]
        found = places[list(error.windows)] if error.windows else np.empty(0, int)
        named = tuple(int(i) for i in found if i >= 0)
        shown = f" (windows {', '.join(map(str, named[:8]))} of the source)" if named else ""
        message = f"{what}: {error}{shown}"
        raise type(error)(message, step=error.step, windows=named) from error  # pyright: ignore[reportArgumentType]
