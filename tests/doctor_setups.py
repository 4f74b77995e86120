"""Models that the doctor is asked about, as a user would name them: `doctor_setups:sound`."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metagrad_filter as mgf
from metagrad_filter.metagradient.trajectory import run

IDS, TOKENS = 8, 7
FACTORY = functools.partial(optax.adamw, b2=0.95, weight_decay=0.01)
CONFIG = mgf.CalibrationConfig(
    horizon=6, trajectories=2, batch_windows=8, learning_rate_scale=0.25, vocab_size=IDS
)
number = 3


@dataclass(frozen=True)
class BigramLoss:
    """Nats per token under a table of next-token logits."""

    def __call__(self, params, windows):
        log_p = jax.nn.log_softmax(params["table"][windows[:, :-1]])
        return -jnp.take_along_axis(log_p, windows[:, 1:, None], axis=2)[..., 0].mean(axis=1)


def upwards(count, seed):
    """Windows that count upwards."""
    first = np.random.default_rng(seed).integers(0, IDS, (count, 1))
    return ((first + np.arange(TOKENS)) % IDS).astype(np.int32)


def stream():
    """Half of the windows count upwards, half are noise."""
    noise = np.random.default_rng(2).integers(0, IDS, (100, TOKENS), dtype=np.int32)
    return np.random.default_rng(3).permutation(np.concatenate([upwards(100, 1), noise]))


def target():
    return mgf.HeldOutLoss(upwards(32, 5))


@functools.cache
def proxy():
    """A bigram table some way into training."""
    optimizer, params = FACTORY(0.02), {"table": jnp.zeros((IDS, IDS))}
    batches = stream()[:160].reshape(10, 16, TOKENS)
    params, state, _ = jax.jit(functools.partial(run, BigramLoss(), optimizer))(
        params, optimizer.init(params), batches, jnp.ones((10, 16))
    )
    return mgf.Proxy(BigramLoss(), params, state, FACTORY, 0.02)


def sound():
    return _calibrator(proxy())


def diverging():
    return _calibrator(replace(proxy(), learning_rate=1e38))


def wrong():
    return number


def broken():
    raise KeyError("checkpoint")


def _calibrator(model):
    folder = tempfile.mkdtemp(prefix="doctor-")
    return mgf.Calibrator(folder, proxy=model, target=target(), windows=stream(), config=CONFIG)
