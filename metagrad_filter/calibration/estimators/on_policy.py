"""Trajectories on the stream as the published versions would keep it, not on the raw one.

What is computed: as for the estimator of record, but each batch holds what a policy keeps of the
raw stream at the round's keep ratio: Gumbel top-k by logits `F = .7 F + .7 y` over the versions in
their order (y: a version's Gaussian rank scores of the block; none for a version of strength 0),
clipped to [-3, 3], and a tenth of the kept drawn uniformly. Without a version it is the estimator
of record.

What it measures is the marginal value of a window after the selection has been made, and top-k on
that un-selects what is working: it is right for small steps of a policy only (`bench/refresh.py`
compares both over a training run).

Cost: that of the estimator of record, and scores of `1 / keep_ratio` as many windows.

References:
  Kool et al., 2019, https://arxiv.org/abs/1903.06059, section 2.3 (Gumbel top-k).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from metagrad_filter.calibration.estimators.probing import probed
from metagrad_filter.calibration.estimators.task import Estimate, Task
from metagrad_filter.metagradient.diagnostics.retraining import passes_over
from metagrad_filter.scorer.scorer import Scorer
from metagrad_filter.selection import as_ratio, kept_before, rank_scores

MEMORY, STEP = 0.7, 0.7  # gamma and eta of the logits
LIMIT = 3.0
EXPLORED = 0.1
VERSIONS = 12  # older ones weigh less than .7 ** 12 = .014


def on_policy(task: Task) -> Estimate:
    """Scores windows by -dPhi/dw over trajectories of the kept stream."""
    config = task.config
    every = np.arange(len(task.source))
    ratio = as_ratio(config.keep_ratio)

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        # The smallest number of windows of which floor(n r) are kept.
        drawn = -(-count * ratio.denominator // ratio.numerator)
        candidates = passes_over(rng, every, drawn)
        kept = []
        for start in range(0, drawn, config.block_windows):
            block = candidates[start : start + config.block_windows]
            quota = kept_before(start + len(block), ratio) - kept_before(start, ratio)
            logits = policy_logits(task.source.take(block), task.versions)
            kept.append(block[policy_choice(rng, logits, quota)])
        return np.concatenate(kept)[:count]

    return probed(task, draw, horizon=config.inner_steps, trajectories=config.trajectories)


def policy_logits(windows: np.ndarray, versions: Sequence[Scorer]) -> np.ndarray:
    """`(n,)` float64 logits of a block under the moving average of versions, oldest first."""
    logits = np.zeros(len(windows))
    for scorer in versions[-VERSIONS:]:
        says = rank_scores(scorer.score(windows)) if scorer.strength else 0.0
        logits = MEMORY * logits + STEP * says
    return np.clip(logits, -LIMIT, LIMIT)


def policy_choice(rng: np.random.Generator, logits: np.ndarray, quota: int) -> np.ndarray:
    """`(quota,)` ascending positions: Gumbel top-k, and a tenth uniform from the others."""
    explored = int(EXPLORED * quota)
    order = np.argsort(-(logits + rng.gumbel(size=len(logits))), kind="stable")
    chosen, rest = order[: quota - explored], order[quota - explored :]
    return np.sort(np.concatenate([chosen, rng.permutation(rest)[:explored]]))
