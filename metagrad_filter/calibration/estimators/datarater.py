"""DataRater's metagradient: the estimator of record cut down to two inner steps.

What is computed: -dPhi/dw of a window over T=2 optimizer steps of the raw stream, averaged over
both steps and over as many trajectories as cost what the estimator of record would (at equal cost
there are many, for two steps are short; each pays a gradient of the outer metric, too).

Where it deviates from the paper: there the metagradient of a batch's own weights, a softmax over
the scores that a 50M-parameter rater gives the batch, trains the rater through Adam and a
population of inner models that are reset; here it is a label, and the scorer is fitted to it. The
outer metric is the whole target part, not a sample of it, and the moments are the live ones.

Cost: that of the estimator of record.

References:
  Calian et al., 2025, https://arxiv.org/abs/2505.17895, section 2 and algorithm 1 (the truncated
  window of two updates).
"""

from __future__ import annotations

import numpy as np

from metagrad_filter.calibration.estimators.probing import probed
from metagrad_filter.calibration.estimators.task import SWEEP_COST, Estimate, Task
from metagrad_filter.metagradient.diagnostics.retraining import passes_over

STEPS = 2


def datarater(task: Task) -> Estimate:
    """Scores windows by -dPhi/dw over two steps."""
    every = np.arange(len(task.source))
    return probed(
        task,
        lambda rng, count: passes_over(rng, every, count),
        horizon=STEPS,
        trajectories=equal_cost(task),
    )


def equal_cost(task: Task) -> int:
    """Two-step trajectories for what those of the configuration cost, at least one a half."""
    config = task.config

    def cost(steps: int) -> float:
        return steps * config.batch_windows * SWEEP_COST + task.target_count

    budget = config.trajectories * cost(config.inner_steps)
    return max(2, round(budget / cost(STEPS)))
