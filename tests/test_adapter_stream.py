"""Any iterable and any sequence: grain's choices, and a resume that loses and repeats nothing."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import subprocess
import sys
from typing import Any

import grain
import numpy as np
import pytest
from hotlane import VOCAB, make_elements, make_scorer
from hypothesis import given, settings
from hypothesis import strategies as st

import metagrad_filter as mgf
from metagrad_filter.adapters.options import configure  # pyright: ignore[reportMissingImports]
from metagrad_filter.adapters.sequence import FilteredSequence  # pyright: ignore[reportMissingImports]
from metagrad_filter.adapters.stream import FilteredStream  # pyright: ignore[reportMissingImports]
from metagrad_filter.errors import ConfigError, ScorerRejected, StateMismatch, WindowError
from metagrad_filter.selection import kept_before

OPTIONS: dict[str, Any] = {
    "keep_ratio": 0.3,
    "windows": mgf.TextWindows("tokens"),
    "block_windows": 10,
    "swap_every_blocks": 2,
}


def config(run_dir, **options):
    return configure(run_dir, **OPTIONS | options)


def publish(run_dir, seed=1, **fields) -> int:
    return mgf.Registry(run_dir).publish(make_scorer(seed, **fields))


def indices(elements) -> list[int]:
    return [int(element["index"]) for element in elements]


class Loader:
    """A re-iterable with the state of the iteration in itself, as loaders have it."""

    def __init__(self, elements):
        self.elements, self.state, self.reads = elements, {"position": 0}, 0

    def __iter__(self):
        while self.state["position"] < len(self.elements):
            self.state["position"] += 1
            self.reads += 1
            yield self.elements[self.state["position"] - 1]
        self.state["position"] = 0

    def state_dict(self):
        # The live object: whoever keeps a position has to copy it.
        return self.state

    def load_state_dict(self, state, /):
        self.state = dict(state)


class Cursor:
    """An iterator that carries its state; starting over resets it."""

    def __init__(self, elements):
        self.elements, self.position = elements, 0

    def __iter__(self):
        self.position = 0
        return self

    def __next__(self):
        if self.position == len(self.elements):
            raise StopIteration
        self.position += 1
        return self.elements[self.position - 1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state, /):
        self.position = state["position"]


SOURCES = {
    "list": list,
    "function": lambda elements: lambda: iter(elements),
    "generator": lambda elements: (element for element in elements),
    "loader": Loader,
    "cursor": Cursor,
    "function of a loader": lambda elements: lambda: Loader(elements),
}


# The same choices as grain's filter.


def digest(elements) -> str:
    sha = hashlib.sha256()
    for element in elements:
        sha.update(np.ascontiguousarray(element["tokens"]).tobytes())
        sha.update(int(element["index"]).to_bytes(8, "little"))
    return sha.hexdigest()


@settings(max_examples=25)
@given(
    n=st.integers(1, 90),
    ratio=st.sampled_from([0.02, 0.3, 0.5, 1]),
    block=st.integers(1, 40),
    explore=st.sampled_from([0, 0.5]),
    scored=st.booleans(),
    kind=st.sampled_from(sorted(SOURCES)),
)
def test_the_stream_is_that_of_grains_filter(
    tmp_path_factory, n, ratio, block, explore, scored, kind
):
    run_dir = tmp_path_factory.mktemp("run")
    if scored:
        publish(run_dir)
    elements = make_elements(n)
    options = OPTIONS | {"keep_ratio": ratio, "block_windows": block, "explore": explore}
    ds = grain.MapDataset.source(elements).to_iter_dataset(grain.ReadOptions(0, 0))
    expected = list(mgf.score_filter(ds, run_dir, **options))
    kept = list(FilteredStream(SOURCES[kind](elements), configure(run_dir, **options)))
    assert len(kept) == kept_before(n, configure(run_dir, **options).keep_ratio)
    assert digest(kept) == digest(expected)
    by_index = configure(run_dir, order="index", **options | {"name": "index"})
    sequence = FilteredSequence(elements, by_index)
    if explore == 0 and scored:
        assert digest(sequence) == digest(expected)
    assert len(sequence) == len(list(sequence)) == len(kept)


def test_a_sequence_answers_in_any_order_and_in_any_process(tmp_path):
    publish(tmp_path)
    elements = make_elements(95)
    sequence = FilteredSequence(elements, config(tmp_path, order="index"))
    kept = indices(sequence)
    order = np.random.default_rng(0).permutation(len(kept))
    assert [sequence[int(i)]["index"] for i in order] == [kept[i] for i in order]
    assert sequence[-1]["index"] == kept[-1]
    other = pickle.loads(pickle.dumps(sequence))
    assert [other[int(i)]["index"] for i in order] == [kept[i] for i in order]
    for index in (len(kept), -len(kept) - 1):
        with pytest.raises(IndexError, match="28 kept windows"):
            sequence[index]


def test_a_sequence_reads_in_order_once_and_counts_blocks_over_epochs(tmp_path):
    reads = []

    class Counting(list):
        def __getitem__(self, i):
            reads.append(i)
            return super().__getitem__(i)

    sequence = FilteredSequence(Counting(make_elements(45)), config(tmp_path, order="index"))
    first = [sequence.element(i, 0)["index"] for i in range(len(sequence))]
    assert sorted(reads) == list(range(45))
    publish(tmp_path)
    second = [sequence.element(i, 1)["index"] for i in range(len(sequence))]
    third = [sequence.element(i, 2)["index"] for i in range(len(sequence))]
    # Epoch 0 is blocks 0-4, intervals 0-2; epoch 1 starts in the interval that was decided last.
    assert sorted(mgf.Ledger(tmp_path).entries()) == list(range(8))
    assert first != second != third
    assert [sequence.element(i, 1)["index"] for i in range(len(sequence))] == second


# Checkpoints.


def json_round_trip(state):
    data = json.dumps(state)
    parent = len(json.dumps(state["parent"]))
    assert len(data) - parent < (9 * 1024 if "online" in state else 1024)
    return json.loads(data)


@pytest.mark.parametrize("rule", ["block", "threshold"])
@pytest.mark.parametrize("n", [73, 80])
@pytest.mark.parametrize("kind", sorted(SOURCES))
def test_resume_at_every_step_gives_the_same_stream(tmp_path, kind, n, rule):
    elements = make_elements(n)
    for interval in (1, 3):
        mgf.Ledger(tmp_path).decide(interval, 0)
    publish(tmp_path)

    def make():
        options = config(tmp_path, annotate=True, rule=rule)
        return FilteredStream(SOURCES[kind](elements), options)

    stream = make()
    states, expected = [json_round_trip(stream.state_dict())], []
    for element in stream:
        expected.append(element)
        states.append(json_round_trip(stream.state_dict()))
    assert {int(e["scorer_version"]) for e in expected} == {0, 1}
    states.append(json_round_trip(stream.state_dict()))
    shape = {key: type(value) for key, value in states[0].items()}
    for step, state in enumerate(states):
        step = min(step, len(expected))
        assert {key: type(value) for key, value in state.items()} == shape
        resumed = make()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        np.testing.assert_equal(list(resumed), expected[step:], err_msg=str(step))
        assert list(resumed) == []
        if kind != "generator":
            # Loaded again and backwards into a stream in use.
            resumed.load_state_dict(state)
            np.testing.assert_equal(next(resumed, None), dict(enumerate(expected)).get(step))


def test_a_stateful_source_is_not_read_again_from_its_start(tmp_path):
    elements = make_elements(80)
    stream = FilteredStream(Loader(elements), config(tmp_path))
    for _ in range(17):
        next(stream)
    source = Loader(elements)
    resumed = FilteredStream(source, config(tmp_path))
    resumed.load_state_dict(stream.state_dict())
    next(resumed)
    assert source.reads == 10
    assert indices(resumed) == indices(stream)[1:]


def test_a_resumed_stream_repeats_the_decisions_made_after_the_checkpoint(tmp_path):
    elements = make_elements(200)
    stream = FilteredStream(elements, config(tmp_path))
    for _ in range(5):
        next(stream)
    state = stream.state_dict()
    expected = [next(stream)["index"] for _ in range(20)]
    publish(tmp_path)
    resumed = FilteredStream(elements, config(tmp_path))
    resumed.load_state_dict(state)
    assert [next(resumed)["index"] for _ in range(20)] == expected


def test_a_counting_loader_goes_on_with_its_own_first_block(tmp_path):
    elements = make_elements(45)
    options = config(tmp_path, block_windows=7)
    first = FilteredStream(elements, options)
    kept = indices(first)
    assert first.ended and first.block == 7 and len(kept) == 13
    publish(tmp_path)
    second = FilteredStream(elements, options, first_block=first.block)
    start = [next(second)["index"] for _ in range(3)]
    # The quota belongs to the place in the pass, the version to the block.
    again = FilteredStream(elements, options)
    again.load_state_dict(second.state_dict())
    assert len(start + indices(second)) == 13 and second.block == 14
    assert len(start + indices(again)) == 13 and again.block == 14
    assert sorted(mgf.Ledger(tmp_path).entries()) == list(range(7))


def test_a_lost_ledger_is_rebuilt_from_the_checkpoint(tmp_path):
    publish(tmp_path)
    elements = make_elements(40)
    stream = FilteredStream(elements, config(tmp_path, annotate=True))
    next(stream)
    state = stream.state_dict()
    expected = list(itertools.islice(stream, 2))
    for path in (tmp_path / "ledger" / "default").iterdir():
        path.unlink()
    publish(tmp_path, 2)
    resumed = FilteredStream(elements, config(tmp_path, annotate=True))
    resumed.load_state_dict(state)
    np.testing.assert_equal(list(itertools.islice(resumed, 2)), expected)
    assert mgf.Ledger(tmp_path).entries()[0].version == 1


def test_elements_are_handed_out_once_so_later_stages_may_change_them(tmp_path):
    class Fresh:
        def __len__(self):
            return 40

        def __getitem__(self, i):
            return dict(make_elements(40)[i])

    sequence = FilteredSequence(Fresh(), config(tmp_path, order="index"))
    first = sequence[4]
    index = first.pop("index")
    assert sequence[4]["index"] == index


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("block"), "fields"),
        (lambda state: state.update(extra=1), "fields"),
        (lambda state: state.update(format=7), "format 7"),
        (lambda state: state.update(filter="{"), "damaged"),
        (
            lambda state: state.update(filter=state["filter"].replace("3/10", "2/5")),
            "keep_ratio='2/5'",
        ),
        (
            lambda state: state.update(filter=state["filter"].replace('"default"', '"other"')),
            "name='other'",
        ),
        (lambda state: state.update(parent={"shard": 1}), "windows_seen"),
        (lambda state: state.update(parent={"windows_seen": 99}), "ended after 40"),
    ],
)
def test_a_foreign_state_is_refused(tmp_path, change, message):
    stream = FilteredStream(make_elements(40), config(tmp_path))
    state = stream.state_dict()
    change(state)
    with pytest.raises(StateMismatch, match=message):
        stream.load_state_dict(state)
        next(stream)
    with pytest.raises(StateMismatch, match="list"):
        stream.load_state_dict([])  # pyright: ignore[reportArgumentType]


# Bad input.


@pytest.mark.parametrize("rule", ["block", "threshold", "index"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"tokens": np.array([1, VOCAB] * 8, np.int32)}, "id 100"),
        ({"tokens": np.zeros(0, np.int32)}, "empty"),
        ({"tokens": np.zeros(16)}, "integer"),
        ({"text": "x"}, "available"),
        ([1, 2], "expected a dict"),
    ],
)
def test_unreadable_windows_end_typed(tmp_path, bad, message, rule):
    publish(tmp_path)
    elements = make_elements(12)
    elements[3] = bad
    if rule == "index":
        kept: Any = FilteredSequence(elements, config(tmp_path, order="index"))
    else:
        kept = FilteredStream(elements, config(tmp_path, rule=rule))
    with pytest.raises(WindowError, match=message):
        list(kept)


def test_a_ragged_block_ends_typed_or_ranks_last(tmp_path):
    publish(tmp_path)
    elements = make_elements(12)
    elements[3] = {"tokens": np.zeros(15, np.int32), "index": 3}
    with pytest.raises(WindowError, match="equal lengths"):
        list(FilteredStream(elements, config(tmp_path)))
    elements[3] = {"tokens": np.zeros(0, np.int32), "index": 3}
    with pytest.warns(RuntimeWarning, match="ranks last"):
        kept = indices(FilteredStream(elements, config(tmp_path, name="last", bad_windows="last")))
    assert len(kept) == 3 and 3 not in kept


def test_a_choice_that_failed_can_be_asked_for_again(tmp_path):
    publish(tmp_path)
    elements = make_elements(30)
    good, elements[13] = elements[13], {"tokens": None, "index": 13}
    stream = FilteredStream(iter(elements), config(tmp_path))
    first = [next(stream)["index"] for _ in range(3)]
    for _ in range(2):
        with pytest.raises(WindowError, match="Window 3"):
            next(stream)
    elements[13]["tokens"] = good["tokens"]
    elements[13] = good
    assert first + indices(stream) == indices(FilteredStream(elements, config(tmp_path)))


@pytest.mark.parametrize("rule", ["block", "threshold"])
def test_an_empty_source_says_what_to_check_unless_a_worker_may_have_none(tmp_path, rule):
    options = config(tmp_path, rule=rule)
    with pytest.raises(WindowError, match="before its first element"):
        next(FilteredStream([], options))
    assert list(FilteredStream([], options, may_be_empty=True)) == []
    with pytest.raises(WindowError, match="length 0"):
        FilteredSequence([], config(tmp_path, order="index", name="index"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0}, "keep_ratio"),
        ({"block_windows": 0}, "block_windows"),
        ({"windows": "tokens"}, "windows"),
        ({"order": "index", "rule": "threshold"}, "order of arrival"),
        ({"rule": "best"}, "rule"),
    ],
)
def test_options_out_of_their_domain_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **options)


def test_the_name_belongs_to_one_configuration(tmp_path):
    FilteredStream([], config(tmp_path))
    with pytest.raises(StateMismatch, match="order='iterator'"):
        FilteredSequence([1], config(tmp_path, order="index"))
    with pytest.raises(StateMismatch, match="keep_ratio"):
        FilteredStream([], config(tmp_path, keep_ratio=0.5))


def test_a_lost_scorer_stops_the_replay(tmp_path):
    publish(tmp_path)
    elements = make_elements(30)
    stream = FilteredStream(elements, config(tmp_path))
    next(stream)
    state = stream.state_dict()
    for path in (tmp_path / "registry").rglob("*"):
        if path.is_file():
            path.unlink()
    resumed = FilteredStream(elements, config(tmp_path))
    resumed.load_state_dict(state)
    with pytest.raises(ScorerRejected, match="version 1"):
        next(resumed)


# Imports.


def test_adapters_load_when_used_and_say_what_is_missing():
    program = """
import sys
import metagrad_filter as mgf

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "datasets", "streaming", "webdataset", "tensorflow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
mgf.adapters.options, mgf.adapters.stream, mgf.adapters.sequence
for name in ("torch", "huggingface", "streaming", "webdataset", "tfdata"):
    try:
        getattr(mgf.adapters, name)
    except mgf.ConfigError as error:
        assert "pip install 'metagrad-filter[adapters]'" in str(error), error
    else:
        raise AssertionError(name)
    assert name in dir(mgf.adapters)
assert not {"jax", "grain", "orbax", "tensorstore"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mgf.adapters.nothing  # noqa: B018
