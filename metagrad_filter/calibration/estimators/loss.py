"""Low perplexity: keep what the model predicts well already.

What is computed: `score = -loss(window)` at the live parameters. It has no outer metric and no
randomness: every part of the target gives the same scores and both halves are equal, so there is no
split-half reliability.

Cost: a forward pass a window.

References:
  Wenzek et al., 2020, https://arxiv.org/abs/1911.00359, section 4.2 (CCNet; there by a model of the
  target, here by the model in training).
"""

from __future__ import annotations

import numpy as np

from metagrad_filter.calibration.estimators.task import FORWARD_COST, Estimate, Task, naming
from metagrad_filter.calibration.estimators.windows import finite_scores, losses_of


def loss(task: Task) -> Estimate:
    """Scores windows by minus their loss."""
    with task.clock("labels"), naming(task.positions, "scoring"):
        task.progress("labels", 0, len(task.windows))
        scores = finite_scores(
            -losses_of(task.proxy.loss, task.proxy.params, task.windows), "losses"
        )
        task.progress("labels", len(task.windows), len(task.windows))
    shape = (len(task.target.parts), 2, len(scores))
    return Estimate(
        np.broadcast_to(scores, shape).copy(),
        independent=False,
        gradients=FORWARD_COST * len(scores),
    )
