"""Calibration rounds in a world of three kinds of windows, in this process and in another.

On-target windows count upwards, off-target windows count downwards, corrupt windows are on-target
ones in random order. The proxy of most tests is a bigram table, which compiles in seconds.
"""

import functools
import json
import math
import os
import pickle
import shutil
import signal
import time
from dataclasses import dataclass, replace

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metagrad_filter as mgf
from metagrad_filter.calibration.gate import decide, draw
from metagrad_filter.calibration.lease import Lease
from metagrad_filter.calibration.limits import Limits
from metagrad_filter.calibration.live import latest_live
from metagrad_filter.calibration.round import split_source
from metagrad_filter.calibration.source import WindowCheck, WindowSource
from metagrad_filter.errors import CalibrationFailed, ConfigError, DataError, WindowError
from metagrad_filter.labels import LabelStore
from metagrad_filter.metagradient.trajectory import run
from metagrad_filter.proxy import DecoderConfig, DecoderLoss, init_decoder
from metagrad_filter.spool import Spool, SpooledWindows

VOCAB, LENGTH = 32, 10
ON, OFF, CORRUPT = 0, 1, 2
FACTORY = functools.partial(optax.adamw, b2=0.95, weight_decay=0.01)
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
class BigramLoss:
    """Nats per token under a table of next-token logits."""

    def __call__(self, params, windows):
        log_p = jax.nn.log_softmax(params["table"][windows[:, :-1]])
        return -jnp.take_along_axis(log_p, windows[:, 1:, None], axis=2)[..., 0].mean(axis=1)


def windows_of(kind, count, seed):
    rng = np.random.default_rng([seed, kind])
    steps = rng.integers(1, 3, (count, LENGTH)) * (-1 if kind == OFF else 1)
    found = (rng.integers(0, VOCAB, (count, 1)) + steps.cumsum(axis=1)) % VOCAB
    return (rng.permuted(found, axis=1) if kind == CORRUPT else found).astype(np.int32)


def world(count=400, seed=0):
    """Shuffled windows, a third of each kind, and their kinds."""
    windows = np.concatenate([windows_of(kind, count, seed) for kind in (ON, OFF, CORRUPT)])
    kinds = np.repeat([ON, OFF, CORRUPT], count)
    order = np.random.default_rng(seed).permutation(len(kinds))
    return windows[order], kinds[order]


def warm_proxy(loss, params, learning_rate=0.02, steps=60):
    """A proxy some way into training on the raw stream."""
    optimizer = FACTORY(learning_rate)
    index = np.random.default_rng(8).integers(0, len(WINDOWS), (steps, 16))
    params, state, _ = jax.jit(functools.partial(run, loss, optimizer))(
        params, optimizer.init(params), WINDOWS[index], jnp.ones((steps, 16))
    )
    return mgf.Proxy(loss, params, state, FACTORY, learning_rate)


WINDOWS, KINDS = world()
TARGET = mgf.HeldOutLoss(windows_of(ON, 128, seed=1), batch_size=64)


@functools.cache
def bigram_proxy():
    return warm_proxy(BigramLoss(), {"table": jnp.zeros((VOCAB, VOCAB))})


def make_calibrator(run_dir, **changes):
    config = replace(CONFIG, vocab_size=VOCAB, **changes.pop("config", {}))
    arguments = {"proxy": bigram_proxy(), "target": TARGET, "windows": WINDOWS} | changes
    return mgf.Calibrator(run_dir, config=config, **arguments)


def share_kept(scorer, kind):
    """Share of a kind among the best quarter of windows that calibration has not seen."""
    windows, kinds = world(300, seed=5)
    best = np.argsort(-scorer.score(windows), kind="stable")[: len(windows) // 4]
    return float(np.mean(kinds[best] == kind))


def files(run_dir):
    return {
        path.relative_to(run_dir): path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run directory after one round, and its report."""
    run_dir = tmp_path_factory.mktemp("finished")
    return run_dir, make_calibrator(run_dir).round()


@pytest.fixture
def after_one_round(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


# A round from end to end.


def test_a_round_publishes_a_scorer_that_keeps_on_target_windows(finished):
    run_dir, report = finished
    assert (report.round, report.version, report.reason) == (1, 1, "published")
    registry = mgf.Registry(run_dir)
    scorer = registry.load(1)
    assert share_kept(scorer, ON) > 0.8
    assert scorer.strength == report.strength == report.gate.chosen > 0
    assert report.reliability > 0.5 and report.rank_correlation > 0.5
    assert report.labels == 600 and report.live_step is None
    assert set(report.seconds) == {"trajectories", "labels", "fit", "gate"}
    assert scorer.metadata["round"] == 1
    assert scorer.metadata["reliability"] == report.reliability
    labels = LabelStore(run_dir).load(1)
    assert labels.windows.shape == (600, LENGTH) and labels.halves.shape == (2, 600)


def test_a_report_is_stored_as_json(finished):
    run_dir, report = finished
    (stored,) = make_calibrator(run_dir).reports()
    assert stored == json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert stored["version"] == 1 and stored["reason"] == "published"
    assert {arm["strength"] for arm in stored["gate"]["arms"]} == {2.0, "inf"}
    assert float(stored["strength"]) == report.strength


def test_a_round_works_with_a_decoder(tmp_path):
    loss = DecoderLoss(DecoderConfig(VOCAB, LENGTH, n_embd=16, n_layer=1, n_head=2))
    proxy = warm_proxy(loss, init_decoder(loss.config))
    seen = []
    calibrator = mgf.Calibrator(
        tmp_path,
        proxy=proxy,
        target=TARGET,
        windows=WINDOWS,
        config=CONFIG,  # the vocabulary is read from the loss
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )
    report = calibrator.round()
    assert report.version == 1, report.reason
    scorer = calibrator.registry.load(1)
    assert scorer.vocab_size == VOCAB and share_kept(scorer, ON) > 0.6
    stages = list(dict.fromkeys(stage for stage, *_ in seen))
    assert stages == ["trajectories", "labels", "fit", "gate"]
    assert all(0 <= done <= total for _, done, total in seen)
    assert [s for s in seen if s[0] == "gate"][-1] == ("gate", 9, 9)


def test_equal_seeds_give_equal_versions_and_others_do_not(finished, tmp_path):
    run_dir, _ = finished
    make_calibrator(tmp_path / "same").round()
    make_calibrator(tmp_path / "other", config={"seed": 4}).round()
    published, same, other = (
        {name: data for name, data in files(path).items() if name.parts[0] != "rounds"}
        for path in (run_dir, tmp_path / "same", tmp_path / "other")
    )
    assert same == published
    assert other.keys() == published.keys() and other != published


def test_the_next_round_draws_anew_and_pools_its_labels(after_one_round):
    calibrator = make_calibrator(after_one_round)
    report = calibrator.round()
    assert (report.round, report.version, report.labels) == (2, 2, 1200)
    first, second = (calibrator.labels.load(n).windows for n in (1, 2))
    assert not np.array_equal(first, second)
    assert [r["round"] for r in calibrator.reports()] == [1, 2]


# Rounds that do not publish.


def rejected(run_dir):
    paths = sorted((run_dir / "registry").glob("rejected-*.json"))
    return [json.loads(path.read_bytes()) for path in paths]


def test_unreliable_labels_leave_everything_as_it_was(after_one_round):
    before = files(after_one_round)
    report = make_calibrator(after_one_round, config={"minimum_reliability": 1.0}).round()
    assert report.version is None and report.gate is None and report.strength is None
    assert report.reason.startswith("unreliable") and "below 1.0" in report.reason
    (record,) = rejected(after_one_round)
    assert record["reason"] == "unreliable" and record["metadata"]["round"] == 2
    after = files(after_one_round)
    assert {name: after[name] for name in before} == before
    assert {str(name) for name in after.keys() - before.keys()} == {
        "registry/rejected-1.json",
        "rounds/round-000002.json",
    }


@dataclass(frozen=True)
class FlatLoss:
    """Says the same of every window, so nothing can help."""

    def __call__(self, params, windows):
        return jnp.zeros(len(windows)) + params["bias"] ** 2


def test_a_loss_that_tells_no_windows_apart_publishes_nothing(tmp_path):
    proxy = warm_proxy(FlatLoss(), {"bias": jnp.ones(())})
    report = make_calibrator(tmp_path, proxy=proxy).round()
    assert report.version is None and report.reliability == 0
    assert report.reason.startswith("unreliable")
    assert mgf.Registry(tmp_path).latest() is None
    json.dumps(report.to_json(), allow_nan=False)


def test_without_a_clear_gain_nothing_is_published(after_one_round, tmp_path):
    never = {"gate_margin": 1e9}
    for run_dir, versions in ((tmp_path / "new", []), (after_one_round, [1])):
        report = make_calibrator(run_dir, config=never).round()
        assert report.version is None and report.reason.startswith("not-better-than-uniform")
        assert report.gate.chosen == 0 and report.strength is None
        assert mgf.Registry(run_dir).versions() == versions
        assert [r["reason"] for r in rejected(run_dir)] == ["not_better_than_uniform"]


def test_a_round_that_is_not_finite_stores_a_reason_and_no_label(after_one_round):
    proxy = bigram_proxy()
    broken = proxy.at({"table": proxy.params["table"].at[3, 4].set(jnp.nan)}, proxy.opt_state)
    report = make_calibrator(after_one_round, proxy=broken).round()
    assert report.version is None and report.reason.startswith("non-finite: trajectory 0: the loss")
    # The windows are named by their place in the source: those that hold token 3.
    source = make_calibrator(after_one_round).source
    named = source.take(np.array(report.windows))
    assert len(named) and (named[:, :-1] == 3).any(axis=1).all()
    record = rejected(after_one_round)[0]
    assert (record["reason"], record["metadata"]["windows"]) == ("non_finite", report.windows)
    assert LabelStore(after_one_round).rounds() == [1]
    assert mgf.Registry(after_one_round).versions() == [1]
    # The next round takes the next number and works.
    report = make_calibrator(after_one_round).round()
    assert (report.round, report.version) == (3, 2)


def test_a_trajectory_that_diverges_ends_the_round_and_names_windows(tmp_path):
    proxy = bigram_proxy()
    report = make_calibrator(tmp_path, proxy=replace(proxy, learning_rate=1e3)).round()
    assert report.version is None and report.reason.startswith("diverged: trajectory 0: the outer")
    assert "maximum_rise" in report.reason
    assert report.windows and max(report.windows) < len(make_calibrator(tmp_path).source)
    record = rejected(tmp_path)[0]
    assert (record["reason"], record["metadata"]["windows"]) == ("diverged", report.windows)
    assert LabelStore(tmp_path).rounds() == []


@pytest.mark.parametrize(
    ("losses", "strengths", "chosen"),
    [
        # columns: uniform, then one per strength; rows: pairs
        ([[3, 2.0], [3, 2.1], [3, 1.9]], (math.inf,), math.inf),
        ([[3, 3.0], [3, 3.0], [3, 3.0]], (math.inf,), 0),
        ([[3, 3.1], [3, 3.2], [3, 3.1]], (math.inf,), 0),
        ([[3, 2.0], [3, 4.0], [3, 2.5]], (math.inf,), 0),  # a gain, but not a clear one
        ([[3, 2.8, 2.0], [3, 2.8, 2.0]], (2.0, math.inf), math.inf),
        ([[3, 2.8, 2.9], [3, 2.8, 2.9]], (2.0, math.inf), 2.0),
        ([[3, 2.8, 0.0], [3, 2.8, 3.9]], (2.0, math.inf), 2.0),  # the better mean is noise
        ([[3, math.nan], [3, 1.0]], (math.inf,), 0),
        ([[3, -math.inf], [3, 1.0]], (math.inf,), 0),
        ([[3, 2.0, math.nan], [3, 2.0, math.nan]], (2.0, math.inf), 2.0),
        ([[math.nan, 2.0], [3, 2.0]], (math.inf,), 0),
        ([[math.inf, 2.0], [math.inf, 2.0]], (math.inf,), 0),
        ([[math.inf, math.inf], [3, 2.0]], (math.inf,), 0),
    ],
)
def test_the_gate_prefers_uniform_unless_a_gain_is_clear(losses, strengths, chosen):
    result = decide(np.array(losses, float), (0.0, *strengths), 2.0)
    assert result.chosen == chosen
    assert [arm.strength for arm in result.arms] == list(strengths)
    json.dumps(result.to_json(), allow_nan=False)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
def test_draws_use_every_position_equally_often(count):
    pool = np.arange(10, 18)
    found = draw(np.random.default_rng(0), pool, count)
    assert len(found) == count and set(found) <= set(pool)
    times = np.bincount(found, minlength=18)[10:]
    assert times.max() - times.min() <= 1


# Live training state.


def test_a_round_starts_from_the_newest_state_that_was_handed_over(after_one_round):
    calibrator, proxy = make_calibrator(after_one_round), bigram_proxy()
    table = proxy.params["table"]
    calibrator.follow(7, {"table": table + 1}, proxy.opt_state)
    calibrator.follow(9, {"table": jnp.full_like(table, jnp.nan)}, proxy.opt_state)
    report = calibrator.round()
    # The marker of step 9 is that it cannot be calibrated.
    assert report.live_step == 9 and report.reason.startswith("non-finite")
    calibrator.follow(12, {"table": table}, proxy.opt_state)
    report = calibrator.round()
    assert report.live_step == 12 and report.version == 2
    assert mgf.Registry(after_one_round).load(2).metadata["live_step"] == 12


def test_a_job_that_starts_anew_is_not_measured_where_the_last_one_stood(tmp_path):
    proxy = bigram_proxy()
    broken = {"table": jnp.full_like(proxy.params["table"], jnp.nan)}
    make_calibrator(tmp_path).follow(99, broken, proxy.opt_state)
    anew = make_calibrator(tmp_path)
    report = anew.round()
    assert report.live_step is None and report.version == 1
    anew.follow(3, proxy.params, proxy.opt_state)
    assert len(list((tmp_path / "live").iterdir())) == 1


def test_a_state_of_another_model_is_refused(tmp_path):
    calibrator = make_calibrator(tmp_path)
    params = {"table": jnp.zeros((3, 3))}
    calibrator.follow(1, params, FACTORY(0.1).init(params))
    with pytest.raises(CalibrationFailed, match="same model"):
        calibrator.round()


def test_a_training_job_that_was_set_back_may_hand_over_a_step_again(tmp_path):
    calibrator, proxy = make_calibrator(tmp_path), bigram_proxy()
    for step in (10, 20, 20, 15):
        calibrator.follow(step, {"table": proxy.params["table"] + step}, proxy.opt_state)
    # What was stored of the course given up is gone: 15 is now the newest.
    (session,) = (tmp_path / "live").iterdir()
    optimizer = FACTORY(proxy.learning_rate)
    found = latest_live(tmp_path, session.name, proxy.params, optimizer)
    assert found is not None and found.step == 15
    np.testing.assert_array_equal(found.params["table"], proxy.params["table"] + 15)
    assert calibrator.round().live_step == 15


# In a process of its own.


def test_the_background_worker_publishes_what_a_round_here_would(finished, tmp_path):
    calibrator = make_calibrator(tmp_path)
    with calibrator.background(rounds=1) as worker:
        assert worker.process.pid != os.getpid()
        (report,) = worker.wait(1)
    assert not worker.alive and worker.process.exitcode == 0
    assert report["version"] == 1
    scorer, here = calibrator.registry.load(1), mgf.Registry(finished[0]).load(1)
    scores = [found.score(WINDOWS[:100]) for found in (scorer, here)]
    np.testing.assert_allclose(*scores, rtol=1e-3, atol=0.02 * np.ptp(scores[1]))
    assert scorer.strength == here.strength


@pytest.mark.filterwarnings("ignore:the calibration worker ended early")
def test_a_killed_worker_leaves_whole_files_and_the_next_round_works(tmp_path):
    path = tmp_path / "windows.npy"
    np.save(path, WINDOWS)
    calibrator = make_calibrator(tmp_path / "run", windows=path)
    with calibrator.background() as worker:
        # It is on its second round, or between the two.
        worker.wait(1)
        os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(CalibrationFailed, match="exit code -9"):
            worker.wait(10**6)
    registry, store = calibrator.registry, calibrator.labels
    assert registry.versions()[0] == 1
    for version in registry.versions():
        assert registry.load(version).metadata["round"] >= 1
    for number in store.rounds():
        assert np.isfinite(store.load(number).halves).all()
    before, versions = max(store.rounds()), registry.versions()
    report = calibrator.round()
    assert report.round > before and report.version == max(versions) + 1


@pytest.mark.filterwarnings("ignore:the calibration worker ended early")
def test_killing_the_worker_changes_nothing_for_the_loader(after_one_round):
    def stream(name):
        source = grain.MapDataset.source([{"tokens": window} for window in WINDOWS])
        return mgf.score_filter(
            source.to_iter_dataset(),
            after_one_round,
            keep_ratio=0.25,
            windows=mgf.TextWindows("tokens"),
            block_windows=64,
            swap_every_blocks=4,
            name=name,
        )

    alone = [window["tokens"].tobytes() for window in stream("alone")]
    with (
        pytest.warns(RuntimeWarning, match="ended early with exit code -9"),
        make_calibrator(after_one_round).background() as worker,
    ):
        beside = iter(stream("beside"))
        kept = [next(beside)["tokens"].tobytes() for _ in range(len(alone) // 2)]
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.join()
        kept += [window["tokens"].tobytes() for window in beside]
    assert kept == alone


@pytest.mark.filterwarnings("ignore:the calibration worker ended early")
def test_a_second_worker_ends_with_the_reason_and_the_first_is_undisturbed(tmp_path):
    calibrator = make_calibrator(tmp_path)
    message = "ConfigError: .* is being calibrated by process"
    with (
        Lease(tmp_path).holding(),
        calibrator.background(wait_seconds=0.0) as worker,
        pytest.raises(CalibrationFailed, match=rf"(?s)exit code 1.*{message}"),
    ):
        worker.wait(1)
    assert mgf.Registry(tmp_path).versions() == []


def test_the_worker_keeps_its_limits_holds_the_lease_and_waits_for_the_spool(tmp_path):
    calibrator = make_calibrator(tmp_path, windows=SpooledWindows(tmp_path))
    limits = Limits(niceness=3, threads=1, device="cpu")
    with calibrator.background(limits=limits) as worker:
        end = time.monotonic() + 60
        while not (tmp_path / "lease" / "holder.json").exists():
            assert worker.alive and time.monotonic() < end
            time.sleep(0.1)
        niceness = os.getpriority(os.PRIO_PROCESS, worker.process.pid)
        assert niceness == min(19, os.nice(0) + 3)
        with pytest.raises(ConfigError, match=f"by process {worker.process.pid} "):
            calibrator.round()
        assert worker.alive and calibrator.reports() == []
    assert worker.process.exitcode == 0


def test_leaving_the_block_ends_the_worker(tmp_path):
    with make_calibrator(tmp_path).background() as worker:
        assert worker.alive
    assert not worker.alive and worker.process.exitcode is not None
    with pytest.raises(ZeroDivisionError), make_calibrator(tmp_path).background() as worker:
        raise ZeroDivisionError
    assert not worker.alive
    assert mgf.Registry(tmp_path).versions() == []


@dataclass(frozen=True)
class BrokenLoss:
    def __call__(self, params, windows):
        raise RuntimeError("the model is out of order")


@pytest.mark.filterwarnings("ignore:the calibration worker ended early")
def test_a_worker_that_raises_leaves_its_traceback(tmp_path):
    proxy = replace(bigram_proxy(), loss=BrokenLoss())
    error = r"(?s)exit code 1.*the model is out of order"
    with (
        make_calibrator(tmp_path, proxy=proxy).background() as worker,
        pytest.raises(CalibrationFailed, match=error),
    ):
        worker.wait(1)


def test_waiting_has_an_end(tmp_path):
    with (
        make_calibrator(tmp_path).background() as worker,
        pytest.raises(CalibrationFailed, match="0 of 1 rounds finished in 0 seconds"),
    ):
        worker.wait(1, timeout_seconds=0)


def test_a_lambda_is_met_with_advice_before_a_process_exists(tmp_path):
    proxy = replace(bigram_proxy(), loss=lambda params, windows: BigramLoss()(params, windows))
    calibrator = make_calibrator(tmp_path, proxy=proxy)
    with pytest.raises(ConfigError, match="importable"), calibrator.background():
        pass


def test_an_unknown_vocabulary_is_asked_for(tmp_path):
    with pytest.raises(ConfigError, match="vocab_size"):
        mgf.Calibrator(
            tmp_path, proxy=bigram_proxy(), target=TARGET, windows=WINDOWS, config=CONFIG
        )


@pytest.mark.parametrize("bad", [-1, VOCAB])
def test_ids_without_an_embedding_row_are_refused(tmp_path, bad):
    held_out = windows_of(ON, 128, seed=1)
    held_out[3, 2] = bad
    with pytest.raises(WindowError, match=f"id {bad} "):
        make_calibrator(tmp_path, target=mgf.HeldOutLoss(held_out))
    windows = WINDOWS.copy()
    windows[:, 0] = bad
    with pytest.raises(WindowError, match=f"id {bad} "):
        make_calibrator(tmp_path, windows=windows).round()
    assert mgf.Registry(tmp_path).versions() == []


def test_the_gate_never_sees_a_window_that_was_labelled():
    config = replace(CONFIG, labels=600)
    to_label, for_gate = split_source(1200, config)
    assert not set(to_label) & set(for_gate)
    assert sorted([*to_label, *for_gate]) == list(range(1200))
    again = split_source(1200, config)
    np.testing.assert_array_equal(again[0], to_label)


def test_a_source_smaller_than_a_trajectory_is_warned_of(tmp_path):
    with pytest.warns(RuntimeWarning, match="memorisation"):
        make_calibrator(tmp_path, config={"horizon": 1000})


def test_a_source_too_small_to_judge_by_is_refused_at_once(tmp_path):
    with pytest.raises(WindowError, match="99 windows"):
        make_calibrator(tmp_path, windows=WINDOWS[:99])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("horizon", 0),
        ("trajectories", 1),
        ("batch_windows", 2.0),
        ("labels", 49),
        ("gate_pairs", 1),
        ("gate_steps", True),
        ("spooled_windows", 99),
        ("learning_rate_scale", 0.0),
        ("learning_rate_scale", math.nan),
        ("keep_ratio", 1.0),
        ("minimum_reliability", 1.1),
        ("gate_strengths", ()),
        ("gate_strengths", (0.0,)),
        ("gate_strengths", (math.nan,)),
        ("microbatch", 0),
        ("gate_margin", math.nan),
        ("seed", -1),
    ],
)
def test_a_configuration_out_of_its_domain_is_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field}=.*expected"):
        mgf.CalibrationConfig(**{field: value})


def test_a_configuration_is_json():
    stored = json.loads(json.dumps(CONFIG.to_json(), allow_nan=False))
    assert stored["horizon"] == 12 and stored["gate_strengths"] == [2.0, "inf"]


# Sources.


@pytest.fixture(params=["array", "path", "text path", "MapDataset"])
def source(request, tmp_path):
    np.save(tmp_path / "windows.npy", WINDOWS)
    if request.param == "array":
        return WindowSource(WINDOWS)
    if request.param == "MapDataset":
        elements = [{"tokens": w, "kind": k} for w, k in zip(WINDOWS, KINDS)]
        return WindowSource(grain.MapDataset.source(elements), mgf.TextWindows("tokens"))
    path = tmp_path / "windows.npy"
    return WindowSource(path if request.param == "path" else str(path))


def test_windows_are_taken_in_any_order(source):
    index = np.array([7, 0, 7, len(WINDOWS) - 1])
    found = source.take(index)
    assert len(source) == len(WINDOWS)
    assert found.dtype == np.int32 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, WINDOWS[index])


def test_a_mapped_file_is_not_copied_into_another_process(tmp_path):
    np.save(tmp_path / "windows.npy", WINDOWS)
    data = pickle.dumps(WindowSource(tmp_path / "windows.npy"))
    assert len(data) < 1000 < WINDOWS.nbytes
    copy = pickle.loads(data)
    np.testing.assert_array_equal(copy.take(np.arange(5)), WINDOWS[:5])


def test_sources_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "text.npy").write_text("windows")
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    for name in ("missing.npy", "text.npy", "objects.npy"):
        with pytest.raises(DataError, match=name):
            WindowSource(tmp_path / name)
    with pytest.raises(WindowError, match=r"\(12,\)"):
        WindowSource(np.zeros(12, np.int32))
    with pytest.raises(WindowError, match="empty"):
        WindowSource(WINDOWS[:0])
    dataset = grain.MapDataset.source([{"tokens": w} for w in WINDOWS[:60]])
    with pytest.raises(ConfigError, match="elements="):
        WindowSource(dataset)
    with pytest.raises(ConfigError, match="IterDataset"):
        WindowSource(dataset.to_iter_dataset())
    with pytest.raises(ConfigError, match="IterDataset"):
        WindowSource(dataset.to_iter_dataset(), mgf.TextWindows("tokens"))
    with pytest.raises(WindowError):
        WindowSource(dataset, mgf.TextWindows("words")).take(np.arange(2))


def test_a_spool_is_read_as_of_the_last_refresh_and_ids_are_checked(tmp_path):
    spool = Spool(tmp_path, share=1.0)
    source = WindowSource(SpooledWindows(tmp_path), check=WindowCheck(VOCAB))
    assert len(source) == 0 and source.lots is not None
    spool.offer(0, WINDOWS[:150])
    spool.flush()
    assert len(source) == 0 and source.refresh() == len(source) == len(source.lots) == 150
    np.testing.assert_array_equal(source.take(np.arange(150)), WINDOWS[:150])
    assert pickle.loads(pickle.dumps(source)).take(np.arange(3)).shape == (3, LENGTH)
    spool.offer(1, WINDOWS[:1] + VOCAB)
    spool.flush()
    source.refresh()
    with pytest.raises(WindowError, match="id "):
        source.take(np.arange(151))
    assert WindowSource(WINDOWS).refresh() == len(WINDOWS) and WindowSource(WINDOWS).lots is None


def test_a_configuration_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    calibrator = make_calibrator(tmp_path)
    with pytest.raises(ConfigError, match="horizon=0"):
        calibrator.configure(horizon=0)
    assert calibrator.config.horizon == CONFIG.horizon
    calibrator.configure(horizon=5, vocab_size=VOCAB - 1)
    assert calibrator.config.horizon == 5
    with pytest.raises(WindowError, match=f"id {VOCAB - 1} "):
        calibrator.source.take(np.arange(len(WINDOWS)))


def test_a_round_killed_after_its_rejection_does_not_give_its_number_away(tmp_path):
    calibrator = make_calibrator(tmp_path, config={"minimum_reliability": 1.0})
    report = calibrator.round()
    (tmp_path / "rounds" / "round-000001.json").unlink()  # as if killed before it was written
    assert report.round == 1 and calibrator._next_number() == 2
