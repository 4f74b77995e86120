"""Every optimizer a pretraining team uses, against `jax.grad` through the loop.

Each runs from warm moments over a schedule of tapes, microbatches and differentiation modes in
which every value of each meets every value of the others at least once over the table.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inner_loop import (
    BATCH,
    mlp_batches,
    mlp_loss,
    mlp_outer,
    mlp_params,
    reference,
    relative_error,
    start,
    train,
    uneven_weights,
)

import metagrad_filter as mgf
from metagrad_filter.metagradient.optimizer import pull_back_update, singular_moments, split_floats

STEPS = 7
decays = {"kernel": True, "output": False}
OPTIMIZERS = {
    "adam": optax.adam(0.02),
    "adamw, cosine schedule": optax.adamw(optax.cosine_decay_schedule(0.02, 60), weight_decay=0.1),
    "adamw, decay mask": optax.adamw(0.02, weight_decay=0.1, mask=decays),
    "adamw, nesterov": optax.nadamw(0.02),
    "adamw, clipped by global norm": optax.chain(
        optax.clip_by_global_norm(0.05), optax.adamw(0.02, weight_decay=0.01)
    ),
    "adamw, injected rate": optax.inject_hyperparams(optax.adamw)(learning_rate=0.02),
    "adamw, every third step": optax.MultiSteps(
        optax.adamw(0.02), every_k_schedule=3
    ).gradient_transformation(),
    "sgd, momentum": optax.sgd(0.05, momentum=0.9),
    "sgd, nesterov": optax.sgd(0.05, momentum=0.9, nesterov=True),
    "rmsprop": optax.rmsprop(0.02),
    "adafactor": optax.adafactor(0.02),
    "adafactor, factored": optax.adafactor(0.02, min_dim_size_to_factor=2),
    "muon": optax.contrib.muon(0.02),
    "adamw and sgd by group": optax.partition(
        {"a": optax.adamw(0.02), "b": optax.sgd(0.05, momentum=0.9)},
        {"kernel": "a", "output": "b"},
    ),
}
LONG = ("adafactor, factored", "muon", "adamw and sgd by group")
TAPES = (
    {"tape": "state"},
    {"tape": "gradient"},
    {"tape": "segments"},
    {"tape": "segments", "levels": 2},
    {"tape": "segments", "offload": True},
)
MODES = ("forward_over_reverse", "reverse_over_reverse")
MICROBATCHES = (None, 1, 4, BATCH + 1)


def variants():
    """Three of all combinations for each optimizer, so that the table covers all of them."""
    combinations = itertools.cycle(itertools.product(TAPES, MODES, MICROBATCHES))
    return [(name, *next(combinations)) for name in OPTIMIZERS for _ in range(3)]


@functools.cache
def expected(name):
    optimizer = OPTIMIZERS[name]
    params, state = start(optimizer, "warm")
    return reference(
        mlp_loss,
        mlp_outer,
        params,
        state,
        mlp_batches(STEPS),
        optimizer=optimizer,
        weights=uneven_weights(STEPS),
    )


def test_the_table_covers_every_combination():
    seen = {(str(tape), mode, microbatch) for _, tape, mode, microbatch in variants()}
    assert len(seen) == len(TAPES) * len(MODES) * len(MICROBATCHES)


def cases():
    """All variants; of optimizers that compile long, two of three are run by `make test-slow`."""
    seen = set()
    for name, *rest in variants():
        slow = name in LONG and name in seen
        seen.add(name)
        yield pytest.param(name, *rest, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("name", "tape", "mode", "microbatch"), cases())
def test_metagradients_equal_autodiff_through_the_loop(name, tape, mode, microbatch):
    optimizer = OPTIMIZERS[name]
    params, state = start(optimizer, "warm")
    result = mgf.metagradients(
        mlp_loss,
        mlp_outer,
        params,
        state,
        mlp_batches(STEPS),
        optimizer=optimizer,
        weights=uneven_weights(STEPS),
        microbatch=microbatch,
        differentiation=mode,
        **tape,
    )
    phi, scores, probe = expected(name)
    assert result.tape.kind == tape["tape"] and result.tape.offload == tape.get("offload", False)
    np.testing.assert_allclose(result.phi, phi, rtol=1e-5)
    assert relative_error(result.scores, scores) <= 1e-4
    assert relative_error(result.probe, probe) <= 1e-4


def test_scores_of_lion_are_exactly_zero_and_said_to_be():
    # The sign has derivative zero wherever it has one, and momentum reaches only the sign.
    lion = optax.lion(0.01)
    params, state = start(lion, "warm")
    _, scores, _ = reference(mlp_loss, mlp_outer, params, state, mlp_batches(4), optimizer=lion)
    assert not scores.any()
    with pytest.warns(RuntimeWarning, match="sign function of Lion"):
        result = mgf.metagradients(
            mlp_loss, mlp_outer, params, state, mlp_batches(4), optimizer=lion
        )
    assert not np.any(result.scores)
    assert np.isfinite(result.phi)


# Coordinates without a second moment, optimizer by optimizer.

ROWS, WIDTH, DEAD = 6, 4, (0, 3)
SINGULAR = {
    "adamw": optax.adamw(0.01),
    "rmsprop": optax.rmsprop(0.01, eps_in_sqrt=False),
    "adafactor": optax.adafactor(0.01),
    "adafactor, factored": optax.adafactor(0.01, min_dim_size_to_factor=2),
    "adamw behind clipping": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.01)),
    "accumulated": optax.MultiSteps(optax.adamw(0.01), 2).gradient_transformation(),
}


def pulled_back(optimizer, params, state, gradient):
    ones = jax.tree.map(jnp.ones_like, params)
    floats = [jnp.zeros(f.shape, jnp.float32) for f in split_floats(state)[0]]
    return pull_back_update(
        optimizer,
        params,
        state,
        gradient,
        (ones, floats),
        singular=singular_moments(optimizer, params, state),
        stacked=False,
    )


def after_steps(optimizer, params, gradient):
    state = optimizer.init(params)
    for scale in (1.0, 0.5, 2.0, -1.0, 0.7):
        scaled = jax.tree.map(lambda g, scale=scale: scale * g, gradient)
        _, state = optimizer.update(scaled, state, params)
    return state


def untouched_rows(shape):
    rng = np.random.default_rng(1)
    params = {"table": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    gradient = rng.normal(size=shape).astype(np.float32)
    gradient[list(DEAD)] = 0
    return params, {"table": jnp.asarray(gradient)}


@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (ROWS, ROWS), (ROWS, 9)])
@pytest.mark.parametrize("name", SINGULAR)
def test_rows_that_no_batch_touched_take_cotangent_zero(name, shape):
    optimizer = SINGULAR[name]
    params, gradient = untouched_rows(shape)
    state = after_steps(optimizer, params, gradient)
    *_, of_gradient, masked = pulled_back(optimizer, params, state, gradient)
    found = np.asarray(of_gradient["table"])
    assert np.isfinite(found).all()
    alive = np.delete(found, DEAD, axis=0)
    assert int(masked) == len(DEAD) * shape[1]
    assert not found[list(DEAD)].any()
    # The rest is what it is without those rows; a factored moment is a mean over all rows.
    if "factored" not in name:
        small = {"table": jnp.delete(params["table"], jnp.array(DEAD), axis=0)}
        lean = {"table": jnp.delete(gradient["table"], jnp.array(DEAD), axis=0)}
        state = after_steps(optimizer, small, lean)
        *_, expected_alive, none = pulled_back(optimizer, small, state, lean)
        assert int(none) == 0
        if "adafactor" not in name:  # which scales by the root mean square of all rows
            assert relative_error(alive, expected_alive["table"]) < 1e-5


def test_an_accumulating_optimizer_masks_nothing_between_its_steps():
    optimizer = SINGULAR["accumulated"]
    params, gradient = untouched_rows((ROWS, WIDTH))
    *_, of_gradient, masked = pulled_back(optimizer, params, optimizer.init(params), gradient)
    assert int(masked) == 0
    assert not np.any(of_gradient["table"])  # the first of two steps moves no parameter


def test_sample_sizes_do_not_hide_a_factored_moment():
    # Factored only above a size that is larger than the sample from which slopes are learned.
    optimizer = optax.adafactor(0.01, min_dim_size_to_factor=150)
    params = {"table": jnp.ones((160, 200))}
    state = optimizer.init(params)
    paths = [jax.tree_util.keystr(p) for p, x in jax.tree.leaves_with_path(state) if jnp.ndim(x)]
    floats = [p for p in paths if "count" not in p]
    found = dict(zip(floats, singular_moments(optimizer, params, state)))
    assert [found[p] for p in floats if "v_row" in p or "v_col" in p] == [True, True]


# Narrow dtypes: the trajectory is the narrow one, the adjoint is float32.

NARROW = {
    "bfloat16 parameters": (jnp.bfloat16, optax.adamw(0.02)),
    "bfloat16 momentum": (jnp.float32, optax.adamw(0.02, mu_dtype=jnp.bfloat16)),
    "both": (jnp.bfloat16, optax.adamw(0.02, mu_dtype=jnp.bfloat16)),
    "both, accumulated": (
        jnp.bfloat16,
        optax.MultiSteps(
            optax.adamw(0.02, mu_dtype=jnp.bfloat16), 2, use_grad_mean=True
        ).gradient_transformation(),
    ),
}


@pytest.mark.parametrize("name", NARROW)
def test_narrow_parameters_and_moments_have_float32_adjoints(name):
    dtype, optimizer = NARROW[name]
    batches = mlp_batches(8)
    wide, wide_state = start(optimizer, "warm")
    params = jax.tree.map(lambda x: x.astype(dtype), wide)
    template = jax.eval_shape(optimizer.init, params)
    state = jax.tree.map(lambda x, like: x.astype(like.dtype), wide_state, template)

    def loss(params, batch):
        return mlp_loss(jax.tree.map(lambda p: p.astype(jnp.float32), params), batch)

    def outer(params):
        return mlp_outer(jax.tree.map(lambda p: p.astype(jnp.float32), params))

    def narrow(**options):
        return mgf.metagradients(
            loss, outer, params, state, batches, optimizer=optimizer, **options
        )

    result = narrow()
    assert {x.dtype for x in jax.tree.leaves(result.probe)} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in jax.tree.leaves(result.params)} == {jnp.dtype(dtype)}
    assert result.scores.dtype == jnp.float32
    # The same trajectory up to rounding, in float32 throughout.
    full = optax.adamw(0.02)
    if "accumulated" in name:
        full = optax.MultiSteps(full, 2).gradient_transformation()
    widened = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    like = jax.eval_shape(full.init, widened)
    full_state = jax.tree.map(lambda x, y: x.astype(y.dtype), wide_state, like)
    _, scores, probe = reference(mlp_loss, mlp_outer, widened, full_state, batches, optimizer=full)
    assert relative_error(result.scores, scores) < 0.15
    assert relative_error(result.probe, probe) < 0.15
    # Microbatches are summed in float32, so they change no more than the narrow rounding does.
    assert relative_error(narrow(microbatch=2, tape="segments").scores, result.scores) < 0.05


def test_the_update_is_differentiated_in_float32():
    optimizer = optax.adamw(0.02)
    wide, state = start(optimizer, "warm")
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    narrow_state = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, state
    )
    widened_state = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, narrow_state
    )
    gradient = jax.tree.map(lambda x: x / 7, narrow)
    found = pulled_back(optimizer, narrow, narrow_state, gradient)
    wanted = pulled_back(
        optimizer,
        widened,
        widened_state,
        jax.tree.map(lambda x: x.astype(jnp.float32), gradient),
    )
    for a, b in zip(jax.tree.leaves(found[:3]), jax.tree.leaves(wanted[:3])):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)


def test_the_reference_sees_training():
    # The loop that all of this is compared with really trains.
    optimizer, batches = OPTIMIZERS["adam"], mlp_batches(60)
    params = mlp_params()
    nudges = jax.tree.map(lambda p: jnp.zeros((60, *p.shape), p.dtype), params)
    before = mlp_loss(params, jax.tree.map(lambda x: x[0], batches)).mean()
    _, (end, _) = train(
        params,
        optimizer.init(params),
        batches,
        jnp.ones((60, BATCH)),
        nudges,
        loss=mlp_loss,
        outer=mlp_outer,
        optimizer=optimizer,
    )
    assert mlp_loss(end, jax.tree.map(lambda x: x[0], batches)).mean() < 0.5 * before
