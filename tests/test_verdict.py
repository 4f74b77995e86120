"""What becomes of a candidate: every reason, its figures, and what a record keeps of it."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import metagrad_filter as mgf
from metagrad_filter.calibration.gate import GateResult, Starved, decide
from metagrad_filter.calibration.verdict import (
    PUBLISHED,
    REJECTIONS,
    UNIFORM_BEATS_RUNNING,
    Facts,
    judge,
)
from metagrad_filter.errors import NonFiniteMetagradient, TrajectoryDiverged
from metagrad_filter.inspection import inspect_run
from metagrad_filter.registry import Registry

CONFIG = mgf.CalibrationConfig()
FACTS = Facts(0.9)
INF = math.inf
NOISE = np.array([0.001, -0.001, 0.0, 0.002])


def gate(soft=0.0, hard=0.0, running=None, **options):
    """A gate of four pairs; `soft`, `hard` and `running` are gains over uniform."""
    uniform = 3 + np.array([0.3, -0.2, 0.0, 0.1])
    losses = np.stack([uniform, uniform - soft - NOISE, uniform - hard + NOISE[::-1]], axis=1)
    if running is not None:
        running = (4, 1.5, uniform - running + NOISE[[1, 3, 0, 2]])
    return decide(losses, (0.0, 2.0, INF), 2.0, running=running, **options)


def guards(rise):
    return {"web": np.array([[4, 4 + rise, 4 + rise]] * 4)}


STARVED = [Starved("crawl", 0.4, 0.001)] * 2

# reason, facts, gate, what its sentence says
CASES = [
    ("non_finite", Facts(error=NonFiniteMetagradient("no number")), None, "no number"),
    (
        "diverged",
        Facts(error=TrajectoryDiverged("far up", step=1, windows=(2,))),
        None,
        "far up",
    ),
    ("unreliable", Facts(0.1), None, r"split-half correlation 0.10 is below 0.3; lower"),
    ("unreliable", Facts(math.nan), None, "split-half correlation nan"),
    ("non_finite", FACTS, gate(math.nan, math.nan), "runs at every strength"),
    ("non_finite", FACTS, gate(math.nan, INF), "left the finite numbers"),
    ("starves", FACTS, gate(0.1, 0.2, starved=STARVED), r"'crawl' is 40.0% .* be 0.10% of"),
    ("guard", FACTS, gate(0.1, 0.2, guards=guards(0.1)), r"'web' would rise by \+0.1 .* 0.005"),
    ("not_better_than_uniform", FACTS, gate(), r"gains by strength 2: .* inf: .* are needed"),
    ("not_better_than_uniform", FACTS, gate(-0.1, -0.2, 0.0), "no strength"),
    # Where nothing is better than uniform anyway, what else is wrong does not matter.
    ("not_better_than_uniform", FACTS, gate(starved=STARVED, guards=guards(1.0)), "no strength"),
    ("worse_than_running", FACTS, gate(0.1, 0.2, 0.25), r"version 4 gains \+0.25 .* behind by"),
    ("worse_than_running", FACTS, gate(0.0, 0.1, 0.3), "version 4 gains"),
    (UNIFORM_BEATS_RUNNING, FACTS, gate(0.0, 0.0, -0.1), "version 4 now loses .*no strength was"),
    (UNIFORM_BEATS_RUNNING, FACTS, gate(0.1, 0.2, -0.1, starved=STARVED), "no better: .*'crawl'"),
    (UNIFORM_BEATS_RUNNING, FACTS, gate(-0.1, 0.0, math.nan), "version 4 now loses"),
    (UNIFORM_BEATS_RUNNING, FACTS, gate(math.nan, INF, math.nan), "left the finite numbers"),
    (PUBLISHED, FACTS, gate(0.1, 0.2), r"gains \+0.2 .* over uniform at strength inf"),
    (PUBLISHED, FACTS, gate(0.2, 0.1), "at strength 2$"),
    (PUBLISHED, Facts(None), gate(0.1, 0.2), "over uniform"),
    (PUBLISHED, FACTS, gate(0.1, 0.2, 0.1), "over version 4"),
    (PUBLISHED, FACTS, gate(0.1, 0.2, 0.2), "over version 4"),  # as good, and fresher
    (PUBLISHED, FACTS, gate(0.1, 0.2, -0.1), "over version 4"),
    (PUBLISHED, FACTS, gate(0.1, 0.2, math.nan), "over uniform"),
]


@pytest.mark.parametrize(("reason", "facts", "found", "sentence"), CASES)
def test_reasons(reason, facts, found, sentence):
    verdict = judge(facts, found, CONFIG)
    assert verdict is not None and verdict.reason == reason
    assert re.search(sentence, verdict.sentence), verdict.sentence
    assert verdict.publish == (reason in (PUBLISHED, UNIFORM_BEATS_RUNNING))
    assert (verdict.strength > 0) == (reason == PUBLISHED)
    assert str(verdict).partition(":")[0] == reason.replace("_", "-")
    json.dumps(verdict.to_json(), allow_nan=False)


def test_every_reason_is_among_the_cases():
    assert {case[0] for case in CASES} == {*REJECTIONS, PUBLISHED, UNIFORM_BEATS_RUNNING}


def test_before_the_gate_silence_means_go_on():
    assert judge(FACTS, None, CONFIG) is None
    assert judge(Facts(None), None, CONFIG) is None


def test_a_share_of_the_running_gain_is_preserved_even_in_noise():
    # So noisy that nothing is clearly worse, but far less than half of what runs.
    uniform = np.full(4, 3.0)
    soft = uniform - 0.05 - NOISE / 10
    own = uniform - np.array([0.5, -0.2, 0.6, -0.1])
    losses = np.stack([uniform, soft], axis=1)
    found = decide(losses, (0.0, 2.0), 2.0, running=(4, 1.5, own))
    verdict = judge(FACTS, found, CONFIG)
    assert verdict is not None and verdict.reason == "worse_than_running"
    assert "less than 0.5 of it" in verdict.sentence
    verdict = judge(FACTS, found, mgf.CalibrationConfig(gate_preserved=0.0))
    assert verdict is not None and verdict.reason == PUBLISHED


gains = st.floats(-1, 1, allow_nan=False) | st.sampled_from([math.nan, INF, -INF])


@given(soft=gains, hard=gains, running=gains | st.none(), rise=gains, starved=st.booleans())
def test_what_is_published_is_never_seen_to_be_worse(soft, hard, running, rise, starved):
    options = {"starved": STARVED} if starved else {}
    found = gate(soft, hard, running, guards=guards(rise), **options)
    verdict = judge(FACTS, found, CONFIG)
    assert verdict is not None
    json.dumps([verdict.to_json(), found.to_json()], allow_nan=False)
    if verdict.reason == PUBLISHED:
        best = found.best
        assert best is not None and verdict.strength == best.strength
        assert best.gain > found.bar * best.standard_error and not starved
        assert rise <= CONFIG.gate_guard_tolerance
        if found.running is not None and found.running.lead is not None:
            lead = found.running.lead
            assert found.running.harmful or lead.mean >= -2 * lead.standard_error
    elif verdict.publish:
        assert verdict.strength == 0 and found.running is not None and found.running.harmful
    else:
        assert verdict.reason in REJECTIONS


def replaced(lead, sd, pairs=4, count=1500):
    """How often a candidate that is `lead` better than what runs takes its place."""
    rng = np.random.default_rng(0)
    wins = 0
    for _ in range(count):
        uniform = 3 + rng.normal(size=pairs)
        loss = uniform[:, None] - np.array([0, 1]) + sd * rng.normal(size=(pairs, 2))
        own = uniform - 1 + lead + sd * rng.normal(size=pairs)
        verdict = judge(FACTS, decide(loss, (0.0, 2.0), 2.0, running=(4, 1.5, own)), CONFIG)
        wins += verdict is not None and verdict.reason == PUBLISHED
    return wins / count


def test_equal_and_fresher_wins_and_clearly_worse_never_does():
    # 1 is the gain over uniform of what runs; one pair's noise is .05.
    assert replaced(0.0, 0.05) > 0.85
    assert replaced(0.05, 0.05) > 0.97
    assert replaced(-0.25, 0.05) < 0.01
    assert replaced(-0.6, 0.05) == 0


def test_a_record_says_why_and_by_how_much(tmp_path):
    registry = Registry(tmp_path)
    for reason, facts, found, _ in CASES:
        verdict = judge(facts, found, CONFIG)
        if verdict is not None and not verdict.publish:
            assert verdict.reason == reason
            figures = None if found is None else found.to_json()
            registry.reject(None, reason, {"detail": verdict.sentence, "gate": figures})
    records = inspect_run(tmp_path)["rejected"]
    assert {record["reason"] for record in records} == set(REJECTIONS)
    behind = next(r for r in records if r["reason"] == "worse_than_running")
    *own, running = behind["metadata"]["gate"]["arms"]
    assert running["running"] and running["version"] == 4 and running["lead"]["mean"] < 0
    assert all(arm["standard_error"] > 0 for arm in [*own, running])


def test_arms_and_result_agree():
    results = [found for _, _, found, _ in CASES if isinstance(found, GateResult)]
    assert all((found.best is None) == (found.chosen == 0) for found in results)
