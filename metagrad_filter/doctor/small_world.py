"""A world small enough to retrain in hundreds: topics, a target, and a decoder in mid-training.

Windows are sequences of a topic's Markov chain over `VOCAB` tokens. Four topics are the target's
("good"), four are others ("off"), and corrupt windows are good ones with their tokens in random
order. Topics differ in how common they are, and in each window a share of the tokens, different
from window to window, is replaced by random ones; so windows of one kind differ in worth too. The
target holds the good topics in equal parts, with few replaced tokens.

`small_world` trains a decoder of about 15 thousand parameters for part of the way on the raw
mixture, in a few seconds, and hands it over with its warm moments.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagrad_filter.metagradient.trajectory import run
from metagrad_filter.proxy import DecoderConfig, DecoderLoss, Proxy, init_decoder
from metagrad_filter.targets import HeldOutLoss

VOCAB, LENGTH = 32, 17
KINDS = ("good", "off", "corrupt")
KIND_SHARES = (0.4, 0.4, 0.2)
TOPICS = 4  # of the target, and as many others
BATCH = 16
LEARNING_RATE = 1e-2
_BASE_STEPS = 600
_NOISE = 0.5  # largest share of replaced tokens
_TARGET_NOISE = 0.05
_FACTORY = functools.partial(optax.adamw, b2=0.95, weight_decay=0.01)


@dataclass(frozen=True, eq=False)
class SmallWorld:
    """A model in training and windows whose origin is known.

    Attributes:
      proxy: the decoder with its warm moments, at the live learning rate.
      target: held-out windows of the target; half of them is the outer metric.
      windows: `(N, LENGTH)` int32, the raw stream.
      kinds: `(N,)` int, positions in `KINDS`.
    """

    proxy: Proxy
    target: HeldOutLoss
    windows: np.ndarray
    kinds: np.ndarray


@functools.lru_cache(maxsize=2)
def small_world(*, seed: int = 0, count: int = 8192, held_out: int = 512) -> SmallWorld:
    """Builds the world and trains its base model.

    Args:
      seed: of topics, windows, initial parameters and order.
      count: windows of the raw stream.
      held_out: windows of the target.
    """
    rng = np.random.default_rng([seed, 0])
    chains = _chains(rng, 2 * TOPICS)
    common = rng.dirichlet(np.full(TOPICS, 2.0), size=2)
    windows, kinds = _stream(rng, chains, common, count + _BASE_STEPS * BATCH)
    topics = rng.integers(0, TOPICS, held_out)
    target = _sample(rng, chains[topics], np.full(held_out, _TARGET_NOISE))

    loss = DecoderLoss(
        DecoderConfig(
            vocab_size=VOCAB,
            n_positions=LENGTH - 1,
            n_embd=32,
            n_layer=1,
            n_head=2,
            activation_function="relu2",
            initializer_range=0.06,
        )
    )
    optimizer = _FACTORY(LEARNING_RATE)
    params = init_decoder(loss.config, seed=seed)
    base = windows[count:].reshape(_BASE_STEPS, BATCH, LENGTH)
    params, opt_state = _train(params, optimizer.init(params), base, loss=loss, optimizer=optimizer)
    return SmallWorld(
        proxy=Proxy(loss, params, opt_state, _FACTORY, LEARNING_RATE),
        target=HeldOutLoss(target, batch_size=256),
        windows=windows[:count],
        kinds=kinds[:count],
    )


@functools.partial(jax.jit, static_argnames=("loss", "optimizer"))
def _train(params, opt_state, batches, *, loss, optimizer):
    weights = jnp.ones(batches.shape[:2], jnp.float32)
    return run(loss, optimizer, params, opt_state, batches, weights)[:2]


def _chains(rng: np.random.Generator, count: int) -> np.ndarray:
    """`(count, VOCAB, VOCAB)` transition probabilities, a handful of likely successors each."""
    weights = rng.dirichlet(np.full(VOCAB, 0.03), size=(count, VOCAB))
    return 0.95 * weights + 0.05 / VOCAB


def _stream(
    rng: np.random.Generator, chains: np.ndarray, common: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    kinds = rng.choice(len(KINDS), count, p=KIND_SHARES)
    topics = np.where(
        kinds == KINDS.index("off"),
        TOPICS + rng.choice(TOPICS, count, p=common[1]),
        rng.choice(TOPICS, count, p=common[0]),
    )
    windows = _sample(rng, chains[topics], rng.uniform(0, _NOISE, count))
    corrupt = kinds == KINDS.index("corrupt")
    windows[corrupt] = rng.permuted(windows[corrupt], axis=1)
    return windows, kinds


def _sample(rng: np.random.Generator, chains: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """`(n, LENGTH)` int32: one sequence of each chain `(n, VOCAB, VOCAB)`, tokens replaced at rate
    `noise` `(n,)`."""
    count = len(chains)
    steps = np.cumsum(chains, axis=2)
    found = np.empty((count, LENGTH), np.int32)
    found[:, 0] = rng.integers(0, VOCAB, count)
    for t in range(1, LENGTH):
        row = steps[np.arange(count), found[:, t - 1]]
        drawn = (rng.random((count, 1)) > row).sum(axis=1)
        found[:, t] = np.minimum(drawn, VOCAB - 1)
    replaced = rng.random(found.shape) < noise[:, None]
    return np.where(replaced, rng.integers(0, VOCAB, found.shape), found).astype(np.int32)
