"""The filter that decides on one window at a time, in grain and alone."""

import json
import math

import grain
import numpy as np
import pytest
from hotlane import make_elements, make_scorer, make_windows

import metagrad_filter as mgf
from metagrad_filter.errors import ConfigError, ScorerRejected, StateMismatch, WindowError

WINDOWS = mgf.TextWindows("tokens")
IN_PROCESS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def publish(run_dir, seed=1, *, reference=True, **fields) -> int:
    scorer = make_scorer(seed, **fields)
    quantiles = np.quantile(scorer.score(make_windows(2000, seed=99)), np.linspace(0, 1, 257))
    metadata = {"reference": [float(q) for q in quantiles]} if reference else {}
    return mgf.Registry(run_dir).publish(scorer, metadata)


def online(elements, run_dir, **options):
    options = {"keep_ratio": 0.3, "windows": WINDOWS, "block_windows": 50} | options
    ds = grain.MapDataset.source(elements).to_iter_dataset(IN_PROCESS)
    return mgf.score_filter(ds, run_dir, rule="threshold", **options)


def indices(ds) -> list[int]:
    return [int(element["index"]) for element in ds]


@pytest.mark.parametrize("reference", [True, False])
def test_the_ratio_holds_and_better_windows_are_kept(tmp_path, reference):
    publish(tmp_path, reference=reference)
    elements = make_elements(3000)
    kept = indices(online(elements, tmp_path))
    assert abs(len(kept) - 900) <= 48
    scores = make_scorer(1).score(np.stack([e["tokens"] for e in elements]))
    assert scores[kept].mean() > scores.mean() + 0.8 * scores.std()
    assert indices(online(elements, tmp_path)) == kept


def test_versions_change_between_intervals_and_replay(tmp_path):
    elements = make_elements(900)
    iterator = iter(online(elements, tmp_path, swap_every_blocks=2, annotate=True))
    seen = []
    for element in iterator:
        if not seen:
            publish(tmp_path, 1)
        if int(element["index"]) >= 300 and mgf.Registry(tmp_path).latest() == 1:
            publish(tmp_path, 2)
        seen.append((int(element["index"]), int(element["scorer_version"])))
    by_interval = {index // 100: version for index, version in seen}
    assert by_interval[0] == 0 and by_interval[1] == 1 and by_interval[8] == 2
    again = online(elements, tmp_path, swap_every_blocks=2, annotate=True)
    assert [(int(e["index"]), int(e["scorer_version"])) for e in again] == seen


def test_resume_at_every_step_gives_the_same_stream(tmp_path):
    publish(tmp_path, 1)
    elements = make_elements(330)
    ds = online(elements, tmp_path, swap_every_blocks=1, name="resume")
    list(ds)
    publish(tmp_path, 2)
    iterator, kept, states = iter(ds), [], []
    while True:
        states.append(json.loads(json.dumps(iterator.get_state(), allow_nan=False)))
        try:
            kept.append(int(next(iterator)["index"]))
        except StopIteration:
            break
    for step in range(0, len(states), 3):
        fresh = iter(online(elements, tmp_path, swap_every_blocks=1, name="resume"))
        fresh.set_state(states[step])
        assert fresh.get_state() == states[step]
        assert indices(fresh) == kept[step:]
    assert len({json.dumps(jax_like(state)) for state in states}) == 1
    grain.experimental.assert_equal_output_after_checkpoint(ds)


def jax_like(state):
    """The structure of a state: names and types."""
    if isinstance(state, dict):
        return {key: jax_like(value) for key, value in state.items()}
    return type(state).__name__


def test_downstream_stages_and_the_exploration_share(tmp_path):
    publish(tmp_path)
    elements = make_elements(600)
    ds = online(elements, tmp_path, explore=0.5).batch(4, drop_remainder=True)
    assert abs(4 * len(list(ds)) - 180) <= 52
    exploring = set(indices(online(elements, tmp_path, explore=0.5)))
    greedy = set(indices(online(elements, tmp_path, name="greedy")))
    assert exploring - greedy and greedy - exploring


def test_keep_ratio_one_is_the_identity(tmp_path):
    publish(tmp_path)
    elements = make_elements(60)
    assert indices(online(elements, tmp_path, keep_ratio=1)) == list(range(60))
    scored = list(online(elements, tmp_path, keep_ratio=1, annotate=True, name="annotated"))
    assert [int(e["index"]) for e in scored] == list(range(60))
    assert all(math.isfinite(e["score"]) and e["scorer_version"] == 1 for e in scored)


def test_without_a_scorer_the_choice_is_by_lot_and_seeded(tmp_path):
    elements = make_elements(1000)
    kept = indices(online(elements, tmp_path / "a"))
    assert kept == indices(online(elements, tmp_path / "b"))
    assert kept != indices(online(elements, tmp_path / "c", seed=1))
    assert abs(len(kept) - 300) <= 48


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="MapDataset"):
        mgf.score_filter(
            grain.MapDataset.source(make_elements(9)),
            tmp_path,
            keep_ratio=0.5,
            windows=WINDOWS,
            rule="threshold",
        )
    with pytest.raises(ConfigError, match="caps need rule='block'"):
        online(make_elements(9), tmp_path, caps=mgf.Cap("source", count=1))
    with pytest.raises(ConfigError, match="rule is 'best'"):
        online(make_elements(9), tmp_path).__class__  # noqa: B018
        mgf.score_filter(
            grain.MapDataset.source(make_elements(9)),
            tmp_path,
            keep_ratio=0.5,
            windows=WINDOWS,
            rule="best",
        )
    with pytest.raises(WindowError, match="ended before its first element"):
        list(
            mgf.score_filter(
                grain.MapDataset.source(make_elements(9)).filter(lambda e: False).to_iter_dataset(),
                tmp_path / "empty",
                keep_ratio=0.5,
                windows=WINDOWS,
                rule="threshold",
            )
        )


def test_states_of_other_filters_and_lost_versions_are_refused(tmp_path):
    publish(tmp_path)
    elements = make_elements(200)
    iterator = iter(online(elements, tmp_path))
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    with pytest.raises(StateMismatch, match="fields"):
        iter(online(elements, tmp_path)).set_state(state | {"online": {}})
    with pytest.raises(StateMismatch, match="version 7"):
        broken = state | {"online": state["online"] | {"version": 7}}
        iter(online(elements, tmp_path)).set_state(broken)
    (tmp_path / "registry" / "00000001.safetensors").unlink()
    with pytest.raises(ScorerRejected, match="cannot be replayed"):
        iter(online(elements, tmp_path)).set_state(state)


def test_a_reference_that_is_no_reference_is_not_used(tmp_path):
    elements = make_elements(600)
    for number, odd in enumerate(([1.0], [2.0, 1.0], "text", None, [math.pi, "x"])):
        run_dir = tmp_path / str(number)
        mgf.Registry(run_dir).publish(make_scorer(1), {"reference": odd})
        assert abs(len(indices(online(elements, run_dir))) - 180) <= 48
