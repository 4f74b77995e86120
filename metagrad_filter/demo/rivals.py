"""The rivals that need a language model: low perplexity and RHO-loss.

References:
  Mindermann et al., 2022, https://arxiv.org/abs/2206.07137 (reducible hold-out loss).
"""

from __future__ import annotations

import numpy as np

from metagrad_filter.demo.training import (
    State,
    continued_state,
    falling_rates,
    train,
    window_losses,
)
from metagrad_filter.proxy.proxy import Proxy

_REFERENCE_BATCH = 64


def low_perplexity_scores(losses: np.ndarray) -> np.ndarray:
    """Keeps what the base model already predicts well: score = -loss, `(N,)`."""
    return -losses


def rho_loss_scores(losses: np.ndarray, reference_losses: np.ndarray) -> np.ndarray:
    """Reducible hold-out loss: base loss - loss of a model tuned on the target, `(N,)`."""
    return losses - reference_losses


def tuned_reference(
    proxy: Proxy,
    target: np.ndarray,
    judge: np.ndarray,
    *,
    steps: tuple[int, ...],
    seed: int,
) -> State:
    """Tunes the base on target windows: RHO-loss's reference model.

    The number of steps is chosen on windows that are not trained on, for a reference that has
    memorised its few target windows makes RHO-loss look worse than it is.

    Args:
      proxy: the base, in training.
      target: `(n, T)` windows to tune on.
      judge: `(m, T)` windows that choose the number of steps.
      steps: numbers of steps to try, ascending.
      seed: of the order.

    Returns:
      Parameters and state of the reference with the lowest loss on `judge`: the last that improved
      as the number of steps grew.
    """
    rng = np.random.default_rng(seed)
    best: tuple[float, State] | None = None
    for count in steps:
        rates = falling_rates(proxy.learning_rate, count)
        batches = target[rng.integers(0, len(target), (count, _REFERENCE_BATCH))]
        state = train(proxy.loss, proxy.optimizer, rates, continued_state(proxy), batches)
        found = float(window_losses(proxy.loss, state[0], judge).mean())
        if best is not None and found >= best[0]:
            break
        best = (found, state)
    assert best is not None
    return best[1]
