"""Same stream for any number of workers, after any resume, while scorers are being published."""

import copy
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from fractions import Fraction
from pathlib import Path

import cloudpickle
import grain
import numpy as np
import pytest
from hotlane import VOCAB, make_elements, make_scorer
from hypothesis import given, settings
from hypothesis import strategies as st

import metagrad_filter as mgf
from metagrad_filter.counting import FilterCounters, counters
from metagrad_filter.errors import ConfigError, ScorerRejected, StateMismatch, WindowError
from metagrad_filter.selection import keep_blocks, kept_before

PATHS = ("map", "iter")
WINDOWS = mgf.TextWindows("tokens")
IN_PROCESS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def source(elements, path):
    ds = grain.MapDataset.source(elements)
    return ds if path == "map" else ds.to_iter_dataset(IN_PROCESS)


def filtered(elements, run_dir, path="map", **options):
    options = {
        "keep_ratio": 0.3,
        "windows": WINDOWS,
        "block_windows": 10,
        "swap_every_blocks": 2,
    } | options
    return mgf.score_filter(source(elements, path), run_dir, **options)


def indices(ds) -> list[int]:
    return [int(element["index"]) for element in ds]


def publish(run_dir, seed=1, **fields) -> int:
    return mgf.Registry(run_dir).publish(make_scorer(seed, **fields))


def replace_scorer(ds, scorer) -> None:
    """Makes version 1 of a map dataset's first interval any object."""
    decisions = ds._blocks()._filter._scorer._decisions
    decisions._versions[0], decisions._scorers[1] = 1, scorer


def as_iter(ds):
    return ds.to_iter_dataset(IN_PROCESS) if isinstance(ds, grain.MapDataset) else ds


# Quota and choice.


@settings(max_examples=30)
@given(
    n=st.integers(1, 90),
    block=st.integers(1, 40),
    ratio=st.fractions(Fraction(1, 50), 1, max_denominator=50),
    swap=st.integers(1, 4),
    scored=st.booleans(),
    path=st.sampled_from(PATHS),
)
def test_every_block_keeps_exactly_its_quota_of_the_best(
    tmp_path_factory, n, block, ratio, swap, scored, path
):
    run_dir = tmp_path_factory.mktemp("run")
    elements = make_elements(n)
    scorer = make_scorer(1)
    if scored:
        publish(run_dir, 1)
    ds = filtered(
        elements, run_dir, path, keep_ratio=ratio, block_windows=block, swap_every_blocks=swap
    )
    kept = indices(ds)
    assert kept == sorted(set(kept)) and len(kept) == kept_before(n, ratio)
    scores = scorer.score(WINDOWS.stack(elements))
    for start in range(0, n, block):
        stop = min(start + block, n)
        mine = [i for i in kept if start <= i < stop]
        k = kept_before(stop, ratio) - kept_before(start, ratio)
        assert len(mine) == k
        if scored:
            best = sorted(range(start, stop), key=lambda i: (-scores[i], i))[:k]
            assert mine == sorted(best)
    if path == "map":
        assert len(ds) == len(kept)
        assert [ds[i]["index"] for i in range(len(ds))] == kept


def test_both_paths_choose_alike(tmp_path):
    publish(tmp_path)
    elements = make_elements(95)
    assert indices(filtered(elements, tmp_path, "map")) == indices(
        filtered(elements, tmp_path, "iter", name="iter")
    )


@pytest.mark.parametrize("strength", [0.0, 1.5, math.inf])
def test_windows_in_hand_are_kept_as_the_stream_keeps_them(tmp_path, strength):
    elements, scorer = make_elements(395), make_scorer(1, strength=strength)
    mgf.Registry(tmp_path).publish(scorer)
    options = {"keep_ratio": 0.3, "block_windows": 20, "seed": 5, "name": "here"}
    streamed = indices(filtered(elements, tmp_path, "map", **options))
    scores = scorer.score(WINDOWS.stack(elements))
    kept = keep_blocks(scores, len(elements), strength=strength, **options)
    assert kept.tolist() == streamed


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ratio", [1, 1.0, Fraction(1)])
def test_keep_ratio_one_changes_nothing(tmp_path, path, ratio):
    publish(tmp_path)
    elements = make_elements(25)
    kept = list(filtered(elements, tmp_path, path, keep_ratio=ratio))
    assert all(a is b for a, b in zip(kept, elements, strict=True))
    assert mgf.Ledger(tmp_path).entries() == {}


@pytest.mark.parametrize("path", PATHS)
def test_keep_ratio_one_can_still_annotate(tmp_path, path):
    publish(tmp_path)
    ds = filtered(make_elements(25), tmp_path, path, keep_ratio=1, annotate=True)
    assert [(e["index"], e["scorer_version"]) for e in ds] == [(i, 1) for i in range(25)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ratio", [0, float("nan"), 1.5, -0.1, "0.5", True, None])
def test_keep_ratios_out_of_range_are_refused_when_the_filter_is_made(tmp_path, path, ratio):
    with pytest.raises(ConfigError, match="keep_ratio"):
        filtered(make_elements(3), tmp_path, path, keep_ratio=ratio)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_windows": 0}, "block_windows"),
        ({"block_windows": 2.0}, "block_windows"),
        ({"swap_every_blocks": 0}, "swap_every_blocks"),
        ({"seed": -1}, "seed"),
        ({"seed": None}, "seed"),
        ({"explore": 1.5}, "explore"),
        ({"name": "../x"}, "name"),
        ({"windows": "tokens"}, "windows"),
    ],
)
def test_options_out_of_their_domain_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        filtered(make_elements(3), tmp_path, **options)


def test_other_datasets_and_directories_are_refused(tmp_path):
    options = {"keep_ratio": 0.5, "windows": WINDOWS}
    with pytest.raises(ConfigError, match="adapters"):
        mgf.score_filter([1, 2], tmp_path, **options)  # pyright: ignore[reportArgumentType]
    ds = grain.MapDataset.source(make_elements(3))
    with pytest.raises(ConfigError, match="expected a directory or a URL"):
        mgf.score_filter(ds, "ftp://host/run", **options)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="run_dir"):
        mgf.score_filter(ds, tmp_path / "file", **options)


@pytest.mark.parametrize("path", PATHS)
def test_a_run_behind_a_url_gives_the_same_stream(tmp_path, path):
    elements = make_elements(60)
    publish(tmp_path)
    url = f"memory://{tmp_path.name}"
    publish(url)
    assert indices(as_iter(filtered(elements, url, path))) == indices(
        as_iter(filtered(elements, tmp_path, path))
    )
    assert mgf.Ledger(url).entries().keys() == {0, 1, 2}
    as_url = indices(as_iter(filtered(elements, tmp_path.as_uri(), path)))
    assert as_url == indices(as_iter(filtered(elements, tmp_path, path)))


def test_an_empty_dataset_says_what_to_check(tmp_path):
    with pytest.raises(WindowError, match="length 0"):
        filtered([], tmp_path, "map")
    empty = filtered([], tmp_path, "iter")
    with pytest.raises(WindowError, match="before its first element"):
        next(iter(empty))


def test_keeping_nothing_gives_an_empty_dataset(tmp_path):
    for path in PATHS:
        ds = filtered(make_elements(5), tmp_path, path, keep_ratio=0.1, name=path)
        assert list(ds) == []
    with pytest.raises(IndexError):
        filtered(make_elements(5), tmp_path, "map", keep_ratio=0.1, name="map")[0]


@pytest.mark.parametrize("path", PATHS)
def test_annotations_name_the_score_and_the_version(tmp_path, path):
    elements = make_elements(40)
    ds = filtered(elements, tmp_path, path, annotate=True, swap_every_blocks=1)
    iterator = iter(as_iter(ds))
    first = [next(iterator) for _ in range(3)]
    assert all(np.isnan(e["score"]) and e["scorer_version"] == 0 for e in first)
    publish(tmp_path)
    rest = list(iterator)
    scores = make_scorer(1).score(WINDOWS.stack(elements))
    for element in rest:
        assert element["score"] == scores[element["index"]]
        assert element["score"].dtype == np.float32 and element["scorer_version"] == 1
    assert "score" not in elements[rest[0]["index"]]
    batch = next(iter(as_iter(ds).batch(4)))
    assert batch["score"].shape == (4,) and batch["scorer_version"].dtype == np.int64


@pytest.mark.parametrize("path", PATHS)
def test_annotations_need_dicts(tmp_path, path):
    ds = mgf.score_filter(
        source([np.arange(4)] * 4, path),
        tmp_path,
        keep_ratio=0.5,
        windows=mgf.TextWindows(),
        annotate=True,
    )
    with pytest.raises(WindowError, match="annotate"):
        list(ds)


# Unreadable elements.


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"tokens": np.array([1, VOCAB] * 8, np.int32)}, "id 100"),
        ({"tokens": np.array([-1] * 16, np.int32)}, "id -1"),
        ({"tokens": np.zeros(15, np.int32)}, "equal lengths"),
        ({"tokens": np.zeros(0, np.int32)}, "empty"),
        ({"tokens": np.zeros(16)}, "integer"),
        ({"text": "x"}, "available"),
        ([1, 2], "expected a dict"),
    ],
)
def test_unreadable_windows_end_typed(tmp_path, path, bad, message):
    publish(tmp_path)
    elements = make_elements(12)
    elements[3] = bad
    with pytest.raises(WindowError, match=message):
        list(as_iter(filtered(elements, tmp_path, path)))


def test_a_sparse_dataset_says_where_to_put_the_filter(tmp_path):
    sparse = grain.MapDataset.source(make_elements(30)).filter(lambda e: e["index"] % 3 > 0)
    options = {"keep_ratio": 0.5, "windows": WINDOWS, "block_windows": 5}
    with pytest.raises(WindowError, match="to_iter_dataset"):
        mgf.score_filter(sparse, tmp_path, name="map", **options)[0]
    ds = mgf.score_filter(sparse.to_iter_dataset(), tmp_path, name="iter", **options)
    assert len(list(ds)) == 10


def test_a_scorer_for_other_windows_is_refused(tmp_path):
    publish(tmp_path)
    elements = [{"v": np.zeros((4, 2), np.float32)}] * 20
    ds = filtered(elements, tmp_path, windows=mgf.SeriesWindows("v"))
    with pytest.raises(ConfigError, match="series"):
        ds[0]


# Epochs, slices and other stages.


def test_repeat_before_and_after_go_on_counting(tmp_path):
    elements = make_elements(45)
    ds = filtered(elements, tmp_path, swap_every_blocks=5, seed=3)
    after = indices(ds.repeat(3))
    k = len(ds)
    assert len(after) == 3 * k == 39
    assert after[:k] == indices(ds)
    assert after[:k] != after[k : 2 * k] != after[2 * k :]
    assert [ds[i]["index"] for i in range(3 * k)] == after
    assert ds[-1]["index"] == after[k - 1]
    assert sorted(mgf.Ledger(tmp_path).entries()) == [0, 1, 2]
    repeated = mgf.score_filter(
        grain.MapDataset.source(elements).repeat(),
        tmp_path,
        keep_ratio=0.3,
        windows=WINDOWS,
        block_windows=10,
        name="before",
    )
    assert len(repeated) > 10**17
    assert [repeated[i]["index"] for i in range(40)] == [
        repeated[i]["index"] for i in reversed(range(40))
    ][::-1]


def test_a_shuffled_parent_is_filtered_anew_each_epoch(tmp_path):
    publish(tmp_path)
    ds = mgf.score_filter(
        grain.MapDataset.source(make_elements(50)).shuffle(seed=7),
        tmp_path,
        keep_ratio=0.4,
        windows=WINDOWS,
        block_windows=10,
    )
    epochs = np.array(indices(ds.repeat(2))).reshape(2, 20)
    assert len(set(epochs[0])) == len(set(epochs[1])) == 20
    assert set(epochs[0]) != set(epochs[1])
    # Backwards: from the remembered choices, reading again what has been handed out.
    assert [ds[i]["index"] for i in reversed(range(40))] == epochs.ravel()[::-1].tolist()


def test_slices_shuffles_and_batches_after_the_filter(tmp_path):
    publish(tmp_path)
    ds = filtered(make_elements(100), tmp_path)
    kept = indices(ds)
    assert indices(ds[3:20:4]) == kept[3:20:4]
    assert indices(ds.slice(slice(1, None, 2))) == kept[1::2]
    assert sorted(indices(ds.shuffle(seed=1))) == kept
    batches = list(ds.batch(7))
    assert np.concatenate([b["index"] for b in batches]).tolist() == kept
    hosts = [indices(ds[i::3]) for i in range(3)]
    assert sorted(itertools.chain(*hosts)) == kept and {len(h) for h in hosts} == {10}


def test_an_elastic_iterator_gives_the_same_batches_for_any_number_of_hosts(tmp_path):
    publish(tmp_path)
    ds = filtered(make_elements(200), tmp_path)

    def batches(hosts):
        iterators = [
            grain.experimental.ElasticIterator(
                ds, 12, grain.sharding.ShardOptions(h, hosts), read_options=IN_PROCESS
            )
            for h in range(hosts)
        ]
        return [
            sorted(np.concatenate([b["index"] for b in parts]).tolist())
            for parts in zip(*iterators)
        ]

    assert batches(1) == batches(2) == batches(4)


def test_an_elastic_iterator_goes_on_with_another_number_of_hosts(tmp_path):
    publish(tmp_path)
    ds = filtered(make_elements(200), tmp_path)

    def hosts(count):
        return [
            grain.experimental.ElasticIterator(
                ds, 12, grain.sharding.ShardOptions(host, count), read_options=IN_PROCESS
            )
            for host in range(count)
        ]

    def step(iterators):
        return sorted(np.concatenate([next(i)["index"] for i in iterators]).tolist())

    four = hosts(4)
    stream = [step(four), step(four)]
    state = json.loads(json.dumps(four[0].get_state()))
    two = hosts(2)
    for iterator in two:
        iterator.set_state(state)
    stream += [step(two) for _ in range(3)]
    one = hosts(1)
    assert stream == [step(one) for _ in range(5)]


class CountingSource:
    """Counts reads; threads may read at once."""

    def __init__(self, elements):
        self.elements, self.reads = elements, []

    def __len__(self):
        return len(self.elements)

    def __getitem__(self, index):
        self.reads.append(index)
        time.sleep(0.0005)
        return self.elements[index]


def test_read_threads_read_every_window_once_and_together(tmp_path):
    publish(tmp_path)
    before = counters("threads").blocks
    counting = CountingSource(make_elements(400))
    ds = mgf.score_filter(
        grain.MapDataset.source(counting),
        tmp_path,
        keep_ratio=0.25,
        windows=WINDOWS,
        block_windows=100,
        name="threads",
    )
    threaded = indices(ds.to_iter_dataset(grain.ReadOptions(16, 64)))
    assert sorted(counting.reads) == list(range(400))
    assert counters("threads").blocks - before == 4
    assert threaded == indices(as_iter(ds))


def test_a_failing_read_reaches_every_thread_and_can_be_retried(tmp_path):
    publish(tmp_path)
    elements: list = make_elements(40)
    counting = CountingSource(elements)
    broken = elements[5]
    elements[5] = None
    ds = mgf.score_filter(
        grain.MapDataset.source(counting),
        tmp_path,
        keep_ratio=0.5,
        windows=WINDOWS,
        block_windows=20,
    )
    with pytest.raises(WindowError, match="sparse"):
        list(ds)
    elements[5] = broken
    assert len(list(ds)) == 20


def test_elements_are_handed_out_once_so_later_stages_may_change_them(tmp_path):
    class Fresh(CountingSource):
        def __getitem__(self, index):
            return dict(self.elements[index])

    ds = mgf.score_filter(
        grain.MapDataset.source(Fresh(make_elements(30))),
        tmp_path,
        keep_ratio=0.5,
        windows=WINDOWS,
        block_windows=10,
    )
    assert [ds[i].pop("index") for i in range(15)] == [ds[i].pop("index") for i in range(15)]


def test_datasets_pickle_small_and_deepcopy(tmp_path):
    publish(tmp_path)
    for path in PATHS:
        ds = filtered(SmallSource(1000), tmp_path, path, windows=mgf.TextWindows(), name=path)
        next(iter(ds))
        size = len(cloudpickle.dumps(ds))
        assert size - len(cloudpickle.dumps(source(SmallSource(1000), path))) < 1500
        expected = [e.tolist() for e in as_iter(ds)]
        assert [e.tolist() for e in as_iter(copy.deepcopy(ds))] == expected


class SmallSource:
    """A source that pickles small."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return np.full(4, index % VOCAB, np.int32)


class Specified(grain.MapDataset):
    """A dataset that knows the shapes of its elements."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return {"tokens": np.zeros(4, np.int32)}

    @property
    def _element_spec(self):
        return {"tokens": grain.experimental.ShapeDtypeStruct((4,), np.int32)}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("annotate", [False, True])
def test_the_filter_names_itself_and_passes_the_element_spec_on(tmp_path, path, annotate):
    parent = Specified() if path == "map" else Specified().to_iter_dataset()
    ds = mgf.score_filter(
        parent, tmp_path, keep_ratio=0.3, windows=WINDOWS, annotate=annotate, name="spec"
    )
    assert "keep_ratio=3/10" in str(ds) and "'spec'" in str(ds)
    spec = grain.experimental.get_element_spec(ds)
    element = next(iter(ds))
    assert set(spec) == set(element)
    assert spec["tokens"].shape == element["tokens"].shape
    if annotate:
        assert spec["score"].dtype == element["score"].dtype == np.float32


# Checkpoints.


def assert_resumes_everywhere(make):
    """Checks the stream after a JSON round trip of the state at every step."""
    iterator = iter(make())
    states, expected = [iterator.get_state()], []
    for element in iterator:
        expected.append(element)
        states.append(iterator.get_state())
    shape = {key: type(value) for key, value in states[0].items()}
    for step, state in enumerate(states):
        assert {key: type(value) for key, value in state.items()} == shape
        data = json.dumps(state)
        assert len(data) < 1024
        resumed = iter(make())
        resumed.set_state(json.loads(data))
        assert resumed.get_state() == state, step
        np.testing.assert_equal(list(resumed), expected[step:], err_msg=str(step))
        # Loaded twice and backwards on an iterator in use.
        resumed.set_state(json.loads(data))
        np.testing.assert_equal(next(resumed, None), dict(enumerate(expected)).get(step))
    grain.experimental.assert_equal_output_after_checkpoint(make())
    return expected


@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize("path", PATHS)
def test_resume_at_every_step_gives_the_same_stream(tmp_path, path, batch):
    elements = make_elements(73)
    for interval in range(4):
        mgf.Ledger(tmp_path).decide(interval, 0) if interval % 2 else None
    publish(tmp_path)

    def make():
        ds = as_iter(filtered(elements, tmp_path, path, annotate=True))
        return ds.batch(batch) if batch else ds

    expected = assert_resumes_everywhere(make)
    versions = np.concatenate([np.atleast_1d(e["scorer_version"]) for e in expected])
    assert set(versions.tolist()) == {0, 1}


@pytest.mark.parametrize("path", PATHS)
def test_resume_below_a_window_shuffle(tmp_path, path):
    publish(tmp_path)
    elements = make_elements(60)

    def make():
        ds = as_iter(filtered(elements, tmp_path, path))
        return grain.experimental.WindowShuffleIterDataset(ds, window_size=7, seed=2)

    assert_resumes_everywhere(make)


@pytest.mark.parametrize("path", PATHS)
def test_resume_through_orbax(tmp_path, path):
    import orbax.checkpoint as ocp

    publish(tmp_path)
    elements = make_elements(80)

    def make():
        return iter(as_iter(filtered(elements, tmp_path, path)).batch(2))

    iterator = make()
    for _ in range(5):
        next(iterator)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(0, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        resumed = make()
        manager.restore(
            0, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed))
        )
    np.testing.assert_equal(list(resumed), list(iterator))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("block"),
        lambda state: state.update(format=1),
        lambda state: state.update(extra=1),
        lambda state: state.update(filter="{"),
    ],
)
def test_a_foreign_state_is_refused(tmp_path, change):
    iterator = iter(filtered(make_elements(20), tmp_path, "iter"))
    state = iterator.get_state()
    change(state)
    with pytest.raises(StateMismatch):
        iterator.set_state(state)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "options",
    [
        {"keep_ratio": 0.5},
        {"seed": 1},
        {"block_windows": 20},
        {"swap_every_blocks": 3},
        {"explore": 0.5},
        {"windows": mgf.TextWindows("tokens", pad_id=0)},
    ],
)
def test_another_configuration_under_the_same_name_is_refused(tmp_path, path, options):
    filtered(make_elements(20), tmp_path, path)
    with pytest.raises(StateMismatch, match=next(iter(options))):
        filtered(make_elements(20), tmp_path, path, **options)
    filtered(make_elements(20), tmp_path, path, annotate=True)


def test_blocks_by_index_and_by_iterator_need_separate_names(tmp_path):
    filtered(make_elements(20), tmp_path, "map")
    with pytest.raises(StateMismatch, match="order='index'"):
        filtered(make_elements(20), tmp_path, "iter")


# Versions.


@pytest.mark.parametrize("path", PATHS)
def test_a_published_scorer_acts_from_the_next_undecided_interval(tmp_path, path):
    elements = make_elements(100)
    ds = filtered(elements, tmp_path, path, annotate=True)
    iterator, versions = iter(as_iter(ds)), []
    for step in range(30):
        if step % 9 == 0:
            publish(tmp_path, seed=step)
        versions.append(next(iterator)["scorer_version"])
    # Three windows a block, six an interval: published at 0, 9 (in use from 12), 18 and 27.
    assert versions == [1] * 12 + [2] * 6 + [3] * 12
    assert [e["scorer_version"] for e in as_iter(ds)] == versions
    decided = {i: e.version for i, e in mgf.Ledger(tmp_path).entries().items()}
    assert decided == {i: versions[6 * i] for i in range(5)}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("damage", ["truncate", "flip", "manifest", "remove"])
def test_a_corrupt_newest_scorer_falls_back_to_the_older_one(tmp_path, path, damage):
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    suffix = "json" if damage == "manifest" else "safetensors"
    file = tmp_path / "registry" / f"00000002.{suffix}"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "truncate" else data)
    before = counters().versions_skipped
    with pytest.warns(RuntimeWarning, match="version 2"):
        ds = filtered(make_elements(40), tmp_path, path, annotate=True)
        assert {e["scorer_version"] for e in as_iter(ds)} == {1}
    assert counters().versions_skipped > before


@pytest.mark.parametrize("path", PATHS)
def test_without_any_usable_scorer_the_choice_is_uniform(tmp_path, path):
    publish(tmp_path)
    (tmp_path / "registry" / "00000001.safetensors").write_bytes(b"")
    with pytest.warns(RuntimeWarning):
        ds = filtered(make_elements(40), tmp_path, path, annotate=True)
        assert {e["scorer_version"] for e in as_iter(ds)} == {0}


@pytest.mark.parametrize("path", PATHS)
def test_a_decided_scorer_that_is_lost_or_replaced_stops_the_replay(tmp_path, path):
    publish(tmp_path)
    elements = make_elements(40)
    kept = indices(as_iter(filtered(elements, tmp_path, path)))
    folder = tmp_path / "registry"
    files = [folder / f"00000001.{s}" for s in ("safetensors", "json")]
    originals = [file.read_bytes() for file in files]
    files[0].unlink()
    with pytest.raises(ScorerRejected, match="cannot be replayed") as error:
        list(as_iter(filtered(elements, tmp_path, path)))
    assert error.value.reason == "missing"
    for file in files:
        file.unlink(missing_ok=True)
    publish(tmp_path, seed=2)
    assert (folder / "00000001.json").exists()
    with pytest.raises(ScorerRejected, match="another hash") as error:
        list(as_iter(filtered(elements, tmp_path, path)))
    assert error.value.reason == "changed"
    for file, content in zip(files, originals):
        file.write_bytes(content)
    assert indices(as_iter(filtered(elements, tmp_path, path))) == kept


def test_a_lost_ledger_is_rebuilt_from_the_checkpoint(tmp_path):
    publish(tmp_path, 1)
    elements = make_elements(60)
    iterator = iter(filtered(elements, tmp_path, "iter"))
    for _ in range(7):
        next(iterator)
    state = iterator.get_state()
    assert (state["version"], state["block"], state["next_in_block"]) == (1, 2, 1)
    rest = [next(iterator)["index"] for _ in range(5)]
    for file in (tmp_path / "ledger" / "default").iterdir():
        file.unlink()
    publish(tmp_path, 2)
    resumed = iter(filtered(elements, tmp_path, "iter"))
    resumed.set_state(state)
    assert [next(resumed)["index"] for _ in range(5)] == rest
    assert mgf.Ledger(tmp_path).read(1).version == 1  # pyright: ignore[reportOptionalMemberAccess]
    state["version"] = 2
    resumed.set_state(state)
    with pytest.raises(StateMismatch, match="version 2"):
        next(resumed)


@pytest.mark.parametrize("path", PATHS)
def test_a_ledger_that_cannot_be_written_does_not_stop_the_stream(tmp_path, path, monkeypatch):
    publish(tmp_path)
    elements = make_elements(60)
    ds = filtered(elements, tmp_path, path, annotate=True)
    iterator = iter(as_iter(ds))
    versions = [next(iterator)["scorer_version"] for _ in range(3)]
    publish(tmp_path, 2)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("metagrad_filter.store.LocalStore.write_once", full)
    with pytest.warns(RuntimeWarning, match="cannot be recorded") as caught:
        versions += [e["scorer_version"] for e in iterator]
    assert len(caught) == 1 and versions == [1] * 18


def test_strength_and_exploration_come_into_effect(tmp_path):
    elements = make_elements(400)
    options = {"keep_ratio": 0.25, "block_windows": 100}
    publish(tmp_path, 1)
    hard = indices(filtered(elements, tmp_path, name="hard", **options))
    explored = indices(filtered(elements, tmp_path, name="explore", explore=0.2, **options))
    assert len(explored) == 100 and 80 <= len(set(hard) & set(explored)) < 100
    publish(tmp_path, 1, strength=1.0)
    soft = indices(filtered(elements, tmp_path, name="soft", **options))
    publish(tmp_path, 1, strength=0.0)
    uniform = indices(filtered(elements, tmp_path, name="uniform", **options))
    assert len(set(hard) & set(soft)) > len(set(hard) & set(uniform))


def test_padding_comes_from_the_windows_or_the_scorer(tmp_path):
    elements = make_elements(40)
    for element in elements:
        element["tokens"][12:] = -1
    publish(tmp_path)
    with pytest.raises(WindowError, match="pad_id"):
        filtered(elements, tmp_path, name="none")[0]
    windows = mgf.TextWindows("tokens", pad_id=-1)
    by_windows = indices(filtered(elements, tmp_path, name="windows", windows=windows))
    publish(tmp_path, 1, pad_id=-1)
    assert indices(filtered(elements, tmp_path, name="scorer")) == by_windows


def test_non_finite_scores_rank_last_and_are_counted(tmp_path):
    elements = make_elements(20)

    class Odd:
        kind, strength = "text", float("inf")

        def score(self, windows):
            scores = np.arange(len(windows), dtype=np.float32)
            scores[-3:] = np.nan
            return scores

    ds = filtered(elements, tmp_path, name="odd")
    replace_scorer(ds, Odd())
    assert indices(as_iter(ds)) == [4, 5, 6, 14, 15, 16]
    assert counters("odd").non_finite_scores == 6


class Broken:
    """A scorer that works for one block and then no more."""

    kind, strength, calls = "text", float("inf"), 0

    def score(self, windows):
        self.calls += 1
        if self.calls > 1:
            raise MemoryError("no table")
        return np.arange(len(windows), dtype=np.float32)


def test_a_scorer_that_fails_leaves_a_uniform_choice_one_warning_and_a_count(tmp_path):
    elements = make_elements(60)
    uniform = indices(as_iter(filtered(elements, tmp_path / "uniform", swap_every_blocks=6)))
    ds = filtered(elements, tmp_path, swap_every_blocks=6)
    replace_scorer(ds, Broken())
    before = counters()
    with pytest.warns(RuntimeWarning, match=r"failed \(MemoryError: no table\)") as caught:
        kept = indices(as_iter(ds))
    assert len(caught) == 1
    assert kept == [7, 8, 9, *uniform[3:]]
    after = counters()
    assert after.scorer_failures - before.scorer_failures == 5
    assert after.uniform_windows - before.uniform_windows == 50 + 0 * before.blocks


@pytest.mark.parametrize("path", PATHS)
def test_a_version_that_is_lost_while_training_runs_leaves_a_uniform_choice(tmp_path, path):
    publish(tmp_path)
    elements = make_elements(60)
    ranked = indices(as_iter(filtered(elements, tmp_path, path)))
    uniform = indices(as_iter(filtered(elements, tmp_path / "uniform", path)))
    # Another version decided the later intervals, and is gone when this process arrives there.
    entry = tmp_path / "ledger" / "default" / "00000001.json"
    original = entry.read_bytes()
    publish(tmp_path, 2)
    manifest = json.loads((tmp_path / "registry" / "00000002.json").read_bytes())
    changed = json.loads(original) | {"version": 2, "manifest_sha256": manifest["manifest_sha256"]}
    entry.write_bytes(json.dumps(changed, sort_keys=True, separators=(",", ":")).encode())
    (tmp_path / "registry" / "00000002.safetensors").unlink()
    before = counters().versions_lost
    with pytest.warns(RuntimeWarning, match="Training goes on: interval 1") as caught:
        kept = indices(as_iter(filtered(elements, tmp_path, path)))
    assert len(caught) == 1
    assert kept == [*ranked[:6], *uniform[6:12], *ranked[12:]]
    assert counters().versions_lost == before + 1


def test_a_checkpoint_written_without_the_lost_version_resumes(tmp_path):
    publish(tmp_path)
    elements = make_elements(60)
    list(as_iter(filtered(elements, tmp_path, "iter")))
    lost = tmp_path / "registry" / "00000001.safetensors"
    content = lost.read_bytes()
    iterator = iter(filtered(elements, tmp_path, "iter", name="other"))
    for _ in range(7):
        next(iterator)
    state = iterator.get_state() | {"version": 0}
    iterator = iter(filtered(elements, tmp_path, "iter", name="other"))
    iterator.set_state(state)
    uniform = indices(as_iter(filtered(elements, tmp_path / "uniform", "iter", name="other")))
    assert indices(iterator)[:2] == uniform[7:9]
    lost.unlink()
    iterator = iter(filtered(elements, tmp_path, "iter", name="other"))
    iterator.set_state(state | {"version": 1})
    with pytest.raises(ScorerRejected, match="cannot be replayed"):
        next(iterator)
    lost.write_bytes(content)


# Groups.


def with_source(n, sources):
    return [e | {"source": np.array(s)} for e, s in zip(make_elements(n), sources)]


@pytest.mark.parametrize("path", PATHS)
def test_caps_hold_in_every_block_and_the_quota_stays_exact(tmp_path, path):
    publish(tmp_path)
    sources = ["ab"[i % 5 == 0] for i in range(40)]
    elements = with_source(40, sources)
    free = indices(as_iter(filtered(elements, tmp_path, path, keep_ratio=0.5, name="free")))
    caps = mgf.Cap("source", share=0.6)
    capped = indices(as_iter(filtered(elements, tmp_path, path, keep_ratio=0.5, caps=caps)))
    assert len(capped) == len(free) == 20 and capped != free
    for block in range(4):
        mine = [sources[i] for i in capped if i // 10 == block]
        assert len(mine) == 5
        # Three of five from "a" is the limit, and only two windows of "b" exist.
        assert mine.count("b") == 2 and mine.count("a") == 3


def test_copies_are_kept_once_while_there_is_something_else(tmp_path):
    publish(tmp_path)
    elements = make_elements(30)
    scores = make_scorer(1).score(np.stack([e["tokens"] for e in elements]))
    best = int(np.argmax(scores[:10]))
    for i in range(10):
        if i % 2:
            elements[i] = {"tokens": elements[best]["tokens"], "index": i}
    kept = indices(as_iter(filtered(elements, tmp_path, caps=[mgf.Cap(count=1)])))
    copies = {i for i in kept if np.array_equal(elements[i]["tokens"], elements[best]["tokens"])}
    assert len(copies) == 1 and len(kept) == 9


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([np.arange(2)] * 10, "shape"),
        ([[1]] * 10, "list"),
        (None, "no entry 'source'"),
    ],
)
def test_groups_that_cannot_be_read_are_named(tmp_path, sources, message):
    elements = make_elements(10)
    if sources is not None:
        elements = [e | {"source": s} for e, s in zip(elements, sources)]
    with pytest.raises(WindowError, match=message):
        filtered(elements, tmp_path, caps=mgf.Cap("source", count=1))[0]


# Bad windows.


@pytest.mark.parametrize("path", PATHS)
def test_bad_windows_can_rank_last_instead_of_ending_the_run(tmp_path, path):
    publish(tmp_path)
    elements = make_elements(20)
    good = indices(as_iter(filtered(elements, tmp_path, path, name="good")))
    elements[good[0]]["tokens"] = np.array([VOCAB, 1], np.int32)  # an id out of range, and ragged
    elements[good[-1]] = {"index": good[-1]}  # no window at all
    before = counters("bad").bad_windows
    with pytest.warns(RuntimeWarning, match="ranks last") as caught:
        kept = indices(as_iter(filtered(elements, tmp_path, path, name="bad", bad_windows="last")))
    assert len(caught) == 1 and counters("bad").bad_windows == before + 2
    assert len(kept) == 6 and not {good[0], good[-1]} & set(kept)
    assert set(good[1:-1]) <= set(kept)


# Placement.


def test_a_filter_inside_an_interleave_is_refused(tmp_path):
    def of_file(number):
        return filtered(make_elements(20, seed=number), tmp_path, "iter")

    files = grain.MapDataset.range(3).map(of_file)
    ds = grain.experimental.InterleaveIterDataset(files, cycle_length=2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="put it after the interleave"):
        list(ds)
    sources = [source(make_elements(20, seed=i), "iter") for i in range(3)]
    ds = grain.experimental.InterleaveIterDataset(sources, cycle_length=2)
    ds = mgf.score_filter(ds, tmp_path, keep_ratio=0.5, windows=WINDOWS, name="after")
    assert len(list(ds)) == 30


def test_a_filter_below_a_repeat_is_refused(tmp_path):
    ds = filtered(make_elements(20), tmp_path, "iter")
    with pytest.raises(ConfigError, match="repeat before the filter"):
        iter(grain.experimental.RepeatIterDataset(ds, 2))
    with pytest.raises(ConfigError, match="repeat before the filter"):
        iter(grain.experimental.RepeatIterDataset(ds.batch(2), 2))
    ds = grain.experimental.RepeatIterDataset(source(make_elements(20), "iter"), 2)  # pyright: ignore[reportArgumentType]
    ds = mgf.score_filter(ds, tmp_path, keep_ratio=0.5, windows=WINDOWS, name="after")
    assert len(list(ds)) == 20


def test_a_state_of_another_number_of_workers_says_so(tmp_path):
    ds = filtered(make_elements(80), tmp_path, "iter")
    iterator = iter(grain.experimental.multithread_prefetch(ds, num_threads=1, buffer_size=1))
    next(iterator)
    state = iterator.get_state()
    iterator.close()
    iterator = iter(grain.experimental.multithread_prefetch(ds, num_threads=2, buffer_size=1))
    with pytest.raises(StateMismatch, match="num_workers=1 and is restored with 2"):
        iterator.set_state(state)
        next(iterator)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"seed": 1}, "seed=0"),
        ({"keep_ratio": 0.5}, "keep_ratio='3/10'"),
        ({"block_windows": 20}, "block_windows=10"),
        ({"rule": "threshold"}, "fields"),
    ],
)
def test_a_state_of_another_filter_names_the_field(tmp_path, options, field):
    state = iter(filtered(make_elements(40), tmp_path / "one", "iter")).get_state()
    iterator = iter(filtered(make_elements(40), tmp_path / "two", "iter", **options))
    with pytest.raises(StateMismatch, match=field):
        iterator.set_state(json.loads(json.dumps(state)))


# Processes.


class Published:
    """Publishes scorers every few milliseconds until the block ends."""

    def __init__(self, run_dir):
        self.run_dir, self.stop = run_dir, threading.Event()

    def __enter__(self):
        self.thread = threading.Thread(target=self.publish)
        self.thread.start()

    def publish(self):
        seed = 0
        while not self.stop.wait(0.02):
            seed += 1
            publish(self.run_dir, seed)

    def __exit__(self, *args):
        self.stop.set()
        self.thread.join()


def slowly(element):
    time.sleep(0.0002)
    return element


def worker_stream(run_dir, path, workers):
    ds = filtered(
        make_elements(1600),
        run_dir,
        path,
        annotate=True,
        keep_ratio=0.25,
        block_windows=20,
        swap_every_blocks=4,
    )
    # Batches of a MapDataset are cut before workers share the indices out.
    ds = ds.map(slowly).batch(5)
    return as_iter(ds).mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=2))


def drain(iterator):
    batches = list(iterator)
    return {
        k: np.concatenate([b[k] for b in batches]).tolist() for k in ("index", "scorer_version")
    }


@pytest.mark.parametrize("path", PATHS)
def test_a_publisher_racing_two_workers_never_changes_a_decided_stream(tmp_path, path):
    with Published(tmp_path):
        iterator = iter(worker_stream(tmp_path, path, 2))
        first = [next(iterator) for _ in range(20)]
        state = json.loads(json.dumps(iterator.get_state()))
        rest = drain(iterator)
        assert len(set(rest["scorer_version"])) > 2
        again = drain(worker_stream(tmp_path, path, 2))
        resumed = iter(worker_stream(tmp_path, path, 2))
        resumed.set_state(state)
        resumed = drain(resumed)
    assert resumed == rest
    assert again == {k: drain(first)[k] + rest[k] for k in rest}
    if path == "map":
        assert again["index"] == sorted(again["index"])
        assert drain(worker_stream(tmp_path, path, 0)) == again
        assert drain(worker_stream(tmp_path, path, 1)) == again


STREAM = """
import json, sys
import grain
from test_filter import as_iter, filtered, make_elements
iterator = iter(as_iter(filtered(make_elements(2000), sys.argv[1], sys.argv[2])).batch(3))
for batch in iterator:
    print(json.dumps([batch["index"].tolist(), iterator.get_state()]), flush=True)
"""


@pytest.mark.parametrize("path", PATHS)
def test_a_killed_process_resumes_with_the_same_stream(tmp_path, path):
    publish(tmp_path, 1)
    process = subprocess.Popen(
        [sys.executable, "-c", STREAM, str(tmp_path), path],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert process.stdout is not None
    seen = [json.loads(process.stdout.readline()) for _ in range(37)]
    os.kill(process.pid, signal.SIGKILL)
    process.stdout.close()
    process.wait()
    publish(tmp_path, 2)
    elements = make_elements(2000)
    resumed = iter(as_iter(filtered(elements, tmp_path, path)).batch(3))
    resumed.set_state(seen[-1][1])
    stream = list(itertools.chain(*(batch for batch, _ in seen)))
    stream += np.concatenate([b["index"] for b in resumed]).tolist()
    assert stream == indices(as_iter(filtered(elements, tmp_path, path)))
    assert len(stream) == len(set(stream)) == 600


def test_errors_cross_process_borders():
    for error in (WindowError("x"), ScorerRejected("x", reason="sha256"), StateMismatch("x")):
        copied = pickle.loads(pickle.dumps(error))
        assert type(copied) is type(error) and str(copied) == "x"


def test_counting_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert counters("never used") == FilterCounters()
