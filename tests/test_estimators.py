"""Every estimator against its definition, computed here by other means, and through a round.

The model is a table of next-token logits, so that definitions can be written out and compiled in
seconds: on-target windows count upwards, off-target ones downwards.
"""

import json
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_calibration import (
    LENGTH,
    OFF,
    ON,
    VOCAB,
    WINDOWS,
    BigramLoss,
    bigram_proxy,
    make_calibrator,
    windows_of,
    world,
)

import metagrad_filter as mgf
from metagrad_filter.calibration.config import ESTIMATORS as NAMES
from metagrad_filter.calibration.estimators import ESTIMATORS, Task, estimate
from metagrad_filter.calibration.estimators.datarater import equal_cost
from metagrad_filter.calibration.estimators.mixing import mixed_halves
from metagrad_filter.calibration.estimators.on_policy import policy_choice, policy_logits
from metagrad_filter.calibration.estimators.rho_loss import CHUNK, TUNING_SCALE, tuned_reference
from metagrad_filter.calibration.estimators.same_batch import STEPS
from metagrad_filter.calibration.estimators.task import combined, naming
from metagrad_filter.calibration.estimators.windows import gradient_norms, in_chunks
from metagrad_filter.calibration.source import WindowSource
from metagrad_filter.errors import ConfigError, NonFiniteMetagradient, TrajectoryDiverged
from metagrad_filter.labels import LabelStore, gaussian_ranks
from metagrad_filter.metagradient.diagnostics.retraining import passes_over
from metagrad_filter.selection import rank_scores

LOSS = BigramLoss()
TARGET = mgf.HeldOutLoss(windows_of(ON, 40, seed=1), batch_size=7)  # 20 to differentiate
OTHER = mgf.HeldOutLoss(windows_of(OFF, 30, seed=2), batch_size=7)
CONFIG = mgf.CalibrationConfig(
    horizon=2, trajectories=2, batch_windows=8, learning_rate_scale=0.25, block_windows=64
)
EIGHT = np.arange(8)


def task_of(estimator="metagradient", target=TARGET, proxy=None, **changes):
    config = replace(CONFIG, estimator=estimator, **changes)
    return Task(
        proxy or bigram_proxy(),
        target,
        WindowSource(WINDOWS),
        config,
        WINDOWS[EIGHT],
        EIGHT,
        seed=(7,),
    )


def gradient_of(params, window):
    return jax.grad(lambda p: LOSS(p, window[None])[0])(params)


def mean_target_loss(params, windows=TARGET.target_windows):
    return LOSS(params, jnp.asarray(windows)).mean()


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def both(part):
    """The two halves of a target's windows."""
    cut = len(part.target_windows) // 2
    return part.target_windows[:cut], part.target_windows[cut:]


def assert_scores(found, expected, rtol=2e-4):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


# Definitions.


def unrolled(proxy, batches, extra, scale, steps, target):
    """-dPhi/dw at w = 0 of windows that each of plainly unrolled steps takes beside its batch, over
    the number of steps. A window is there with its gradient at the start, as for any probe."""
    optimizer = proxy.optimizer(proxy.learning_rate * scale)
    state = proxy.opt_state
    assert float(jnp.min(state[0].nu["table"])) > 0  # nothing that the adjoint would mask

    gradients = jnp.stack([gradient_of(proxy.params, w)["table"] for w in extra])

    def phi(weights):
        params, moments = proxy.params, state
        for t in range(steps):

            def objective(p, t=t):
                inserted = jnp.einsum("n,nab,ab", weights, gradients, p["table"])
                return (LOSS(p, batches[t]).sum() + inserted) / batches.shape[1]

            updates, moments = optimizer.update(jax.grad(objective)(params), moments, params)
            params = optax.apply_updates(params, updates)
        return mean_target_loss(params, target)

    return -np.asarray(jax.grad(phi)(jnp.zeros(len(extra)))) / steps


@pytest.mark.parametrize("name", ["metagradient", "datarater", "on_policy"])
def test_a_trajectory_is_differentiated_as_jax_does_through_unrolled_steps(name):
    task = task_of(name)
    steps = 2
    found = estimate(task)
    count = equal_cost(task) if name == "datarater" else 2
    assert found.halves.shape == (1, 2, 8) and found.independent
    assert (found.horizon, found.learning_rate_scale) == (steps, 0.25)
    expected = np.zeros((2, 8))
    for i in range(count):
        rng = np.random.default_rng([7, 1, i])
        if name == "on_policy":  # without a version a tenth is uniform, and so is the rest
            candidates = passes_over(rng, np.arange(len(WINDOWS)), 64)
            index = candidates[policy_choice(rng, np.zeros(64), 16)]
        else:
            index = passes_over(rng, np.arange(len(WINDOWS)), 16)
        batches = WINDOWS[index].reshape(steps, 8, -1)
        # Each half of the trajectories has its own half of the target's windows.
        target = both(TARGET)[i % 2]
        expected[i % 2] += unrolled(task.proxy, batches, WINDOWS[EIGHT], 0.25, steps, target)
    sizes = np.array([count - count // 2, count // 2])[:, None]
    assert_scores(found.halves[0], expected / sizes, rtol=1e-4)


def test_one_step_is_the_product_of_gradients():
    task = task_of("one_step")
    found = estimate(task)
    params = task.proxy.params
    each = np.stack([flat(gradient_of(params, w)) for w in WINDOWS[EIGHT]])
    for half, windows in zip(found.halves[0], both(TARGET)):
        of_target = flat(jax.grad(mean_target_loss)(params, windows))
        assert_scores(half, each @ of_target)
    # A step along a window with a positive score lowers the outer metric.
    best = int(found.halves[0].mean(axis=0).argmax())
    moved = jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient_of(params, WINDOWS[best]))
    assert mean_target_loss(moved) < mean_target_loss(params)


def test_less_is_the_cosine_with_the_adam_update_of_each_window():
    task = task_of("less")
    proxy = task.proxy
    found = estimate(task)
    adam = proxy.opt_state[0]
    b1, b2, count = 0.9, 0.95, int(adam.count) + 1
    for i, window in enumerate(WINDOWS[EIGHT]):
        g = flat(gradient_of(proxy.params, window))
        m = (b1 * flat(adam.mu) + (1 - b1) * g) / (1 - b1**count)
        v = (b2 * flat(adam.nu) + (1 - b2) * g**2) / (1 - b2**count)
        update = m / (np.sqrt(v) + 1e-8)
        for half, windows in zip(found.halves[0], both(TARGET)):
            query = flat(jax.grad(mean_target_loss)(proxy.params, windows))
            cosine = query @ update / np.linalg.norm(query) / np.linalg.norm(update)
            np.testing.assert_allclose(half[i], cosine, rtol=1e-3, atol=1e-4)


def test_mates_is_the_fall_of_the_outer_metric_after_a_step_on_one_window():
    task = task_of("mates")
    proxy = task.proxy
    found = estimate(task)
    optimizer = proxy.optimizer(proxy.learning_rate)
    for i, window in enumerate(WINDOWS[EIGHT]):
        gradient = gradient_of(proxy.params, window)
        updates, _ = optimizer.update(gradient, proxy.opt_state, proxy.params)
        after = optax.apply_updates(proxy.params, updates)
        for half, windows in zip(found.halves[0], both(TARGET)):
            fall = LOSS(proxy.params, jnp.asarray(windows)) - LOSS(after, jnp.asarray(windows))
            np.testing.assert_allclose(half[i], fall.mean(), rtol=1e-3, atol=1e-6)


def test_same_batch_repeats_one_batch_from_cold_moments():
    task = task_of("same_batch")
    proxy = task.proxy
    found = estimate(task)
    rate = 0.25 * proxy.learning_rate
    optimizer = optax.adamw(rate, b2=0.95, eps=0.0, eps_root=1e-8, weight_decay=0.01)
    batch = jnp.asarray(WINDOWS[EIGHT])

    def phi(weights):
        params, state = proxy.params, optimizer.init(proxy.params)

        def step(carry, _):
            params, state = carry
            gradient = jax.grad(lambda p: jnp.mean(weights * LOSS(p, batch)))(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, state), None, length=STEPS)
        return mean_target_loss(params)

    slopes = -np.asarray(jax.grad(phi)(jnp.ones(8)), np.float64)
    expected = (slopes - slopes.mean()) / slopes.std()
    # Eight windows are one batch, whatever their order, so both passes say the same.
    np.testing.assert_allclose(found.halves[0], np.stack([expected] * 2), rtol=0.02, atol=0.02)


def test_the_windows_of_same_batch_all_get_a_label():
    task = task_of("same_batch", batch_windows=3)
    found = estimate(task).halves[0]
    assert np.isfinite(found).all() and (found.std(axis=1) > 0).all()
    assert not np.allclose(*found)  # two orders, two sets of neighbours


def test_rho_loss_is_the_live_loss_minus_that_of_a_tuned_model():
    task = task_of("rho_loss")
    proxy = task.proxy
    found = estimate(task)
    first, second = both(TARGET)
    live = np.asarray(LOSS(proxy.params, jnp.asarray(WINDOWS[EIGHT])))
    for i, (tune, judge) in enumerate([(first, second), (second, first)]):
        rng = np.random.default_rng([7, 3, 0, i])
        tuned = tuned_reference(proxy, tune, judge, batch_windows=8, rng=rng)
        assert 0 < tuned.steps <= tuned.taken
        assert mean_target_loss(tuned.params, judge) < mean_target_loss(proxy.params, judge)
        expected = live - np.asarray(LOSS(tuned.params, jnp.asarray(WINDOWS[EIGHT])))
        np.testing.assert_allclose(found.halves[0, i], expected, rtol=1e-5, atol=1e-6)


def test_a_reference_is_tuned_by_plain_steps_and_kept_where_it_was_best():
    proxy = bigram_proxy()
    windows, judge = both(TARGET)
    tuned = tuned_reference(
        proxy,
        windows,
        judge,
        batch_windows=4,
        rng=np.random.default_rng(0),
        most_steps=CHUNK,
    )
    rng = np.random.default_rng(1)
    optimizer = proxy.optimizer(TUNING_SCALE * proxy.learning_rate)
    params, state = proxy.params, proxy.opt_state
    rows = passes_over(np.random.default_rng(0), np.arange(len(windows)), CHUNK * 4)
    for batch in windows[rows].reshape(CHUNK, 4, -1):
        gradient = jax.grad(lambda p, b=batch: LOSS(p, jnp.asarray(b)).mean())(params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert (tuned.steps, tuned.taken) == (CHUNK, CHUNK)
    np.testing.assert_allclose(flat(tuned.params), flat(params), rtol=1e-4, atol=1e-5)
    # Where the first steps make the judging windows worse, the live model is the reference.
    hot = replace(proxy, learning_rate=1e3)
    stopped = tuned_reference(hot, windows, judge, batch_windows=4, rng=rng)
    assert (stopped.steps, stopped.taken) == (0, CHUNK) and stopped.params is proxy.params


def test_loss_prefers_what_is_known_and_claims_no_reliability():
    found = estimate(task_of("loss"))
    expected = -np.asarray(LOSS(bigram_proxy().params, jnp.asarray(WINDOWS[EIGHT])))
    np.testing.assert_allclose(found.halves[0], np.stack([expected] * 2), rtol=1e-6)
    assert not found.independent


# The policy.


def test_a_policy_adds_up_versions_with_fading_weights():
    windows, kinds = world(40, seed=9)
    up = mgf.fit_scorer(windows, 1.0 * (kinds == ON), vocab_size=VOCAB)
    down = replace(mgf.fit_scorer(windows, 1.0 * (kinds == OFF), vocab_size=VOCAB), strength=2.0)
    assert not policy_logits(windows, []).any()
    says = [rank_scores(scorer.score(windows)) for scorer in (up, down)]
    np.testing.assert_allclose(
        policy_logits(windows, [up, down]),
        np.clip(0.7 * (0.7 * says[0]) + 0.7 * says[1], -3, 3),
    )
    # One that selects uniformly says nothing, but time has passed.
    uniform = replace(down, strength=0.0)
    np.testing.assert_allclose(policy_logits(windows, [up, uniform]), 0.49 * says[0])


@given(
    logits=arrays(np.float64, st.integers(1, 60), elements=st.floats(-3, 3)),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_a_policy_keeps_its_quota_of_distinct_windows(logits, share, seed):
    quota = int(share * len(logits))
    chosen = policy_choice(np.random.default_rng(seed), logits, quota)
    assert len(chosen) == quota == len(set(chosen.tolist()))
    assert (np.diff(chosen) > 0).all() and set(chosen) <= set(range(len(logits)))


def test_trajectories_on_policy_are_of_what_a_version_keeps():
    windows, kinds = world(60, seed=9)
    scorer = mgf.fit_scorer(windows, 1.0 * (kinds == ON), vocab_size=VOCAB)
    taken = []

    class Watched(WindowSource):
        def take(self, index):
            taken.append(np.asarray(index))
            return super().take(index)

    task = replace(task_of("on_policy"), source=Watched(WINDOWS), versions=[scorer, scorer, scorer])
    estimate(task)
    _, kinds = world()
    kept = [index for index in taken if len(index) == 16]
    offered = [index for index in taken if len(index) == 64]
    assert len(kept) == 2
    assert np.mean(kinds[np.concatenate(kept)] == ON) > 0.45
    assert abs(np.mean(kinds[np.concatenate(offered)] == ON) - 1 / 3) < 0.15


# Several outer metrics, norms, learning rates.


def test_a_guarded_target_is_one_sweep_and_the_weighted_mean_of_ranks():
    guarded = mgf.GuardedTarget(TARGET, {"off": OTHER}, weights={"off": 0.5})
    found = estimate(task_of(target=guarded))
    assert found.halves.shape == (2, 2, 8)
    for k, part in enumerate((TARGET, OTHER)):
        assert_scores(found.halves[k], estimate(task_of(target=part)).halves[0], rtol=1e-3)
    ranks = [[gaussian_ranks(half) for half in part] for part in found.halves]
    expected = (1.0 * np.array(ranks[0]) + 0.5 * np.array(ranks[1])) / 1.5
    np.testing.assert_allclose(combined(found.halves, guarded.weights), expected, atol=1e-6)
    single = estimate(task_of(target=TARGET)).halves
    np.testing.assert_array_equal(combined(single, TARGET.weights), single[0])


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("metagradient", "on_policy")])
def test_the_other_estimators_score_every_part_of_a_target(name):
    guarded = mgf.GuardedTarget(TARGET, {"off": OTHER})
    found = estimate(task_of(name, target=guarded))
    assert found.halves.shape == (2, 2, 8) and np.isfinite(found.halves).all()
    assert found.halves.dtype == np.float32 and found.gradients > 0
    if name != "loss":
        assert not np.allclose(found.halves[0], found.halves[1])


def test_norms_are_those_of_the_gradients_and_divide_the_scores():
    params = bigram_proxy().params
    expected = [np.linalg.norm(flat(gradient_of(params, w))) for w in WINDOWS[:9]]
    found = gradient_norms(LOSS, params, WINDOWS[:9], microbatch=4)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    plain, divided = estimate(task_of()), estimate(task_of(normalise_gradient=True))
    assert divided.norms is not None and plain.norms is None
    np.testing.assert_allclose(divided.halves, plain.halves / expected[:8], rtol=1e-5)
    assert divided.gradients == plain.gradients + 8


def test_a_norm_that_is_not_finite_names_its_window():
    params = {"table": bigram_proxy().params["table"].at[3].set(jnp.nan)}
    with pytest.raises(NonFiniteMetagradient, match="gradient norms") as caught:
        gradient_norms(LOSS, params, WINDOWS[:40])
    assert list(caught.value.windows) == [
        i for i, w in enumerate(WINDOWS[:40]) if (w[:-1] == 3).any()
    ]


@given(count=st.integers(1, 40), size=st.integers(1, 50))
def test_chunks_have_one_shape_and_every_window_once(count, size):
    shapes = set()

    def double(chunk):
        shapes.add(chunk.shape)
        return jnp.asarray(2 * chunk)

    np.testing.assert_array_equal(in_chunks(double, np.arange(count), size), 2 * np.arange(count))
    assert len(shapes) == 1


def test_a_learning_rate_is_the_largest_at_which_the_halves_agree():
    # Halves that are measured on many target windows agree.
    many = mgf.HeldOutLoss(windows_of(ON, 2000, seed=3))
    task = task_of(target=many, learning_rate_scale=None, horizon=8)
    reliable = estimate(replace(task, windows=WINDOWS[:300]))
    assert list(reliable.tried) == [0.25] and (reliable.tried[0.25] or 0) >= 0.9
    assert reliable.learning_rate_scale == 0.25
    # At a rate where the largest share runs away, the next ones are tried.
    hot = replace(bigram_proxy(), learning_rate=200.0)
    cooled = estimate(task_of(learning_rate_scale=None, proxy=hot, maximum_rise=2.0))
    assert list(cooled.tried) == [0.25, 0.1, 0.05] and cooled.tried[0.25] is None
    best = max(r for r in cooled.tried.values() if r is not None)
    assert cooled.learning_rate_scale is not None
    assert cooled.tried[cooled.learning_rate_scale] == best
    single = estimate(task_of(learning_rate_scale=0.05, proxy=hot))
    assert cooled.gradients > 2 * single.gradients
    with pytest.raises(TrajectoryDiverged, match="maximum_rise"):
        estimate(task_of(learning_rate_scale=None, proxy=replace(hot, learning_rate=1e5)))


def test_equal_tasks_have_equal_estimates_and_other_seeds_do_not():
    first, again = (estimate(task_of()).halves for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(estimate(replace(task_of(), seed=(8,))).halves, first)


def test_errors_name_windows_of_the_source_and_none_that_is_not_in_it():
    places = np.array([40, -1, 42])
    with (
        pytest.raises(NonFiniteMetagradient, match=r"scoring: bad \(windows 42 of") as caught,
        naming(places, "scoring"),
    ):
        raise NonFiniteMetagradient("bad", windows=(1, 2))
    assert caught.value.windows == (42,)


# Through a round.


@pytest.mark.parametrize("name", NAMES)
def test_every_estimator_runs_through_a_whole_round(tmp_path, name):
    changes = {"estimator": name, "horizon": 2, "labels": 200, "probed_labels": 60}
    config = {**changes, "minimum_reliability": -0.99, "gate_steps": 4, "batch_windows": 8}
    calibrator = make_calibrator(tmp_path, config=config)
    report = calibrator.round()
    few = name in ("mates", "same_batch")
    assert report.estimator == name and report.labels == (60 if few else 200)
    assert (report.reliability is None) == (name == "loss")
    assert report.gate is not None and report.rank_correlation is not None
    assert report.horizon == {"same_batch": 16}.get(
        name, 2 if name in ("metagradient", "datarater", "on_policy") else None
    )
    assert set(report.gradients) == {"labels", "fit", "gate"}
    assert report.gradients["labels"] > 0 and report.gradients["gate"] > 0
    stored = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert stored["estimator"] == name and stored["agreement"] is None
    assert LabelStore(tmp_path).rounds() == [1]


def test_every_name_has_its_module_and_others_are_refused():
    assert tuple(ESTIMATORS) == NAMES
    with pytest.raises(ConfigError, match="estimator='two_step'; expected one of metagradient"):
        mgf.CalibrationConfig(estimator="two_step")
    with pytest.raises(ConfigError, match="linear in a window's gradient"):
        mgf.CalibrationConfig(estimator="less", normalise_gradient=True)


@pytest.mark.parametrize(
    ("acts_for_steps", "horizon", "steps"),
    [(96, None, 96), (3, None, 16), (200, None, 200), (5000, None, 288), (5000, 12, 12)],
)
def test_the_horizon_is_how_long_a_version_acts(acts_for_steps, horizon, steps):
    config = mgf.CalibrationConfig(acts_for_steps=acts_for_steps, horizon=horizon)
    assert config.inner_steps == steps and config.trajectory_windows == 64 * steps


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("acts_for_steps", 0),
        ("probed_labels", 49),
        ("mix_rho", 1.0),
        ("mix_rho", float("nan")),
        ("label_decay", 0.0),
        ("label_decay", 1.1),
        ("reference_windows", 2),
        ("normalise_gradient", 1),
    ],
)
def test_options_out_of_their_domain_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field}=.*expected"):
        mgf.CalibrationConfig(**{field: value})


def test_mixing_rho_is_reported_and_its_labels_are_pooled_apart(tmp_path):
    small = {"horizon": 2, "labels": 200, "gate_steps": 4, "batch_windows": 8}
    plain = make_calibrator(tmp_path, config=small)
    assert plain.round().rho is None
    report = make_calibrator(tmp_path, config={**small, "mix_rho": 0.5}).round()
    assert report.labels == 200  # not pooled with labels that mean something else
    rho = report.to_json()["rho"]
    assert rho["weight"] == 0.5 and rho["gradients"] > 0 and report.seconds["rho"] > 0
    for name, value in rho.items():
        assert np.isfinite(value), name
    # Half of the mixed ranks are the estimator's own.
    assert rho["mixed_correlation"] > 0.7 >= 0 < rho["label_correlation"]
    stored = LabelStore(tmp_path)
    assert stored.load(1).target != stored.load(2).target


def test_mixed_halves_are_means_of_ranks():
    rng = np.random.default_rng(0)
    own, other = rng.normal(size=(2, 2, 30))
    found = mixed_halves(own, np.exp(other), 0.25)
    for h in (0, 1):
        expected = 0.75 * gaussian_ranks(own[h]) + 0.25 * gaussian_ranks(other[h])
        np.testing.assert_allclose(found[h], expected, rtol=1e-6)


def test_the_running_version_is_compared_with_fresh_labels_of_windows_that_are_never_fitted(
    tmp_path,
):
    small = {"horizon": 2, "labels": 1200, "gate_steps": 4, "reference_windows": 60}
    calibrator = make_calibrator(tmp_path, config=small)
    assert calibrator.round().agreement is None
    assert calibrator.registry.latest() == 1
    report = calibrator.round()
    found = report.agreement
    assert (found.version, found.windows) == (1, 60)
    assert -1 <= found.low <= found.rho <= found.high <= 1 and found.rho > 0.3
    assert report.to_json()["agreement"]["version"] == 1
    (pool,) = (tmp_path / "reference").iterdir()
    with np.load(pool, allow_pickle=False) as data:
        reference = {window.tobytes() for window in data["windows"]}
    copies = Counter(window.tobytes() for window in WINDOWS)
    reference = {window for window in reference if copies[window] == 1}
    for number in (1, 2):
        fitted = {w.tobytes() for w in LabelStore(tmp_path).load(number).windows}
        assert not fitted & reference
    assert WINDOWS.shape[1] == LENGTH
    off = make_calibrator(tmp_path, config={**small, "reference_windows": 0})
    assert off.round().agreement is None
