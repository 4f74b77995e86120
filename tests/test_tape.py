"""What the backward sweep keeps: the arithmetic of the choice, and what programs really take."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inner_loop import mlp_batches, mlp_loss, mlp_outer, other_outer, relative_error, start

import metagrad_filter as mgf
from metagrad_filter.errors import ConfigError
from metagrad_filter.metagradient.memory import predict_memory
from metagrad_filter.metagradient.sweep import slots
from metagrad_filter.metagradient.tape import Sizes, choose_tape, free_bytes, sizes_of

MIB = 1 << 20
ADAM = Sizes(params=100 * MIB, state=300 * MIB, cotangents=600 * MIB)


@given(
    steps=st.integers(1, 700),
    levels=st.integers(1, 3),
    state=st.integers(1, 5),
)
def test_spans_nest_and_cover_the_trajectory(steps, levels, state):
    sizes = Sizes(MIB, state * MIB, 6 * MIB)
    tape = choose_tape("segments", steps, sizes, levels=levels)
    assert len(tape.spans) == levels
    for outer, inner in zip(tape.spans, tape.spans[1:]):
        assert outer % inner == 0
    assert 1 <= tape.block <= 16 and tape.block <= tape.spans[-1]
    assert slots(tape, steps) >= steps
    # No other spacing of one level keeps less, but for a little that evenness is worth.
    if levels == 1:
        least = min(s * sizes.params + (-(-steps // s) - 1) * sizes.state for s in range(1, 17))
        assert tape.nbytes <= 1.06 * (least + sizes.cotangents + 2 * sizes.state)


@given(steps=st.integers(2, 700), free=st.integers(1, 400))
def test_auto_takes_the_first_tape_that_fits_half_of_what_is_free(steps, free):
    free <<= 30
    chosen = choose_tape("auto", steps, ADAM, free_bytes=free, has_host_memory=True)
    assert chosen.free_bytes == free
    cheaper = [
        choose_tape("gradient", steps, ADAM),
        *(choose_tape("segments", steps, ADAM, levels=n) for n in (1, 2, 3)),
        choose_tape("segments", steps, ADAM, offload=True, has_host_memory=True),
    ]
    if chosen.kind == "state":
        assert chosen.nbytes <= 1 << 30
        return
    fits = [tape.nbytes <= free / 2 for tape in cheaper]
    expected = cheaper[fits.index(True)] if any(fits) else min(cheaper, key=lambda t: t.nbytes)
    found = (chosen.kind, chosen.spans, chosen.offload)
    assert found == (expected.kind, expected.spans, expected.offload)


def test_deeper_levels_and_host_memory_keep_less_of_a_long_trajectory():
    held = [choose_tape("segments", 512, ADAM, levels=n).nbytes for n in (1, 2, 3)]
    offloaded = choose_tape("segments", 512, ADAM, offload=True, has_host_memory=True)
    gradient = choose_tape("gradient", 512, ADAM)
    assert gradient.nbytes > held[0] > held[1] > held[2] > offloaded.nbytes


def test_a_tape_says_what_it_is():
    assert str(choose_tape("state", 16, ADAM)).startswith("state: keeps parameters, moments")
    text = str(choose_tape("segments", 96, ADAM, levels=2, free_bytes=40 << 30))
    assert text.startswith("segments: keeps states") and "of 40.0 GiB free" in text
    host = choose_tape("segments", 96, ADAM, offload=True, has_host_memory=True)
    assert "in host memory" in str(host)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "paper"}, "'paper'"),
        ({"kind": "segments", "levels": 4}, "levels=4"),
        ({"kind": "segments", "levels": True}, "levels=True"),
        ({"kind": "state", "levels": 2}, "levels=2.*'state'"),
        ({"kind": "gradient", "offload": True, "has_host_memory": True}, "'gradient'"),
        ({"kind": "segments", "offload": True}, "no pinned host memory"),
        (
            {"kind": "segments", "offload": True, "levels": 2, "has_host_memory": True},
            "levels=2 with offload",
        ),
    ],
)
def test_choose_tape_refuses(arguments, message):
    with pytest.raises(ConfigError, match=message):
        choose_tape(arguments.pop("kind"), 16, ADAM, **arguments)


def test_metagradients_passes_on_what_is_asked_of_the_tape():
    adamw = optax.adamw(0.02)
    params, state = start(adamw, "cold")
    with pytest.raises(ConfigError, match="levels=5"):
        mgf.metagradients(
            mlp_loss, mlp_outer, params, state, mlp_batches(2), optimizer=adamw, levels=5
        )


def test_free_memory_of_this_machine_is_known():
    found = free_bytes({"a": jnp.zeros(3)})
    assert found is not None and 1 << 24 < found < 1 << 50


def test_sizes_count_bytes_per_target_and_in_the_width_of_the_adjoint():
    params = {"a": jnp.zeros((3, 5), jnp.bfloat16)}
    state = optax.adam(0.1).init(params)
    one, two = sizes_of(params, state, 1), sizes_of(params, state, 2)
    assert one.params == 30 and one.state == 30 + 60 + 4
    assert one.cotangents == 4 * 60 + 2 * 60 and two.cotangents == 2 * one.cotangents


# Host arrays, host memory.


@pytest.mark.parametrize("targets", [1, 2])
def test_host_arrays_and_anchors_in_host_memory_change_nothing(targets):
    adamw = optax.adamw(0.02)
    params, state = start(adamw, "warm")
    outers = {"a": mlp_outer, "b": other_outer} if targets == 2 else mlp_outer
    batches = mlp_batches(11)

    def scores(params, state, **options):
        found = mgf.metagradients(
            mlp_loss, outers, params, state, batches, optimizer=adamw, **options
        )
        return found

    plain = scores(params, state, tape="state")
    host = jax.tree.map(np.asarray, (params, state))
    offloaded = scores(*host, tape="segments", offload=True)
    assert relative_error(offloaded.scores, plain.scores) < 2e-5
    assert relative_error(offloaded.probe, plain.probe) < 2e-5
    assert relative_error(offloaded.params, plain.params) < 2e-5
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(offloaded.params)}
    assert kinds == {"pinned_host"}


# What the compiled programs take.

DIM = 300


def wide_loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["a"])
    return jnp.sum((hidden @ params["b"]) ** 2, axis=1)


def wide_outer(params):
    return jnp.sum(params["a"] ** 2) + jnp.sum(params["b"] ** 2)


def predicted(steps, windows, **options):
    params = {name: jax.ShapeDtypeStruct((DIM, DIM), jnp.float32) for name in "ab"}
    adam = optax.adam(0.01)
    return predict_memory(
        wide_loss,
        wide_outer,
        params,
        jax.eval_shape(adam.init, params),
        {"x": jax.ShapeDtypeStruct((steps, windows, DIM), jnp.float32)},
        optimizer=adam,
        **options,
    )


def test_memory_of_the_gradient_tape_grows_by_one_gradient_a_step():
    one = 2 * DIM * DIM * 4
    batch = 4 * DIM * 4
    found = [predicted(steps, 4, tape="gradient").peak_bytes for steps in (8, 14)]
    assert 0.9 * one <= (found[1] - found[0]) / 6 - batch <= 1.1 * one


def test_memory_does_not_depend_on_the_number_of_windows_given_microbatches():
    few, many = (predicted(4, windows, tape="gradient", microbatch=8) for windows in (64, 512))
    whole = predicted(4, 512, tape="gradient")
    # The windows themselves are there in any case, a few times where they are cut.
    windows = 4 * 448 * DIM * 4
    assert many.peak_bytes - few.peak_bytes <= 2.5 * windows
    assert whole.peak_bytes > many.peak_bytes


def test_offloaded_anchors_leave_the_device():
    near = predicted(64, 4, tape="segments")
    far = predicted(64, 4, tape="segments", offload=True)
    assert far.peak_bytes < near.peak_bytes
    assert far.kept_bytes == 0 and near.host_bytes == 0
    state = 3 * 2 * DIM * DIM * 4 + 4
    assert far.host_bytes == (64 // far.tape.spans[0]) * state
