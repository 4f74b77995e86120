"""Metagradients and probe scores on meshes of simulated devices equal those on one.

jax fixes its number of devices when it starts, so everything runs in one other process that has
four of them and reports what it found.
"""

import functools
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from metagrad_filter.calibration.checkpoint import Checkpoints
from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.metagradient import metagradients, probe_scores
from metagrad_filter.sharding import (
    AXES,
    data_mesh,
    shard_batches,
    shard_params,
    shard_windows,
    spec_of,
)

VOCAB, WIDTH, LENGTH, STEPS, BATCH = 64, 32, 6, 5, 8
FSDP = {"4x1": 1, "2x2": 2, "1x4": 4}
CASES = [
    ("4x1", "state", None),
    ("4x1", "segments", 3),
    ("2x2", "gradient", 4),
    ("1x4", "state", 4),
    ("1x4", "gradient", None),
    ("1x4", "segments", None),
]
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01, b2=0.95))


def loss(params, windows):
    hidden = jnp.tanh(params["wte"][windows[:, :-1]] @ params["up"] + params["bias"])
    log_p = jax.nn.log_softmax(hidden @ params["down"] @ params["wte"].T)
    return -jnp.take_along_axis(log_p, windows[:, 1:, None], axis=2)[..., 0].mean(axis=1)


def world():
    """Parameters, a warm state, batches and held-out windows, all numpy."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(0, 0.1, shape).astype(np.float32)  # noqa: E731
    params = {
        "wte": normal(VOCAB, WIDTH),
        "up": normal(WIDTH, 4 * WIDTH),
        "down": normal(4 * WIDTH, WIDTH),
        "bias": normal(4 * WIDTH),
        "scale": normal(),
    }
    params["odd"] = normal(3, 5)  # no axis of which can be cut
    draw = lambda *shape: rng.integers(0, VOCAB, (*shape, LENGTH)).astype(np.int32)  # noqa: E731
    state = OPTIMIZER.init(params)
    step = jax.jit(
        lambda s, x: OPTIMIZER.update(jax.grad(lambda p: loss(p, x).mean())(params), s, params)[1]
    )
    for _ in range(10):
        state = step(state, draw(BATCH))
    return params, jax.tree.map(np.asarray, state), draw(STEPS, BATCH), draw(50)


@functools.cache
def held_out_metric():
    """One object for all runs of a process, so that equal shardings share a program."""
    held_out = world()[3]
    return lambda params: loss(params, held_out[:32]).mean()


def run(mesh=None, tape="auto", microbatch=None):
    """A sweep, and probe scores of windows outside of it, on a mesh or on one device."""
    params, state, batches, held_out = world()
    if mesh is not None:
        params, state = shard_params(mesh, params), shard_params(mesh, state)
        batches = shard_batches(mesh, batches)
    result = metagradients(
        loss,
        held_out_metric(),
        params,
        state,
        batches,
        optimizer=OPTIMIZER,
        tape=tape,  # pyright: ignore[reportArgumentType]
        microbatch=microbatch,
    )
    return result, probe_scores(loss, params, result.probe, held_out, batch_size=16)


def error(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def worst(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(error(a, b) for a, b in pairs)


def compare(*which):
    """Runs the cases of these numbers; returns, by case, relative errors and where arrays lie."""
    one, one_probe = run()
    report = {}
    for name, tape, microbatch in (CASES[int(i)] for i in which):
        result, scores = run(data_mesh(fsdp=FSDP[name]), tape, microbatch)
        report[f"{name} {tape} {microbatch}"] = {
            "phi": error(result.phi, one.phi),
            "scores": error(result.scores, one.scores),
            "probe scores": error(scores, one_probe),
            "probe": worst(result.probe, one.probe),
            "params": worst(result.params, one.params),
            "moments": worst(result.opt_state, one.opt_state),
            "masked": abs(result.masked_coordinates - one.masked_coordinates),
            "shares": {
                place: {key: share(leaf) for key, leaf in tree.items()}
                for place, tree in (
                    ("probe", result.probe),
                    ("params", result.params),
                    ("nu", result.opt_state[1][0].nu),
                )
            },
        }
    mesh = data_mesh(fsdp=4)
    params, _, _, held_out = world()
    probe = shard_params(mesh, jax.tree.map(np.asarray, one.probe))
    scores = probe_scores(
        loss, shard_params(mesh, params), probe, shard_windows(mesh, held_out[:48]), batch_size=7
    )
    report["sharded windows"] = error(scores, one_probe[:48])
    return report


def share(leaf):
    """What part of an array the first device holds."""
    return leaf.addressable_shards[0].data.nbytes / leaf.nbytes


def sweep(fsdp):
    """One sweep on four devices, for what XLA makes of it."""
    run(data_mesh(fsdp=int(fsdp)), tape="gradient")
    return "done"


def in_child(what, *arguments, flags=""):
    """Runs a function of this file in a process with four devices; returns what it reports."""
    program = (
        f"import json, sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); "
        f"import test_sharding; print(json.dumps(test_sharding.{what}(*sys.argv[1:])))"
    )
    flags = f"--xla_force_host_platform_device_count=4 {flags}"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


QUICK = 2  # cuts batches, parameters, tape and microbatches at once


@pytest.fixture(scope="module")
def quick():
    return in_child("compare", str(QUICK))


@pytest.fixture(scope="module")
def every():
    return in_child("compare", *map(str, range(len(CASES))))


def assert_equal_to_one_device(found):
    for name in ("phi", "scores", "probe scores", "probe", "params", "moments", "masked"):
        assert found[name] <= 1e-5, name


def assert_still_cut(found, parts):
    for place, shares in found["shares"].items():
        for key in ("wte", "up", "down", "bias"):
            assert shares[key] == 1 / parts, (place, key)
        assert shares["odd"] == shares["scale"] == 1


def test_four_devices_give_what_one_gives(quick):
    (found,) = (quick[name] for name in quick if name != "sharded windows")
    assert_equal_to_one_device(found)
    assert_still_cut(found, 2)


def test_windows_may_be_sharded_too(quick):
    assert quick["sharded windows"] <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", [f"{n} {t} {m}" for n, t, m in CASES])
def test_every_mesh_and_tape_gives_what_one_device_gives(every, case):
    assert_equal_to_one_device(every[case])
    assert_still_cut(every[case], FSDP[case[:3]])


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 4])
def test_no_device_holds_a_whole_tape(tmp_path, fsdp):
    """Looks through the compiled programs for an array as large as a leaf's uncut tape."""
    flags = f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*sweep.*"
    assert in_child("sweep", str(fsdp), flags=flags) == "done"
    texts = [p.read_text() for p in tmp_path.glob("*after_optimizations.txt")]
    assert texts
    shapes = {shape for text in texts for shape in re.findall(r"\bf32\[([0-9,]+)\]", text)}
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    tape = STEPS * WIDTH * 4 * WIDTH  # of the gradient of `up`
    assert largest == tape if fsdp == 1 else largest <= tape / 2


# Laying out, on the one device of this process.


def test_an_array_is_cut_along_its_longest_even_axis():
    mesh = jax.sharding.AbstractMesh((1, 4), AXES)
    for shape, expected in {
        (): (),
        (3, 5): (),
        (0, 4): (None, "fsdp"),
        (8,): ("fsdp",),
        (8, 12): (None, "fsdp"),
        (12, 8): ("fsdp",),
        (16, 18): ("fsdp",),
        (2, 4, 3): (None, "fsdp"),
    }.items():
        assert tuple(spec_of(mesh, shape)) == expected, shape


def test_a_mesh_of_one_device_changes_nothing():
    mesh = data_mesh()
    assert mesh.shape == {"data": 1, "fsdp": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    params, state, batches, held_out = world()
    for place, tree in [
        (shard_params, params),
        (shard_params, state),
        (shard_batches, {"tokens": batches}),
        (shard_windows, held_out),
    ]:
        placed = place(mesh, tree)
        assert jax.tree.structure(placed) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, placed, tree)


def test_what_cannot_be_cut_is_refused():
    mesh = data_mesh()
    for fsdp in (0, 2, True, 1.0):
        with pytest.raises(ConfigError, match=f"fsdp={fsdp!r} with 1 devices"):
            data_mesh(fsdp=fsdp)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="with 0 devices"):
        data_mesh([])
    with pytest.raises(WindowError, match=r"batches\['x'\] has the shape \(3,\)"):
        shard_batches(mesh, {"x": np.zeros(3)})
    with pytest.raises(WindowError, match=r"windows has the shape \(0, 4\)"):
        shard_windows(mesh, np.zeros((0, 4)))


def refused():
    mesh = data_mesh(fsdp=2)
    seen = []
    for place, shape in ((shard_batches, (2, 6, 3)), (shard_windows, (6, 3))):
        try:
            place(mesh, np.zeros(shape))
        except WindowError as error:
            seen.append(str(error))
    return seen


def test_an_uneven_batch_is_refused_with_the_number_it_has_to_divide_by():
    batches, windows = in_child("refused")
    assert "(2, 6, 3) on 4 devices" in batches and "axis 1 a positive multiple of 4" in batches
    assert "(6, 3) on 4 devices" in windows and "axis 0 a positive multiple of 4" in windows


def restored(directory):
    """Reads a checkpoint, written by a job on one device, for a proxy cut in four."""
    params, state, _, _ = world()
    tree = {"params": params, "opt_state": state}
    with ocp.CheckpointManager(directory) as manager:
        manager.save(3, args=ocp.args.StandardSave(tree))
    mesh = data_mesh(fsdp=4)
    like = shard_params(mesh, jax.tree.map(np.zeros_like, params))
    found = Checkpoints(directory).newest(like, OPTIMIZER)
    assert found is not None
    moments = found.opt_state[1][0]
    return {
        "error": worst((found.params, moments), (params, state[1][0])),
        "shares": [share(tree["up"]) for tree in (found.params, moments.mu, moments.nu)],
    }


def test_a_checkpoint_is_read_onto_the_devices_of_the_proxy(tmp_path):
    assert in_child("restored", str(tmp_path / "job")) == {"error": 0, "shares": [0.25] * 3}
