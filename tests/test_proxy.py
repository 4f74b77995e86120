"""The decoder proxy as a loss, its chunked cross-entropy, and the value that describes a job."""

import functools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import metagrad_filter as mgf
from metagrad_filter.errors import ConfigError
from metagrad_filter.proxy import DecoderConfig, DecoderLoss, init_decoder
from metagrad_filter.proxy.cross_entropy import token_cross_entropy
from metagrad_filter.proxy.decoder import _graph

CONFIG = DecoderConfig(vocab_size=19, n_positions=8, n_embd=8, n_layer=1, n_head=2)
LOSS = DecoderLoss(CONFIG)
batch_losses = jax.jit(LOSS)
WINDOWS = jnp.asarray(np.random.default_rng(0).integers(0, 19, (5, 9)), jnp.int32)


@pytest.fixture(scope="module")
def params():
    # Ten times the usual scale: a fresh decoder hardly looks at its context.
    return jax.tree.map(lambda p: p + 0.2 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), fresh())


@functools.cache
def fresh(seed=0):
    return init_decoder(CONFIG, seed=seed)


@jax.jit
def hidden_states(params, tokens):
    return nnx.merge(_graph(CONFIG), params)(tokens)


def test_a_position_sees_itself_and_what_came_before(params):
    tokens = WINDOWS[:, :8]
    before = hidden_states(params, tokens)
    for position in (0, 4, 7):
        changed = tokens.at[:, position].set((tokens[:, position] + 7) % 19)
        moved = np.abs(hidden_states(params, changed) - before).max(axis=(0, 2))
        np.testing.assert_allclose(moved[:position], 0, atol=1e-6)
        assert (moved[position:] > 1e-4).all()


def test_the_last_token_is_a_target_and_never_an_input(params):
    # 2 windows that differ in it share hidden states, and differ in one cross-entropy.
    losses = [batch_losses(params, WINDOWS.at[:, -1].set(token)) * 8 for token in (2, 3)]
    hidden = hidden_states(params, WINDOWS[:, :-1])[:, -1]
    embedding = params["wte"]["embedding"]
    np.testing.assert_allclose(
        losses[0] - losses[1], hidden @ (embedding[3] - embedding[2]), rtol=1e-3, atol=1e-4
    )


def test_a_fresh_decoder_is_uniform_and_gives_one_loss_per_window():
    losses = batch_losses(fresh(), WINDOWS)
    assert losses.shape == (5,) and losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, math.log(19), atol=0.05)


def test_windows_of_a_batch_do_not_see_each_other(params):
    losses = batch_losses(params, WINDOWS)
    np.testing.assert_allclose(batch_losses(params, WINDOWS[::-1]), losses[::-1], rtol=1e-5)
    np.testing.assert_allclose(batch_losses(params, WINDOWS[2:3]), losses[2:3], rtol=1e-5)


def test_seeds_decide_the_parameters():
    same, other = init_decoder(CONFIG, seed=0), init_decoder(CONFIG, seed=1)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, fresh(), same)))
    assert not np.array_equal(fresh()["wte"]["embedding"], other["wte"]["embedding"])
    assert {x.dtype for x in jax.tree.leaves(same)} == {np.dtype("float32")}


def test_both_activations_train(params):
    relu2 = DecoderLoss(
        DecoderConfig(19, 8, n_embd=8, n_layer=1, n_head=2, activation_function="relu2")
    )
    losses, pull_back = jax.vjp(lambda p: jax.jit(relu2)(p, WINDOWS), params)
    assert not np.allclose(losses, batch_losses(params, WINDOWS), atol=1e-3)
    (gradient,) = pull_back(jnp.ones_like(losses))
    assert all(np.any(x) and np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_equal_configurations_share_a_compiled_program(params):
    traces = []

    @functools.partial(jax.jit, static_argnames="loss")
    def mean(params, windows, *, loss):
        traces.append(loss)
        return loss(params, windows).mean()

    again = DecoderLoss(DecoderConfig(19, 8, 8, 1, 2))
    assert again == LOSS and hash(again) == hash(LOSS) and again is not LOSS
    assert float(mean(params, WINDOWS, loss=LOSS)) == float(mean(params, WINDOWS, loss=again))
    assert len(traces) == 1
    assert DecoderLoss(DecoderConfig(20, 8, 8, 1, 2)) != LOSS


@pytest.mark.parametrize("length", [0, 1, 10])
def test_windows_of_a_wrong_length_are_refused(params, length):
    with pytest.raises(ConfigError, match=rf"hold {length} tokens.*2 to 9"):
        LOSS(params, jnp.zeros((2, length), jnp.int32))


@pytest.mark.parametrize("length", [2, 9])
def test_the_shortest_and_longest_windows_are_taken(params, length):
    assert np.isfinite(batch_losses(params, WINDOWS[:, :length])).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"n_positions": -1}, "n_positions=-1"),
        ({"n_layer": 0}, "n_layer=0"),
        ({"n_embd": 10, "n_head": 4}, "n_embd=10.*n_head=4"),
        ({"activation_function": "gelu"}, "'gelu'.*gelu_new"),
    ],
)
def test_configurations_out_of_their_domain_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        DecoderConfig(**({"vocab_size": 19} | fields))


# Cross-entropy in chunks: the same numbers in every derivative.

COUNT, WIDTH, VOCAB = 12, 4, 7


def dense(hidden, embedding, targets):
    logits = np.asarray(hidden, np.float64) @ np.asarray(embedding, np.float64).T
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(targets)), targets]


@pytest.mark.parametrize("chunk", [1, 4, 5, 12, 13, None])
def test_chunks_change_no_derivative(chunk):
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(COUNT, WIDTH)), jnp.float32)
    embedding = jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, COUNT), jnp.int32)
    point, along = (hidden, embedding), (jnp.cos(hidden), jnp.sin(embedding))
    weight = jnp.arange(1.0, COUNT + 1)

    def plain(hidden, embedding):
        logits = hidden @ embedding.T
        picked = jnp.sum(jax.nn.one_hot(targets, VOCAB) * logits, axis=1)
        return weight @ (jax.nn.logsumexp(logits, axis=1) - picked)

    def chunked(hidden, embedding):
        return weight @ token_cross_entropy(hidden, embedding, targets, chunk=chunk)

    losses = token_cross_entropy(hidden, embedding, targets, chunk=chunk)
    np.testing.assert_allclose(losses, dense(hidden, embedding, targets), rtol=1e-4)
    for derivative in (
        lambda f: jax.grad(f, argnums=(0, 1))(*point),
        lambda f: jax.jvp(jax.grad(f, argnums=(0, 1)), point, along)[1],
    ):
        for found, expected in zip(derivative(chunked), derivative(plain)):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_low_precision_is_reduced_in_float32():
    hidden = jnp.ones((3, WIDTH), jnp.bfloat16)
    embedding = jnp.eye(VOCAB, WIDTH, dtype=jnp.bfloat16)
    losses = token_cross_entropy(hidden, embedding, jnp.zeros(3, jnp.int32), chunk=2)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, np.log(4 * np.e + 3) - 1, rtol=1e-3)


# Proxy.

FACTORY = functools.partial(optax.adamw, b2=0.95, weight_decay=0.01)


def make_proxy(**changes):
    params = changes.pop("params", fresh())
    arguments = {
        "loss": LOSS,
        "params": params,
        "opt_state": FACTORY(1e-3).init(params),
        "optimizer": FACTORY,
        "learning_rate": 1e-3,
    }
    return mgf.Proxy(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": 3.0}, "got float"),
        ({"optimizer": FACTORY(1e-3)}, "pass the factory"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": -1e-3}, "learning_rate=-0.001"),
        ({"learning_rate": math.inf}, "learning_rate=inf"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
    ],
)
def test_a_proxy_refuses_what_cannot_train(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_proxy(**changes)


def test_the_same_rate_gives_the_same_transformation():
    proxy = make_proxy()
    assert proxy.transformation(1e-4) is proxy.transformation(1e-4)
    assert proxy.transformation(1e-4) is not proxy.transformation(2e-4)
    moved = proxy.at(fresh(1), proxy.opt_state)
    assert moved.transformation(1e-4) is proxy.transformation(1e-4)
    assert moved.params is fresh(1) and proxy.params is fresh()


def test_a_proxy_survives_the_way_to_another_process():
    proxy = make_proxy()
    copy = pickle.loads(pickle.dumps(proxy))
    assert copy.loss == proxy.loss and copy.learning_rate == proxy.learning_rate
    assert jax.tree.structure(copy.opt_state) == jax.tree.structure(proxy.opt_state)
    np.testing.assert_array_equal(copy.loss(copy.params, WINDOWS), LOSS(proxy.params, WINDOWS))
    gradient = jax.tree.map(jnp.ones_like, copy.params)
    updates = [
        p.transformation(1e-3).update(gradient, p.opt_state, p.params)[0] for p in (proxy, copy)
    ]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *updates)))
