"""The gate: how often it is wrong, what it refuses, and real short runs that show both."""

import functools
import json
import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import metagrad_filter as mgf
from metagrad_filter.calibration.gate import (
    Starved,
    decide,
    required,
    run_gate,
    running_version,
    starved_source,
)
from metagrad_filter.calibration.source import WindowSource
from metagrad_filter.calibration.verdict import Facts, judge
from metagrad_filter.errors import ConfigError, DataError
from metagrad_filter.scorer.fit import fit_scorer
from metagrad_filter.spool import SpooledWindows
from metagrad_filter.windows import TextWindows

INF = math.inf
STRENGTHS = (0.0, 2.0, INF)
LEVEL = 0.02275  # of a margin of 2


# How often it is wrong.


def simulated(kind, count, pairs, effect=0.0, seed=0):
    """`(count, pairs, 3)` losses of gates; gains of both strengths are `effect` sd of a gain."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(count, pairs, 3))
    if kind == "arms share their noise":
        noise[..., 2] = noise[..., 1]
    if kind == "the second arm is noisy":
        noise[..., 2] *= 5
    if kind == "uniform is quiet":
        noise[..., 0] *= 0.1
    shift = np.array([0, effect, effect]) * math.sqrt(2)
    # What a pair's windows do to all runs alike is far larger than what selections do.
    return 3 + rng.normal(size=(count, pairs, 1)) * 10 + noise - shift


def share_accepted(losses, margin=2.0):
    return np.mean([decide(one, STRENGTHS, margin).chosen > 0 for one in losses])


@pytest.mark.parametrize(
    "kind",
    ["independent", "arms share their noise", "the second arm is noisy", "uniform is quiet"],
)
@pytest.mark.parametrize("pairs", [2, 3, 4])
def test_where_no_strength_helps_one_is_chosen_as_rarely_as_the_margin_says(kind, pairs):
    count = 2000
    wrong = share_accepted(simulated(kind, count, pairs))
    # Four standard deviations of the simulation itself.
    assert wrong <= LEVEL + 4 * math.sqrt(LEVEL * (1 - LEVEL) / count)


def test_two_plain_standard_errors_would_err_in_one_gate_of_six():
    losses = simulated("independent", 2000, 3)
    gains = losses[..., :1] - losses[..., 1:]
    errors = gains.std(axis=1, ddof=1) / math.sqrt(3)
    assert np.mean((gains.mean(axis=1) > 2 * errors).any(axis=1)) > 0.12


@pytest.mark.parametrize(("pairs", "effect", "power"), [(3, 4, 0.8), (4, 4, 0.98), (4, 2.5, 0.8)])
def test_it_finds_gains_of_some_standard_deviations_of_one_pair(pairs, effect, power):
    assert share_accepted(simulated("independent", 1000, pairs, effect)) > power


@given(st.floats(0.1, 4), st.integers(2, 30), st.integers(1, 8))
def test_fewer_pairs_and_more_strengths_ask_for_more(margin, pairs, comparisons):
    bar = required(margin, pairs, comparisons)
    assert bar > margin * 0.999
    assert bar >= required(margin, pairs + 1, comparisons)
    assert bar <= required(margin, pairs, comparisons + 1)


def test_the_bar_is_the_quantile_of_student():
    assert required(2.0, 3, 1) == pytest.approx(4.527, abs=1e-3)
    assert required(2.0, 10**7, 1) == pytest.approx(2, abs=1e-4)
    assert required(1e9, 3, 2) == INF
    losses = np.array([[3, 2, 1.0]] * 3)
    assert decide(losses, STRENGTHS, 1e9).chosen == 0


# What makes an arm ineligible.

CLEAR = np.array([[3, 2.5, 2.0], [3.1, 2.61, 2.1], [2.9, 2.4, 1.9], [3, 2.5, 2.01]])


def guard_losses(rise, noise=0.001):
    rng = np.random.default_rng(0)
    return 4 + noise * rng.normal(size=(4, 3)) + np.array([0, 0, rise])


def test_an_arm_that_a_guard_pays_for_is_not_chosen():
    found = decide(CLEAR, STRENGTHS, 2.0, guards={"web": guard_losses(0.1)}, guard_tolerance=0.005)
    assert found.chosen == 2.0
    soft, hard = found.arms
    assert (soft.broken_guard, hard.broken_guard) == ("", "web")
    assert hard.better and not hard.eligible
    assert hard.guards["web"].mean == pytest.approx(0.1, abs=0.005)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["arms"][1]["guards"]["web"]


@pytest.mark.parametrize(
    ("rise", "noise", "tolerance", "chosen"),
    [
        (0.0, 0.001, 0.0, INF),
        (0.004, 0.0001, 0.005, INF),  # within the tolerance, clear as it is
        (0.02, 0.05, 0.005, INF),  # above it, but not clearly
        (0.02, 0.001, 0.005, 2.0),
        (math.nan, 0.001, 0.005, 2.0),
        (INF, 0.001, 0.005, 2.0),
    ],
)
def test_a_guard_breaks_beyond_its_tolerance_and_the_noise(rise, noise, tolerance, chosen):
    guards = {"web": guard_losses(rise, noise)}
    found = decide(CLEAR, STRENGTHS, 2.0, guards=guards, guard_tolerance=tolerance)
    assert found.chosen == chosen
    json.dumps(found.to_json(), allow_nan=False)


def test_a_starving_arm_is_not_chosen():
    starved = Starved("web", 0.3, 0.001)
    assert decide(CLEAR, STRENGTHS, 2.0, starved=[None, starved]).chosen == 2.0
    found = decide(CLEAR, STRENGTHS, 2.0, starved=[starved, starved])
    assert found.chosen == 0 and all(arm.better for arm in found.arms)


@given(
    counts=st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 5000), min_size=1),
    shares=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    least=st.floats(0, 1),
)
def test_a_source_is_starved_where_less_than_the_least_share_of_its_due_is_kept(
    counts, shares, least
):
    kept = {name: int(n * share) for (name, n), share in zip(counts.items(), shares)}
    config = replace(CONFIG, gate_minimum_source_share=least)
    total, held = sum(counts.values()), sum(kept.values())
    starving = {
        name
        for name, n in counts.items()
        if n / total >= 0.05 and n / total * held >= 20 and kept[name] / held < least * (n / total)
    }
    found = starved_source(counts, kept, config)
    assert (found is None) == (not starving)
    if found is not None:
        assert found.source in starving
        assert (found.before, found.after) == (
            counts[found.source] / total,
            kept[found.source] / held,
        )
        # Whoever means to drop it says so.
        config = replace(config, gate_may_starve=tuple(starving))
        assert starved_source(counts, kept, config) is None
    assert starved_source(counts, kept, replace(CONFIG, gate_minimum_source_share=0)) is None


def test_the_running_version_is_measured_against_uniform_and_the_chosen_arm():
    own = CLEAR[:, 2] + np.array([0.1, 0.11, 0.1, 0.09])
    found = decide(CLEAR, STRENGTHS, 2.0, running=(7, 1.5, own))
    assert found.running is not None and found.running.lead is not None
    assert (found.running.version, found.running.strength) == (7, 1.5)
    assert found.running.gain.mean == pytest.approx((CLEAR[:, 0] - own).mean())
    assert found.running.lead.mean == pytest.approx(0.1)
    assert not found.running.harmful and found.runs == 4 * 4
    arms = json.loads(json.dumps(found.to_json(), allow_nan=False))["arms"]
    assert [arm.get("running", False) for arm in arms] == [False, False, True]
    for own in (CLEAR[:, 0] + [0.5, 0.51, 0.5, 0.49], np.full(4, math.nan)):
        found = decide(CLEAR, STRENGTHS, 2.0, running=(7, 1.5, own))
        assert found.running is not None and found.running.harmful
        json.dumps(found.to_json(), allow_nan=False)


# Real runs: windows that count upwards (the target), downwards, and in no order.

VOCAB, LENGTH = 24, 10
UP, DOWN, MIXED = "up", "down", "mixed"
CONFIG = mgf.CalibrationConfig(
    batch_windows=16, block_windows=64, gate_steps=12, gate_pairs=3, vocab_size=VOCAB
)


@dataclass(frozen=True)
class BigramLoss:
    """Nats per token under a table of next-token logits."""

    def __call__(self, params, windows):
        log_p = jax.nn.log_softmax(params["table"][windows[:, :-1]])
        return -jnp.take_along_axis(log_p, windows[:, 1:, None], axis=2)[..., 0].mean(axis=1)


def windows_of(kind, count, seed):
    rng = np.random.default_rng([seed, len(kind)])
    steps = rng.integers(1, 3, (count, LENGTH)) * (-1 if kind == DOWN else 1)
    found = (rng.integers(0, VOCAB, (count, 1)) + steps.cumsum(axis=1)) % VOCAB
    return (rng.permuted(found, axis=1) if kind == MIXED else found).astype(np.int32)


ORDER = np.random.default_rng(0).permutation(900)
WINDOWS = np.concatenate([windows_of(kind, 300, 0) for kind in (UP, DOWN, MIXED)])[ORDER]
KINDS = np.repeat([UP, DOWN, MIXED], 300)[ORDER]
FACTORY = functools.partial(optax.adamw, b2=0.95)
TARGET = mgf.HeldOutLoss(windows_of(UP, 128, seed=1))
GUARD = mgf.HeldOutLoss(windows_of(DOWN, 128, seed=1))


@functools.cache
def proxy():
    table = 0.1 * jax.random.normal(jax.random.key(0), (VOCAB, VOCAB))
    params = {"table": table}
    return mgf.Proxy(BigramLoss(), params, FACTORY(0.05).init(params), FACTORY, 0.05)


@functools.cache
def scorer(wanted=UP):
    return fit_scorer(WINDOWS, np.equal(KINDS, wanted).astype(float), vocab_size=VOCAB, seed=0)


def gate(candidate=None, *, source=None, guards=False, running=None, config=CONFIG, **options):
    source = source or WindowSource(WINDOWS, sources=KINDS)
    return run_gate(
        proxy(),
        candidate or scorer(),
        TARGET.gate_metric(proxy().loss),
        source,
        np.arange(len(source)),
        config,
        seed=5,
        running=running,
        guards={"down": GUARD.gate_metric(proxy().loss)} if guards else None,
        **options,
    )


def reason(found, config=CONFIG):
    verdict = judge(Facts(0.9), found, config)
    assert verdict is not None
    return verdict.reason


def test_a_candidate_that_drops_a_source_is_refused_unless_that_is_meant():
    seen = []
    found = gate(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 9) for i in range(1, 10)]
    hard = found.arms[1]
    assert hard.better and hard.starved is not None and hard.starved.source in (DOWN, MIXED)
    assert hard.starved.before == pytest.approx(1 / 3, abs=0.05) and hard.starved.after < 0.03
    meant = replace(CONFIG, gate_may_starve=(DOWN, MIXED))
    assert gate(config=meant).chosen > 0
    # Without names nothing is known of sources, and nothing refused for them.
    unnamed = gate(source=WindowSource(WINDOWS))
    assert unnamed.chosen > 0 and all(arm.starved is None for arm in unnamed.arms)
    # Names change nothing that is measured.
    assert [arm.gain for arm in unnamed.arms] == [arm.gain for arm in found.arms]
    only = replace(CONFIG, gate_strengths=(INF,))
    assert reason(gate(config=only), only) == "starves"


def test_a_guard_is_measured_in_the_same_runs():
    source = WindowSource(WINDOWS)
    found, plain = gate(source=source, guards=True), gate(source=source)
    assert np.allclose([a.gain for a in found.arms], [a.gain for a in plain.arms], atol=1e-5)
    assert all(arm.better and arm.broken_guard == "down" for arm in found.arms)
    assert found.arms[1].guards["down"].mean > found.arms[0].guards["down"].mean > 0.005
    assert reason(found) == "guard"
    lenient = replace(CONFIG, gate_guard_tolerance=100.0)
    assert reason(gate(source=source, guards=True, config=lenient), lenient) == "published"


def test_the_running_version_competes_at_its_own_strength():
    source = WindowSource(WINDOWS)
    best, worst = replace(scorer(), strength=INF), replace(scorer(DOWN), strength=INF)
    # The same scorer at the same strength keeps the same windows: an exact tie, which is replaced.
    only = replace(CONFIG, gate_strengths=(INF,))
    tie = gate(source=source, running=(1, best), config=only)
    assert tie.running is not None and tie.running.lead is not None
    assert tie.running.lead.mean == 0 == tie.running.lead.standard_error
    assert tie.running.gain.mean == tie.arms[0].gain and reason(tie, only) == "published"
    # A weak strength of the same scorer is better than uniform and worse than what runs.
    weak = replace(CONFIG, gate_strengths=(0.3,), gate_margin=0.5)
    behind = gate(source=source, running=(1, best), config=weak)
    assert behind.arms[0].better and reason(behind, weak) == "worse_than_running"
    # One that does harm gives way to a good candidate, and to uniform where there is none.
    harmful = gate(source=source, running=(1, worst))
    assert harmful.running is not None and harmful.running.harmful
    assert reason(harmful) == "published"
    neither = gate(scorer(DOWN), source=source, running=(1, worst))
    assert reason(neither) == "uniform_beats_running"
    assert reason(gate(scorer(DOWN), source=source)) == "not_better_than_uniform"


def test_runs_that_leave_the_finite_numbers_reject_the_candidate():
    params = {"table": jnp.full((VOCAB, VOCAB), jnp.nan)}
    broken = mgf.Proxy(BigramLoss(), params, FACTORY(0.05).init(params), FACTORY, 0.05)
    found = run_gate(
        broken,
        scorer(),
        TARGET.gate_metric(broken.loss),
        WindowSource(WINDOWS),
        np.arange(len(WINDOWS)),
        CONFIG,
        seed=5,
    )
    assert not found.finite and found.chosen == 0
    assert reason(found) == "non_finite"
    json.dumps(found.to_json(), allow_nan=False)


def test_which_version_runs(tmp_path):
    source, registry = WindowSource(WINDOWS), mgf.Registry(tmp_path)
    assert running_version(registry, source) is None
    registry.publish(replace(scorer(), strength=1.5))
    found = running_version(registry, source)
    assert found is not None and (found[0], found[1].strength) == (1, 1.5)
    series = WindowSource(np.zeros((5, 8, 2), np.float32))
    with pytest.warns(RuntimeWarning, match="Version 1 cannot score the windows"):
        assert running_version(registry, series) is None
    registry.publish(replace(scorer(), strength=0.0))
    assert running_version(registry, source) is None


# Names of sources.


def test_names_come_with_an_array_or_from_the_elements_of_a_dataset():
    index = np.array([5, 0, 899])
    assert WindowSource(WINDOWS).sources(index) is None
    named = WindowSource(WINDOWS, sources=list(KINDS)).sources(index)
    assert named is not None and named.tolist() == list(KINDS[index])
    elements = [{"tokens": w, "from": k} for w, k in zip(WINDOWS[:9], KINDS)]
    dataset = WindowSource(_Dataset(elements), TextWindows("tokens"), sources="from")
    named = dataset.sources(np.arange(9))
    assert named is not None and named.tolist() == list(KINDS[:9])
    missing = WindowSource(_Dataset(elements), TextWindows("tokens"), sources="origin")
    with pytest.raises(DataError, match="element 0 has no entry 'origin'"):
        missing.sources(np.arange(2))


class _Dataset(tuple):
    """A dataset with random access that is no list of arrays."""

    def __new__(cls, elements):
        return super().__new__(cls, elements)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["a"], "sources holds 1 names for 900 windows"),
        ([1.5] * 900, "expected .N,. names"),
        ([["a"]] * 900, "expected .N,. names"),
        ("from", "names an entry of a dataset's elements, but windows are an array"),
    ],
)
def test_names_that_do_not_belong_to_the_windows_are_refused(sources, message):
    with pytest.raises(ConfigError, match=message):
        WindowSource(WINDOWS, sources=sources)


def test_a_spool_has_names_of_its_own(tmp_path):
    with pytest.raises(ConfigError, match="give the filter source_key="):
        WindowSource(SpooledWindows(tmp_path), sources=["a"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gate_guard_tolerance", -0.1),
        ("gate_guard_tolerance", INF),
        ("gate_guard_tolerance", math.nan),
        ("gate_preserved", 1.1),
        ("gate_preserved", math.nan),
        ("gate_minimum_source_share", -0.1),
        ("gate_minimum_source_share", 2),
        ("gate_may_starve", "crawl"),
        ("gate_may_starve", (1,)),
    ],
)
def test_settings_out_of_their_domain_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        mgf.CalibrationConfig(**{field: value})
    json.dumps(mgf.CalibrationConfig(gate_may_starve=("crawl",)).to_json(), allow_nan=False)
