"""The decoder proxies as losses, their chunked cross-entropy, and the value that describes a job.

The Llama family is held to a reference written in numpy with explicit loops, in float64.
"""

import functools
import math
import pickle
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import metagrad_filter as mgf
from metagrad_filter.errors import ConfigError
from metagrad_filter.proxy import (
    DecoderConfig,
    DecoderLoss,
    LlamaConfig,
    RopeScaling,
    init_decoder,
    layers,
)
from metagrad_filter.proxy.cross_entropy import token_cross_entropy
from metagrad_filter.proxy.llama import rotary_angles

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


hidden_states = jax.jit(LOSS.hidden)


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
        ({"activation_function": "tanh"}, "'tanh'.*gelu_new"),
        ({"n_head": 2.0}, "n_head=2.0"),
        ({"n_inner": 0}, "n_inner=0"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon=0.0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({"dtype": "float16"}, "dtype='float16'.*bfloat16"),
        ({"remat": 1}, "remat=1"),
        ({"attn_implementation": "flash"}, "attn_implementation='flash'.*chunked"),
    ],
)
def test_configurations_out_of_their_domain_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        DecoderConfig(**({"vocab_size": 19} | fields))


# The Llama family.

LLAMA = LlamaConfig(
    vocab_size=19,
    hidden_size=12,
    intermediate_size=10,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=8,
    rope_theta=50.0,
    tie_word_embeddings=False,
    attention_bias=True,
    mlp_bias=True,
)
SCALING = RopeScaling(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)


@functools.cache
def jitted(config):
    """The functions of a loss, compiled once for all tests."""
    loss = DecoderLoss(config)

    def mean(params):
        return loss(params, WINDOWS).mean()

    def slope(params, along):
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.grad(mean)(params), along)))

    return SimpleNamespace(
        mean=mean,
        token_losses=jax.jit(loss.token_losses),
        hidden_and_logits=jax.jit(lambda p, t: (loss.hidden(p, t), loss.logits(p, t))),
        # Gradient, and how it changes along a direction.
        derivatives=jax.jit(lambda p, along: jax.jvp(jax.grad(mean), (p,), (along,))),
        reverse_over_reverse=jax.jit(jax.grad(slope)),
    )


@functools.cache
def llama_params(config=LLAMA):
    fresh = init_decoder(config, seed=1)
    return jax.tree.map(lambda p: p + 0.3 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), fresh)


def reference_losses(config, params, windows):
    """Nats of each token of each window by a Llama decoder, one position and head at a time."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)

    def norm(x, p):
        return x / np.sqrt(np.mean(x**2) + config.rms_norm_eps) * p["scale"]

    def linear(x, p):
        return x @ p["kernel"] + p.get("bias", 0.0)

    def turned(x, position):
        # As complex numbers: channel i is the real part, i + d / 2 the imaginary one.
        half = len(x) // 2
        angle = [position * config.rope_theta ** (-2 * i / len(x)) for i in range(half)]
        z = (x[:half] + 1j * x[half:]) * np.exp(1j * np.asarray(angle))
        return np.concatenate([z.real, z.imag])

    def block(states, p):
        d, group = config.head_width, config.num_attention_heads // config.key_value_heads
        normed = [norm(x, p["input_layernorm"]) for x in states]
        q, k, v = (
            [linear(x, p["self_attn"][f"{name}_proj"]).reshape(-1, d) for x in normed]
            for name in "qkv"
        )
        mixed = []
        for s in range(len(states)):
            heads = []
            for h in range(config.num_attention_heads):
                query = turned(q[s][h], s)
                scores = [query @ turned(k[t][h // group], t) / d**0.5 for t in range(s + 1)]
                share = np.exp(scores) / np.exp(scores).sum()
                heads.append(sum(share[t] * v[t][h // group] for t in range(s + 1)))
            mixed.append(states[s] + linear(np.concatenate(heads), p["self_attn"]["o_proj"]))
        out = []
        for x in mixed:
            y = norm(x, p["post_attention_layernorm"])
            gate = linear(y, p["mlp"]["gate_proj"])
            gated = gate / (1 + np.exp(-gate)) * linear(y, p["mlp"]["up_proj"])
            out.append(x + linear(gated, p["mlp"]["down_proj"]))
        return out

    losses = []
    for window in np.asarray(windows):
        states = [params["embed_tokens"]["embedding"][token] for token in window[:-1]]
        for layer in range(config.num_hidden_layers):
            states = block(states, params["layers"][layer])
        name = "embed_tokens" if config.tie_word_embeddings else "lm_head"
        logits = np.stack([norm(x, params["norm"]) for x in states]) @ params[name]["embedding"].T
        chosen = logits[np.arange(len(states)), window[1:]]
        losses.append(np.log(np.exp(logits).sum(axis=1)) - chosen)
    return np.asarray(losses)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False},
        {"num_key_value_heads": None, "head_dim": None, "num_attention_heads": 3},
        {"num_key_value_heads": 1, "rms_norm_eps": 0.1, "rope_theta": 1e4},
    ],
)
def test_llama_is_its_reference(changes):
    config = replace(LLAMA, **changes)
    params, windows = llama_params(config), WINDOWS[:2]
    expected = reference_losses(config, params, windows)
    assert expected.std() > 0.3
    found = jitted(config).token_losses(params, windows)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@given(
    factor=st.floats(1, 64),
    low=st.floats(0.1, 4),
    band=st.floats(0.1, 8),
    context=st.integers(1, 4096),
    theta=st.floats(10, 1e6),
)
def test_scaled_rotary_frequencies(factor, low, band, context, theta):
    """By wavelength: long ones slow down by the factor, short ones stay, the rest lie between."""
    scaling = RopeScaling(factor, low, low + band, context)
    config = replace(LLAMA, head_dim=32, rope_theta=theta)
    plain = rotary_angles(config, 2)[1]
    scaled = rotary_angles(replace(config, rope_scaling=scaling), 2)[1]
    for before, after in zip(plain, scaled):
        wavelength = 2 * math.pi / before
        if wavelength > context / low:
            expected = before / factor
        elif wavelength < context / (low + band):
            expected = before
        else:
            smooth = (context / wavelength - low) / band
            expected = (1 - smooth) * before / factor + smooth * before
        assert math.isclose(after, expected, rel_tol=1e-9)
    assert not rotary_angles(config, 1).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"num_key_value_heads": 4}, "num_attention_heads=6.*num_key_value_heads=4"),
        ({"head_dim": 3}, "3 wide"),
        ({"head_dim": None, "num_attention_heads": 8}, "hidden_size=12.*num_attention_heads=8"),
        ({"hidden_act": "swiglu"}, "'swiglu'.*silu"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling=.*RopeScaling"),
        ({"mlp_bias": None}, "mlp_bias=None"),
        ({"dtype": "bf16"}, "dtype='bf16'"),
        ({"attn_implementation": 1}, "attn_implementation=1"),
    ],
)
def test_llama_configurations_out_of_their_domain_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(LLAMA, **changes)


def test_scalings_out_of_their_domain_are_refused():
    with pytest.raises(ConfigError, match=r"high_freq_factor=1.0 is not above"):
        replace(SCALING, high_freq_factor=1.0)
    with pytest.raises(ConfigError, match="factor=0"):
        replace(SCALING, factor=0)


def test_other_configurations_are_no_decoder():
    with pytest.raises(ConfigError, match=r"config is a dict; expected a DecoderConfig"):
        DecoderLoss({"vocab_size": 19})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"config is a RopeScaling"):
        init_decoder(SCALING)  # pyright: ignore[reportArgumentType]


# Both families: derivatives, memory and precision.

TINY = {
    "gpt2": DecoderConfig(19, 8, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=False),
    "llama": replace(LLAMA, num_hidden_layers=1, tie_word_embeddings=True),
}


@pytest.fixture(scope="module", params=TINY)
def tiny(request):
    config = TINY[request.param]
    # Gentler than `llama_params`: bfloat16 is compared at a point of ordinary curvature.
    params = jax.tree.map(
        lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), init_decoder(config)
    )
    along = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size) * 0.7).reshape(p.shape), params)
    return config, params, along


def relative_error(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected))
    norm = math.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(expected)))
    return math.sqrt(sum(float(jnp.sum((a - b) ** 2)) for a, b in pairs)) / norm


def test_the_second_derivative_is_the_same_both_ways(tiny):
    config, params, along = tiny
    _, forward = jitted(config).derivatives(params, along)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(forward))
    assert relative_error(forward, jitted(config).reverse_over_reverse(params, along)) < 1e-5


def test_recomputing_blocks_changes_no_derivative_and_keeps_less(tiny):
    config, params, along = tiny
    again = replace(config, remat=True)
    pairs = (jitted(c).derivatives(params, along) for c in (again, config))
    for found, expected in zip(*pairs):
        assert relative_error(found, expected) < 1e-5

    def kept(config):
        """Elements that the forward pass leaves for the backward pass."""
        pull_back = jax.eval_shape(lambda p: jax.vjp(jitted(config).mean, p)[1], params)
        return sum(x.size for x in jax.tree.leaves(pull_back))

    assert kept(again) < 0.7 * kept(config)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("changes", [{"remat": True}, {"attn_implementation": "xla"}])
def test_blocks_differ_and_are_computed_in_order_however_they_are(family, changes):
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    config = replace(TINY[family], **{layers: 3})
    params = jax.tree.map(
        lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), init_decoder(config)
    )
    along = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size) * 0.7).reshape(p.shape), params)
    pairs = (jitted(c).derivatives(params, along) for c in (replace(config, **changes), config))
    for found, expected in zip(*pairs):
        assert relative_error(found, expected) < 1e-5


def test_blocks_that_differ_are_not_recomputed_as_if_they_were_alike():
    from flax import nnx

    class Plus(nnx.Module):
        def __init__(self, by, width=2):
            self.by, self.bias = by, nnx.Param(jnp.zeros(width))

        def __call__(self, x):
            return x + self.by + self.bias[...]

    for blocks in ([Plus(1.0), Plus(10.0)], [Plus(1.0), Plus(1.0, width=1)]):
        assert layers.walk(blocks, jnp.zeros(2), remat=False)[0] == sum(b.by for b in blocks)
        with pytest.raises(ConfigError, match="blocks that differ"):
            layers.walk(blocks, jnp.zeros(2), remat=True)


def test_bfloat16_computes_what_float32_does_to_its_rounding(tiny):
    config, params, along = tiny
    low = replace(config, dtype="bfloat16")
    hidden, logits = jitted(low).hidden_and_logits(params, WINDOWS[:, :-1])
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    losses, expected = (jitted(c).token_losses(params, WINDOWS) for c in (low, config))
    assert losses.dtype == jnp.float32
    assert 0 < np.abs(losses - expected).max() < 0.1
    pairs = (jitted(c).derivatives(params, along) for c in (low, config))
    for lower, higher in zip(*pairs):
        assert {x.dtype for x in jax.tree.leaves(lower)} == {np.dtype("float32")}
        assert relative_error(lower, higher) < 0.1, config


def test_low_precision_parameters_compute_in_float32(tiny):
    config, params, _ = tiny
    stored = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    widened = jax.tree.map(lambda p: p.astype(jnp.float32), stored)
    found, expected = (jitted(config).token_losses(p, WINDOWS) for p in (stored, widened))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_logits_and_losses_agree(tiny):
    config, params, _ = tiny
    _, logits = jitted(config).hidden_and_logits(params, WINDOWS[:, :-1])
    scores = np.asarray(logits) - np.logaddexp.reduce(np.asarray(logits), axis=2, keepdims=True)
    expected = -np.take_along_axis(scores, np.asarray(WINDOWS)[:, 1:, None], axis=2)[..., 0]
    found = jitted(config).token_losses(params, WINDOWS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


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
