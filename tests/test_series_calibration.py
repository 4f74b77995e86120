"""Calibration on time series: the same round, store, gate, registry and filter as for text."""

import functools
import json
from dataclasses import dataclass, replace

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metagrad_filter as mgf
from metagrad_filter.calibration.round import _target_hash
from metagrad_filter.calibration.source import SeriesCheck, WindowSource
from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.labels import LabelStore
from metagrad_filter.metagradient.divergence import check_rise
from metagrad_filter.metagradient.trajectory import run
from metagrad_filter.proxy import SeriesConfig, SeriesLoss, init_series
from metagrad_filter.scorer.fit_series import fit_series
from metagrad_filter.series_targets import CalibrationGuard, SoftRecall
from metagrad_filter.spool import Spool

LENGTH, CHANNELS = 12, 2
SLOW, FAST, BROKEN = 0, 1, 2
FACTORY = functools.partial(optax.adamw, b2=0.9)
CONFIG = mgf.CalibrationConfig(
    horizon=12,
    trajectories=2,
    batch_windows=16,
    learning_rate_scale=0.25,
    labels=600,
    block_windows=64,
    gate_steps=12,
    gate_pairs=3,
    seed=3,
)


@dataclass(frozen=True)
class RecurrenceLoss:
    """Squared error of a linear recurrence of order two; missing values are left out."""

    def __call__(self, params, windows):
        seen = jnp.isfinite(windows)
        x = jnp.where(seen, windows, 0)
        known = jnp.concatenate([x[:, 1:-1], x[:, :-2]], axis=2)
        errors = jnp.square(x[:, 2:] - known @ params["kernel"]) * seen[:, 2:]
        return errors.sum(axis=(1, 2)) / jnp.maximum(seen[:, 2:].sum(axis=(1, 2)), 1)


def windows_of(kind, count, seed):
    """Waves that are slow, fast, or slow in random order; a twentieth of the values missing."""
    rng = np.random.default_rng([seed, kind])
    phase = rng.uniform(0, 2 * np.pi, (count, 1, CHANNELS))
    steps = np.arange(LENGTH)[None, :, None]
    found = np.sin({SLOW: 0.4, FAST: 2.2, BROKEN: 0.4}[kind] * steps + phase)
    found = found + rng.normal(size=found.shape) / 20
    if kind == BROKEN:
        found = rng.permuted(found, axis=1)
    found[rng.random(found.shape) < 0.05] = np.nan
    return found.astype(np.float32)


def world(count=400, seed=0):
    windows = np.concatenate([windows_of(kind, count, seed) for kind in (SLOW, FAST, BROKEN)])
    kinds = np.repeat([SLOW, FAST, BROKEN], count)
    order = np.random.default_rng(seed).permutation(len(kinds))
    return windows[order], kinds[order]


def warm_proxy(loss, params, learning_rate=0.02, steps=60):
    optimizer = FACTORY(learning_rate)
    index = np.random.default_rng(8).integers(0, len(WINDOWS), (steps, 16))
    params, state, _ = jax.jit(functools.partial(run, loss, optimizer))(
        params, optimizer.init(params), WINDOWS[index], jnp.ones((steps, 16))
    )
    return mgf.Proxy(loss, params, state, FACTORY, learning_rate)


WINDOWS, KINDS = world()
TARGET = mgf.HeldOutLoss(windows_of(SLOW, 128, seed=1), batch_size=64)


@functools.cache
def proxy():
    kernel = jnp.zeros((2 * CHANNELS, CHANNELS))
    return warm_proxy(RecurrenceLoss(), {"kernel": kernel})


def make_calibrator(run_dir, **changes):
    config = replace(CONFIG, **changes.pop("config", {}))
    arguments = {"proxy": proxy(), "target": TARGET, "windows": WINDOWS} | changes
    return mgf.Calibrator(run_dir, config=config, **arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run directory after two rounds, their reports and the calibrator."""
    run_dir = tmp_path_factory.mktemp("series")
    elements = [{"values": w, "kind": int(k)} for w, k in zip(WINDOWS, KINDS)]
    calibrator = make_calibrator(
        run_dir,
        windows=grain.MapDataset.source(elements),
        elements=mgf.SeriesWindows("values"),
        config={"normalise_gradient": True, "mix_rho": 0.2, "reference_windows": 50},
    )
    return run_dir, [calibrator.round(), calibrator.round()], calibrator


def test_a_round_publishes_a_scorer_of_series(finished):
    run_dir, (first, _), _ = finished
    assert (first.version, first.reason) == (1, "published")
    assert first.reliability > 0.5 and first.rank_correlation > 0.3
    assert first.rho is not None and first.rho.weight == 0.2
    scorer = mgf.Registry(run_dir).load(1)
    assert isinstance(scorer, mgf.SeriesScorer) and scorer.strength == first.strength > 0
    fresh, kinds = world(300, seed=5)
    best = np.argsort(-scorer.score(fresh), kind="stable")[: len(fresh) // 4]
    assert np.mean(kinds[best] == SLOW) > 0.8
    labels = LabelStore(run_dir).load(1)
    assert labels.windows.shape == (600, LENGTH, CHANNELS) and labels.windows.dtype == np.float32
    assert labels.norms is not None and np.isnan(labels.windows).any()


def test_the_next_round_pools_labels_and_judges_the_version_that_runs(finished):
    _, (_, second), calibrator = finished
    assert second.labels == 1200
    assert second.agreement is not None and second.agreement.version == 1
    assert second.agreement.windows == 50 and second.agreement.rho > 0.3
    stored = calibrator.reports()
    assert stored[1] == json.loads(json.dumps(second.to_json(), allow_nan=False))


def test_a_published_version_filters_a_stream(finished):
    run_dir, _, _ = finished
    fresh, kinds = world(256, seed=9)
    elements = [
        {"values": np.nan_to_num(w), "mask": ~np.isnan(w), "kind": int(k)}
        for w, k in zip(fresh, kinds)
    ]
    ds = mgf.score_filter(
        grain.MapDataset.source(elements).to_iter_dataset(),
        run_dir,
        keep_ratio=0.25,
        windows=mgf.SeriesWindows("values", mask_key="mask"),
        block_windows=256,
        annotate=True,
        name="stream",
    )
    kept = list(ds)
    assert len(kept) == 192 and {int(e["scorer_version"]) for e in kept} == {2}
    assert np.mean([e["kind"] == SLOW for e in kept]) > 0.8
    scores = mgf.Registry(run_dir).load(2).score(fresh)
    assert min(e["score"] for e in kept) >= np.quantile(scores, 0.5)


def test_a_spool_of_series_is_calibrated_on(tmp_path):
    spool = Spool(tmp_path, share=1.0)
    for block in range(6):
        spool.offer(block, WINDOWS[200 * block : 200 * (block + 1)])
    spool.flush()
    calibrator = make_calibrator(
        tmp_path,
        windows=mgf.SpooledWindows(tmp_path),
        config={"reference_windows": 0, "gate_margin": 1.0},
    )
    assert calibrator.missing_windows() == 0
    report = calibrator.round()
    assert report.version == 1, report.reason


def test_windows_of_another_kind_are_refused(tmp_path):
    with pytest.raises(WindowError, match=r"float32\(\d+, 12, 3\); expected float32 \(N, T, 2\)"):
        make_calibrator(tmp_path, windows=WINDOWS[:, :, [0, 1, 1]]).source.take(np.arange(3))
    with pytest.raises(WindowError, match=r"int32\(3, 12\); expected float32"):
        make_calibrator(tmp_path, windows=np.zeros((200, 12), np.int32)).source.take(np.arange(3))
    with pytest.raises(WindowError, match=r"float32\(64, 12\)"):
        make_calibrator(tmp_path, target=mgf.HeldOutLoss(np.zeros((128, 12), np.float32)))
    guard = mgf.GuardedTarget(TARGET, {"g": mgf.HeldOutLoss(np.zeros((9, 12, 3), np.float32))})
    with pytest.raises(WindowError, match=r"12, 3\); expected float32 \(N, T, 2\)"):
        make_calibrator(tmp_path, target=guard)
    SeriesCheck(2)(WINDOWS)


def test_labels_of_different_measures_are_not_pooled():
    source, rare = WindowSource(WINDOWS), np.arange(128) % 2 == 0
    windows = TARGET.windows
    targets = [
        TARGET,
        SoftRecall(windows, rare),
        SoftRecall(windows, ~rare),
        SoftRecall(windows, rare, temperature=0.2),
        mgf.GuardedTarget(TARGET, {"g": mgf.HeldOutLoss(windows)}),
        mgf.GuardedTarget(TARGET, {"g": CalibrationGuard(windows)}),
    ]
    assert len({_target_hash(target, source, CONFIG) for target in targets}) == len(targets)
    again = mgf.HeldOutLoss(windows)
    assert _target_hash(again, source, CONFIG) == _target_hash(TARGET, source, CONFIG)


def test_mates_refuses_a_target_that_is_no_mean_loss(tmp_path):
    target = SoftRecall(TARGET.windows, np.arange(128) % 2 == 0)
    calibrator = make_calibrator(
        tmp_path, target=target, config={"estimator": "mates", "reference_windows": 0}
    )
    with pytest.raises(ConfigError, match=r"mates.*SoftRecall"):
        calibrator.round()


@pytest.mark.parametrize(("unit", "allowed"), [(0.0, 0.1), (1.0, 0.25)])
def test_losses_that_cross_zero_may_rise_by_a_share_of_their_unit(unit, allowed):
    arguments = (RecurrenceLoss(), FACTORY(0.1), (None, None), WINDOWS[:0], jnp.ones(0))
    check_rise(*arguments, before=0.4, after=0.4 + allowed - 0.01, most=0.25, unit=unit)
    proxy_ = proxy()
    state = proxy_.params, FACTORY(0.1).init(proxy_.params)
    batches = WINDOWS[:32].reshape(2, 16, LENGTH, CHANNELS)
    with pytest.raises(ArithmeticError, match=r"rose from 0\.4"):
        check_rise(
            RecurrenceLoss(),
            FACTORY(0.1),
            state,
            batches,
            jnp.ones((2, 16)),
            before=0.4,
            after=0.4 + allowed + 0.01,
            most=0.25,
            unit=unit,
        )


def test_weights_count_as_repetitions_do():
    """Labels of older rounds weigh less: a label of weight 2 is there twice, in rank and fit."""
    windows, _ = world(60, seed=2)
    rng = np.random.default_rng(0)
    labels = np.nanmean(windows[:, :, 0], axis=1) + rng.normal(size=len(windows)) / 10
    weights = rng.integers(1, 4, len(windows))
    weighted = fit_series(windows, labels, weights=weights, deeper=False)
    scaled = fit_series(windows, labels, weights=weights * 0.25, deeper=False)
    plain = fit_series(windows, labels, deeper=False)
    np.testing.assert_allclose(weighted.skip, scaled.skip, rtol=1e-5)
    assert np.abs(weighted.skip - plain.skip).max() > 1e-4
    ones = fit_series(windows, labels, weights=np.ones(len(windows)), deeper=False)
    np.testing.assert_allclose(ones.skip, plain.skip, rtol=1e-4, atol=1e-6)
    for bad in (-weights, weights[:5], weights * np.nan):
        with pytest.raises(WindowError, match="weights have shape"):
            fit_series(windows, labels, weights=bad)


@pytest.mark.slow
def test_a_patch_transformer_is_calibrated_for_recall_under_a_guard(tmp_path):
    config = SeriesConfig(channels=CHANNELS, patch=4, max_patches=3, width=16, layers=1, heads=2)
    loss = SeriesLoss(config)
    held = np.concatenate([windows_of(SLOW, 200, 1), windows_of(FAST, 200, 1)])
    kinds = np.repeat([SLOW, FAST], 200)
    order = np.random.default_rng(0).permutation(400)
    target = mgf.GuardedTarget(
        SoftRecall(held[order], kinds[order] == FAST),
        {"calibration": CalibrationGuard(windows_of(SLOW, 128, 2))},
    )
    report = make_calibrator(
        tmp_path,
        proxy=warm_proxy(loss, init_series(config), 3e-3, steps=200),
        target=target,
        config={"gate_guard_tolerance": 10.0},
    ).round()
    assert report.reliability is not None and report.gate is not None
    assert set(report.gate.arms[0].guards) == {"calibration"}
