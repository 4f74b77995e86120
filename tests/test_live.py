"""Where a round starts: checkpoints that a training job writes, or weights without moments.

Every checkpoint here is written by orbax itself, in the layouts that jobs use.
"""

import functools
import multiprocessing as mp
import shutil
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import given, settings
from hypothesis import strategies as st

import metagrad_filter as mgf
from metagrad_filter.calibration.checkpoint import Checkpoints
from metagrad_filter.calibration.warm import MAX_WARMUP_STEPS, warm_moments, warmup_steps
from metagrad_filter.errors import (
    CalibrationFailed,
    ConfigError,
    NonFiniteMetagradient,
    WindowError,
)
from metagrad_filter.metagradient import metagradients
from metagrad_filter.metagradient.optimizer import warm_state
from metagrad_filter.metagradient.trajectory import weighted_gradient
from metagrad_filter.proxy.proxy import Proxy
from metagrad_filter.statistics import rank_correlation

FACTORY = functools.partial(optax.adamw, b2=0.95)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), FACTORY(optax.constant_schedule(0.1)))


def params_at(step):
    """Parameters that say which step they are of."""
    return {
        "table": jnp.full((3, 4), float(step)),
        "h": [{"kernel": jnp.full((2, 3), step + 0.5), "bias": jnp.float32(step)}],
    }


def state_at(step, optimizer=OPTIMIZER):
    """A state in which every leaf differs from a fresh one and from its neighbours."""
    leaves, treedef = jax.tree.flatten(optimizer.init(params_at(step)))
    return treedef.unflatten([x + jnp.asarray(step + i, x.dtype) for i, x in enumerate(leaves)])


def manager(directory, **options):
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **options)
    return ocp.CheckpointManager(directory, options=options)


def save(directory, step, args, **options):
    with manager(directory, **options) as writer:
        writer.save(step, args=args, force=True)


def tree_at(step):
    return {"params": params_at(step), "opt_state": state_at(step)}


def standard(directory, step):
    save(directory, step, ocp.args.StandardSave(tree_at(step)))


def composite(directory, step):
    items = {"state": ocp.args.StandardSave(tree_at(step)), "data": ocp.args.JsonSave({"at": step})}
    save(directory, step, ocp.args.Composite(**items), step_prefix="run")


def separate_items(directory, step):
    items = {name: ocp.args.StandardSave(tree) for name, tree in tree_at(step).items()}
    save(directory, step, ocp.args.Composite(**items), step_format_fixed_length=8)


def train_state(directory, step):
    state = TrainState(
        step=step,
        apply_fn=lambda: None,
        params=params_at(step),  # pyright: ignore[reportArgumentType]
        tx=OPTIMIZER,
        opt_state=state_at(step),  # pyright: ignore[reportArgumentType]
    )
    save(directory, step, ocp.args.StandardSave(state))


def collections(directory, step):
    """MaxText and linen keep the parameters, and so the moments, under a collection."""
    params = {"params": params_at(step)}
    fresh = OPTIMIZER.init(params)
    treedef, leaves = jax.tree.structure(fresh), jax.tree.leaves(state_at(step))
    tree = {"step": step, "params": params, "opt_state": treedef.unflatten(leaves)}
    save(directory, step, ocp.args.Composite(items=ocp.args.PyTreeSave(tree)))


def plain(directory, step):
    with ocp.StandardCheckpointer() as writer:
        writer.save(directory / str(step), tree_at(step))


LAYOUTS = [standard, composite, separate_items, train_state, collections, plain]


def newest(directory, optimizer=OPTIMIZER, params=None, **where):
    found = Checkpoints(str(directory), **where).newest(params or params_at(0), optimizer)
    assert found is not None
    return found


def assert_at(found, step):
    assert found.step == step
    jax.tree.map(np.testing.assert_array_equal, found.params, params_at(step))
    # The very structure: named tuples of optax, not what orbax makes of them.
    assert jax.tree.structure(found.opt_state) == jax.tree.structure(state_at(step))
    jax.tree.map(np.testing.assert_array_equal, found.opt_state, state_at(step))


# Reading.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_newest_step_with_its_moments(tmp_path, layout):
    for step in (7, 30, 100):
        layout(tmp_path / "run", step)
    assert_at(newest(tmp_path / "run"), 100)


@pytest.mark.parametrize(
    ("layout", "params", "opt_state"),
    [
        (standard, "params", "opt_state"),
        (composite, "state.params", "state.opt_state"),
        (composite, "params", "opt_state"),
        (collections, "items/params/params", "items/opt_state"),
    ],
)
def test_places_may_be_named(tmp_path, layout, params, opt_state):
    layout(tmp_path, 4)
    found = Checkpoints(str(tmp_path), params, opt_state).newest(params_at(0), OPTIMIZER)
    assert_at(found, 4)


def test_one_checkpoint_may_be_named_itself(tmp_path):
    plain(tmp_path, 12)
    plain(tmp_path, 15)
    assert_at(newest(tmp_path / "12"), 12)


def test_the_state_of_nnx_is_read(tmp_path):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(model))
    gradient = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2))) ** 2))(model)
    optimizer.update(model, gradient)
    tree = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
    save(tmp_path, 3, ocp.args.StandardSave(tree))
    found = newest(tmp_path, optax.adam(0.1), params)
    jax.tree.map(np.testing.assert_array_equal, found.params, nnx.to_pure_dict(nnx.state(model)))
    assert int(found.opt_state[0].count) == 1
    expected = 0.1 * nnx.to_pure_dict(nnx.state(gradient))["kernel"]
    np.testing.assert_allclose(found.opt_state[0].mu["kernel"], expected, rtol=1e-6)


def test_wrappers_of_an_optimizer_are_entered_by_name(tmp_path):
    wrapped = (
        optax.MultiSteps(OPTIMIZER, 2).init(params_at(5))._replace(inner_opt_state=state_at(5))
    )
    save(tmp_path, 5, ocp.args.StandardSave({"params": params_at(5), "opt_state": wrapped}))
    with pytest.raises(CalibrationFailed, match=r"no .*opt_state\.1\.0\.mu\.h\.0\.bias"):
        newest(tmp_path)
    assert_at(newest(tmp_path, opt_state="opt_state.inner_opt_state"), 5)


def test_a_schedule_on_one_side_only_does_not_matter(tmp_path):
    """The inner loop runs at a rate of its own: only the moments are taken over in the end."""
    constant = optax.chain(optax.clip_by_global_norm(1.0), FACTORY(0.1))
    standard(tmp_path / "scheduled", 6)
    found = newest(tmp_path / "scheduled", constant)
    assert jax.tree.structure(found.opt_state) == jax.tree.structure(constant.init(params_at(0)))
    np.testing.assert_array_equal(found.opt_state[1][0].nu["table"], state_at(6)[1][0].nu["table"])
    tree = {"params": params_at(6), "opt_state": state_at(6, constant)}
    save(tmp_path / "constant", 6, ocp.args.StandardSave(tree))
    found = newest(tmp_path / "constant")
    warm = warm_state(OPTIMIZER, found.params, found.opt_state)
    np.testing.assert_array_equal(warm[1][0].mu["table"], state_at(6, constant)[1][0].mu["table"])


def test_weights_alone_are_read_too(tmp_path):
    save(tmp_path / "named", 2, ocp.args.StandardSave({"params": params_at(2)}))
    save(tmp_path / "bare", 2, ocp.args.StandardSave(params_at(2)))
    for name in ("named", "bare"):
        found = newest(tmp_path / name)
        jax.tree.map(np.testing.assert_array_equal, found.params, params_at(2))
        assert found.opt_state is None
    save(tmp_path / "sgd", 2, ocp.args.StandardSave({"params": params_at(2)}))
    found = newest(tmp_path / "sgd", optax.sgd(0.1))
    assert found.opt_state == optax.sgd(0.1).init(params_at(2))  # there is nothing to warm


def test_no_checkpoint_yet_is_no_error(tmp_path):
    for directory in (tmp_path / "missing", tmp_path):
        assert Checkpoints(str(directory)).newest(params_at(0), OPTIMIZER) is None


# Reading what is not there, or not the proxy's.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {**p, "table": jnp.zeros((3, 5))}, r"float32\[3, 4\] at default\.params\.table"),
        (lambda p: {**p, "table": p["table"].astype(jnp.bfloat16)}, r"table is bfloat16\[3, 4\]"),
        (lambda p: {**p, "extra": jnp.zeros(2)}, r"nothing at default\.params\.extra"),
        (lambda p: {"table": p["table"]}, r"default\.params\.h\.0\.bias \(2 more leaves"),
    ],
)
def test_another_model_is_refused_by_the_name_of_a_leaf(tmp_path, change, message):
    standard(tmp_path, 1)
    with pytest.raises(CalibrationFailed, match=message):
        newest(tmp_path, params=change(params_at(0)))


def test_another_optimizer_is_refused_by_the_name_of_a_leaf(tmp_path):
    standard(tmp_path, 1)
    with pytest.raises(
        CalibrationFailed, match=r"no default\.opt_state\.0\.mu\.h.*optimizer factory"
    ):
        newest(tmp_path, FACTORY(0.1))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "params",
            "state.weights",
            r"params='state.weights' names nothing.*default.opt_state, default.params",
        ),
        ("opt_state", "momenta", r"opt_state='momenta' names nothing"),
        ("params", "", "names joined by dots"),
        ("opt_state", 3, "names joined by dots"),
        ("directory", "", "names no folder"),
    ],
)
def test_a_place_that_is_none_is_refused(tmp_path, field, value, message):
    standard(tmp_path, 1)
    with pytest.raises(ConfigError, match=message):
        Checkpoints(**{"directory": str(tmp_path), field: value}).newest(params_at(0), OPTIMIZER)


def test_several_places_are_asked_about(tmp_path):
    tree = {"model": params_at(1), "params": params_at(1)}
    save(tmp_path / "params", 1, ocp.args.StandardSave(tree))
    with pytest.raises(ConfigError, match=r"may lie at default\.model, default\.params"):
        newest(tmp_path / "params")
    tree = {"generator": tree_at(1), "critic": {"opt_state": state_at(1)}}
    save(tmp_path / "state", 1, ocp.args.StandardSave(tree))
    with pytest.raises(ConfigError, match=r"critic\.opt_state, .*generator\.opt_state"):
        newest(tmp_path / "state")
    save(tmp_path / "none", 1, ocp.args.StandardSave({"weights": params_at(1), "step": 1}))
    with pytest.raises(ConfigError, match="no node called params or model"):
        newest(tmp_path / "none")


@pytest.mark.parametrize("victim", ["manifest.ocdbt", "d", "_METADATA"])
def test_a_damaged_checkpoint_is_named(tmp_path, victim):
    standard(tmp_path, 8)
    for path in list(tmp_path.rglob(victim)):
        path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    with pytest.raises((CalibrationFailed, ConfigError), match=f"{tmp_path}/8"):
        newest(tmp_path)


def test_a_checkpoint_that_is_being_written_is_not_read(tmp_path):
    standard(tmp_path, 8)
    # What a job leaves that was killed while it wrote step 9.
    shutil.copytree(tmp_path / "8", tmp_path / "9.orbax-checkpoint-tmp-1700000000")
    (tmp_path / "notes").mkdir()
    (tmp_path / "10").write_text("not a folder")
    assert_at(newest(tmp_path), 8)


def _rotate(directory, ready, stop):
    """A job that writes a checkpoint after the other and keeps one."""
    with manager(directory, max_to_keep=1) as writer:
        step = 0
        while not stop.is_set():
            step += 1
            tree = {"params": params_at(step), "opt_state": state_at(step)}
            writer.save(step, args=ocp.args.StandardSave(tree), force=True)
            ready.set()


def test_reading_beside_a_job_that_writes_and_removes_gives_whole_states(tmp_path):
    context = mp.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    job = context.Process(target=_rotate, args=(tmp_path, ready, stop), daemon=True)
    job.start()
    try:
        assert ready.wait(120)
        steps = []
        for _ in range(12):
            found = newest(tmp_path)
            assert_at(found, found.step)
            steps.append(found.step)
    finally:
        stop.set()
        job.join(60)
    assert job.exitcode == 0
    assert steps == sorted(steps) and len(set(steps)) > 3


def test_a_checkpoint_removed_while_it_is_read_is_given_up_for_the_next(tmp_path, monkeypatch):
    """The race in slow motion: the job rotates between the listing and the reading."""
    standard(tmp_path, 1)
    listed = ocp.utils.checkpoint_steps_paths

    def list_then_rotate(directory):
        found = listed(directory)
        if (tmp_path / "1").exists():
            shutil.rmtree(tmp_path / "1")
            standard(tmp_path, 2)
        return found

    monkeypatch.setattr(ocp.utils, "checkpoint_steps_paths", list_then_rotate)
    assert_at(newest(tmp_path), 2)


# Warming moments.


@dataclass(frozen=True)
class BigramLoss:
    """Nats per token under a table of next-token logits."""

    def __call__(self, params, windows):
        log_p = jax.nn.log_softmax(params["table"][windows[:, :-1]])
        return -jnp.take_along_axis(log_p, windows[:, 1:, None], axis=2)[..., 0].mean(axis=1)


VOCAB, LENGTH, BATCH = 16, 8, 16
LOSS = BigramLoss()


def windows_of(count, seed, *, upwards=0.5):
    rng = np.random.default_rng(seed)
    signs = np.where(rng.random((count, 1)) < upwards, 1, -1)
    steps = rng.integers(1, 3, (count, LENGTH)) * signs
    return ((rng.integers(0, VOCAB, (count, 1)) + steps.cumsum(1)) % VOCAB).astype(np.int32)


WINDOWS = windows_of(2000, seed=0)


def batches_of(steps, seed):
    index = np.random.default_rng(seed).integers(0, len(WINDOWS), (steps, BATCH))
    return WINDOWS[index]


@functools.cache
def trained(b2=0.99, steps=100):
    """Parameters and state of a job some way into its training."""
    optimizer = optax.adamw(0.02, b2=b2)

    @jax.jit
    def train(params, state, batches):
        def step(carry, batch):
            params, state = carry
            gradient = weighted_gradient(LOSS, params, batch, jnp.ones(BATCH), None)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), batches)[0]

    params = {"table": jnp.zeros((VOCAB, VOCAB))}
    params, state = train(params, optimizer.init(params), batches_of(steps, seed=1))
    return optimizer, params, state


def test_warm_moments_are_the_long_run_ones_within_sampling_error():
    optimizer, params, _ = trained()
    steps = 48
    batches = batches_of(steps, seed=2)
    state = warm_moments(LOSS, params, batches, optimizer=optimizer)[0]
    assert int(state.count) == steps
    gradient = jax.jit(lambda x: weighted_gradient(LOSS, params, x, jnp.ones(BATCH), None))
    many = np.stack([gradient(x)["table"] for x in batches_of(3000, seed=3)])
    for moment, power, decay in ((state.mu, 1, 0.9), (state.nu, 2, 0.99)):
        unbiased = moment["table"] / (1 - decay**steps)
        weights = decay ** np.arange(steps)
        share = np.sum(weights**2) / np.sum(weights) ** 2
        error = (many**power).std(axis=0) * share**0.5
        distance = (unbiased - (many**power).mean(axis=0)) / error
        # A standard normal in each of 256 coordinates, were the gradients Gaussian.
        assert 0.8 < np.sqrt(np.mean(distance**2)) < 1.2
    # And not merely small: the cold state is many errors away.
    assert np.sqrt(np.mean(((many**2).mean(0) / error) ** 2)) > 5


def test_scores_from_warm_moments_agree_with_those_from_live_ones_and_cold_ones_do_not():
    optimizer, params, live = trained()
    inner = optax.adamw(0.005, b2=0.99)
    held_out = windows_of(256, seed=5, upwards=1.0)
    warm = warm_moments(
        LOSS, params, batches_of(warmup_steps(params, optimizer), seed=4), optimizer=optimizer
    )

    def scores(state):
        start = warm_state(inner, params, state)
        return np.concatenate(
            [
                np.ravel(
                    metagradients(
                        LOSS, OUTER, params, start, batches_of(2, seed), optimizer=inner
                    ).scores
                )
                for seed in range(10, 14)
            ]
        )

    OUTER = functools.partial(_mean_loss, windows=held_out)
    of_live, of_warm, of_cold = (scores(s) for s in (live, warm, optimizer.init(params)))
    assert rank_correlation(of_warm, of_live) > 0.9
    assert rank_correlation(of_cold, of_live) < rank_correlation(of_warm, of_live) - 0.1
    # Cold scores have no zero point: they sum to nothing, whatever the windows are worth.
    assert abs(of_cold.sum()) < 1e-3 * np.abs(of_cold).sum() < np.abs(of_live.sum())


def _mean_loss(params, windows):
    return LOSS(params, windows).mean()


@pytest.mark.parametrize(
    ("optimizer", "steps"),
    [
        (optax.adamw(0.1, b2=0.95), 40),
        (optax.adamw(0.1), MAX_WARMUP_STEPS),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, b2=0.9, b1=0.8)), 20),
        (optax.inject_hyperparams(optax.adamw)(0.1, b2=0.95), 40),
        (optax.sgd(0.1, momentum=0.9), 20),
        (optax.sgd(0.1), 1),
    ],
)
def test_the_number_of_steps_follows_the_slowest_moment(optimizer, steps):
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    assert warmup_steps(params, optimizer) == steps


@settings(max_examples=10)
@given(steps=st.sampled_from([1, 4]), microbatch=st.sampled_from([None, 3]), seed=st.integers(0))
def test_warming_is_the_optimizer_fed_with_gradients_at_one_point(steps, microbatch, seed):
    optimizer, params, _ = trained()
    before = jax.tree.map(np.array, params)
    batches = batches_of(steps, seed)
    found = warm_moments(LOSS, params, batches, optimizer=optimizer, microbatch=microbatch)
    state = optimizer.init(params)
    for batch in batches:
        gradient = jax.grad(lambda p, x=batch: LOSS(p, x).mean())(params)
        state = optimizer.update(gradient, state, params)[1]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), found, state)
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_warming_refuses_what_it_cannot_use():
    optimizer, params, _ = trained()
    with pytest.raises(WindowError, match=r"\(0, 16\)"):
        warm_moments(LOSS, params, batches_of(0, 0), optimizer=optimizer)
    with pytest.raises(ConfigError, match="microbatch=0"):
        warm_moments(LOSS, params, batches_of(1, 0), optimizer=optimizer, microbatch=0)
    broken = {"table": params["table"].at[2, 3].set(jnp.nan)}
    with pytest.raises(NonFiniteMetagradient, match="1 batches are not finite"):
        warm_moments(LOSS, broken, batches_of(1, 0), optimizer=optimizer)


# Rounds.

CONFIG = mgf.CalibrationConfig(
    horizon=6,
    trajectories=2,
    batch_windows=BATCH,
    learning_rate_scale=0.25,
    labels=200,
    block_windows=64,
    gate_steps=4,
    gate_pairs=2,
    vocab_size=VOCAB,
)
TARGET = mgf.HeldOutLoss(windows_of(64, seed=6, upwards=1.0), batch_size=32)


def calibrator_of(run_dir, *, warm=True, config=CONFIG, **arguments):
    _, params, live = trained(b2=0.95)
    proxy = Proxy(LOSS, params, live if warm else None, FACTORY, 0.02)
    return mgf.Calibrator(
        run_dir, proxy=proxy, target=TARGET, windows=WINDOWS, config=config, **arguments
    )


def save_job(directory, step, *, opt_state=True, table=0.0):
    _, params, live = trained(b2=0.95)
    tree = {"params": {"table": params["table"] + table}}
    save(directory, step, ocp.args.StandardSave(tree | ({"opt_state": live} if opt_state else {})))


def test_a_round_warms_the_moments_of_a_proxy_that_has_none(tmp_path):
    report = calibrator_of(tmp_path, warm=False).round()
    assert report.warmup_steps == 40 and "warmup" in report.seconds
    assert report.reliability is not None and report.reliability > 0.5
    with pytest.raises(ConfigError, match="warmup_steps=0"):
        replace(CONFIG, warmup_steps=0)


def test_a_round_starts_from_the_newest_checkpoint_of_the_job(tmp_path):
    job = tmp_path / "job"
    calibrator = calibrator_of(tmp_path / "run", checkpoints=job)
    report = calibrator.round()
    assert report.live_step is None and report.warmup_steps == 0
    assert "warmup" not in report.seconds
    assert report.started_from == f"the proxy as given: no complete checkpoint yet in {job}"
    save_job(job, 20)
    save_job(job, 40, table=np.nan)
    report = calibrator.round()
    # The marker of step 40 is that it cannot be calibrated.
    assert report.live_step == 40 and report.reason.startswith("non-finite")
    assert report.started_from == f"a checkpoint in {job}"
    save_job(job, 60, opt_state=False)
    report = calibrator.round()
    assert report.live_step == 60 and report.warmup_steps == 40
    assert [r["live_step"] for r in calibrator.reports()] == [None, 40, 60]
    with pytest.raises(ConfigError, match=f"reads checkpoints from {job}"):
        calibrator.follow(80, calibrator.proxy.params, calibrator.proxy.opt_state)


@pytest.mark.slow
def test_the_worker_follows_the_checkpoints_too(tmp_path):
    save_job(tmp_path / "job", 31)
    calibrator = calibrator_of(
        tmp_path / "run", checkpoints=Checkpoints(str(tmp_path / "job"), params="params")
    )
    with calibrator.background(rounds=1) as worker:
        (report,) = worker.wait(1)
    assert report["live_step"] == 31 and report["warmup_steps"] == 0
    here = calibrator_of(tmp_path / "here", checkpoints=tmp_path / "job").round()
    assert report["reliability"] == pytest.approx(here.reliability, abs=1e-3)


def test_weights_alone_may_be_handed_over(tmp_path):
    calibrator = calibrator_of(tmp_path, config=replace(CONFIG, warmup_steps=7))
    calibrator.follow(11, calibrator.proxy.params)
    report = calibrator.round()
    assert (report.live_step, report.warmup_steps) == (11, 7)
    assert report.started_from == "the state handed over by follow()"


def test_checkpoints_of_another_model_end_the_round_with_the_name_of_a_leaf(tmp_path):
    save(tmp_path / "job", 1, ocp.args.StandardSave({"params": {"table": jnp.zeros((3, 3))}}))
    calibrator = calibrator_of(tmp_path / "run", checkpoints=tmp_path / "job")
    with pytest.raises(CalibrationFailed, match=r"float32\[3, 3\] at default\.params\.table"):
        calibrator.round()
