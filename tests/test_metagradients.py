"""The adjoint against `jax.grad` through a loop that knows nothing of it, and against retraining.

`test_conformance.py` has the table of optimizers, tapes, microbatches and modes.
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inner_loop import (
    BATCH,
    WARM_STEPS,
    WIDTH,
    mlp_batches,
    mlp_loss,
    mlp_outer,
    mlp_params,
    other_outer,
    reference,
    relative_error,
    start,
    uneven_weights,
    warmed,
)

import metagrad_filter as mgf
from metagrad_filter.errors import ConfigError, NonFiniteMetagradient, WindowError
from metagrad_filter.metagradient.optimizer import owners, singular_moments, warm_state
from metagrad_filter.metagradient.probe import probe_scores
from metagrad_filter.proxy import DecoderConfig, DecoderLoss, init_decoder

OPTIMIZERS = {
    "adamw": optax.adamw(optax.cosine_decay_schedule(0.02, 60), weight_decay=0.1),
    "sgd": optax.sgd(0.05, momentum=0.9),
    "clipped adamw": optax.chain(
        optax.clip_by_global_norm(0.05), optax.adamw(0.02, weight_decay=0.01)
    ),
}

# Values, dtypes, horizons.


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("steps", [1, 4, 32])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scores_and_probe_equal_autodiff_through_the_loop(name, steps, bits):
    tolerance = 1e-9 if bits == 64 else 1e-4
    optimizer = OPTIMIZERS[name]
    with jax.enable_x64(True) if bits == 64 else contextlib.nullcontext():
        batches, weights, warm_size = mlp_batches(steps), uneven_weights(steps), np.inf
        for moments in ("warm", "cold"):
            params, state = start(optimizer, moments)
            result = mgf.metagradients(
                mlp_loss, mlp_outer, params, state, batches, optimizer=optimizer, weights=weights
            )
            phi, scores, probe = reference(
                mlp_loss, mlp_outer, params, state, batches, optimizer=optimizer, weights=weights
            )
            assert result.scores.dtype == (jnp.float64 if bits == 64 else jnp.float32)
            assert result.scores.shape == (steps, BATCH)
            assert result.masked_coordinates == 0
            np.testing.assert_allclose(result.phi, phi, rtol=tolerance)
            if (bits, steps, moments) == (32, 1, "cold") and name != "sgd":
                # Adam's first step from zero is the sign of the gradient: true scores are of the
                # order of its epsilon, and float32 leaves little of them after cancellation.
                assert np.abs(scores).max() < 1e-2 * warm_size
                assert np.abs(result.scores - scores).max() < tolerance * warm_size
                continue
            warm_size = np.abs(scores).max()
            assert relative_error(result.scores, scores) <= tolerance, moments
            assert relative_error(result.probe, probe) <= tolerance, moments


def test_the_clip_of_the_conformance_table_is_active():
    params, batches = mlp_params(), mlp_batches(32)
    for t in range(32):
        batch = jax.tree.map(lambda x, t=t: x[t], batches)
        gradient = jax.grad(lambda p, batch=batch: mlp_loss(p, batch).mean())(params)
        assert optax.tree.norm(gradient) > 0.05


def test_the_trajectory_ends_where_plain_training_ends():
    optimizer, batches = OPTIMIZERS["adamw"], mlp_batches(7)
    params, state = start(optimizer, "warm")
    result = mgf.metagradients(mlp_loss, mlp_outer, params, state, batches, optimizer=optimizer)
    for t in range(7):
        batch = jax.tree.map(lambda x, t=t: x[t], batches)
        gradient = jax.grad(lambda p, batch=batch: mlp_loss(p, batch).mean())(params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert relative_error(result.params, params) < 1e-6
    assert relative_error(result.opt_state, state) < 1e-6


def test_an_unhelpful_window_scores_below_a_helpful_one():
    def loss(theta, batch):
        return (theta - batch) ** 2

    sgd, theta = optax.sgd(0.1), jnp.float32(0.0)
    result = mgf.metagradients(
        loss,
        lambda theta: (theta - 1.0) ** 2,
        theta,
        sgd.init(theta),
        jnp.array([[1.0, -1.0]]),
        optimizer=sgd,
    )
    np.testing.assert_allclose(result.scores, [[0.2, -0.2]], rtol=1e-5)


# What is kept and how it is differentiated changes memory, not results.

VARIANTS = [
    # steps, tape, microbatch, differentiation
    (1, "gradient", 4, "forward_over_reverse"),
    (1, "segments", None, "forward_over_reverse"),
    (7, "gradient", None, "forward_over_reverse"),
    (7, "segments", None, "forward_over_reverse"),
    (7, "auto", 3, "forward_over_reverse"),
    (7, "state", 4, "forward_over_reverse"),
    (7, "segments", 1, "forward_over_reverse"),
    (7, "state", None, "reverse_over_reverse"),
    (7, "segments", 4, "reverse_over_reverse"),
    (9, "gradient", BATCH, "reverse_over_reverse"),
    (9, "segments", BATCH + 1, "forward_over_reverse"),
]


@functools.cache
def plain_result(steps, other=False):
    optimizer = OPTIMIZERS["adamw"]
    params, state = start(optimizer, "warm")
    return mgf.metagradients(
        mlp_loss,
        other_outer if other else mlp_outer,
        params,
        state,
        mlp_batches(steps),
        optimizer=optimizer,
        weights=uneven_weights(steps),
        tape="state",
    )


@pytest.mark.parametrize(("steps", "tape", "microbatch", "differentiation"), VARIANTS)
def test_tapes_microbatches_and_modes_agree(steps, tape, microbatch, differentiation):
    optimizer = OPTIMIZERS["adamw"]
    params, state = start(optimizer, "warm")
    result = mgf.metagradients(
        mlp_loss,
        mlp_outer,
        params,
        state,
        mlp_batches(steps),
        optimizer=optimizer,
        weights=uneven_weights(steps),
        tape=tape,
        microbatch=microbatch,
        differentiation=differentiation,
    )
    assert result.tape.kind == ("state" if tape == "auto" else tape)
    expected = plain_result(steps)
    for found, wanted in (
        (result.scores, expected.scores),
        (result.probe, expected.probe),
        (result.params, expected.params),
    ):
        assert relative_error(found, wanted) < 2e-5


@pytest.mark.parametrize(
    ("tape", "microbatch", "differentiation"),
    [("gradient", 4, "forward_over_reverse"), ("state", None, "reverse_over_reverse")],
)
def test_a_dict_of_outer_metrics_equals_separate_calls(tape, microbatch, differentiation):
    optimizer = OPTIMIZERS["adamw"]
    params, state = start(optimizer, "warm")
    outers = {"held out": mlp_outer, "norm": other_outer}
    both = mgf.metagradients(
        mlp_loss,
        outers,
        params,
        state,
        mlp_batches(7),
        optimizer=optimizer,
        weights=uneven_weights(7),
        tape=tape,
        microbatch=microbatch,
        differentiation=differentiation,
    )
    assert set(both.phi) == set(both.scores) == set(both.probe) == set(outers)
    for name in outers:
        alone = plain_result(7, name == "norm")
        np.testing.assert_allclose(both.phi[name], alone.phi, rtol=1e-6)
        assert relative_error(both.scores[name], alone.scores) < 2e-5
        assert relative_error(both.probe[name], alone.probe) < 2e-5


# The probe is the metagradient of a window that has no weight.


def linear_loss(params, batch):
    return batch @ params


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_probe_score_is_the_mean_metagradient_of_a_window_with_weight_zero(name):
    # A loss linear in the parameters has the same gradient at every step.
    optimizer, rng = OPTIMIZERS[name], np.random.default_rng(3)
    params = jnp.asarray(rng.normal(size=WIDTH), jnp.float32)
    batches = jnp.asarray(rng.normal(size=(5, BATCH, WIDTH)), jnp.float32)
    extra = jnp.asarray(rng.normal(size=(8, WIDTH)), jnp.float32)
    params, state = warmed(optimizer, params, linear_loss, batches[::-1])

    def outer(params):
        return jnp.sum((params - 1.0) ** 2)

    result = mgf.metagradients(linear_loss, outer, params, state, batches, optimizer=optimizer)
    scores = probe_scores(linear_loss, params, result.probe, extra)

    def inserted(batch):
        # Written so that the mean over B + 8 windows, rescaled, is the sum over B of the batch.
        return jnp.concatenate([batch, extra])

    wide = jnp.stack([inserted(batch) for batch in batches])
    ratio = wide.shape[1] / BATCH
    weights = jnp.concatenate([jnp.ones((5, BATCH)), jnp.zeros((5, 8))], axis=1) * ratio
    _, slopes, _ = reference(
        linear_loss, outer, params, state, wide, optimizer=optimizer, weights=weights
    )
    assert relative_error(scores, slopes[:, BATCH:].mean(axis=0) * ratio) < 1e-4


def test_after_one_step_probe_scores_equal_the_scores_of_the_batch():
    optimizer, batches = OPTIMIZERS["adamw"], mlp_batches(1)
    params, state = start(optimizer, "warm")
    result = mgf.metagradients(mlp_loss, mlp_outer, params, state, batches, optimizer=optimizer)
    batch = jax.tree.map(lambda x: x[0], batches)
    scores = probe_scores(mlp_loss, params, result.probe, batch)
    assert relative_error(scores, result.scores[0]) < 1e-5


# Coordinates without a second moment.

ROWS, UNSEEN, DIM = 6, 2, 3
SINGULAR = {
    "adamw": optax.adamw(0.05, weight_decay=0.0),
    "clipped adamw": optax.chain(
        optax.clip_by_global_norm(0.05), optax.adamw(0.05, weight_decay=0.0)
    ),
}


def bag_loss(params, batch):
    return (params["rows"][batch["ids"]].mean(axis=1) @ params["head"] - batch["y"]) ** 2


def bag_outer(params):
    # Depends on the unseen rows too, so that their cotangent is not trivially zero.
    ids = jnp.arange(ROWS + UNSEEN).reshape(-1, 2)
    return jnp.mean(bag_loss(params, {"ids": ids, "y": jnp.ones(len(ids))}))


def bag_batches(steps, seed):
    rng = np.random.default_rng(seed)
    # Every batch touches every seen row.
    ids = np.stack([rng.permuted(np.tile(np.arange(ROWS), 2)) for _ in range(steps)])
    y = rng.normal(size=(steps, 4)).astype(np.float32)
    return {"ids": jnp.asarray(ids.reshape(steps, 4, 3), jnp.int32), "y": jnp.asarray(y)}


def bag_start(optimizer, moments):
    rng = np.random.default_rng(4)
    params = {
        "rows": jnp.asarray(rng.normal(size=(ROWS + UNSEEN, DIM)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=DIM), jnp.float32),
    }
    if moments == "warm":
        return warmed(optimizer, params, bag_loss, bag_batches(5, seed=5))
    return params, optimizer.init(params)


@pytest.mark.parametrize("moments", ["warm", "cold"])
@pytest.mark.parametrize("name", SINGULAR)
def test_unseen_rows_take_cotangent_zero_and_leave_the_rest_exact(name, moments):
    optimizer, batches = SINGULAR[name], bag_batches(5, seed=6)
    params, state = bag_start(optimizer, moments)
    result = mgf.metagradients(bag_loss, bag_outer, params, state, batches, optimizer=optimizer)

    # Autodiff fails on these rows: in the probe always, behind clipping everywhere.
    _, broken, probe = reference(bag_loss, bag_outer, params, state, batches, optimizer=optimizer)
    assert np.isnan(probe["rows"][ROWS:]).any()
    if name == "clipped adamw":
        assert np.isnan(broken).any() and np.isnan(probe["rows"][:ROWS]).any()

    # The same model without them. Without weight decay they stay where they are.
    unseen = params["rows"][ROWS:]

    def without(tree):
        cut = [x[:ROWS] if jnp.shape(x) == params["rows"].shape else x for x in tree]
        return cut

    leaves, structure = jax.tree.flatten(state)
    small = {**params, "rows": params["rows"][:ROWS]}
    _, scores, probe = reference(
        bag_loss,
        lambda p: bag_outer({**p, "rows": jnp.concatenate([p["rows"], unseen])}),
        small,
        structure.unflatten(without(leaves)),
        batches,
        optimizer=optimizer,
    )
    assert relative_error(result.scores, scores) < 1e-4
    assert relative_error(result.probe["rows"][:ROWS], probe["rows"]) < 1e-4
    assert relative_error(result.probe["head"], probe["head"]) < 1e-4
    assert not np.any(result.probe["rows"][ROWS:])
    assert result.masked_coordinates == UNSEEN * DIM


def test_sgd_has_no_singular_moment_and_nothing_is_masked():
    optimizer, batches = OPTIMIZERS["sgd"], bag_batches(5, seed=6)
    params, state = bag_start(optimizer, "cold")
    result = mgf.metagradients(bag_loss, bag_outer, params, state, batches, optimizer=optimizer)
    _, scores, probe = reference(bag_loss, bag_outer, params, state, batches, optimizer=optimizer)
    assert result.masked_coordinates == 0
    assert np.all(probe["rows"][ROWS:] != 0)
    assert relative_error(result.probe, probe) < 1e-4
    assert relative_error(result.scores, scores) < 1e-4


def test_singular_moments_and_their_owners_are_found_without_knowing_the_optimizer():
    params = mlp_params()
    order = list(params)
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    state = adamw.init(params)
    paths = [path for path, x in jax.tree.leaves_with_path(state) if jnp.ndim(x)]
    second = tuple("nu" in jax.tree_util.keystr(path) for path in paths)
    assert sum(second) == len(params)
    assert singular_moments(adamw, params, state) == second
    named = sorted(order)
    for path, owner in zip(paths, owners(params, state)):
        assert repr(named[owner]) in jax.tree_util.keystr(path)
    safe = optax.adamw(0.1, eps_root=1e-8)
    assert not any(singular_moments(safe, params, safe.init(params)))
    assert not any(singular_moments(OPTIMIZERS["sgd"], params, OPTIMIZERS["sgd"].init(params)))


def test_scores_of_a_cold_adam_trajectory_sum_to_zero_and_warm_ones_do_not():
    # From a zero state Adam's steps do not depend on the scale of the gradients.
    optimizer, batches = OPTIMIZERS["adamw"], mlp_batches(4)
    shares = {}
    for moments in ("cold", "warm"):
        params, state = start(optimizer, moments)
        scores = np.asarray(
            mgf.metagradients(
                mlp_loss, mlp_outer, params, state, batches, optimizer=optimizer
            ).scores
        )
        shares[moments] = abs(scores.sum()) / np.abs(scores).sum()
    assert shares["cold"] < 1e-4 < 0.01 < shares["warm"]


# Moments of a live run in an inner optimizer of its own.


def test_warm_state_takes_moments_and_counts_but_not_the_place_in_a_schedule():
    live, inner = OPTIMIZERS["adamw"], optax.adamw(0.01)
    params, state = start(live, "warm")
    taken: Any = warm_state(inner, params, state)
    assert jax.tree.structure(taken) == jax.tree.structure(inner.init(params))
    for field in ("mu", "nu"):
        found, expected = getattr(taken[0], field), getattr(state[0], field)
        assert relative_error(found, expected) == 0
    assert int(taken[0].count) == WARM_STEPS
    # And the other way: a schedule starts anew.
    scheduled: Any = warm_state(live, params, state)
    assert int(scheduled[0].count) == WARM_STEPS and int(scheduled[-1].count) == 0


def test_warm_state_refuses_a_state_without_a_fitting_moment():
    params = mlp_params()
    with pytest.raises(ConfigError, match="optimizer factory"):
        warm_state(optax.adamw(0.01), params, optax.sgd(0.1).init(params))


# Errors say what was seen.


def call(**changes) -> Any:
    optimizer = changes.pop("optimizer", OPTIMIZERS["sgd"])
    params = changes.pop("params", mlp_params())
    arguments = {
        "loss": mlp_loss,
        "outer": mlp_outer,
        "params": params,
        "opt_state": None,
        "batches": mlp_batches(2),
        "optimizer": optimizer,
    } | changes
    if arguments["opt_state"] is None:
        arguments["opt_state"] = optimizer.init(params)
    return mgf.metagradients(**arguments)


ERRORS = {
    "integer params": (
        {"params": {**mlp_params(), "steps": jnp.arange(3)}},
        ConfigError,
        r"params\['steps'\] has dtype int32",
    ),
    "leading axes": (
        {"batches": {"x": jnp.zeros((2, 3, WIDTH)), "y": jnp.zeros((2, 4))}},
        WindowError,
        r"\(2, 3\), \(2, 4\)",
    ),
    "no step axis": ({"batches": {"y": jnp.zeros(4)}}, WindowError, r"\(4,\)"),
    "no steps": ({"batches": mlp_batches(0)}, WindowError, r"\(0, 6\)"),
    "no arrays": ({"batches": {}}, WindowError, r"\[\]"),
    "weights' shape": ({"weights": jnp.ones((2, 3))}, WindowError, r"\[2, 3\].*\[2, 6\]"),
    "weights' dtype": ({"weights": jnp.ones((2, BATCH), int)}, WindowError, "int32"),
    "no outer": ({"outer": {}}, ConfigError, "empty dict"),
    "tape": ({"tape": "paper"}, ConfigError, "'paper'"),
    "microbatch 0": ({"microbatch": 0}, ConfigError, "microbatch=0"),
    "microbatch 1.5": ({"microbatch": 1.5}, ConfigError, "microbatch=1.5"),
    "microbatch True": ({"microbatch": True}, ConfigError, "microbatch=True"),
    "differentiation": ({"differentiation": "x"}, ConfigError, "differentiation='x'"),
    "another optimizer's state": (
        {"opt_state": optax.adamw(0.1).init(mlp_params())},
        ConfigError,
        "ScaleByAdamState",
    ),
    "other parameters' state": (
        {"opt_state": OPTIMIZERS["sgd"].init({n: jnp.zeros(3) for n in mlp_params()})},
        ConfigError,
        r"\(3,\)",
    ),
    "mean loss": (
        {"loss": lambda params, batch: mlp_loss(params, batch).mean()},
        ConfigError,
        r"loss.*\(\).*\(6,\)",
    ),
    "diverging rate": (
        {"optimizer": optax.sgd(1e8), "batches": mlp_batches(8)},
        NonFiniteMetagradient,
        "lower its learning rate",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_value(case):
    changes, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call(**changes)


def test_a_window_that_is_not_finite_is_found():
    batches = mlp_batches(2)
    with pytest.raises(NonFiniteMetagradient):
        call(batches={**batches, "y": batches["y"].at[1, 2].set(jnp.nan)})


# Finite differences of real retraining.

DECODER = DecoderLoss(DecoderConfig(vocab_size=12, n_positions=8, n_embd=8, n_layer=1, n_head=2))
ADAMW = optax.adamw(3e-3, b2=0.95, weight_decay=0.01)


def decoder_outer(params):
    return DECODER(params, jnp.tile(jnp.arange(9, dtype=jnp.int32), (2, 1))).mean()


def misreported_outer(params):
    """The value of `mlp_outer` with the gradient of something else."""
    other = other_outer(params)
    return mlp_outer(jax.lax.stop_gradient(params)) + other - jax.lax.stop_gradient(other)


@pytest.fixture(scope="module")
def decoder_start():
    rng = np.random.default_rng(7)

    def windows(steps):
        # Ascending runs, which the outer metric rewards, and noise.
        first = rng.integers(0, 12, (steps, 8, 1))
        runs = (first + np.arange(9)) % 12
        noise = rng.integers(0, 12, (steps, 8, 9))
        pick = rng.random((steps, 8, 1)) < 0.5
        return jnp.asarray(np.where(pick, runs, noise), jnp.int32)

    params = init_decoder(DECODER.config, seed=0)
    return *warmed(ADAMW, params, DECODER, windows(20)), windows(8)


def test_metagradients_agree_with_retraining(decoder_start):
    params, state, batches = decoder_start
    found = mgf.check_metagradients(DECODER, decoder_outer, params, state, batches, optimizer=ADAMW)
    assert found.entries.shape == (24, 2) and len({*map(tuple, found.entries)}) == 24
    assert found.rank_correlation >= 0.99
    assert found.relative_error <= 0.05
    assert found.sign_agreement >= 0.95
    assert 0.9 < found.metasmoothness <= 1


@pytest.mark.parametrize(("outer", "right"), [(mlp_outer, True), (misreported_outer, False)])
def test_finite_differences_expose_a_wrong_gradient(outer, right):
    optimizer = OPTIMIZERS["adamw"]
    params, state = start(optimizer, "warm")
    found = mgf.check_metagradients(
        mlp_loss, outer, params, state, mlp_batches(4), optimizer=optimizer
    )
    assert (found.rank_correlation > 0.98) == right
    assert (found.rank_correlation < 0.8) != right
    assert (found.relative_error < 0.05) == right
    assert (found.relative_error > 0.5) != right


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outer": {"a": mlp_outer}}, "one outer metric"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"epsilon": float("nan")}, "epsilon=nan"),
        ({"entries": 1}, "entries=1"),
        ({"entries": 13}, "entries=13; expected 2 to 12"),
    ],
)
def test_check_metagradients_refuses(changes, message):
    sgd, params = OPTIMIZERS["sgd"], mlp_params()
    outer = changes.pop("outer", mlp_outer)
    with pytest.raises(ConfigError, match=message):
        mgf.check_metagradients(
            mlp_loss, outer, params, sgd.init(params), mlp_batches(2), optimizer=sgd, **changes
        )
