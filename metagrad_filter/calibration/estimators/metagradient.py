"""The estimator of record: metagradients through the steps for which the selection will act.

What is computed: R trajectories of T optimizer steps from the live parameters and moments, each on
fresh batches of the raw (unfiltered) stream at a cooled learning rate; the cotangent of the
gradient, averaged over all insertion steps and over the trajectories of a half, scores every window
by one forward-mode product, -dPhi/dw, with the window's gradient where the trajectories start. Each
of these is load-bearing: the step-0 cotangent, the filtered stream, a short horizon or the live
rate give labels that look reliable and select badly.

Cost: `R T B 3.66` gradients for the probe and 1.6 for each label, halves included.

References:
  Engstrom et al., 2025, https://arxiv.org/abs/2503.13751, section 3 and algorithm 1 (REPLAY). It
  differs in that a window need not be in the trajectory (its weight there is a virtual zero), and
  that moments are warm.
"""

from __future__ import annotations

import numpy as np

from metagrad_filter.calibration.estimators.probing import probed
from metagrad_filter.calibration.estimators.task import Estimate, Task
from metagrad_filter.metagradient.diagnostics.retraining import passes_over


def metagradient(task: Task) -> Estimate:
    """Scores windows by -dPhi/dw over `config.inner_steps` steps of the raw stream."""
    every = np.arange(len(task.source))
    return probed(
        task,
        lambda rng, count: passes_over(rng, every, count),
        horizon=task.config.inner_steps,
        trajectories=task.config.trajectories,
    )
