"""Live validation: what is recorded, when its trend is broken, and what follows."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metagrad_filter as mgf
from metagrad_filter.calibration.validation import (
    FILE,
    Break,
    broken_trend,
    fall_back,
    last_fallback,
    read_validation,
    record_validation,
)
from metagrad_filter.errors import ConfigError, DataError
from metagrad_filter.scorer.fit import fit_scorer


def curve(n, noise, rng, correlation=0.0):
    """Steps and losses of a power law with noise, which may be correlated."""
    z = rng.normal(size=n)
    for i in range(1, n):
        z[i] = correlation * z[i - 1] + math.sqrt(1 - correlation**2) * z[i]
    steps = 100 * np.arange(1, n + 1)
    return steps, 2 + 3 * (steps / 100) ** -0.3 + noise * z


def breaks(steps, losses):
    """All breaks, the trend beginning anew after each."""
    found, after = [], -1
    while (one := broken_trend(steps, losses, after=after, newest=10**6)) is not None:
        found.append(one)
        after = one.step
    return found


# When a trend is broken.


@pytest.mark.parametrize(("noise", "correlation", "most"), [(0.01, 0, 1), (1e-3, 0, 1), (0, 0, 0)])
def test_curves_that_only_fall_are_left_alone(noise, correlation, most):
    rng = np.random.default_rng(1)
    found = [breaks(*curve(1000, noise, rng, correlation)) for _ in range(4)]
    assert sum(map(len, found)) <= most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "correlation", "most"),
    [(0.01, 0, 2), (1e-3, 0, 2), (1e-5, 0, 2), (0.01, 0.5, 8), (0.01, 0.8, 40)],
)
def test_ten_thousand_points_without_a_break(noise, correlation, most):
    rng = np.random.default_rng(0)
    found = [breaks(*curve(1000, noise, rng, correlation)) for _ in range(10)]
    assert sum(map(len, found)) <= most


def test_a_lasting_rise_of_three_standard_deviations_is_found_within_a_few_points():
    rng = np.random.default_rng(0)
    waits = []
    for _ in range(30):
        steps, losses = curve(200, 0.01, rng)
        losses[150:] += 0.03
        found = broken_trend(steps, losses)
        waits.append(math.inf if found is None else (found.step - steps[150]) / 100 + 1)
    assert np.median(waits) <= 7 and np.quantile(waits, 0.8) <= 15
    assert min(waits) >= 3  # no point alone, nor any two


def test_a_large_rise_is_found_at_the_third_point():
    steps, losses = curve(200, 0.01, np.random.default_rng(0))
    losses[150:] += 0.5
    found = broken_trend(steps, losses)
    assert found is not None and found.step == steps[152]
    assert found.loss - found.expected == pytest.approx(0.5, abs=0.05)
    assert 0.005 < found.standard_error < 0.02
    assert "where its trend leads to 2.6" in str(found)


@settings(max_examples=30)
@given(st.integers(34, 99), st.floats(0.1, 1e6))
def test_a_single_spike_is_not_a_break(place, height):
    steps, losses = curve(100, 0.005, np.random.default_rng(2))
    assert broken_trend(steps, losses) is None
    losses[place] += height
    assert broken_trend(steps, losses) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 7, 60])
def test_a_loss_that_is_not_finite_is_a_break_at_once(value, place):
    steps, losses = curve(80, 0.01, np.random.default_rng(0))
    losses[place] = value
    found = broken_trend(steps, losses)
    assert found is not None and found.step == steps[place]
    assert f"step {steps[place]} is {value}" in str(found)
    # What came before is found before.
    losses[place - 10 : place] += 5 if place > 50 else 0
    found = broken_trend(steps, losses)
    assert found is not None and (found.step < steps[place]) == (place > 50)


def test_a_fall_is_no_break_and_neither_is_a_short_curve():
    steps, losses = curve(200, 0.01, np.random.default_rng(0))
    assert broken_trend(steps, np.where(steps > 15000, losses - 0.5, losses)) is None
    assert broken_trend(steps[:30], losses[:30] + np.where(steps[:30] > 2000, 5, 0)) is None
    assert broken_trend([], []) is None


@settings(max_examples=20)
@given(scale=st.floats(1e-3, 1e3), stretch=st.integers(1, 1000))
def test_the_units_of_loss_do_not_matter(scale, stretch):
    steps, losses = curve(120, 0.01, np.random.default_rng(0))
    losses[90:] += 0.1
    plain, scaled = broken_trend(steps, losses), broken_trend(steps, losses * scale)
    assert plain is not None and scaled is not None and plain.step == scaled.step
    # Nor does it matter that steps are counted in others, but for how log(1 + step) begins.
    assert broken_trend(steps * stretch, losses) is not None


def test_points_up_to_an_answered_break_are_forgotten():
    steps, losses = curve(300, 0.01, np.random.default_rng(0))
    losses[150:] += 0.3
    first = broken_trend(steps, losses)
    assert first is not None
    assert broken_trend(steps, losses, after=first.step) is None
    losses[250:] += 0.3
    second = broken_trend(steps, losses, after=first.step)
    assert second is not None and second.step >= steps[250]


@pytest.mark.parametrize(
    ("steps", "losses", "options", "message"),
    [
        ([1, 2], [1.0], {}, "do not belong together"),
        ([2, 1], [1.0, 1.0], {}, "do not belong together"),
        ([-1, 1], [1.0, 1.0], {}, "do not belong together"),
        ([[1]], [[1.0]], {}, "do not belong together"),
        ([1], [1.0], {"least": 5}, "least=5, window=128; expected 6 <= least <= window"),
        ([1], [1.0], {"window": 16}, "least=32, window=16"),
    ],
)
def test_what_is_no_curve_is_refused(steps, losses, options, message):
    with pytest.raises(ConfigError, match=message):
        broken_trend(steps, losses, **options)


# What is recorded.


def test_points_come_back_whatever_they_are(tmp_path):
    run_dir = tmp_path / "new" / "run"
    assert [list(a) for a in read_validation(run_dir)] == [[], []]
    points = [(0, 3.0), (10, math.nan), (20, math.inf), (30, -math.inf), (40, np.float32(2.5))]
    for step, loss in points:
        record_validation(run_dir, step, loss)
    steps, losses = read_validation(run_dir)
    assert steps.tolist() == [0, 10, 20, 30, 40]
    np.testing.assert_array_equal(losses, [3.0, math.nan, math.inf, -math.inf, 2.5])
    for line in (run_dir / FILE).read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_job_that_goes_back_or_starts_anew_is_followed(tmp_path):
    for step in (10, 20, 30, 40):
        record_validation(tmp_path, step, step / 10)
    record_validation(tmp_path, 30, 7.0)
    steps, losses = read_validation(tmp_path)
    assert (steps.tolist(), losses.tolist()) == ([10, 20, 30], [1, 2, 7])
    record_validation(tmp_path, 50, 8.0, reset=True)
    record_validation(tmp_path, 60, 8.5)
    assert read_validation(tmp_path)[0].tolist() == [50, 60]


@given(cut=st.integers(0, 200))
def test_a_line_that_a_crash_tore_costs_itself_only(cut, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("torn")
    for step in range(5):
        record_validation(run_dir, step, 3.0)
    path = run_dir / FILE
    data = path.read_bytes()
    cut = min(cut, len(data))
    path.write_bytes(data[:cut])
    whole = data[:cut].count(b"}")
    assert len(read_validation(run_dir)[0]) == whole
    record_validation(run_dir, 9, 2.0)
    assert read_validation(run_dir)[0].tolist() == [*range(whole), 9]


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "null",
        '{"step":1}',
        '{"step":true,"loss":1}',
        '{"step":-1,"loss":1}',
        '{"step":1e9,"loss":1}',
        '{"step":1,"loss":"x"}',
        '{"step":1,"loss":[1]}',
        "\xff",
        "{" * 100_000,
    ],
)
def test_lines_of_other_kinds_are_passed_over(line, tmp_path):
    record_validation(tmp_path, 1, 3.0)
    with open(tmp_path / FILE, "ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    record_validation(tmp_path, 2, 2.0)
    assert read_validation(tmp_path)[0].tolist() == [1, 2]


def test_a_file_without_end_is_refused(tmp_path):
    with open(tmp_path / FILE, "wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(DataError, match="is longer than"):
        read_validation(tmp_path)


@pytest.mark.parametrize(
    ("step", "loss", "message"),
    [
        (-1, 1.0, "step=-1; expected an integer >= 0"),
        (True, 1.0, "step=True"),
        (1.5, 1.0, "step=1.5"),
        (1, "much", "loss='much'; expected a number"),
        (1, None, "loss=None"),
    ],
)
def test_what_is_no_point_is_refused(step, loss, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        record_validation(tmp_path, step, loss)
    assert not (tmp_path / FILE).exists()


def test_a_reader_never_sees_half_a_point(tmp_path):
    code = (
        "import sys\n"
        "from metagrad_filter.calibration.validation import record_validation\n"
        "for step in range(300):\n"
        "    record_validation(sys.argv[1], step, 1.0)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) as writer:
        seen = 0
        while writer.poll() is None:
            steps = read_validation(tmp_path)[0]
            assert steps.tolist() == list(range(len(steps))) and len(steps) >= seen
            seen = len(steps)
    assert writer.returncode == 0 and len(read_validation(tmp_path)[0]) == 300


def test_a_training_job_without_jax_can_record():
    code = (
        "import sys, metagrad_filter.calibration.validation\n"
        "cold = {'jax', 'flax', 'optax', 'orbax', 'transformers', 'tensorstore'}\n"
        "assert not cold & set(sys.modules), cold & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_calibrator_records_too(tmp_path):
    rng = np.random.default_rng(0)
    proxy = mgf.Proxy(lambda p, w: p, {}, None, lambda rate: None, 0.1)  # pyright: ignore[reportArgumentType]
    windows = rng.integers(0, 9, (200, 8)).astype(np.int32)
    config = mgf.CalibrationConfig(vocab_size=9, horizon=1, batch_windows=1)
    calibrator = mgf.Calibrator(
        tmp_path, proxy=proxy, target=mgf.HeldOutLoss(windows[:8]), windows=windows, config=config
    )
    calibrator.validation(3, 2.5)
    calibrator.validation(5, 2.25, reset=True)
    assert [a.tolist() for a in read_validation(tmp_path)] == [[5], [2.25]]


# What follows.


def unanswered(run_dir, registry):
    return broken_trend(*read_validation(run_dir), after=last_fallback(registry))


@pytest.fixture(scope="module")
def scorer():
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 16, (120, 8)).astype(np.int32)
    found = fit_scorer(windows, (windows == 3).sum(axis=1).astype(float), vocab_size=16)
    return replace(found, strength=2.0)


def recorded(run_dir, rise_at=150, count=170, rise=0.3):
    steps, losses = curve(count, 0.01, np.random.default_rng(0))
    losses[rise_at:] += rise
    for step, loss in zip(steps, losses):
        record_validation(run_dir, int(step), loss)
    return steps, losses


def test_a_break_makes_selection_uniform_once_until_a_gate_accepts_again(tmp_path, scorer):
    registry = mgf.Registry(tmp_path)
    recorded(tmp_path)
    assert fall_back(registry, "nothing runs yet") is None
    registry.publish(scorer)
    found = unanswered(tmp_path, registry)
    assert found is not None
    assert fall_back(registry, found) == 2
    running, manifest = registry.load_with_manifest(2)
    assert running.strength == 0
    assert manifest["metadata"]["fallback"] == str(found)
    assert manifest["metadata"]["fallback_from"] == 1
    windows = np.zeros((3, 8), np.int32)
    np.testing.assert_array_equal(running.score(windows), scorer.score(windows))
    # Once, whoever asks: this process, or one that was started later.
    for again in (registry, mgf.Registry(tmp_path)):
        assert unanswered(tmp_path, again) is None
        assert fall_back(again, found) is None
    # A round that was accepted filters again, and the old break says nothing about it.
    registry.publish(scorer)
    assert unanswered(tmp_path, registry) is None
    assert registry.versions() == [1, 2, 3] and last_fallback(registry) == found.step


def test_a_new_break_after_an_answered_one_is_answered_too(tmp_path, scorer):
    registry = mgf.Registry(tmp_path)
    registry.publish(scorer)
    steps, losses = curve(300, 0.01, np.random.default_rng(0))
    losses[150:] += 0.3
    losses[250:] += 0.3
    fallbacks = []
    for step, loss in zip(steps, losses):
        record_validation(tmp_path, int(step), loss)
        if step % 500:
            continue
        found = unanswered(tmp_path, registry)
        if found is not None and fall_back(registry, found) is not None:
            fallbacks.append(found.step)
            registry.publish(scorer)  # the round that follows is accepted
    assert len(fallbacks) == 2
    assert 15000 < fallbacks[0] <= 15500 and 25000 < fallbacks[1] <= 25500


def test_a_reason_in_words_is_kept(tmp_path, scorer):
    registry = mgf.Registry(tmp_path)
    registry.publish(scorer)
    assert fall_back(registry, "asked for by an operator") == 2
    assert registry.manifest(2)["metadata"]["fallback"] == "asked for by an operator"
    assert last_fallback(registry) == -1


def test_a_broken_loss_falls_back_from_the_first_point_on(tmp_path, scorer):
    registry = mgf.Registry(tmp_path)
    registry.publish(scorer)
    record_validation(tmp_path, 5, math.nan)
    found = unanswered(tmp_path, registry)
    assert isinstance(found, Break) and fall_back(registry, found) == 2
    record_validation(tmp_path, 6, 3.0)
    assert unanswered(tmp_path, registry) is None


def test_a_damaged_version_hides_no_earlier_fallback(tmp_path, scorer):
    registry = mgf.Registry(tmp_path)
    registry.publish(scorer)
    assert fall_back(registry, Break(7, math.nan)) == 2
    registry.publish(scorer)
    (tmp_path / "registry" / "00000003.json").write_bytes(b"{}")
    assert last_fallback(mgf.Registry(tmp_path)) == 7
